"""Which patches and tokens are hidden in masked modelling: chosen on the host, a function of each sample's seed alone.

Shape letters: see `indiclip.types`.
"""

import math
from collections.abc import Collection, Sequence

import numpy as np

from indiclip.types import Images

# BEiT (arXiv:2106.08254, section 2.3 and its code): blocks of at least 16 of 196 patches, of these aspects.
_LEAST_SHARE = 16 / 196
_ASPECTS = (0.3, 1 / 0.3)


def hidden_patches(images: Images, patch_size: int, ratio: float, seeds: Sequence[int]) -> np.ndarray:
    """Which patches of each image are hidden, bool (B, N): a share of them, in blocks.

    Of an image some of whose patches were dropped they are any, as the host does not know where the others lie.

    Args:
        images: Of any size.
        patch_size: In pixels.
        ratio: The share; of an image at least one patch stays.
        seeds: Of each image.
    """
    hidden_BN = np.zeros(images["patches_BNP"].shape[:2], bool)
    for hidden_N, count, size_hw, seed in zip(hidden_BN, images["num_patches"], images["sizes_hw"], seeds, strict=True):
        rows, columns = (side // patch_size for side in size_hw)
        number = min(max(round(ratio * count), 1), count - 1)
        rng = np.random.default_rng([seed, 1])
        if rows * columns == count:
            hidden_N[:count] = blocks(rows, columns, number, rng).ravel()
        else:
            hidden_N[rng.permutation(count)[:number]] = True
    return hidden_BN


def blocks(rows: int, columns: int, number: int, rng: np.random.Generator) -> np.ndarray:
    """A mask (rows, columns) of exactly so many cells, the union of random rectangles (BEiT, algorithm 1).

    Where the last rectangle would hide too many, some of its cells stay.
    """
    hidden = np.zeros((rows, columns), bool)
    least = max(1.0, _LEAST_SHARE * rows * columns)
    while (missing := number - int(hidden.sum())) > 0:
        area = rng.uniform(min(least, missing), missing)
        aspect = math.exp(rng.uniform(*np.log(_ASPECTS)))
        height = min(max(round(math.sqrt(area * aspect)), 1), rows)
        width = min(max(round(math.sqrt(area / aspect)), 1), columns)
        top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
        block = np.zeros_like(hidden)
        block[top : top + height, left : left + width] = True
        new = np.flatnonzero(block & ~hidden)
        hidden.flat[rng.permutation(new)[:missing] if len(new) > missing else new] = True
    return hidden


def hidden_tokens(
    rows: Sequence[Sequence[int]], ratio: float, seeds: Sequence[int], never: Collection[int]
) -> list[np.ndarray]:
    """The places of the hidden tokens of each text, ascending: a share of them, but at least one.

    Args:
        rows: Token ids of each text.
        ratio: The share.
        seeds: Of each text.
        never: Ids that stay, such as those of the start and the end.
    """
    found = []
    for row, seed in zip(rows, seeds, strict=True):
        places = np.array([place for place, token in enumerate(row) if token not in never], np.int64)
        number = max(round(ratio * len(places)), 1)
        found.append(np.sort(np.random.default_rng([seed, 2]).permutation(places)[:number]))
    return found
