"""Retrieval: the captions nearest to an image, the images nearest to a caption or to a class name.

Shape letters: N images, T texts, D classes with a text, M images of those classes, E embedding length.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from indiclip.evals.protocols.cosines import Floats, Integers, as_near, chunks, labels_of, truncate_normalize
from indiclip.evals.protocols.zero_shot import at_one_length, candidates_of


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
    return CaptionRanks(*(rank.numpy() for rank in _ranks(images, texts, owner_T)))


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


def _ranks(images: Tensor, texts: Tensor, owner_T: Tensor) -> tuple[Tensor, Tensor]:
    right_T = (images[owner_T] * texts).sum(1)
    best_N = torch.full((len(images),), -torch.inf).scatter_reduce_(0, owner_T, right_T, "amax")
    rank_N, rank_T = torch.zeros(len(images), dtype=torch.int64), torch.zeros(len(texts), dtype=torch.int64)
    for part in chunks(len(images), len(texts)):
        cosine_BT = images[part] @ texts.T
        # An image's own captions, and a caption's own image, are no wrong candidates.
        own = ((owner_T >= part.start) & (owner_T < part.stop)).nonzero()[:, 0]
        own_at = (owner_T[own] - part.start, own)
        for rank, dim, right in ((rank_N[part], 1, best_N[part, None]), (rank_T, 0, right_T)):
            near_BT = as_near(cosine_BT, right)
            near_BT[own_at] = False
            rank += near_BT.sum(dim)
    return rank_N, rank_T


def class_ranks(
    image_NE: Floats,
    class_DE: Floats,
    label_N: Integers,
    classes: Integers | None = None,
    length: int | None = None,
) -> ClassRanks:
    """Ranks the images for the text of every class; a class without images is left out.

    Ties (to rounding, 1e-6) and NaN count against the right images.

    Args:
        image_NE: Images, of any norm.
        class_DE: From `class_embeddings`, at `length`.
        label_N: Class of each image, -1 for none.
        classes: (D,) the class of each text; images of other classes are no candidates. None: row c is class c.
        length: Cut the images to this length; None is that of the classes.
    """
    image_M, column_M, class_D = candidates_of(label_N, classes, len(class_DE))
    images, texts = at_one_length(image_NE, class_DE, length, image_M)
    parts = [(part, column_M[None, part]) for part in chunks(len(images), len(texts))]
    best_D = torch.full((len(texts),), -torch.inf)
    for part, column_1B in parts:
        right_B = (texts @ images[part].T).gather(0, column_1B)[0]
        best_D.scatter_reduce_(0, column_1B[0], right_B, "amax")
    rank_D = torch.zeros(len(texts), dtype=torch.int64)
    for part, column_1B in parts:
        near_DB = as_near(texts @ images[part].T, best_D[:, None]).scatter_(0, column_1B, False)
        rank_D += near_DB.sum(1)
    present = torch.unique(column_M)
    return ClassRanks(class_D[present].numpy(), rank_D[present].numpy())
