"""Cloth and things in one colour: a relief of threads and folds multiplies the colour, and its median is 1.

The median pixel of what is drawn is therefore the colour itself, to rounding, however deep the folds are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from indiclip.generated.base import load_table
from indiclip.generated.cielab import RGB, Floats, delta_e76, lab_to_srgb, srgb_to_lab
from indiclip.generated.mela_shapes import CLOTHES, THINGS
from indiclip.generated.mela_things import draw_shapes

UInt8 = NDArray[np.uint8]
Mask = NDArray[np.bool_]

SHAPES = THINGS | CLOTHES
TABLE: dict[str, dict[str, Any]] = load_table("swatches.yaml")
_DRAFTS: dict[str, list[str]] = TABLE["weaves"]["train"] | TABLE["weaves"]["test"]
WEAVES = list(_DRAFTS)
_ZARI: RGB = (232, 172, 36)
_GROUND_AWAY = 30.0  # CIE76 between a thing's colour and what it lies on


def draw_patch(rng: np.random.Generator, rgb: RGB, height: int, width: int) -> tuple[UInt8, Mask]:
    """A painted card or disc on a grey ground, or nothing but the paint.

    Returns:
        The image, uint8 (height, width, 3), and where the colour is, bool (height, width).
    """
    kind, (x1, y1, x2, y2) = rng.integers(3), rng.uniform(0.05, 0.25, 4)
    canvas = Image.new("L", (width, height), 255 if kind == 0 else 0)
    draw = ImageDraw.Draw(canvas)
    box = (x1 * width, y1 * height, (1 - x2) * width, (1 - y2) * height)
    if kind == 1:
        draw.ellipse(box, fill=255)
    elif kind == 2:
        draw.rounded_rectangle(box, radius=rng.uniform(0, 0.1) * min(height, width), fill=255)
    own = np.asarray(canvas) > 0
    relief = 1 + rng.uniform(0, 0.08) * _slope(rng, height, width)
    image = _ground(rng, rgb, height, width)
    image[own] = _lit(rgb, relief, own)
    return _grainy(rng, image), own


def draw_cloth(rng: np.random.Generator, rgb: RGB, height: int, width: int, weave: str) -> tuple[UInt8, Mask]:
    """Cloth that fills the image: threads, folds and light, now and then a border of gold thread.

    Returns:
        As `draw_patch`; the border is not the colour.
    """
    folds = _folds(rng, height, width, depth=rng.uniform(0.08, 0.3))
    relief = folds * _threads(rng, height, width, weave) * (1 + rng.uniform(0, 0.15) * _slope(rng, height, width))
    own = np.ones((height, width), bool)
    image = np.empty((height, width, 3), np.uint8)
    if rng.random() < 0.35:
        rows = np.arange(height)[:, None] / height + 0.03 * np.sin(np.linspace(0, rng.uniform(2, 7), width))
        edge, wide = rng.uniform(0.72, 0.88), rng.uniform(0.05, 0.1)
        own = (rows < edge) | (rows > edge + wide)
        image[~own] = _lit(_ZARI, relief, ~own)
    image[own] = _lit(rgb, relief, own)
    return _grainy(rng, image), own


def draw_object(rng: np.random.Generator, rgb: RGB, height: int, width: int, kind: str) -> tuple[UInt8, Mask]:
    """A thing of the fair or a piece of clothing (a key of `SHAPES`) on a grey ground.

    Returns:
        As `draw_patch`; darker and lighter parts of the thing, and those of fixed paints, are not the colour.
    """
    side = rng.uniform(0.7, 0.9) * min(height, width)
    sprite = draw_shapes(SHAPES[kind], rgb, side, rng.uniform(-0.2, 0.2), rng.uniform(0.9, 1.1), rng.random() < 0.5)
    sprite_h, sprite_w = sprite.mask.shape
    assert max(sprite_h - height, sprite_w - width) <= -2, "a side of at most 0.9 leaves room for the stretch"
    top, left = int(rng.integers(height - sprite_h + 1)), int(rng.integers(width - sprite_w + 1))
    image = _ground(rng, rgb, height, width)
    window = image[top : top + sprite_h, left : left + sprite_w]
    window[sprite.mask] = sprite.rgb[sprite.mask]
    own = np.zeros((height, width), bool)
    own[top : top + sprite_h, left : left + sprite_w] = sprite.mask & (sprite.rgb == np.array(rgb)).all(axis=-1)
    depth = rng.uniform(0.05, 0.2) if kind in CLOTHES else rng.uniform(0.02, 0.08)
    image[own] = _lit(rgb, _folds(rng, height, width, depth), own)
    return _grainy(rng, image), own


def _lit(rgb: RGB, relief: Floats, own: Mask) -> UInt8:
    """The colour times the relief, at the pixels of `own`."""
    shade = relief[own] / np.median(relief[own])
    return np.asarray(np.rint((shade[:, None] * rgb).clip(0, 255)), np.uint8)


def _grainy(rng: np.random.Generator, image: UInt8) -> UInt8:
    """The image with a camera's noise."""
    noise = rng.normal(0, rng.uniform(0, 3), (*image.shape[:2], 1))
    return np.rint(image + noise).clip(0, 255).astype(np.uint8)


def _ground(rng: np.random.Generator, rgb: RGB, height: int, width: int) -> UInt8:
    """A nearly grey ground, well apart from the colour."""
    while True:
        lab = np.array([rng.uniform(15, 95), *rng.uniform(-5, 5, 2)])
        if delta_e76(lab, srgb_to_lab(rgb)) > _GROUND_AWAY:
            break
    light = 6 * _slope(rng, height, width)[..., None] * [1, 0, 0]
    return lab_to_srgb(lab + light)


def _slope(rng: np.random.Generator, height: int, width: int) -> Floats:
    """Light from one side: from -1 to 1 across the image."""
    angle = rng.uniform(0, 2 * np.pi)
    plane = np.cos(angle) * np.linspace(-1, 1, width) + np.sin(angle) * np.linspace(-1, 1, height)[:, None]
    return np.asarray(plane / np.abs(plane).max())


def _soft(rng: np.random.Generator, height: int, width: int, cells: int) -> Floats:
    """Smooth noise between about -1 and 1."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64)


def _folds(rng: np.random.Generator, height: int, width: int, depth: float) -> Floats:
    """Relief of cloth that hangs: bent ridges, sharper above than below."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    angle, count = rng.normal(0, 0.35), rng.uniform(1.5, 4.5)
    across = x * np.cos(angle) + y * np.sin(angle) + 0.05 * _soft(rng, height, width, 4)
    wave = np.sin(2 * np.pi * count * across + rng.uniform(0, 6)) + 0.5 * np.sin(4.7 * np.pi * count * across)
    return np.asarray(np.exp(depth * (wave * (1 + 0.4 * _soft(rng, height, width, 3)))))


def _threads(rng: np.random.Generator, height: int, width: int, weave: str) -> Floats:
    """Relief of a weave: each thread is round, and dips where another crosses above it."""
    draft = np.array([[int(top) for top in row] for row in _DRAFTS[weave]], bool)
    # No finer than three pixels, below which a weave is a moire.
    angle, thick = rng.uniform(0, np.pi / 2), max(3.0, rng.uniform(0.016, 0.035) * min(height, width))
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    warp = (x * np.cos(angle) + y * np.sin(angle)) / thick + 0.5 * _soft(rng, height, width, 3)
    weft = (y * np.cos(angle) - x * np.sin(angle)) / thick + 0.5 * _soft(rng, height, width, 3)
    column, row = np.floor(warp).astype(int), np.floor(weft).astype(int)
    on_top = draft[row % draft.shape[0], column % draft.shape[1]]
    round_warp, round_weft = (np.cos(np.pi * (place % 1 - 0.5)) for place in (warp, weft))
    relief = np.where(on_top, round_warp, 0.9 * round_weft)
    if weave == "khadi":  # every thread has its own thickness, which changes slowly along it
        slubs = rng.normal(0, 0.25, (2, 512))
        relief = relief + slubs[0, column % 512] * on_top + slubs[1, row % 512] * ~on_top
    return np.asarray(1 + rng.uniform(0.12, 0.3) * (relief - 0.6))
