"""From a `Sample` of a dataset to the patches and targets of a batch: image, boxes, points and masks move together.

The geometry is torchvision's (transforms v2 on tv_tensors), so its transforms can be named in a YAML.
Shape letters: see `indiclip.types`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from indiclip import patches
from indiclip.images import EncodedImage
from indiclip.types import Batch, Sample

Prepared = dict[str, Any]

# Which entries of a sample belong to the same list, so that what a crop removes goes from all of them.
_PER_OBJECT = ("boxes_xyxy", "classes", "crowd", "masks")
_PER_PERSON = ("dp_boxes_xyxy", "dp_masks")
_PER_DP_POINT = ("dp_points_xy", "dp_person", "dp_part", "dp_uv")
# These take the first boxes of a sample for all that it has, but points and bodies are boxes too (see `_wrap`).
_FOR_ONE_LIST_OF_BOXES = (v2.RandomIoUCrop, v2.SanitizeBoundingBoxes)


# Transforms that do the same to an image of any size, so that they can come after the resizing.
_OF_ANY_SIZE = (
    *(v2.RandomHorizontalFlip, v2.RandomVerticalFlip, v2.ColorJitter, v2.RandomGrayscale, v2.RandomPhotometricDistort),
    *(v2.RandomAutocontrast, v2.RandomEqualize, v2.RandomInvert, v2.RandomPosterize, v2.RandomSolarize),
    v2.RandomChannelPermutation,
)
# EXIF orientation -> transpose, then mirror left-right, then mirror top-bottom.
_TURNS = {2: (0, 1, 0), 3: (0, 1, 1), 4: (0, 0, 1), 5: (1, 0, 0), 6: (1, 1, 0), 7: (1, 1, 1), 8: (1, 0, 1)}

Size = tuple[int, int]
Region = tuple[int, int, int, int]  # top, left, height, width


class Transform:
    """Decode, turn upright, augment, resize into the token budget, cut into patches.

    A JPEG is decoded no larger than what follows needs: where no augmentation depends on the image's size, or where
    the first one is a `RandomResizedCrop` with its default interpolation.

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

    @property
    def keeps_size(self) -> bool:
        """Whether the number of patches depends on the image's size alone."""
        return all(type(step) in _OF_ANY_SIZE for step in self.augment)

    def __call__(
        self,
        sample: Sample,
        patch_size: int,
        canvas_hw: Size | None,
        random_seed: int | None,
        max_tokens: int | None = None,
    ) -> Prepared:
        """Prepare one sample.

        Args:
            patch_size: Side of a patch in pixels.
            canvas_hw: The one image size of a fixed-size backbone, or None.
            random_seed: Seeds the augmentation; None leaves it out (validation).
            max_tokens: A smaller budget than the transform's own.

        Returns:
            `patches`, `size_hw`, `scale`, and the sample's annotations in the resized image's pixels, as tensors.

        Raises:
            UnreadableSample: The image cannot be decoded.
        """
        budget = min(self.max_tokens, max_tokens or self.max_tokens)

        def fit(size: Size) -> Size:
            if canvas_hw is not None:
                return patches.fit_canvas_hw(*size, patch_size, canvas_hw)
            return patches.fit_hw(*size, patch_size, budget)

        fields, full = _wrap(sample)
        steps = self.augment if random_seed is not None else []
        with _seeded(random_seed if steps else None):
            region, size, left = _plan_reading(full, steps, fit)
            fields = {name: _move(value, region, size) for name, value in fields.items()}
            fields["image"] = tv_tensors.Image(_read_region(sample["image"], full, region, size))
            fields = v2.Compose(left)(fields) if left else fields
        if steps:
            fields = _drop_outside(fields)
            if fields["image"].dtype != torch.uint8:
                raise ValueError(f"augment: gives an image of {fields['image'].dtype}; expected torch.uint8")
        height, width = fields["image"].shape[-2:]
        scale = (size[0] / region[2], size[1] / region[3])
        size = fit((height, width))
        if size != (height, width):
            fields = {name: _move(value, (0, 0, height, width), size) for name, value in fields.items()}
        prepared = {name: _plain(value) for name, value in fields.items() if name != "image"}
        prepared |= {name: _inside(value, size) for name, value in prepared.items() if name.endswith("points_xy")}
        prepared["patches"] = patches.patchify(_plain(fields["image"]), patch_size)
        prepared["size_hw"] = size
        prepared["scale"] = (scale[0] * size[0] / height, scale[1] * size[1] / width)
        return prepared


def read_upright(image: EncodedImage | np.ndarray, size: Size | None = None) -> Tensor:
    """A whole picture, turned as its EXIF orientation asks: uint8 (3, height, width).

    Args:
        image: An encoded one, or uint8 (height, width, 3).
        size: (height, width) to resize it to, a JPEG decoded no larger than that needs. None leaves it as large as
            it is.

    Raises:
        UnreadableSample: The image cannot be decoded.
    """
    full = upright_hw(image)
    return _read_region(image, full, (0, 0, *full), size or full)


def upright_hw(image: EncodedImage | np.ndarray) -> Size:
    """(height, width) of a picture after the turn that EXIF asks for."""
    return image.upright_hw if isinstance(image, EncodedImage) else (image.shape[0], image.shape[1])


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


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Random numbers from `seed`, and the generator as it was afterwards; nothing where it is None."""
    if seed is None:
        yield
        return
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also seeds every GPU backend, at 0.3 ms a call
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


def _plan_reading(full: Size, steps: list[Any], fit: Callable[[Size], Size]) -> tuple[Region, Size, list[Any]]:
    """Which part (top, left, height, width) of the upright image is wanted at which size, and what is left to do."""
    if steps and _crops_as_we_resize(steps[0]):
        canvas = tv_tensors.Image(torch.empty(3, *full, device="meta"))
        at = steps[0].make_params([canvas])
        height, width = steps[0].size
        return (at["top"], at["left"], at["height"], at["width"]), (int(height), int(width)), steps[1:]
    late = all(type(step) in _OF_ANY_SIZE for step in steps)
    return (0, 0, *full), fit(full) if late else full, steps


def _crops_as_we_resize(step: Any) -> bool:
    if type(step) is not v2.RandomResizedCrop:
        return False
    # torchvision's own default is the word.
    return bool(step.antialias) and step.interpolation in (v2.InterpolationMode.BILINEAR, "bilinear")


def _read_region(image: Any, full: Size, region: Region, size: Size) -> Tensor:
    """A part of an image, decoded no larger than needed, as uint8 (3, *size)."""
    if isinstance(image, EncodedImage):
        # So large that the part still has the pixels that it is shown with.
        needed = (-(-full[0] * size[0] // region[2]), -(-full[1] * size[1] // region[3]))
        smaller = needed if needed[0] <= full[0] and needed[1] <= full[1] else full
        pixels = image.decode(smaller if image.orientation < 5 else smaller[::-1])
        image_CHW = _turn(tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1)), image.orientation)
    else:
        image_CHW = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)  # PIL's are read-only
    found = image_CHW.shape[-2:]
    if region[2:] != full:
        top, left, height, width = (
            round(place * found[i % 2] / full[i % 2]) for i, place in enumerate((*region[:2], *region[2:]))
        )
        image_CHW = image_CHW[:, top : top + max(height, 1), left : left + max(width, 1)]
    return patches.resize(_plain(image_CHW), size)


def _move(value: Any, region: Region, size: Size) -> Any:
    """Annotations of a part of the image at another size."""
    if not isinstance(value, tv_tensors.TVTensor):
        return value
    if region[2:] == tuple(TF.get_size(value)):
        return value if region[2:] == size else TF.resize(value, list(size), antialias=True)
    return TF.resized_crop(value, *region, list(size), antialias=True)


def _turn(value: Any, orientation: int) -> Any:
    """Turn an image, mask or boxes upright from EXIF's `orientation`."""
    if orientation == 1 or not isinstance(value, tv_tensors.TVTensor):
        return value
    transpose, left_right, top_bottom = _TURNS[orientation]
    if transpose and isinstance(value, tv_tensors.BoundingBoxes):
        swapped = _plain(value)[:, [1, 0, 3, 2]]
        value = tv_tensors.wrap(swapped, like=value, canvas_size=value.canvas_size[::-1])
    elif transpose:
        value = tv_tensors.wrap(_plain(value).transpose(-1, -2), like=value)
    if left_right:
        value = TF.horizontal_flip(value)
    return TF.vertical_flip(value) if top_bottom else value


def _wrap(sample: Sample) -> tuple[dict[str, Any], Size]:
    """The annotations as tv_tensors in the frame of the upright image, and that image's (height, width)."""
    image = sample["image"]
    encoded = isinstance(image, EncodedImage)
    full = upright_hw(image)
    turned = not encoded or sample.get("annotated_upright", False)  # no turn to make
    canvas = full if turned else image.size_hw
    fields: dict[str, Any] = {}
    for name, value in sample.items():
        if name in ("image", "annotated_upright"):
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
            fields[name] = tensor if turned else _turn(tensor, image.orientation)
        else:
            fields[name] = value
    return fields, full


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
