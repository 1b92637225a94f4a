"""The fair made difficult: clutter behind, look-alikes of one colour, sizes 1:8, turned and in front of each other."""

from functools import lru_cache

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from indiclip.generated.base import Floats, SizeHW, UInt8, pick
from indiclip.generated.mela_layout import COLOUR_NAMES, Item, jittered, place_people
from indiclip.generated.mela_things import THINGS, draw_thing

SMALLEST = 0.1  # of the image's shorter side, but not below
_LEAST_PIXELS = 10.0  # where a thing can still be told from another
SCALE = 8.0  # the largest thing is so many times as large as the smallest


def draw_clutter(rng: Generator, image_HW3: UInt8) -> UInt8:
    """The background with 12 to 24 polygons in colours of the fair, which are nothing that has a label."""
    canvas = Image.fromarray(image_HW3)
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(12, 25)):
        corners = int(rng.integers(3, 7))
        angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
        radii = rng.uniform(0.03, 0.15) * min(canvas.size) * rng.uniform(0.6, 1, corners)
        x, y = rng.random(2) * canvas.size
        polygon = np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], axis=1)
        draw.polygon(polygon.ravel().tolist(), fill=jittered(rng, pick(rng, COLOUR_NAMES)))
    return np.array(canvas)


def hard_single(rng: Generator, size_hw: SizeHW, kinds: list[str]) -> list[Item]:
    """One to six of one of the kinds, from small to large, turned any way and close together."""
    kind = pick(rng, kinds)
    if kind == "person":
        return place_people(rng, size_hw, same=True, shortest=0.3)
    colour = pick(rng, COLOUR_NAMES)
    return _crowd(rng, [(kind, colour)] * int(rng.integers(1, 7)), size_hw)


def hard_mixed(rng: Generator, size_hw: SizeHW, things: list[str], people: float) -> list[Item]:
    """Four to nine things of two or three kinds that look alike, and up to three people anywhere between them."""
    wanted = []
    if things:
        alike = _look_alikes(pick(rng, things), things)[: rng.integers(2, 4)]
        shared = pick(rng, COLOUR_NAMES)
        # Half of the things have one colour, whatever their kind is.
        colours = [shared if rng.random() < 0.5 else pick(rng, COLOUR_NAMES) for _ in range(rng.integers(4, 10))]
        wanted = [(pick(rng, alike), colour) for colour in colours]
    items = _crowd(rng, wanted, size_hw)
    crowd = place_people(rng, size_hw, same=False, shortest=0.3) if rng.random() < people else []
    split = int(rng.integers(len(items) + 1))
    return items[:split] + crowd + items[split:]


def _crowd(rng: Generator, wanted: list[tuple[str, str]], size_hw: SizeHW) -> list[Item]:
    """Things from (kind, colour): most of them beside an earlier one, which they hide in part."""
    short, image_wh = min(size_hw), np.array(size_hw[::-1])
    smallest = max(_LEAST_PIXELS, SMALLEST * short)
    largest = min(SCALE * smallest, 0.9 * short)
    sizes = smallest * (largest / smallest) ** rng.random(len(wanted))
    sizes[:1] = sizes[:1].clip(0.3 * short)  # so that no scene is without anything to see
    centres: list[Floats] = []
    items = []
    for i, (kind, colour) in enumerate(wanted):
        turn, stretch, mirror = rng.uniform(-np.pi, np.pi), rng.uniform(0.75, 1.33), rng.random() < 0.5
        sprite = draw_thing(kind, jittered(rng, colour), sizes[i], turn, stretch, mirror)
        centre = rng.random(2) * image_wh
        if i and rng.random() < 0.7:
            beside = int(rng.integers(i))
            angle = rng.uniform(0, 2 * np.pi)
            apart = rng.uniform(0.5, 0.9) * (sizes[i] + sizes[beside]) / 2
            centre = centres[beside] + apart * np.array([np.cos(angle), np.sin(angle)])
        centre = centre.clip(0.35 * sizes[i], image_wh - 0.35 * sizes[i])
        centres.append(centre)
        items.append(Item.centred(sprite, centre[0], centre[1], kind, colour))
    return items


def _look_alikes(kind: str, things: list[str]) -> list[str]:
    """The kinds by how little they differ from this one, which is the first."""
    differences = _differences()[THINGS.index(kind)]
    return sorted(things, key=lambda other: float(differences[THINGS.index(other)]))


@lru_cache(maxsize=1)
def _differences() -> Floats:
    """Between all pairs of things, in one colour at 24 pixels: the mean squared difference of their pixels."""
    pictures = np.full((len(THINGS), 26, 26, 3), 220.0)
    for picture, kind in zip(pictures, THINGS, strict=True):
        sprite = draw_thing(kind, (213, 0, 109), 24, 0)
        h, w = sprite.mask.shape
        top, left = (26 - h) // 2, (26 - w) // 2
        picture[top : top + h, left : left + w][sprite.mask] = sprite.rgb[sprite.mask]
    return np.asarray(np.square(pictures[:, None] - pictures[None]).mean(axis=(2, 3, 4)))
