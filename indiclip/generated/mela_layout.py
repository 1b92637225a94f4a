"""Backgrounds, and where the sprites of a layout are placed."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from indiclip.generated.base import Floats, SizeHW, UInt8, pick
from indiclip.generated.cielab import RGB, rgb_of_hex
from indiclip.generated.mela_people import GARMENTS, draw_person
from indiclip.generated.mela_things import COLOURS, FAIR, Sprite, draw_thing, rgb_of

COLOUR_NAMES = list(COLOURS)
# Centres of instances are drawn in one of these boxes (x1, y1, x2, y2 of 0..1).
_REGIONS = [
    *((0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.46, 1.0), (0.54, 0.0, 1.0, 1.0)),
    *((0.0, 0.0, 1.0, 0.46), (0.0, 0.54, 1.0, 1.0), (0.34, 0.34, 0.66, 0.66)),
]


@dataclass(frozen=True)
class Item:
    """A sprite at its place: `y`, `x` of its first pixel, which may lie outside of the image."""

    sprite: Sprite
    y: int
    x: int
    kind: str
    colour: str
    garment: str = ""

    @classmethod
    def centred(cls, sprite: Sprite, x: float, y: float, kind: str, colour: str) -> "Item":
        """With its middle at (x, y)."""
        h, w = sprite.mask.shape
        return cls(sprite, round(y - h / 2), round(x - w / 2), kind, colour)

    def windows(self, size_hw: SizeHW) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """The same pixels in the image and in the sprite."""
        height, width = size_hw
        h, w = self.sprite.mask.shape
        top, left = max(self.y, 0), max(self.x, 0)
        bottom, right = max(min(self.y + h, height), top), max(min(self.x + w, width), left)
        in_image = (slice(top, bottom), slice(left, right))
        return in_image, (slice(top - self.y, bottom - self.y), slice(left - self.x, right - self.x))


def draw_background(rng: Generator, size_hw: SizeHW) -> UInt8:
    """A fairground with nothing on it: plain, gradient, stripes, or ground and sky, with light noise."""
    pale = FAIR["backgrounds"]
    first, second = (np.array(rgb_of_hex(pale[i]), np.int16) for i in rng.integers(len(pale), size=2))
    style, place, angle = rng.integers(4), rng.random(), rng.uniform(-1, 1)
    down, across = (np.linspace(0, 1, side, dtype=np.float32) for side in size_hw)
    down = down[:, None]
    slope = down + angle * across
    ramp = slope.clip(0, 1)
    if style == 0:
        ramp = np.zeros_like(ramp)
    elif style == 2:
        # Broad and faint: no thing has such stripes.
        ramp = 0.35 * ((slope * (3 + 4 * place)) % 1 < 0.5).astype(np.float32)
    elif style == 3:
        horizon = down > 0.35 + 0.4 * place
        ramp = np.broadcast_to(np.where(horizon, 0.7 + 0.3 * down, 0.15 * down), ramp.shape)
    image = first + (ramp[..., None] * (second - first).astype(np.float32)).astype(np.int16)
    strength = int(rng.integers(1, 6))
    image += rng.integers(-strength, strength + 1, size=(*size_hw, 1), dtype=np.int16)
    return image.clip(0, 255).astype(np.uint8)


def jittered(rng: Generator, colour: str) -> RGB:
    """A named colour, each channel moved by at most 10."""
    red, green, blue = (rng.integers(-10, 11, size=3) + rgb_of(colour)).clip(0, 255).tolist()
    return red, green, blue


def _centres(rng: Generator, sprites: list[Sprite], region: int, size_hw: SizeHW) -> list[Floats]:
    """Centres (x, y) of the sprites in a region: of six random places, the furthest from the others."""
    image_wh = np.array(size_hw[::-1])
    low, high = np.reshape(_REGIONS[region], (2, 2))
    draws = low * image_wh + rng.random((len(sprites), 6, 2)) * ((high - low) * image_wh)
    centres: list[Floats] = []
    for sprite, candidates in zip(sprites, draws, strict=True):
        sprite_wh = np.array(sprite.mask.shape[::-1])
        margin = np.minimum(sprite_wh * 0.45, image_wh / 2)
        candidates = candidates.clip(margin, image_wh - margin)
        best = 0
        if centres:
            gaps = np.abs(candidates[:, None] - centres) / sprite_wh
            best = gaps.max(axis=2).min(axis=1).argmax()
        centres.append(candidates[best])
    return centres


def _things(rng: Generator, wanted: list[tuple[str, str, float]], region: int, size_hw: SizeHW) -> list[Item]:
    """Things from (kind, colour, size in pixels), placed in a region of the image."""
    sprites = []
    for kind, colour, size in wanted:
        tilt, stretch, mirror = rng.uniform(-0.35, 0.35), rng.uniform(0.88, 1.12), rng.random() < 0.5
        sprites.append(draw_thing(kind, jittered(rng, colour), size, tilt, stretch, mirror))
    centres = _centres(rng, sprites, region, size_hw)
    return [
        Item.centred(sprite, x, y, kind, colour)
        for sprite, (kind, colour, _), (x, y) in zip(sprites, wanted, centres, strict=True)
    ]


def place_people(rng: Generator, size_hw: SizeHW, same: bool, shortest: float = 0.45) -> list[Item]:
    """One to three people, `shortest` to 90 % of the image's height (less where the image is too narrow for that).

    `same`: they all wear the same garment in the same colour.
    """
    height, width = size_hw
    count = pick(rng, (1, 1, 1, 2, 2, 3))
    looks = [(pick(rng, GARMENTS), pick(rng, COLOUR_NAMES)) for _ in range(count)]
    if same:
        looks = looks[:1] * count
    items = []
    for i, (garment, colour) in enumerate(looks):
        tall = min(rng.uniform(shortest, 0.9) * height, 1.6 * width)
        sprite = draw_person(rng, garment, jittered(rng, colour), tall)
        h, w = sprite.mask.shape
        # Each has a share of the width to stand in, so that they hide each other only in part.
        x = (i + rng.uniform(0.2, 0.8)) / count * width
        x = float(np.clip(x, min(0.4 * w, width / 2), max(width - 0.4 * w, width / 2)))
        y = round(rng.uniform(0.3, 1) * (height - h))
        items.append(Item(sprite, y, round(x - w / 2), "person", colour, garment))
    return items


def single(rng: Generator, size_hw: SizeHW, kinds: list[str]) -> list[Item]:
    """One to six of one of the kinds, mostly in one colour."""
    kind = pick(rng, kinds)
    if kind == "person":
        return place_people(rng, size_hw, same=True)
    count = pick(rng, (1, 1, 1, 2, 2, 3, 3, 4, 5, 6))
    low, high = ((0.45, 0.85), (0.35, 0.55), (0.3, 0.45), (0.25, 0.38))[min(count, 4) - 1]
    colours = [COLOUR_NAMES[i] for i in rng.integers(len(COLOUR_NAMES), size=count)]
    if rng.random() < 0.85:
        colours = colours[:1] * count
    region = int(rng.integers(len(_REGIONS) - (count > 2))) if rng.random() < 0.6 else 0
    wanted = [(kind, colour, max(12.0, rng.uniform(low, high) * min(size_hw))) for colour in colours]
    return _things(rng, wanted, region, size_hw)


def mixed(rng: Generator, size_hw: SizeHW, things: list[str], people: float) -> list[Item]:
    """One to eight things of up to four kinds in front of, or behind, up to three people.

    `things`: the kinds to draw from, without the person; may be empty.
    """
    count = int(rng.integers(1, 9)) if things else 0
    looks = [(pick(rng, things), pick(rng, COLOUR_NAMES)) for _ in range(rng.integers(1, 5) if things else 0)]
    wanted = []
    for _ in range(count):
        kind, colour = pick(rng, looks)
        # Half of the things share the colour of their kind, so that a caption has groups to name.
        colour = colour if rng.random() < 0.5 else pick(rng, COLOUR_NAMES)
        size = rng.uniform(0.2, 0.47 - 0.02 * count) * min(size_hw)
        wanted.append((kind, colour, max(12.0, size)))
    items = _things(rng, wanted, 0, size_hw)
    crowd = place_people(rng, size_hw, same=False) if rng.random() < people else []
    # Mostly people stand behind: they are large and would hide the things.
    split = 0 if rng.random() < 0.7 else int(rng.integers(len(items) + 1))
    return items[:split] + crowd + items[split:]
