"""Cosines of embeddings at any trained length, and when one candidate counts as at least as near as another.

Shape letters: N vectors, E embedding length.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from indiclip.names import check_whole

Floats = Tensor | np.ndarray
Integers = Tensor | np.ndarray

ROUNDING = 1e-6  # of a cosine in float32: about eight units in the last place
_CHUNK = 400_000  # cosines at a time: 1.6 MB, which stay in the cache between the passes over it


def truncate_normalize(vector_NE: Floats, length: int | None = None) -> Tensor:
    """The first `length` numbers of each vector, of unit length again: what a Matryoshka embedding is cut to.

    A vector of zeros stays one, so that its cosine with everything is 0.

    Args:
        vector_NE: Of any norm.
        length: 1 to E; None is E.

    Returns:
        float32 (N, length) on the CPU.

    Raises:
        ValueError: Another length than these.
    """
    vectors = torch.as_tensor(vector_NE, dtype=torch.float32)
    if length is not None:
        check_whole({"length": length}, 1, vectors.shape[-1])
    return F.normalize(vectors[..., :length], dim=-1)


def as_near(cosine: Tensor, right: Tensor) -> Tensor:
    """Whether a candidate is at least as near as the right one.

    Ties (to rounding) and NaN count as at least as near, so that a model which gives the same vector for everything
    finds nothing.
    """
    return ~(cosine < right - ROUNDING)


def num_near(cosine_BD: Tensor, right: Tensor, dim: int) -> Tensor:
    """How many candidates along `dim` are `as_near`, int64.

    Numbers are compared to numbers and summed, which takes a quarter of the time that booleans do.
    """
    is_farther_BD = torch.lt(cosine_BD, right - ROUNDING, out=torch.empty_like(cosine_BD))
    return cosine_BD.shape[dim] - is_farther_BD.sum(dim).long()


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """Parts of `rows`, so that the cosines of each with all `columns` are few enough to keep in memory."""
    step = max(1, _CHUNK // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def labels_of(label_N: Integers) -> Tensor:
    """Classes as int64."""
    return torch.as_tensor(label_N, dtype=torch.int64)


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
