"""What the generated data sets share: checks of what they are asked for, a length, and names for their samples."""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any, TypeVar

import numpy as np
import yaml
from numpy.random import Generator
from numpy.typing import NDArray

from indiclip.datasets.base import SampleDataset

PARTS = ("train", "test")  # of the data sets that train and test reading and colours
T = TypeVar("T")
Floats = NDArray[np.float64]
Float32s = NDArray[np.float32]
UInt8 = NDArray[np.uint8]
Mask = NDArray[np.bool_]
SizeHW = tuple[int, int]  # pixels


def must_be_at_least(least: int, **arguments: int) -> None:
    """Raise ValueError that names the argument which is less."""
    for name, value in arguments.items():
        if value < least:
            raise ValueError(f"{name}: expected a whole number from {least} up; found {value!r}")


def pick(rng: Generator, choices: Sequence[T]) -> T:
    """One of the choices, each as likely."""
    return choices[int(rng.integers(len(choices)))]


def grainy(rng: Generator, image: UInt8, most: float) -> UInt8:
    """An image with a camera's noise, of a deviation up to `most`."""
    noise = rng.normal(0, rng.uniform(0, most), (*image.shape[:2], 1))
    return np.rint(image + noise).clip(0, 255).astype(np.uint8)


def load_table(name: str) -> Any:
    """What a YAML file beside this one holds."""
    return yaml.safe_load((files(__package__) / name).read_text("utf-8"))


class Generated(SampleDataset):
    """Images that are a pure function of a seed and their number.

    Args:
        name: First word of the samples' keys.
        size: Of the images in pixels: one number for square ones, or [height, width].
        least_side: Fewest pixels of a side.
        seed: Which data set.
        length: Number of images, under the name of the argument that says so.

    Raises:
        ValueError: An argument is out of its range; names it.
    """

    is_generated = True

    def __init__(self, name: str, size: int | list[int], least_side: int, seed: int, **length: int) -> None:
        must_be_at_least(1, **length)
        must_be_at_least(0, seed=seed)
        sides = [size, size] if isinstance(size, int) else list(size)
        if len(sides) != 2 or not all(isinstance(side, int) and side >= least_side for side in sides):
            expected = f"one number or [height, width], each at least {least_side} pixels"
            raise ValueError(f"size: expected {expected}; found {size!r}")
        (self.length,) = length.values()
        self.name, self.seed, self.size_hw = name, seed, (sides[0], sides[1])

    def __len__(self) -> int:
        return self.length

    def key(self, index: int) -> str:
        """The image's name. Draws nothing."""
        return f"{self.name}-{self.seed}-{index}"

    def must_have(self, index: int) -> None:
        """Raise IndexError where there is no such image."""
        if not 0 <= index < self.length:
            raise IndexError(f"index: expected 0 to {self.length - 1}; found {index}")
