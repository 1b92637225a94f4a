"""Retrieval: the captions nearest to an image, the images nearest to a caption or to a class name.

Shape letters: N images, T texts, D classes with a text, M images of those classes, E embedding length.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from indiclip.evals.protocols.cosines import Floats, Integers, as_near, chunks, labels_of, truncate_normalize
from indiclip.evals.protocols.zero_shot import candidates_of


class CaptionRanks(NamedTuple):
    """How many wrong candidates are at least as near as the right one; a hit@k is a rank below k.

    Attributes:
        rank_N: int64, for each image, of the nearest of its own captions among those of other images.
        rank_T: int64, for each caption, of its image among the other images.
    """

    rank_N: np.ndarray
    rank_T: np.ndarray


class ClassRanks(NamedTuple):
    """How many images of other classes are at least as near to a class's text as the nearest of its own.

    Attributes:
        class_M: int64, the classes with images, in the order of their texts.
        rank_M: int64.
    """

    class_M: np.ndarray
    rank_M: np.ndarray


def caption_ranks(image_NE: Floats, text_TE: Floats, image_T: Integers, length: int | None = None) -> CaptionRanks:
    """Ranks the texts for every image and the images for every text.

    The candidates are those of clip-benchmark 1.6.2 (`zeroshot_retrieval`, its recall@k being the share of ranks below
    k): every caption is one, equal captions too, and an image has found its text when any of its captions is within
    the k nearest. Unlike there, ties (to rounding, 1e-6) and NaN count against the right one: a caption that two
    images share is found for neither at k=1.

    Args:
        image_NE: Images, of any norm.
        text_TE: Captions, of any norm.
        image_T: The image of each caption, 0 to N - 1.
        length: Cut all to this length; None is the whole.

    Raises:
        ValueError: An image without a caption.
    """
    images, texts = truncate_normalize(image_NE, length), truncate_normalize(text_TE, length)
    owner_T = labels_of(image_T)
    missing = np.setdiff1d(np.arange(len(images)), owner_T.numpy())
    if len(missing):
        raise ValueError(f"{len(missing)} of {len(images)} images have no caption, first number {missing[0]}")
    rank_N, rank_T = pair_ranks(images, texts, owner_T, torch.arange(len(texts)))
    return CaptionRanks(rank_N.numpy(), rank_T.numpy())


def chance_recall(right_Q: np.ndarray, num_candidates: int, k: int) -> float:
    """Recall@k of candidates in random order: the share of queries of which any right one is among the first k.

    Args:
        right_Q: int, how many candidates are right for each query.
        num_candidates: Of every query.
        k: At least 1.
    """
    missed_Q = np.ones(len(right_Q))
    for drawn in range(min(k, num_candidates)):
        missed_Q *= np.maximum(num_candidates - right_Q - drawn, 0) / (num_candidates - drawn)
    return float(1 - missed_Q.mean())


def pair_ranks(image_NE: Tensor, text_TE: Tensor, image_S: Tensor, text_S: Tensor) -> tuple[Tensor, Tensor]:
    """How many wrong ones are at least as near as the nearest right one: texts for an image, and images for a text.

    Ties (to rounding) and NaN count against the right one, so that a model which gives the same vector for everything
    finds nothing.

    Args:
        image_NE: Images, of unit length.
        text_TE: Texts, of unit length.
        image_S: The image of each pair that belongs together.
        text_S: Its text.

    Returns:
        int64 `(rank_N, rank_T)`: 0 where a right one is the nearest; all candidates where nothing is right.
    """
    right_S = (image_NE[image_S] * text_TE[text_S]).sum(1)
    sides = ((len(image_NE), image_S), (len(text_TE), text_S))
    best_N, best_T = (right_S.new_full((n,), -torch.inf).scatter_reduce_(0, i_S, right_S, "amax") for n, i_S in sides)
    rank_N, rank_T = (image_S.new_zeros(n) for n, _ in sides)
    for part in chunks(len(image_NE), len(text_TE)):
        cosine_BT = image_NE[part] @ text_TE.T
        here = ((image_S >= part.start) & (image_S < part.stop)).nonzero()[:, 0]
        pairs = (image_S[here] - part.start, text_S[here])
        for rank, dim, right in ((rank_N[part], 1, best_N[part, None]), (rank_T, 0, best_T)):
            near_BT = as_near(cosine_BT, right)
            near_BT[pairs] = False
            rank += near_BT.sum(dim)
    return rank_N, rank_T


def class_ranks(
    image_NE: Floats,
    class_DE: Floats,
    label_N: Integers,
    classes: Integers | None = None,
) -> ClassRanks:
    """Ranks the images for the text of every class; a class without images is left out.

    Ties (to rounding, 1e-6) and NaN count against the right images.

    Args:
        image_NE: Images, of any norm; they are cut to the length of the classes.
        class_DE: From `class_embeddings`.
        label_N: Class of each image, -1 for none.
        classes: (D,) the class of each text; images of other classes are no candidates. None: row c is class c.
    """
    found = candidates_of(image_NE, class_DE, label_N, classes)
    _, rank_D = pair_ranks(found.images, found.texts, torch.arange(len(found.images)), found.column_M)
    present = torch.unique(found.column_M)
    return ClassRanks(found.class_D[present].numpy(), rank_D[present].numpy())
