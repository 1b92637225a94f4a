"""Cosines of embeddings at any trained length, and when one candidate counts as at least as near as another.

Shape letters: N vectors, E embedding length.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Floats = Tensor | np.ndarray
Integers = Tensor | np.ndarray

ROUNDING = 1e-6  # of a cosine in float32: about eight units in the last place
_CHUNK = 2_500_000  # cosines at a time: 10 MB, which stays in the cache between the passes over it


def truncate_normalize(vector_NE: Floats, length: int | None = None) -> Tensor:
    """The first `length` numbers of each vector, of unit length again: what a Matryoshka embedding is cut to.

    A vector of zeros stays one, so that its cosine with everything is 0.

    Args:
        vector_NE: Of any norm.
        length: 1 to E; None is E.

    Returns:
        float32 (N, length) on the CPU.

    Raises:
        ValueError: The vectors are shorter.
    """
    vectors = torch.as_tensor(vector_NE, dtype=torch.float32)
    if length is not None and not 1 <= length <= vectors.shape[-1]:
        raise ValueError(f"length={length}: the embeddings allow 1 to {vectors.shape[-1]}")
    return F.normalize(vectors[..., :length], dim=-1)


def as_near(cosine: Tensor, right: Tensor) -> Tensor:
    """Whether a candidate is at least as near as the right one.

    Ties (to rounding) and NaN count as at least as near, so that a model which gives the same vector for everything
    finds nothing.
    """
    return ~(cosine < right - ROUNDING)


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """Parts of `rows`, so that the cosines of each with all `columns` are few enough to keep in memory."""
    step = max(1, _CHUNK // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def labels_of(label_N: Integers) -> Tensor:
    """Classes as int64."""
    return torch.as_tensor(label_N, dtype=torch.int64)
