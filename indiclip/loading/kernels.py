"""The kinds of things that move with an image, and where torchvision moves them otherwise than we need.

Tried with torchvision 0.29 (0.26 has the same functions). Shape letters: M rows; H W height and width in pixels.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

_STEPS = 20  # of the search for the place that an elastic displacement moves to a given one
_EDGE = 9  # points on a side of a box that is bent


class ExactMask(tv_tensors.Mask):  # type: ignore[misc]
    """(..., height, width), resized to the nearest pixel; torchvision's own takes one up to half a pixel off."""


class SmoothMask(tv_tensors.Mask):  # type: ignore[misc]
    """(..., height, width), resized bilinearly; NaN where an augmentation shows what was not in the image."""


class Boxes(tv_tensors.BoundingBoxes):  # type: ignore[misc]
    """(M, 4), or points as boxes without an extent. A box that is turned becomes the upright one around its corners.

    torchvision's own are up to 1.6 pixels off after a rotation that enlarges the image, and more after an elastic one.
    """


def as_boxes(corners_M4: Tensor, canvas: tuple[int, int], clamping: str | None, kind: type = Boxes) -> Any:
    """Boxes in an image of (height, width); `clamping` None leaves them outside of it."""
    return kind(corners_M4, format="XYXY", canvas_size=canvas, clamping_mode=clamping)  # type: ignore[call-arg]


def plain(value: Any) -> Any:
    """A tv_tensor as a plain tensor; anything else as it is."""
    return value.as_subclass(Tensor) if isinstance(value, Tensor) else value


def _register_move(operation: Callable[..., Any], kind: type) -> None:
    """A mask is not filled as the image is: a grey of 128 is no mask and no depth."""

    @TF.register_kernel(operation, kind)  # type: ignore[untyped-decorator]
    def moved(value: Tensor, *args: Any, fill: Any = None, **options: Any) -> Any:
        mask = plain(value)
        found = plain(operation(tv_tensors.Mask(mask), *args, **options))
        if kind is SmoothMask:
            inside = plain(operation(tv_tensors.Mask(torch.ones_like(mask)), *args, **options))
            found = found.where(inside > 0, torch.nan)
        return tv_tensors.wrap(found, like=value)


def _register_resize(kind: type, interpolation: InterpolationMode) -> None:
    @TF.register_kernel(TF.resize, kind)  # type: ignore[untyped-decorator]
    def resize(value: Tensor, size: list[int], **options: Any) -> Any:
        resized = TF.resize(plain(value), size, interpolation=interpolation, antialias=True, **_longest(options))
        return tv_tensors.wrap(resized, like=value)

    @TF.register_kernel(TF.resized_crop, kind)  # type: ignore[untyped-decorator]
    def resized_crop(
        value: Tensor, top: int, left: int, height: int, width: int, size: list[int], **options: Any
    ) -> Any:
        return resize(tv_tensors.wrap(TF.crop(plain(value), top, left, height, width), like=value), size)


def _longest(options: dict[str, Any]) -> dict[str, Any]:
    """The limit on the longer side, where a `Resize` names one."""
    return {name: value for name, value in options.items() if name == "max_size"}


for _kind, _interpolation in ((ExactMask, InterpolationMode.NEAREST_EXACT), (SmoothMask, InterpolationMode.BILINEAR)):
    _register_resize(_kind, _interpolation)
    # Those that may show what was not in the image.
    for _operation in (TF.affine, TF.rotate, TF.perspective, TF.elastic, TF.pad, TF.crop, TF.center_crop):
        _register_move(_operation, _kind)


@TF.register_kernel(TF.rotate, Boxes)  # type: ignore[untyped-decorator]
def _rotate(value: Any, angle: float, expand: bool = False, center: Any = None, **options: Any) -> Any:
    """About the image's middle, which is that of the enlarged one too."""
    size = value.canvas_size
    boxes = as_boxes(plain(value), size, None, tv_tensors.BoundingBoxes)
    turned = plain(TF.rotate(boxes, angle, center=None if expand else center))
    if expand:
        # As the image's own; what torchvision says for boxes is a pixel off, and wrong where there is none.
        size = tuple(TF.rotate(torch.empty(1, *size, device="meta"), angle, expand=True).shape[1:])
        height, width = ((new - old) / 2 for new, old in zip(size, value.canvas_size, strict=True))
        turned = turned + turned.new_tensor([width, height, width, height])
    return _clamped(turned, value, size)


@TF.register_kernel(TF.elastic, Boxes)  # type: ignore[untyped-decorator]
def _elastic(value: Any, displacement: Tensor, **options: Any) -> Any:
    """Around the places that points on a grid in the box are moved to: p with p + displacement(p) = the point."""
    size_WH = plain(value).new_tensor(value.canvas_size[::-1])
    low_M2, high_M2 = plain(value)[:, None, None].split(2, dim=-1)
    t = torch.linspace(0, 1, _EDGE, dtype=size_WH.dtype)
    share = torch.stack(torch.meshgrid(t, t, indexing="xy"), dim=-1)
    start = low_M2 + share * (high_M2 - low_M2)
    field = displacement.to(size_WH.dtype).permute(0, 3, 1, 2)
    found = start
    for _ in range(_STEPS):
        grid = (found / size_WH * 2 - 1).reshape(1, 1, -1, 2)
        moved = F.grid_sample(field, grid, padding_mode="border", align_corners=False)
        found = start - moved[0, :, 0].T.reshape(start.shape) * size_WH / 2
    corners = torch.cat([found.amin((1, 2)), found.amax((1, 2))], dim=1)
    return _clamped(corners, value, value.canvas_size)


def _clamped(corners_M4: Tensor, like: Any, size: tuple[int, int]) -> Any:
    return TF.clamp_bounding_boxes(tv_tensors.wrap(corners_M4, like=like, canvas_size=size))
