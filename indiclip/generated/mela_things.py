"""The sixteen things of the fair, painted at any size, tilt and colour.

A thing is drawn at twice the resolution and reduced, so its inner marks are smooth at 20 pixels; a pixel belongs to
the thing where at least half of it is covered.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from indiclip.generated.base import Float32s, Mask, UInt8, load_table
from indiclip.generated.cielab import RGB, rgb_of_hex
from indiclip.generated.mela_shapes import THINGS as _DRAWINGS
from indiclip.generated.mela_shapes import Shapes

FAIR: dict[str, Any] = load_table("mela.yaml")
COLOURS: dict[str, str] = FAIR["colours"]
_PAINTS: dict[str, RGB] = {paint: rgb_of_hex(colour) for paint, colour in FAIR["paints"].items()}
_CLEAR = (0, 0, 0, 0)  # paint "hole": what lies behind the thing shows through


@dataclass(frozen=True)
class Sprite:
    """Something drawn, ready to be laid on an image.

    Attributes:
        rgb: uint8 (h, w, 3); read only where `mask` is true.
        mask: bool (h, w), the pixels it owns.
        parts: uint8 (h, w), 0 off the body and 1..24 on it; None for things.
        uv: float32 (h, w, 2) in [0, 1]; None for things.
    """

    rgb: UInt8
    mask: Mask
    parts: UInt8 | None = None
    uv: Float32s | None = None


def rgb_of(colour: str) -> RGB:
    """The red, green and blue (0..255) of a colour name of `COLOURS`."""
    return rgb_of_hex(COLOURS[colour])


THINGS = list(_DRAWINGS)  # class id = place in this list


def shades(rgb: RGB) -> dict[str, RGB]:
    """The paints of one colour: `main`, a `dark` and a `light` of it, and those that never change."""
    red, green, blue = rgb
    dark = (red * 3 // 5, green * 3 // 5, blue * 3 // 5)
    light = (red // 2 + 126, green // 2 + 126, blue // 2 + 126)
    return {**_PAINTS, "main": rgb, "dark": dark, "light": light}


def draw_thing(
    thing: str | Shapes, rgb: RGB, size: float, tilt: float, stretch: float = 1.0, mirror: bool = False
) -> Sprite:
    """Draw a thing, with the paints of a colour.

    Args:
        thing: One of `THINGS`, or a stack of polygons.
        rgb: Its colour, 0..255 each.
        size: The longer side of its box, in pixels.
        tilt: Clockwise, in radians.
        stretch: Width times this before it is tilted.
        mirror: Left and right are swapped.
    """
    shapes = _DRAWINGS[thing] if isinstance(thing, str) else thing
    cos, sin = np.cos(tilt), np.sin(tilt)
    across = -stretch if mirror else stretch
    # In one array, so that a single matrix product moves all polygons.
    points = np.concatenate([polygon for _, polygon in shapes]) @ np.array([[across * cos, across * sin], [-sin, cos]])
    low, high = points.min(axis=0), points.max(axis=0)
    scale = 2 * size / (high - low).max()  # twice: it is drawn at double resolution
    flat: list[float] = ((points - low) * scale).ravel().tolist()
    width, height = (int(extent) // 2 + 1 for extent in (high - low) * scale)
    canvas = Image.new("RGBA", (2 * width, 2 * height))
    draw = ImageDraw.Draw(canvas)
    paints = shades(rgb)
    start = 0
    for paint, polygon in shapes:
        stop = start + 2 * len(polygon)
        draw.polygon(flat[start:stop], fill=_CLEAR if paint == "hole" else paints[paint])
        start = stop
    pixels = np.asarray(canvas.reduce(2))
    return Sprite(rgb=pixels[..., :3], mask=pixels[..., 3] >= 128)
