"""Articulated people: 24 body parts with (part, U, V) at every pixel, in a saree, a kurta or a dhoti.

A figure faces the viewer and is 28 pieces around the bones of a skeleton; each piece is a polygon in the
coordinates (t, s) of its bone: t from 0 to 1 along it, s from -1 to 1 across it. U is t; V is |s| (0 on the bone, 1
at the side) where a limb has two half parts, and (s + 1) / 2 for hands and feet, which are one part. Clothes are
painted on these pixels, so every pixel of a person has its exact part, U and V.

Part numbers are DensePose's: 1, 2 torso; 3, 4 right and left hand; 5, 6 left and right foot; 7, 9 right and 8, 10
left upper leg; 11, 13 and 12, 14 lower leg; 15, 17 left and 16, 18 right upper arm; 19, 21 and 20, 22 lower arm; 23,
24 head. Here the first of two is the outer half of a limb (the right half of torso and head). Right is the person's.
"""

from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from indiclip.generated.base import Float32s, Floats, UInt8, pick
from indiclip.generated.cielab import RGB, rgb_of_hex
from indiclip.generated.mela_things import FAIR, Sprite, shades

_PARTS: dict[str, list[list[int]]] = FAIR["parts"]
_LOOKS: dict[str, dict[str, Any]] = FAIR["garments"]
_WIDTHS: dict[str, list[float]] = FAIR["widths"]
GARMENTS = list(_LOOKS)
NUM_PARTS = 24
_SKINS = [rgb_of_hex(colour) for colour in FAIR["skins"]]

# Half outlines in (t, s): a limb with round ends, and an oval for the head.
_T = np.array([0, 0.02, 0.08, 0.18, 0.82, 0.92, 0.98, 1])
_LIMB = np.stack([_T, np.array([0, 0.5, 0.85, 1, 1, 0.85, 0.5, 0])], axis=1)
_ARC = np.linspace(0, np.pi, len(_T))
_OVAL = np.stack([(1 - np.cos(_ARC)) / 2, np.sin(_ARC)], axis=1)


class _Piece:
    """A bone and the half of it, or all of it, that one polygon pair covers; it reaches a little over both joints.

    Units are the body's height. `outer` is the unit normal towards the side where s is 1: the person's right for `side`
    -1; `parts` are the part numbers at s > 0 and at s < 0; `widths` are half widths at both ends.
    """

    def __init__(self, name: str, start: Floats, end: Floats, side: int, garment: str) -> None:
        widths = (_WIDTHS | _LOOKS[garment]["widths"])[name]
        along = (end - start) / np.hypot(*(end - start))
        self.start, self.end = start - along * widths[0] * 0.6, end + along * widths[1] * 0.6
        self.outer = np.array([along[1], -along[0]]) * side
        self.name, self.widths = name, widths
        self.parts = _PARTS[name][0 if side < 0 else -1]


def _towards(angle: float, side: int) -> Floats:
    """The direction `angle` radians away from straight down, outwards on `side` (-1: the image's left)."""
    return np.array([side * np.sin(angle), np.cos(angle)])


def _leg(rng: Generator, side: int, garment: str) -> list[_Piece]:
    """Foot, lower leg and upper leg; a skirt is wide legs that stand close together."""
    look = _LOOKS[garment]
    thigh = rng.uniform(0.0, look["spread"])
    shin = thigh + rng.uniform(*look["bend"])
    hip = np.array([side * 0.055, 0.0])
    knee = hip + 0.235 * _towards(thigh, side)
    ankle = knee + 0.225 * _towards(shin, side)
    toe = ankle + 0.085 * _towards(1.2 if rng.random() < 0.5 else 0.7, side)
    return [
        _Piece("foot", ankle, toe, side, garment),
        _Piece("shin", knee, ankle, side, garment),
        _Piece("thigh", hip, knee, side, garment),
    ]


def _arm(rng: Generator, shoulder: Floats, side: int, garment: str) -> list[_Piece]:
    """Upper arm, lower arm and hand, anywhere from hanging to raised."""
    lift = rng.uniform(0.15, 2.5) if rng.random() < 0.6 else rng.uniform(0.15, 0.7)
    bend = lift + rng.uniform(-0.3, 1.5 if lift < 1.6 else 0.6)
    elbow = shoulder + 0.165 * _towards(lift, side)
    wrist = elbow + 0.15 * _towards(bend, side)
    tip = wrist + 0.06 * _towards(bend + rng.uniform(-0.3, 0.3), side)
    return [
        _Piece("hand", wrist, tip, side, garment),
        _Piece("forearm", elbow, wrist, side, garment),
        _Piece("arm", shoulder, elbow, side, garment),
    ]


def _body(rng: Generator, garment: str) -> list[_Piece]:
    """All pieces in painting order; the origin is between the hips, the standing body is about 1 high."""
    lean, tilt = rng.uniform(-0.12, 0.12), rng.uniform(-0.2, 0.2)
    up = np.array([np.sin(lean), -np.cos(lean)])
    neck, chin = 0.29 * up, 0.3 * up
    crown = chin + 0.18 * np.array([np.sin(lean + tilt), -np.cos(lean + tilt)])
    # Both outer normals point to the image's left: the person's right half has s > 0.
    torso = _Piece("torso", np.array([0.0, 0.01]), neck, 1, garment)
    head = _Piece("head", chin, crown, 1, garment)
    legs = _leg(rng, -1, garment) + _leg(rng, 1, garment)
    across = np.array([-up[1], up[0]])
    behind: list[_Piece] = []
    in_front: list[_Piece] = []
    for side in (-1, 1):
        arm = _arm(rng, neck * 0.92 + side * 0.115 * across, side, garment)
        (behind if rng.random() < 0.3 else in_front).extend(arm)
    return [*behind, *legs, torso, head, *in_front]


def _outlines(pieces: list[_Piece]) -> Floats:
    """The half outlines of all pieces, (pieces, 2 sides, points, xy), in the units of the pieces."""
    start = np.stack([piece.start for piece in pieces])[:, None, None]
    along = np.stack([piece.end - piece.start for piece in pieces])[:, None, None]
    outer = np.stack([piece.outer for piece in pieces])[:, None, None]
    widths = np.array([piece.widths for piece in pieces])[:, None, :, None]
    profile = np.stack([_OVAL if piece.name == "head" else _LIMB for piece in pieces])[:, None]
    t, s = profile[..., :1], profile[..., 1:]
    side = np.array([1.0, -1.0])[None, :, None, None]
    half_width = widths[:, :, :1] * (1 - t) + widths[:, :, 1:] * t
    outlines: Floats = start + along * t + outer * side * s * half_width
    return outlines


def _coordinates(pieces: list[_Piece], scale: float, origin: Floats) -> Floats:
    """Per part number the row that turns a pixel into its (t, s).

    t = row[0:2] @ xy + row[2]; s = (row[3:5] @ xy + row[5]) / (row[6] + row[7] * t). xy are pixel centres.
    """
    table = np.zeros((NUM_PARTS + 1, 8))
    for piece in pieces:
        start = (piece.start - origin) * scale
        along = (piece.end - piece.start) * scale
        gain = along / (along @ along)
        w0, w1 = (width * scale for width in piece.widths)
        row = [*gain, -(gain @ start), *piece.outer, -(piece.outer @ start), w0, w1 - w0]
        table[piece.parts] = row
    return table


def _part_and_ts(pieces: list[_Piece], height: float) -> tuple[UInt8, Floats, Floats]:
    """Rasterise at `height` pixels: the part map, and t and s of its body pixels in row order."""
    outlines = _outlines(pieces)
    low, high = outlines.min(axis=(0, 1, 2)), outlines.max(axis=(0, 1, 2))
    scale = (height - 1) / (high[1] - low[1])
    size_wh = np.ceil((high - low) * scale).astype(int) + 1
    canvas = Image.new("L", (int(size_wh[0]), int(size_wh[1])))
    draw = ImageDraw.Draw(canvas)
    polygons = ((outlines - low) * scale).reshape(len(pieces), 2, -1).tolist()
    for piece, sides in zip(pieces, polygons, strict=True):
        for part, polygon in zip(piece.parts, sides, strict=True):
            draw.polygon(polygon, fill=part)
    parts = np.array(canvas)
    ys, xs = np.nonzero(parts)
    # PIL's polygons put whole numbers on pixel centres.
    row = _coordinates(pieces, scale, low)[parts[ys, xs]]
    t = (row[:, 0] * xs + row[:, 1] * ys + row[:, 2]).clip(0, 1)
    s = (row[:, 3] * xs + row[:, 4] * ys + row[:, 5]) / (row[:, 6] + row[:, 7] * t)
    return parts, t, s.clip(-1, 1)


def _paint(parts_S: UInt8, t_S: Floats, s_S: Floats, garment: str, rgb: RGB, skin: RGB, turban: bool) -> Float32s:
    """The colours (S, 3) of body pixels: clothes, face, and sides darker than middles."""
    paints = shades(rgb) | {"skin": skin}
    look = _LOOKS[garment]
    wardrobe = look["paints"] | (look.get("turban", {}) if turban else {})
    table, cut = np.zeros((2, NUM_PARTS + 1, 3), np.float32), np.zeros(NUM_PARTS + 1)
    for name, (first, limit, second) in wardrobe.items():
        parts = np.array(_PARTS[name])
        table[0, parts], cut[parts], table[1, parts] = paints[first], limit, paints[second]
    colour = table[(t_S >= cut[parts_S]).astype(np.intp), parts_S]
    torso, head = parts_S <= 2, parts_S >= 23
    if "sash" in look:  # from the right hip to the left shoulder
        colour[torso & (np.abs(1.1 * (2 * t_S - 0.95) + s_S) < 0.42)] = paints[look["sash"]]
    else:
        colour[torso & (np.abs(s_S) < 0.09) & (t_S > 0.5)] = paints["gold"]
    for paint, (t, half_t, s, half_s) in (FAIR["face"] | look.get("face", {})).items():
        colour[head & (np.abs(t_S - t) < half_t) & (np.abs(np.abs(s_S) - s) < half_s)] = paints[paint]
    shade = 1 - 0.28 * s_S**2
    # One cloth around both legs has no dark line between them.
    shade[np.isin(parts_S, look["even"])] = 1
    colour *= shade[:, None].astype(np.float32)
    return colour


def draw_person(rng: Generator, garment: str, rgb: RGB, height: float) -> Sprite:
    """Draw one person in a random pose.

    Args:
        rng: Where pose, skin and headgear come from.
        garment: One of `GARMENTS`.
        rgb: The garment's colour, 0..255 each.
        height: From the highest to the lowest pixel, in pixels.
    """
    skin, turban = pick(rng, _SKINS), bool(rng.random() < 0.4)
    parts, t, s = _part_and_ts(_body(rng, garment), height)
    mask = parts > 0
    parts_S = parts[mask]
    pixels = np.zeros((*parts.shape, 3), np.uint8)
    pixels[mask] = _paint(parts_S, t, s, garment, rgb, skin, turban)
    uv = np.zeros((*parts.shape, 2), np.float32)
    uv[mask] = np.stack([t, np.where((parts_S >= 3) & (parts_S <= 6), (s + 1) / 2, np.abs(s))], axis=1)
    return Sprite(rgb=pixels, mask=mask, parts=parts, uv=uv)
