"""One scene of the fair and its exact truth, a pure function of (seed, index).

Every pixel of a scene is either pure background or copied from exactly one sprite, so the instance map is not an
annotation of the image but what the image was made from. What ends up mostly hidden is taken out before painting:
everything that can be seen is labelled.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from indiclip.data.mela_people import GARMENTS, draw_person
from indiclip.data.mela_things import COLOURS, RGB, THINGS, Sprite, draw_thing, rgb_of
from indiclip.data.mela_words import CLASSES, PERSON, Group, captions, must_be_one_of

LAYOUTS = ["single", "mixed"]
MIN_SIDE = 32  # pixels; below, things have no room for 12 pixels of their own
MIN_VISIBLE = 0.25  # of an instance's pixels, and
MIN_PIXELS = 12  # this many, or the instance is taken out
_COLOUR_NAMES = list(COLOURS)

# Pale and muted, so that none is a colour of the fair.
_BACKGROUNDS: list[RGB] = [
    *((244, 238, 226), (226, 232, 238), (214, 208, 220), (222, 226, 212), (236, 222, 218), (198, 202, 206)),
    *((206, 196, 184), (182, 190, 198), (186, 184, 172), (172, 166, 176), (158, 166, 164), (212, 220, 222)),
]
# Centres of instances are drawn in one of these boxes (x1, y1, x2, y2 of 0..1).
_REGIONS = [
    *((0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.46, 1.0), (0.54, 0.0, 1.0, 1.0)),
    *((0.0, 0.0, 1.0, 0.46), (0.0, 0.54, 1.0, 1.0), (0.34, 0.34, 0.66, 0.66)),
]


@dataclass(frozen=True)
class Scene:
    """An image and the truth about it. M instances in painting order; coordinates are absolute pixels.

    Attributes:
        image_HW3: uint8 RGB.
        instances_HW: int16, the instance each pixel belongs to, -1 on the background.
        parts_HW: uint8, 1..24 on people, else 0 (numbers: see `mela_people`).
        uv_HW2: float32 in [0, 1], surface coordinates on people, else 0.
        boxes_xyxy: float32 (M, 4), tight around the visible pixels; x2, y2 exclusive.
        classes: int64 (M,), index into `CLASSES`.
        colours: M keys of `COLOURS`; of a person, the garment's.
        garments: M garments, "" for things.
        points_xy: float32 (M, 2), the centre of a visible pixel of the instance, close to its middle.
        captions: language -> caption.
    """

    image_HW3: NDArray[np.uint8]
    instances_HW: NDArray[np.int16]
    parts_HW: NDArray[np.uint8]
    uv_HW2: NDArray[np.float32]
    boxes_xyxy: NDArray[np.float32]
    classes: NDArray[np.int64]
    colours: list[str]
    garments: list[str]
    points_xy: NDArray[np.float32]
    captions: dict[str, str]


@dataclass(frozen=True)
class _Item:
    """A sprite at its place: `y`, `x` of its first pixel, which may lie outside of the image."""

    sprite: Sprite
    y: int
    x: int
    kind: str
    colour: str
    garment: str = ""

    def windows(self, height: int, width: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """The same pixels in the image and in the sprite."""
        h, w = self.sprite.mask.shape
        top, left = max(self.y, 0), max(self.x, 0)
        bottom, right = max(min(self.y + h, height), top), max(min(self.x + w, width), left)
        in_image = (slice(top, bottom), slice(left, right))
        return in_image, (slice(top - self.y, bottom - self.y), slice(left - self.x, right - self.x))


def draw_background(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """A fairground with nothing on it: plain, gradient, stripes, or ground and sky, with light noise."""
    first, second = (np.array(_BACKGROUNDS[i], np.int16) for i in rng.integers(len(_BACKGROUNDS), size=2))
    style, place, angle = rng.integers(4), rng.random(), rng.uniform(-1, 1)
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    across = np.linspace(0, 1, width, dtype=np.float32)[None, :]
    ramp = (down + angle * across).clip(0, 1)
    if style == 0:
        ramp = np.zeros_like(ramp)
    elif style == 2:
        # Broad and faint: no thing has such stripes.
        ramp = 0.35 * (((down + angle * across) * (3 + 4 * place)) % 1 < 0.5).astype(np.float32)
    elif style == 3:
        horizon = down > 0.35 + 0.4 * place
        ramp = np.broadcast_to(np.where(horizon, 0.7 + 0.3 * down, 0.15 * down), ramp.shape)
    image = first + (ramp[..., None] * (second - first).astype(np.float32)).astype(np.int16)
    strength = int(rng.integers(1, 6))
    image += rng.integers(-strength, strength + 1, size=(height, width, 1), dtype=np.int16)
    return image.clip(0, 255).astype(np.uint8)


def _jittered(rng: np.random.Generator, colour: str) -> RGB:
    red, green, blue = (rng.integers(-10, 11, size=3) + rgb_of(colour)).clip(0, 255).tolist()
    return red, green, blue


def _centres(
    rng: np.random.Generator, sizes_wh: list[tuple[float, float]], region: int, height: int, width: int
) -> list[tuple[float, float]]:
    """Centres (x, y) of boxes of these sizes in a region: of six random places, the furthest from the others."""
    x1, y1, x2, y2 = _REGIONS[region]
    draws = rng.random((len(sizes_wh), 6, 2))
    low, span = np.array([x1 * width, y1 * height]), np.array([(x2 - x1) * width, (y2 - y1) * height])
    centres: list[tuple[float, float]] = []
    for size_wh, draw in zip(sizes_wh, draws, strict=True):
        margin = np.minimum(np.array(size_wh) * 0.45, [width / 2, height / 2])
        candidates = (low + draw * span).clip(margin, np.array([width, height]) - margin)
        if centres:
            gaps = np.abs(candidates[:, None] - np.array(centres)[None]) / size_wh
            best = candidates[gaps.max(axis=2).min(axis=1).argmax()]
        else:
            best = candidates[0]
        centres.append((float(best[0]), float(best[1])))
    return centres


def _things(
    rng: np.random.Generator, wanted: list[tuple[str, str, float]], region: int, height: int, width: int
) -> list[_Item]:
    """Things from (kind, colour, size in pixels), placed in a region of the image."""
    sprites = []
    for kind, colour, size in wanted:
        tilt, stretch, mirror = rng.uniform(-0.35, 0.35), rng.uniform(0.88, 1.12), rng.random() < 0.5
        sprites.append(draw_thing(kind, _jittered(rng, colour), size, tilt, stretch, mirror))
    sizes = [(float(sprite.mask.shape[1]), float(sprite.mask.shape[0])) for sprite in sprites]
    centres = _centres(rng, sizes, region, height, width)
    return [
        _Item(sprite, round(y - h / 2), round(x - w / 2), kind, colour)
        for sprite, (kind, colour, _), (w, h), (x, y) in zip(sprites, wanted, sizes, centres, strict=True)
    ]


def _people(rng: np.random.Generator, height: int, width: int, same: bool) -> list[_Item]:
    """One to three people, 45 to 90 % of the image's height (less where the image is too narrow for that).

    `same`: they all wear the same garment in the same colour.
    """
    count = (1, 1, 1, 2, 2, 3)[rng.integers(6)]
    looks = [(GARMENTS[rng.integers(3)], _COLOUR_NAMES[rng.integers(12)]) for _ in range(count)]
    items = []
    for i, (garment, colour) in enumerate(looks):
        garment, colour = looks[0] if same else (garment, colour)
        tall = min(rng.uniform(0.45, 0.9) * height, 1.6 * width)
        sprite = draw_person(rng, garment, _jittered(rng, colour), tall)
        h, w = sprite.mask.shape
        # Each has a share of the width to stand in, so that they hide each other only in part.
        x = (i + rng.uniform(0.2, 0.8)) / count * width
        x = float(np.clip(x, min(0.4 * w, width / 2), max(width - 0.4 * w, width / 2)))
        items.append(_Item(sprite, round(rng.uniform(0.3, 1) * (height - h)), round(x - w / 2), "person", colour, garment))
    return items


def _single(rng: np.random.Generator, height: int, width: int, people: float) -> list[_Item]:
    """One to six of one kind, mostly in one colour. People are one of 17 kinds unless `people` is 0."""
    kind = CLASSES[rng.integers(len(CLASSES) if people > 0 else len(THINGS))]
    if kind == "person":
        return _people(rng, height, width, same=True)
    count = (1, 1, 1, 2, 2, 3, 3, 4, 5, 6)[rng.integers(10)]
    low, high = ((0.45, 0.85), (0.35, 0.55), (0.3, 0.45), (0.25, 0.38))[min(count, 4) - 1]
    colours = [_COLOUR_NAMES[i] for i in rng.integers(12, size=count)]
    if rng.random() < 0.85:
        colours = colours[:1] * count
    region = int(rng.integers(len(_REGIONS) - (count > 2))) if rng.random() < 0.6 else 0
    short = min(height, width)
    sizes = [max(12.0, rng.uniform(low, high) * short) for _ in range(count)]
    return _things(rng, [(kind, c, s) for c, s in zip(colours, sizes, strict=True)], region, height, width)


def _mixed(rng: np.random.Generator, height: int, width: int, people: float) -> list[_Item]:
    """One to eight things of up to four kinds in front of, or behind, up to three people."""
    count = int(rng.integers(1, 9))
    kinds = [(THINGS[rng.integers(len(THINGS))], _COLOUR_NAMES[rng.integers(12)]) for _ in range(rng.integers(1, 5))]
    wanted = []
    for _ in range(count):
        kind, colour = kinds[rng.integers(len(kinds))]
        # Half of the things share the colour of their kind, so that a caption has groups to name.
        colour = colour if rng.random() < 0.5 else _COLOUR_NAMES[rng.integers(12)]
        size = rng.uniform(0.2, 0.47 - 0.02 * count) * min(height, width)
        wanted.append((kind, colour, max(12.0, size)))
    items = _things(rng, wanted, 0, height, width)
    crowd = _people(rng, height, width, same=False) if rng.random() < people else []
    # Mostly people stand behind: they are large and would hide the things.
    split = 0 if rng.random() < 0.7 else int(rng.integers(len(items) + 1))
    return items[:split] + crowd + items[split:]


def _instance_map(items: list[_Item], height: int, width: int) -> NDArray[np.int16]:
    instances = np.full((height, width), -1, np.int16)
    for i, item in enumerate(items):
        image, sprite = item.windows(height, width)
        np.copyto(instances[image], np.int16(i), where=item.sprite.mask[sprite])
    return instances


def _visible_only(items: list[_Item], height: int, width: int) -> tuple[list[_Item], NDArray[np.int16]]:
    """Take out what is mostly hidden or outside; what stays can only become more visible by that."""
    instances = _instance_map(items, height, width)
    pixels = np.bincount(instances.ravel() + 1, minlength=len(items) + 1)[1:]
    needed = [max(MIN_PIXELS, MIN_VISIBLE * int(item.sprite.mask.sum())) for item in items]
    kept = [item for item, has, needs in zip(items, pixels, needed, strict=True) if has >= needs]
    return kept, instances if len(kept) == len(items) else _instance_map(kept, height, width)


def _box_and_point(own: NDArray[np.bool_], top: int, left: int) -> tuple[list[int], list[float]]:
    """The tight box of a mask whose first pixel is at (top, left), and the centre of its pixel nearest the middle."""
    rows, columns = own.sum(axis=1), own.sum(axis=0)
    ys, xs = rows.nonzero()[0], columns.nonzero()[0]
    y, x = (int(weights @ np.arange(len(weights)) / weights.sum() + 0.5) for weights in (rows, columns))
    if not own[y, x]:
        all_y, all_x = own.nonzero()
        nearest = ((all_y - y) ** 2 + (all_x - x) ** 2).argmin()
        y, x = int(all_y[nearest]), int(all_x[nearest])
    box = [left + int(xs[0]), top + int(ys[0]), left + int(xs[-1]) + 1, top + int(ys[-1]) + 1]
    return box, [left + x + 0.5, top + y + 0.5]


def place_of(points_xy: NDArray[np.float32], height: int, width: int) -> str:
    """Where the points are: the half, or the middle, that holds them all, else "everywhere"; "" for none."""
    if not len(points_xy):
        return ""
    relative = points_xy / (width, height) - 0.5
    if (np.abs(relative) < 0.16).all():
        return "centre"
    x, y = relative.mean(axis=0)
    sides = [("left" if x < 0 else "right", 0, x), ("top" if y < 0 else "bottom", 1, y)]
    for side, axis, mean in sorted(sides, key=lambda entry: -abs(entry[2])):
        if (relative[:, axis] * np.sign(mean) > 0).all():
            return side
    return "everywhere"


def _groups(items: list[_Item]) -> list[Group]:
    """The kinds in a scene, most frequent first."""
    by_kind: dict[str, list[_Item]] = {}
    for item in items:
        by_kind.setdefault(item.kind, []).append(item)
    groups = []
    for kind, members in sorted(by_kind.items(), key=lambda entry: (-len(entry[1]), CLASSES.index(entry[0]))):
        first = members[0]
        alike = all((a.colour, a.garment) == (b.colour, b.garment) for a, b in pairwise(members))
        groups.append(Group(kind, len(members), first.colour if alike else "", first.garment if alike else ""))
    return groups


def _paint(background: NDArray[np.uint8], items: list[_Item], instances: NDArray[np.int16]) -> dict[str, NDArray]:
    raise NotImplementedError
