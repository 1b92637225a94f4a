"""One scene of the fair and its exact truth, a pure function of (seed, index).

Every pixel of a scene is either pure background or copied from exactly one sprite, so the instance map is not an
annotation of the image but what the image was made from. What ends up mostly hidden is taken out before painting:
everything that can be seen is labelled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from indiclip.generated.base import Float32s, Mask, SizeHW, UInt8, must_be_at_least
from indiclip.generated.mela_hard import draw_clutter, hard_mixed, hard_single
from indiclip.generated.mela_layout import Item, draw_background, mixed, single
from indiclip.generated.mela_words import CLASSES, Group, captions
from indiclip.names import check_choice

LAYOUTS = ["single", "mixed"]
DIFFICULTIES = ["normal", "hard"]
EMPTY = 0.03  # share of mixed scenes without any object
MIN_SIDE = 32  # pixels; below, things have no room for 12 pixels of their own
MIN_VISIBLE = 0.25  # of an instance's pixels, and
MIN_PIXELS = 12  # this many, or the instance is taken out


Int16s = NDArray[np.int16]


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

    image_HW3: UInt8
    instances_HW: Int16s
    parts_HW: UInt8
    uv_HW2: Float32s
    boxes_xyxy: Float32s
    classes: NDArray[np.int64]
    colours: list[str]
    garments: list[str]
    points_xy: Float32s
    captions: dict[str, str]

    @property
    def depth_HW(self) -> Float32s:
        """float32 in (0, 1], by painting order: 1 on the background, then in equal steps to 1 / (M + 1) in front.

        Nothing is 0, which fills what lies outside of an image in a batch.
        """
        return (1 - (self.instances_HW + 1) / (len(self.classes) + 1)).astype(np.float32)


def _instance_map(items: list[Item], size_hw: SizeHW) -> Int16s:
    instances = np.full(size_hw, -1, np.int16)
    for i, item in enumerate(items):
        image, sprite = item.windows(size_hw)
        np.copyto(instances[image], np.int16(i), where=item.sprite.mask[sprite])
    return instances


def _visible_only(items: list[Item], size_hw: SizeHW) -> tuple[list[Item], Int16s]:
    """Take out what is mostly hidden or outside; what stays can only become more visible by that."""
    instances = _instance_map(items, size_hw)
    pixels = np.bincount(instances.ravel() + 1, minlength=len(items) + 1)[1:]
    needed = [max(MIN_PIXELS, MIN_VISIBLE * int(item.sprite.mask.sum())) for item in items]
    kept = [item for item, has, needs in zip(items, pixels, needed, strict=True) if has >= needs]
    return kept, instances if len(kept) == len(items) else _instance_map(kept, size_hw)


def _box_and_point(own: Mask, top: int, left: int) -> list[float]:
    """The tight box of a mask whose first pixel is at (top, left), and the centre of its pixel nearest the middle."""
    rows, columns = own.sum(axis=1), own.sum(axis=0)
    ys, xs = rows.nonzero()[0], columns.nonzero()[0]
    y, x = (int(weights @ np.arange(len(weights)) / weights.sum() + 0.5) for weights in (rows, columns))
    if not own[y, x]:
        all_y, all_x = own.nonzero()
        nearest = ((all_y - y) ** 2 + (all_x - x) ** 2).argmin()
        y, x = int(all_y[nearest]), int(all_x[nearest])
    return [left + xs[0], top + ys[0], left + xs[-1] + 1, top + ys[-1] + 1, left + x + 0.5, top + y + 0.5]


def place_of(points_xy: Float32s, size_hw: SizeHW) -> str:
    """Where the points are: the half, or the middle, that holds them all, else "everywhere"; "" for none."""
    if not len(points_xy):
        return ""
    relative = points_xy / size_hw[::-1] - 0.5
    if (np.abs(relative) < 0.16).all():
        return "centre"
    x, y = relative.mean(axis=0)
    sides = [("left" if x < 0 else "right", 0, x), ("top" if y < 0 else "bottom", 1, y)]
    for side, axis, mean in sorted(sides, key=lambda entry: -abs(entry[2])):
        if (relative[:, axis] * np.sign(mean) > 0).all():
            return side
    return "everywhere"


def _groups(items: list[Item]) -> list[Group]:
    """The kinds in a scene, most frequent first."""
    groups = []
    for kind in CLASSES:
        looks = [(item.colour, item.garment) for item in items if item.kind == kind]
        if looks:
            groups.append(Group(kind, len(looks), *(looks[0] if len(set(looks)) == 1 else ("", ""))))
    return sorted(groups, key=lambda group: -group.count)


def kinds_in(kinds: Sequence[str] | None, people: float) -> list[str]:
    """The kinds that occur in scenes of these arguments, in the order of `CLASSES`."""
    return [kind for kind in CLASSES if (kinds is None or kind in kinds) and (kind != "person" or people > 0)]


def _checked_kinds(kinds: Sequence[str] | None, people: float) -> list[str]:
    if not 0 <= people <= 1:
        raise ValueError(f"people: expected a probability in [0, 1]; found {people!r}")
    if isinstance(kinds, str) or (kinds is not None and not kinds):
        raise ValueError(f"kinds: expected a list such as ['diya', 'kite']; found {kinds!r}")
    for kind in kinds or ():
        check_choice("kinds", kind, CLASSES)
    if not (occurring := kinds_in(kinds, people)):
        raise ValueError(f"kinds: {list(kinds or ())} are never drawn where people is {people}")
    return occurring


def draw_scene(
    seed: int,
    index: int,
    height: int,
    width: int,
    layout: str = "mixed",
    people: float = 0.5,
    kinds: Sequence[str] | None = None,
    difficulty: str = "normal",
) -> Scene:
    """Draw scene number `index` of the fair that `seed` names: the same bytes in any process and any order.

    Args:
        seed: Which fair, from 0 up.
        index: Which of its scenes, from 0 up.
        height: Of the image, in pixels, at least 32.
        width: Of the image, in pixels, at least 32.
        layout: "single" (one to six of one kind, large) or "mixed" (up to eight things of several kinds).
        people: Mixed: probability of a scene with one to three people. Single: people are one of the 17 kinds, or
            none of them where this is 0.
        kinds: Those of `CLASSES` that may occur; None for all.
        difficulty: "normal" or "hard" (see `indiclip.generated.mela_hard`).

    Raises:
        ValueError: An argument is out of its range.
    """
    check_choice("layout", layout, LAYOUTS)
    check_choice("difficulty", difficulty, DIFFICULTIES)
    must_be_at_least(0, seed=seed, index=index)
    must_be_at_least(MIN_SIDE, height=height, width=width)
    occurring = _checked_kinds(kinds, people)
    rng, size_hw = default_rng([seed, index]), (height, width)
    image = draw_background(rng, size_hw)
    place_single, place_mixed = single, mixed
    if difficulty == "hard":
        image = draw_clutter(rng, image)
        place_single, place_mixed = hard_single, hard_mixed
    if layout == "single":
        items = place_single(rng, size_hw, occurring)
    elif rng.random() < EMPTY:
        items = []
    else:
        things = [kind for kind in occurring if kind != "person"]
        items = place_mixed(rng, size_hw, things, people if "person" in occurring else 0.0)
    items, instances = _visible_only(items, size_hw)
    return _assemble(rng, image, items, instances)


def _assemble(rng: Generator, image: UInt8, items: list[Item], instances: Int16s) -> Scene:
    """Paint the items where the instance map says they show, and read the labels off the same masks."""
    parts = np.zeros(instances.shape, np.uint8)
    uv = np.zeros((*instances.shape, 2), np.float32)
    labels = []
    for i, item in enumerate(items):
        shown, source = item.windows(instances.shape)
        own = instances[shown] == i
        sprite = item.sprite
        np.copyto(image[shown], sprite.rgb[source], where=own[..., None])
        if sprite.parts is not None and sprite.uv is not None:
            np.copyto(parts[shown], sprite.parts[source], where=own)
            np.copyto(uv[shown], sprite.uv[source], where=own[..., None])
        labels.append(_box_and_point(own, shown[0].start, shown[1].start))
    boxes_xyxy, points_xy = np.split(np.array(labels, np.float32).reshape(-1, 6), [4], axis=1)
    return Scene(
        image_HW3=image,
        instances_HW=instances,
        parts_HW=parts,
        uv_HW2=uv,
        boxes_xyxy=boxes_xyxy,
        classes=np.array([CLASSES.index(item.kind) for item in items], np.int64),
        colours=[item.colour for item in items],
        garments=[item.garment for item in items],
        points_xy=points_xy,
        captions=captions(rng, _groups(items), place_of(points_xy, instances.shape)),
    )
