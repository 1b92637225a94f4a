"""Swatches: generated images of named colours, as painted patches, as cloth and as things.

A colour is never drawn at its exact value: it strays in CIELAB by less than half the way to the nearest other colour,
by CIE76 and by CIEDE2000, so it is still nearest to its own name. An image is a pure function of (part, seed, index).
Training and testing have other weaves and other things.

    swatches = Swatches({"kesariya": "#FF9933", "firozi": "#40E0D0"}, num_images=60, part="test")
    swatches[7]["image"], swatches[7]["caption"], swatches.kind(7)
"""

import numpy as np
from numpy.random import Generator, default_rng

from indiclip.generated.base import PARTS, Floats, Generated, Mask, UInt8, pick
from indiclip.generated.cielab import RGB, delta_e76, delta_e2000, lab_to_srgb, rgb_of_hex, srgb_to_lab
from indiclip.generated.swatch_draw import TABLE, draw_cloth, draw_object, draw_patch
from indiclip.names import check_choice
from indiclip.types import Sample

KINDS = ("patch", "cloth", "thing")
WEAVES = {part: list(drafts) for part, drafts in TABLE["weaves"].items()}
THINGS: dict[str, list[str]] = TABLE["things"]
MIN_SIDE = 32
STRAY = 0.45  # of the distance to the nearest other colour; at 0.5 it would be as near as its own
_WIDEST = 12.0  # CIE76 that a colour strays at most, however alone it is
_TRIES = 1000


class Swatches(Generated):
    """Images of named colours as a map-style data set; the colours take turns, then the kinds.

    `label` is the place of the colour in `colours`.

    Args:
        colours: Ids and their values as #RRGGBB; at least two, no two alike.
        num_images: Length of the data set.
        part: "train" or "test": other weaves, other things, other draws.
        size: Of the images in pixels: one number for square ones, or [height, width].
        seed: Which data set.

    Raises:
        ValueError: An argument is out of its range; names it.
    """

    def __init__(
        self,
        colours: dict[str, str],
        num_images: int = 12_000,
        part: str = "train",
        size: int | list[int] = 224,
        seed: int = 0,
    ) -> None:
        check_choice("part", part, PARTS)
        super().__init__(f"swatch-{part}", size, MIN_SIDE, seed, num_images=num_images)
        self.part = part
        self.colours = list(colours)
        self.labs = np.array([srgb_to_lab(rgb_of_hex(colour)) for colour in colours.values()]).reshape(-1, 3)
        self.room = _room(self.colours, self.labs)

    def __getitem__(self, index: int) -> Sample:
        image, _ = self.draw(index)
        name = self.colours[self.label(index)].replace("_", " ")
        return {
            "image": image,
            "key": self.key(index),
            "caption": TABLE["captions"][self.kind(index)].format(name),
            "label": self.label(index),
        }

    def label(self, index: int) -> int:
        """The place of the image's colour in `colours`."""
        self.must_have(index)
        return index % len(self.colours)

    def kind(self, index: int) -> str:
        """What has the colour: one of `KINDS`."""
        self.label(index)
        return KINDS[index // len(self.colours) % len(KINDS)]

    def draw(self, index: int) -> tuple[UInt8, Mask]:
        """The image, uint8 (height, width, 3), and where it has the colour, bool (height, width)."""
        label, kind = self.label(index), self.kind(index)
        rng = default_rng([self.seed, index, PARTS.index(self.part)])
        rgb = self.stray(rng, label)
        if kind == "patch":
            return draw_patch(rng, rgb, self.size_hw)
        choices = (WEAVES if kind == "cloth" else THINGS)[self.part]
        draw = draw_cloth if kind == "cloth" else draw_object
        return draw(rng, rgb, self.size_hw, pick(rng, choices))

    def stray(self, rng: Generator, label: int) -> RGB:
        """A colour near that of a label, and nearer to it than to any other."""
        own, (room76, room2000) = self.labs[label], self.room[label]
        for _ in range(_TRIES):
            direction = rng.normal(size=3)
            length = min(STRAY * room76, _WIDEST) * rng.random() ** (1 / 3)  # even in the ball
            red, green, blue = lab_to_srgb(own + length * direction / np.linalg.norm(direction)).tolist()
            lab = srgb_to_lab((red, green, blue))  # what the screen shows, after rounding and clipping
            if delta_e76(lab, own) < STRAY * room76 and delta_e2000(lab, own) < STRAY * room2000:
                return red, green, blue
        raise AssertionError(f"{self.colours[label]}: its own value is not within reach of itself")


def _room(colours: list[str], labs: Floats) -> Floats:
    """Per colour the distance to the nearest other one, by CIE76 and by CIEDE2000."""
    if len(colours) < 2:
        raise ValueError(f"colours: expected at least two; found {colours}")
    apart = np.stack([delta_e76(labs[:, None], labs), delta_e2000(labs[:, None], labs)])
    apart[:, np.eye(len(colours), dtype=bool)] = np.inf
    if apart.min() < 4:  # rounding to 8 bits moves a colour by up to about 1
        a, b = divmod(int(apart.min(axis=0).argmin()), len(colours))
        raise ValueError(f"colours: {colours[a]} and {colours[b]} are too alike to be told apart")
    return np.asarray(apart.min(axis=2).T)
