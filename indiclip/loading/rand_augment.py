"""RandAugment (Cubuk et al., CVPRW 2020, arXiv:1909.13719) that moves all of a sample, not its image alone.

torchvision's own refuses a sample with boxes or masks. This one draws the same operations from the same random numbers,
so that images are equal bit by bit, and applies those that move pixels to every field. It reads private parts of
`torchvision.transforms.v2.RandAugment`; tried with torchvision 0.29.

big_vision's operations and their sizes, which are those of the AugReg paper (Steiner et al., TMLR 2022,
arXiv:2106.10270), are of `big_vision/pp/archive/autoaugment.py`. There magnitude 10 is what 30 is in torchvision's: at
15, images are rotated by 45 degrees and not by 15. Pixels that it counts in images of 224 x 224 are shares here.
"""

from collections.abc import Callable
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from indiclip.loading.geometry import Fields, drop_outside
from indiclip.loading.kernels import plain
from indiclip.names import check_choice, check_range

# (number of magnitudes, height, width) -> the size of an operation at each, and whether half of them are negative.
Space = dict[str, tuple[Callable[[int, int, int], Tensor | None], bool]]

_MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_MAX_MAGNITUDE = 30


def _levels(bins: int) -> Tensor:
    return torch.arange(bins) / 10


def _none(bins: int, height: int, width: int) -> None:
    return None


def _enhance(bins: int, height: int, width: int) -> Tensor:
    return _levels(bins) * 1.8 - 0.9  # torchvision adds 1: from nearly black, or grey, on


def _bits(bins: int, height: int, width: int) -> Tensor:
    """That Posterize leaves. One at least: of an 8-bit number TensorFlow moves no more than 7 bits out."""
    return (_levels(bins) * 4).int().clamp(1, 8)


# Some get weaker: from magnitude 10 on Solarize does nothing, from 20 on Posterize. At 0 many do much. Contrast is
# torchvision's, about the mean grey: big_vision's is about an image's number of pixels / 256, clipped to 255.
BIG_VISION: Space = {
    "AutoContrast": (_none, False),
    "Equalize": (_none, False),
    "Invert": (_none, False),
    "Rotate": (lambda bins, height, width: _levels(bins) * 30, True),
    "Posterize": (_bits, False),
    "Solarize": (lambda bins, height, width: (_levels(bins) * 256).int() / 255, False),  # of 255
    "Color": (_enhance, False),
    "Contrast": (_enhance, False),
    "Brightness": (_enhance, False),
    "Sharpness": (_enhance, False),
    "ShearX": (lambda bins, height, width: _levels(bins) * 0.3, True),
    "ShearY": (lambda bins, height, width: _levels(bins) * 0.3, True),
    "TranslateX": (lambda bins, height, width: _levels(bins) * width * 100 / 224, True),
    "TranslateY": (lambda bins, height, width: _levels(bins) * height * 100 / 224, True),
    "Cutout": (lambda bins, height, width: _levels(bins) * sqrt(height * width) * 40 / 224, False),  # half a side
    "SolarizeAdd": (lambda bins, height, width: (_levels(bins) * 110).int(), False),
}


class RandAugment(v2.RandAugment):  # type: ignore[misc]
    """Some random operations on an image; boxes, points, masks and maps move with it, and go where it loses them.

    It does the same to an image of any size, so it runs on the resized one.

    Args:
        num_ops: Operations, one after the other; the same may come twice.
        magnitude: Of all of them, 0 to 30.
        space: Which operations there are and what a magnitude means: those of `torchvision`, or of `big_vision`.
        interpolation: Of the image: `nearest` or `bilinear`.
        fill: Grey level of what was not in the image, or one for each colour.

    Raises:
        ValueError: A number out of its range.
    """

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: int = 9,
        space: Literal["torchvision", "big_vision"] = "torchvision",
        interpolation: Literal["nearest", "bilinear"] = "nearest",
        fill: float | list[float] | None = None,
    ) -> None:
        check_choice("augment: RandAugment.space", space, ("torchvision", "big_vision"))
        check_range({"augment: RandAugment.magnitude": magnitude}, 0, _MAX_MAGNITUDE)
        check_range({"augment: RandAugment.num_ops": num_ops})
        super().__init__(num_ops, magnitude, _MAX_MAGNITUDE + 1, interpolation, fill)
        self.space: Space = BIG_VISION if space == "big_vision" else self._AUGMENTATION_SPACE

    def forward(self, fields: Fields) -> Fields:
        """The fields of a sample, `image` among them (uint8), as `indiclip.loading.geometry.wrap` gives them."""
        fields = dict(fields)
        height, width = fields["image"].shape[-2:]
        for _ in range(self.num_ops):
            name, (magnitudes_of, signed) = self._get_random_item(self.space)
            magnitudes, magnitude = magnitudes_of(self.num_magnitude_bins, height, width), 0.0
            if magnitudes is not None:
                magnitude = float(magnitudes[self.magnitude])
                if signed and torch.rand(()) <= 0.5:
                    magnitude *= -1
            moved = [key for key, value in fields.items() if isinstance(value, tv_tensors.TVTensor)]
            for key in moved if name in _MOVES else ["image"]:
                fields[key] = self._apply(fields[key], name, magnitude)
            if name in _MOVES:  # what is lost now does not come back with the next one
                fields = drop_outside(fields, (height, width))
        return fields

    def _apply(self, value: Any, name: str, magnitude: float) -> Any:
        if name == "Cutout":
            return self._cut_out(value, int(magnitude))
        if name == "SolarizeAdd":
            image = plain(value)
            added = (image.int() + int(magnitude)).clamp(max=255).to(image.dtype)
            return tv_tensors.wrap(added.where(image < 128, image), like=value)
        if name == "Solarize" and magnitude > 1:  # no pixel is so bright
            return value
        return self._apply_image_or_video_transform(value, name, magnitude, self.interpolation, self._fill)

    def _cut_out(self, image: Any, half: int) -> Any:
        """A square of the fill, its middle anywhere in the image (DeVries, Taylor, arXiv:1708.04552)."""
        height, width = image.shape[-2:]
        row, column = int(torch.randint(height, ())), int(torch.randint(width, ()))
        top, left = max(row - half, 0), max(column - half, 0)
        size = (min(row + half, height) - top, min(column + half, width) - left)
        grey = torch.tensor(self._fill["others"] or 0.0).to(image.dtype).reshape(-1, 1, 1)
        return TF.erase(image, top, left, *size, grey)
