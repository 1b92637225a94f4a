"""Cloth and things in one colour: a relief of threads and folds multiplies the colour, and its median is 1.

The median pixel of what is drawn is therefore the colour itself, to rounding, however deep the folds are.
"""

from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from indiclip.generated.base import Floats, Mask, SizeHW, UInt8, grainy, load_table
from indiclip.generated.cielab import RGB, delta_e76, lab_to_srgb, srgb_to_lab
from indiclip.generated.mela_shapes import CLOTHES, THINGS
from indiclip.generated.mela_things import draw_thing

SHAPES = THINGS | CLOTHES
TABLE: dict[str, dict[str, Any]] = load_table("swatches.yaml")
_DRAFTS: dict[str, list[str]] = TABLE["weaves"]["train"] | TABLE["weaves"]["test"]
WEAVES = list(_DRAFTS)
_ZARI: RGB = (232, 172, 36)
_NOISE = 3
_GROUND_AWAY = 30.0  # CIE76 between a thing's colour and what it lies on


def draw_patch(rng: Generator, rgb: RGB, size_hw: SizeHW) -> tuple[UInt8, Mask]:
    """A painted card or disc on a grey ground, or nothing but the paint.

    Returns:
        The image, uint8 (height, width, 3), and where the colour is, bool (height, width).
    """
    height, width = size_hw
    kind, (x1, y1, x2, y2) = rng.integers(3), rng.uniform(0.05, 0.25, 4)
    canvas = Image.new("L", size_hw[::-1], 255 if kind == 0 else 0)
    draw = ImageDraw.Draw(canvas)
    box = (x1 * width, y1 * height, (1 - x2) * width, (1 - y2) * height)
    if kind == 1:
        draw.ellipse(box, fill=255)
    elif kind == 2:
        draw.rounded_rectangle(box, radius=rng.uniform(0, 0.1) * min(size_hw), fill=255)
    own = np.asarray(canvas) > 0
    relief = 1 + rng.uniform(0, 0.08) * _slope(rng, size_hw)
    image = _ground(rng, rgb, size_hw)
    image[own] = _lit(rgb, relief, own)
    return grainy(rng, image, _NOISE), own


def draw_cloth(rng: Generator, rgb: RGB, size_hw: SizeHW, weave: str) -> tuple[UInt8, Mask]:
    """Cloth that fills the image: threads, folds and light, now and then a border of gold thread.

    Returns:
        As `draw_patch`; the border is not the colour.
    """
    folds = _folds(rng, size_hw, depth=rng.uniform(0.08, 0.3))
    relief = folds * _threads(rng, size_hw, weave) * (1 + rng.uniform(0, 0.15) * _slope(rng, size_hw))
    own = np.ones(size_hw, bool)
    image = np.empty((*size_hw, 3), np.uint8)
    if rng.random() < 0.35:
        height, width = size_hw
        rows = np.arange(height)[:, None] / height + 0.03 * np.sin(np.linspace(0, rng.uniform(2, 7), width))
        edge, wide = rng.uniform(0.72, 0.88), rng.uniform(0.05, 0.1)
        own = (rows < edge) | (rows > edge + wide)
        image[~own] = _lit(_ZARI, relief, ~own)
    image[own] = _lit(rgb, relief, own)
    return grainy(rng, image, _NOISE), own


def draw_object(rng: Generator, rgb: RGB, size_hw: SizeHW, kind: str) -> tuple[UInt8, Mask]:
    """A thing of the fair or a piece of clothing (a key of `SHAPES`) on a grey ground.

    Returns:
        As `draw_patch`; darker and lighter parts of the thing, and those of fixed paints, are not the colour.
    """
    side = rng.uniform(0.7, 0.9) * min(size_hw)
    sprite = draw_thing(SHAPES[kind], rgb, side, rng.uniform(-0.2, 0.2), rng.uniform(0.9, 1.1), rng.random() < 0.5)
    sprite_h, sprite_w = sprite.mask.shape
    top, left = (int(rng.integers(room + 1)) for room in (size_hw[0] - sprite_h, size_hw[1] - sprite_w))
    window = slice(top, top + sprite_h), slice(left, left + sprite_w)
    image = _ground(rng, rgb, size_hw)
    image[window][sprite.mask] = sprite.rgb[sprite.mask]
    own = np.zeros(size_hw, bool)
    own[window] = sprite.mask & (sprite.rgb == rgb).all(axis=-1)
    depth = rng.uniform(0.05, 0.2) if kind in CLOTHES else rng.uniform(0.02, 0.08)
    image[own] = _lit(rgb, _folds(rng, size_hw, depth), own)
    return grainy(rng, image, _NOISE), own


def _lit(rgb: RGB, relief: Floats, own: Mask) -> UInt8:
    """The colour times the relief, at the pixels of `own`."""
    shade = relief[own] / np.median(relief[own])
    return np.asarray(np.rint((shade[:, None] * rgb).clip(0, 255)), np.uint8)


def _ground(rng: Generator, rgb: RGB, size_hw: SizeHW) -> UInt8:
    """A nearly grey ground, well apart from the colour."""
    while True:
        lab = np.array([rng.uniform(15, 95), *rng.uniform(-5, 5, 2)])
        if delta_e76(lab, srgb_to_lab(rgb)) > _GROUND_AWAY:
            break
    light = 6 * _slope(rng, size_hw)[..., None] * [1, 0, 0]
    return lab_to_srgb(lab + light)


def _slope(rng: Generator, size_hw: SizeHW) -> Floats:
    """Light from one side: from -1 to 1 across the image."""
    angle = rng.uniform(0, 2 * np.pi)
    plane = np.cos(angle) * np.linspace(-1, 1, size_hw[1]) + np.sin(angle) * np.linspace(-1, 1, size_hw[0])[:, None]
    return np.asarray(plane / np.abs(plane).max())


def _soft(rng: Generator, size_hw: SizeHW, cells: int) -> Floats:
    """Smooth noise between about -1 and 1."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize(size_hw[::-1], Image.Resampling.BICUBIC), np.float64)


def _folds(rng: Generator, size_hw: SizeHW, depth: float) -> Floats:
    """Relief of cloth that hangs: bent ridges, sharper above than below."""
    y, x = np.indices(size_hw) / max(size_hw)
    angle, count = rng.normal(0, 0.35), rng.uniform(1.5, 4.5)
    across = x * np.cos(angle) + y * np.sin(angle) + 0.05 * _soft(rng, size_hw, 4)
    wave = np.sin(2 * np.pi * count * across + rng.uniform(0, 6)) + 0.5 * np.sin(4.7 * np.pi * count * across)
    return np.asarray(np.exp(depth * (wave * (1 + 0.4 * _soft(rng, size_hw, 3)))))


def _threads(rng: Generator, size_hw: SizeHW, weave: str) -> Floats:
    """Relief of a weave: each thread is round, and dips where another crosses above it."""
    draft = np.array([[*row] for row in _DRAFTS[weave]]) == "1"
    # No finer than three pixels, below which a weave is a moire.
    angle, thick = rng.uniform(0, np.pi / 2), max(3.0, rng.uniform(0.016, 0.035) * min(size_hw))
    y, x = np.indices(size_hw, float)
    warp = (x * np.cos(angle) + y * np.sin(angle)) / thick + 0.5 * _soft(rng, size_hw, 3)
    weft = (y * np.cos(angle) - x * np.sin(angle)) / thick + 0.5 * _soft(rng, size_hw, 3)
    column, row = np.floor(warp).astype(int), np.floor(weft).astype(int)
    on_top = draft[row % draft.shape[0], column % draft.shape[1]]
    round_warp, round_weft = (np.cos(np.pi * (place % 1 - 0.5)) for place in (warp, weft))
    relief = np.where(on_top, round_warp, 0.9 * round_weft)
    if weave == "khadi":  # every thread has its own thickness, which changes slowly along it
        slubs = rng.normal(0, 0.25, (2, 512))
        relief = relief + slubs[0, column % 512] * on_top + slubs[1, row % 512] * ~on_top
    return np.asarray(1 + rng.uniform(0.12, 0.3) * (relief - 0.6))
