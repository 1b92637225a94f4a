"""Embeddings as they are stored.

Shape letters: N rows, E embedding length.
"""

from typing import Literal

import numpy as np

DType = Literal["fp32", "fp16", "int8"]
_LARGEST = 127  # of int8; -128 has no opposite


def stored(vectors_NE: np.ndarray, dtype: DType) -> tuple[np.ndarray, np.ndarray]:
    """Unit-length vectors as they are stored, and what that loses.

    int8 scales each row so that its largest number is 127 or -127. Whatever the type, `row / norm(row)` in float32 is
    the unit-length vector again, so that no scale has to be kept.

    Returns:
        `(stored_NE, loss_N)`, the latter float32, 1 - cosine of each row to what is made of it again.
    """
    if dtype == "int8":
        largest_N1 = np.abs(vectors_NE).max(1, keepdims=True, initial=0)
        found = np.rint(vectors_NE * (_LARGEST / np.maximum(largest_N1, 1e-30))).astype(np.int8)
    else:
        found = vectors_NE.astype({"fp16": np.float16, "fp32": np.float32}[dtype])
    if dtype == "fp32":
        return found, np.zeros(len(found), np.float32)
    again_NE = found.astype(np.float32)
    again_NE /= np.maximum(np.linalg.norm(again_NE, axis=1, keepdims=True), 1e-30)
    again_NE -= vectors_NE
    # Of unit vectors 1 - cosine is half of the squared distance, which float32 has exactly enough where it is small.
    return found, np.einsum("ne,ne->n", again_NE, again_NE) / 2
