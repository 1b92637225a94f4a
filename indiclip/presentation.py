"""How people see what a head predicts, and how they read its numbers. Heads import it from `indiclip.head`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from indiclip.types import Batch, class_names


class Panel(NamedTuple):
    """One of the images that stand side by side in a picture.

    Attributes:
        image_HW3: uint8 RGB.
        title: What it shows, such as `model` and `truth`.
        labels: Words at places: x and y in the image's pixels, of a box its upper left corner. They are not drawn into
            the image, so that they can be read at any size and in any script.
    """

    image_HW3: np.ndarray
    title: str = ""
    labels: Sequence[tuple[float, float, str]] = ()


class Line(NamedTuple):
    """A line of text below a picture.

    Attributes:
        language: The code of the language that the text is in, where that is known.
        mark: A sign before it, such as ✓, which belongs to no language.
    """

    text: str
    language: str = ""
    mark: str = ""


# What is shown of a held-out image: pixels (uint8 RGB) or panels, and the lines below.
Picture = tuple[np.ndarray | Sequence[Panel], str | Sequence[Line]]


class Measure(NamedTuple):
    """How people read a number of a head's metric.

    Attributes:
        words: What it is, such as `AP at IoU 0.5`.
        better: Which direction is; empty where neither is.
        unit: Empty for shares and ratios.
        trivial: What an answer gets that looks at no image; None where the head cannot know.
        answer: Which answer that is, such as `guessing among 17 classes`.
        main: Whether it may stand for the head in a summary; of several, the first that was measured does.
    """

    words: str
    better: Literal["higher", "lower", ""] = ""
    unit: str = ""
    trivial: float | None = None
    answer: str = ""
    main: bool = False


class Frame(NamedTuple):
    """The image that a prediction is of, as it was before it was resized: upright, as the model saw it.

    Attributes:
        size_hw: Height and width in pixels.
        scale_hw: Of the resized image to this one.
        class_names: Of the source; empty where they are unknown.
    """

    size_hw: tuple[int, int]
    scale_hw: tuple[float, float]
    class_names: Sequence[str] = ()

    @classmethod
    def of(cls, batch: Batch, image: int) -> "Frame":
        """That of an image of a batch."""
        scale_hw, resized_hw = batch["images"]["scale"][image], batch["images"]["sizes_hw"][image]
        height, width = (round(side / scale) for side, scale in zip(resized_hw, scale_hw, strict=True))
        return cls((height, width), scale_hw, class_names(batch))

    def points(self, resized_xy: Tensor) -> Tensor:
        """Points (..., 2) of the resized image in this one's pixels."""
        size_wh, scale_wh = (resized_xy.new_tensor(pair[::-1]) for pair in (self.size_hw, self.scale_hw))
        return torch.minimum((resized_xy / scale_wh).clamp(min=0), size_wh)

    def boxes(self, resized_xyxy: Tensor) -> Tensor:
        """Boxes (..., 4) of the resized image in this one's pixels."""
        return self.points(resized_xyxy.reshape(-1, 2)).reshape(resized_xyxy.shape)


def plain(value: Any) -> Any:
    """A value that JSON has: tensors as lists, numbers with six digits, None for one that is not finite."""
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
