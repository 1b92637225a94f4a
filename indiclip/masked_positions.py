"""Which patches and tokens are hidden in masked modelling: chosen on the host, a function of each sample's seed alone.

Shape letters: see `indiclip.types`.
"""

from collections.abc import Collection, Sequence

import numpy as np

from indiclip.block_masks import block_mask
from indiclip.types import Images


def hidden_patches(images: Images, patch_size: int, ratio: float, seeds: Sequence[int]) -> np.ndarray:
    """Which patches of each image are hidden, bool (B, N): a share of them, in blocks as BEiT's (arXiv:2106.08254).

    A block has 16 patches at least on a grid of 14 x 14, and as iBOT's (arXiv:2111.07832) fewer on smaller ones. Of an
    image some of whose patches were dropped they are any, as the host does not know where the others lie.

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
            least = max(min(rows, columns) // 3, 1) ** 2
            hidden_N[:count] = block_mask(rng, (rows, columns), number, least).ravel()
        else:
            hidden_N[rng.permutation(count)[:number]] = True
    return hidden_BN


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
