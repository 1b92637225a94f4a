"""From a `Sample` of a dataset to the patches and targets of a batch: image, boxes, points and masks move together.

The geometry is torchvision's (transforms v2 on tv_tensors), so its transforms can be named in a YAML.
Shape letters: see `indiclip.types`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from indiclip import patches
from indiclip.types import Batch, Sample

Prepared = dict[str, Any]

# Which entries of a sample belong to the same list, so that what a crop removes goes from all of them.
_PER_OBJECT = ("boxes_xyxy", "classes", "crowd", "masks")
_PER_PERSON = ("dp_boxes_xyxy", "dp_masks")
_PER_DP_POINT = ("dp_points_xy", "dp_person", "dp_part", "dp_uv")
# These take the first boxes of a sample for all that it has, but points and bodies are boxes too (see `_wrap`).
_FOR_ONE_LIST_OF_BOXES = (v2.RandomIoUCrop, v2.SanitizeBoundingBoxes)


class Transform:
    """Augment, resize into the token budget, cut into patches.

    Args:
        max_tokens: Most patches per image; larger images are scaled down, aspect kept.
        augment: torchvision v2 transforms on the uint8 image and its annotations, e.g. a
            `torchvision.transforms.v2.RandomHorizontalFlip`. Their random numbers are a function of (seed, sample
            position).

    Raises:
        ValueError: A transform that cannot move several lists of boxes.
    """

    def __init__(self, max_tokens: int = 256, augment: list[torch.nn.Module] | None = None) -> None:
        self.max_tokens = max_tokens
        self.augment = list(augment or [])
        for step in _each(self.augment):
            if isinstance(step, _FOR_ONE_LIST_OF_BOXES):
                raise ValueError(
                    f"augment: {type(step).__name__} loses points and bodies; what leaves the image is removed anyway, "
                    "and RandomResizedCrop crops"
                )

    @property
    def flips(self) -> bool:
        """Whether any step may mirror the image."""
        return any("Flip" in type(step).__name__ for step in _each(self.augment))

    def __call__(
        self, sample: Sample, patch_size: int, canvas_hw: tuple[int, int] | None, random_seed: int | None
    ) -> Prepared:
        """Prepare one sample.

        Args:
            patch_size: Side of a patch in pixels.
            canvas_hw: The one image size of a fixed-size backbone, or None.
            random_seed: Seeds the augmentation; None leaves it out (validation).

        Returns:
            `patches`, `size_hw`, `scale`, and the sample's annotations in the resized image's pixels, as tensors.
        """
        fields = _wrap(sample)
        if self.augment and random_seed is not None:
            # Not torch.manual_seed: it also seeds every GPU backend, at 0.3 ms a call.
            before = torch.default_generator.get_state()
            torch.default_generator.manual_seed(random_seed)
            fields = _drop_outside(v2.Compose(self.augment)(fields))
            torch.default_generator.set_state(before)
            if fields["image"].dtype != torch.uint8:
                raise ValueError(f"augment: gives an image of {fields['image'].dtype}; expected torch.uint8")
        height, width = fields["image"].shape[-2:]
        if canvas_hw is not None:
            size = patches.fit_canvas_hw(height, width, patch_size, canvas_hw)
        else:
            size = patches.fit_hw(height, width, patch_size, self.max_tokens)
        if size != (height, width):
            fields = v2.Resize(list(size), antialias=True)(fields)
        prepared = {name: _plain(value) for name, value in fields.items() if name != "image"}
        prepared |= {name: _inside(value, size) for name, value in prepared.items() if name.endswith("points_xy")}
        prepared["patches"] = patches.patchify(_plain(fields["image"]), patch_size)
        prepared["size_hw"] = size
        prepared["scale"] = (size[0] / height, size[1] / width)
        return prepared


def collate(samples: list[Prepared]) -> Batch:
    """Prepared samples -> `Batch`: patches padded to the longest, every annotation a list over the images."""
    samples = [dict(sample) for sample in samples]
    images = patches.stack(
        [sample.pop("patches") for sample in samples],
        [sample.pop("size_hw") for sample in samples],
        [sample.pop("scale") for sample in samples],
    )
    keys = [sample.pop("key") for sample in samples]
    names = dict.fromkeys(name for sample in samples for name in sample)
    targets = {name: [sample.get(name) for sample in samples] for name in names}
    return Batch(images=images, targets=targets, keys=keys, quarantined=[])


def _each(steps: Iterable[Any]) -> Iterator[Any]:
    """The transforms, and those inside of `Compose`, `RandomApply` and the like, which keep them in a plain list."""
    for step in steps:
        yield step
        yield from _each(getattr(step, "transforms", ()))


def _wrap(sample: Sample) -> dict[str, Any]:
    """NumPy -> tv_tensors, so that v2 transforms know what each entry is."""
    image_CHW = torch.from_numpy(np.ascontiguousarray(sample["image"])).permute(2, 0, 1)
    canvas = (int(image_CHW.shape[1]), int(image_CHW.shape[2]))
    fields: dict[str, Any] = {"image": tv_tensors.Image(image_CHW)}
    for name, value in sample.items():
        if name == "image":
            continue
        if isinstance(value, np.ndarray):
            tensor = torch.from_numpy(value)
            if name.endswith("boxes_xyxy"):
                tensor = tv_tensors.BoundingBoxes(tensor.reshape(-1, 4), format="XYXY", canvas_size=canvas)
            elif name.endswith("points_xy"):
                # As boxes without an extent: v2's KeyPoints count from the pixel's middle, boxes and our points from
                # its edge. Without clamping, because a clamped point would lie on the border instead of outside.
                corners = tensor.reshape(-1, 2).repeat(1, 2)
                tensor = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=canvas, clamping_mode=None)
            elif name.endswith("masks"):
                tensor = tv_tensors.Mask(tensor)
            fields[name] = tensor
        else:
            fields[name] = value
    return fields


def _drop_outside(fields: dict[str, Any]) -> dict[str, Any]:
    """Remove what an augmentation moved out of the image, from every list that it has an entry in."""
    height, width = fields["image"].shape[-2:]
    edge = torch.tensor([width, height])
    if "boxes_xyxy" in fields:
        _select(fields, _PER_OBJECT, _visible(fields["boxes_xyxy"], edge))
    if "points_xy" in fields:
        _select(fields, ("points_xy",), _within(fields["points_xy"], edge))
    if "dp_boxes_xyxy" in fields:
        keep, person = _visible(fields["dp_boxes_xyxy"], edge), fields["dp_person"]
        fields["dp_person"] = (keep.cumsum(0) - 1)[person]  # the people who stay are numbered anew
        _select(fields, _PER_DP_POINT, keep[person] & _within(fields["dp_points_xy"], edge))
        _select(fields, _PER_PERSON, keep)
    return fields


def _visible(boxes: Any, edge: Tensor) -> Tensor:
    corners: Tensor = _plain(boxes)
    low, high = corners[:, :2].clamp(min=0), torch.minimum(corners[:, 2:], edge)
    return (low < high).all(1)


def _within(points: Any, edge: Tensor) -> Tensor:
    corners: Tensor = _plain(points)[:, :2]
    # The far edge counts as inside, because mirroring moves the near edge there; `_inside` has the last word.
    return ((corners >= 0) & (corners <= edge)).all(1)


def _select(fields: dict[str, Any], names: tuple[str, ...], keep: Tensor) -> None:
    for name in names:
        if name in fields:
            value = fields[name]
            kept = value[keep]
            # Indexing makes a plain tensor of a tv_tensor, which v2 would then leave as it is.
            fields[name] = tv_tensors.wrap(kept, like=value) if isinstance(value, tv_tensors.TVTensor) else kept


def _inside(corners: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Points of `_wrap`'s boxes, (K, 2), with those on the far edges moved to the last number before them."""
    edge = torch.tensor([size_hw[1], size_hw[0]], dtype=corners.dtype)
    return torch.minimum(corners[:, :2].clamp(min=0), torch.nextafter(edge, torch.zeros_like(edge)))


def _plain(value: Any) -> Any:
    """A tv_tensor as a plain tensor; anything else as it is."""
    return value.as_subclass(Tensor) if isinstance(value, Tensor) else value
