"""Which tokens of an image are hidden from a model that is to predict them; any grid, a function of a seed.

Shape letters: H W rows and columns of tokens, R tokens that a loss is of; B N as in `indiclip.types`.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

MaskKind = Literal["block", "large_block", "random"]
Grid = tuple[int, int]

_MIN_BLOCK = 4  # tokens of a rectangle: DINOv2's (arXiv:2304.07193), whatever the grid
_MIN_ASPECT = 0.3  # of a rectangle, as BEiT's (arXiv:2106.08254)
_ATTEMPTS = 100


def masks_of(
    seeds: Sequence[int], grids: Sequence[Grid], share: float, ratio: tuple[float, float], kind: MaskKind
) -> list[np.ndarray]:
    """The masks of some images' crops.

    Args:
        seeds: Of each image; equal ones give equal masks, whatever other images there are.
        grids: H and W of the crops, as many of each image, image by image.
        share: Of an image's crops that get a mask; by chance one more or less, where that is no whole number.
        ratio: Least and largest share of a crop's tokens that are hidden. At least one is, and one is not.
        kind: `block`, see `block_mask`; `large_block`, with rectangles of 16 tokens at least on a grid of 14 x 14 as
            BEiT's, and as iBOT's (arXiv:2111.07832) fewer on smaller ones; `random`, or in a single row: each token
            for itself.

    Returns:
        bool (H, W) of each crop.
    """
    masks: list[np.ndarray] = []
    per_image = len(grids) // len(seeds)
    for image, seed in enumerate(seeds):
        rng = np.random.default_rng(zlib.crc32(f"masks:{seed}".encode()))
        chosen = rng.permutation(per_image)[: int(per_image * share + rng.random())]
        for crop in range(per_image):
            grid_hw = grids[image * per_image + crop]
            most = math.prod(grid_hw) - 1
            number = min(max(round(rng.uniform(*ratio) * (most + 1)), 1), most) if crop in chosen else 0
            if kind == "random" or grid_hw[0] == 1:
                masks.append(random_mask(rng, grid_hw, number))
            else:
                least = _MIN_BLOCK if kind == "block" else max(min(grid_hw) // 3, 1) ** 2
                masks.append(block_mask(rng, grid_hw, number, least))
    return masks


def block_mask(rng: np.random.Generator, grid_hw: Grid, number: int, least: int = _MIN_BLOCK) -> np.ndarray:
    """Rectangles at random places, until no other fits; what they leave of the number is single tokens.

    Args:
        rng: What is drawn with.
        grid_hw: H and W.
        number: Of hidden tokens.
        least: Tokens of a rectangle.

    Returns:
        bool (H, W).
    """
    mask_HW = np.zeros(grid_hw, bool)
    for _ in range(_ATTEMPTS):
        left = number - int(mask_HW.sum())
        if left < least:
            break
        area, log_aspect = rng.uniform(least, left), rng.uniform(-1, 1) * math.log(_MIN_ASPECT)
        sides = (math.sqrt(area) * math.exp(sign * log_aspect / 2) for sign in (1, -1))
        height, width = (min(max(round(side), 1), most) for side, most in zip(sides, grid_hw, strict=True))
        top, first = rng.integers(grid_hw[0] - height + 1), rng.integers(grid_hw[1] - width + 1)
        block = mask_HW[top : top + height, first : first + width]
        if 0 < block.size - int(block.sum()) <= left:
            block[:] = True
    return _with_random(rng, mask_HW, number)


def random_mask(rng: np.random.Generator, grid_hw: Grid, number: int) -> np.ndarray:
    """As `block_mask`, of single tokens."""
    return _with_random(rng, np.zeros(grid_hw, bool), number)


def _with_random(rng: np.random.Generator, mask_HW: np.ndarray, number: int) -> np.ndarray:
    """The mask with so many hidden tokens, the missing ones anywhere."""
    visible = np.flatnonzero(~mask_HW)
    rng.shuffle(visible)
    mask_HW.flat[visible[: number - int(mask_HW.sum())]] = True
    return mask_HW


def predicted_tokens(
    masks: Sequence[np.ndarray], longest: int, canvas_columns: int | None, visible_weight: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that a loss is of, and their weights in it.

    Args:
        masks: Of each image's tokens.
        longest: N, tokens of an image in the batch.
        canvas_columns: Columns of tokens where all images lie on one canvas; None where an image's tokens come row by
            row of its own.
        visible_weight: Of the tokens of an image that are not hidden, together; those that are have 1.

    Returns:
        `(rows_R, weights_R)`: int64 places among all B * N tokens, and float32.
    """
    rows: list[np.ndarray] = [np.zeros(0, np.int64)]
    weights: list[np.ndarray] = [np.zeros(0, np.float32)]
    for image, mask_HW in enumerate(masks):
        H, W = mask_HW.shape
        place_HW: np.ndarray = np.arange(H)[:, None] * (canvas_columns or W) + np.arange(W)
        for tokens_HW, weight in ((mask_HW, 1.0), (~mask_HW, visible_weight)):
            if weight and (number := int(tokens_HW.sum())):
                rows.append(image * longest + place_HW[tokens_HW])
                weights.append(np.full(number, weight / number, np.float32))
    return np.concatenate(rows), np.concatenate(weights)
