"""From a `Sample` of a dataset to its patches and targets: the image and all that belongs to it move together.

The geometry is torchvision's (transforms v2 on tv_tensors), so its transforms can be named in a YAML.
Shape letters: see `indiclip.types`.
"""

from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from indiclip.images import EncodedImage
from indiclip.loading.collate import Prepared
from indiclip.loading.geometry import Fields, Region, drop_outside, move, turn, unwrap, without_objects, wrap
from indiclip.loading.kernels import plain
from indiclip.loading.rand_augment import RandAugment
from indiclip.names import shorten
from indiclip.preprocessing import Preprocessing, Size, read_upright, resize, upright_hw
from indiclip.types import Sample

# Transforms that cannot be used, and why. Points and people are boxes too (see `geometry`).
_LOSES = "loses points and bodies; what leaves the image is removed anyway, and RandomResizedCrop crops"
_BATCHES = "mixes the images of a batch, which is what `mix` of the source does"
_REFUSED = {
    **dict.fromkeys(("RandomIoUCrop", "SanitizeBoundingBoxes", "ClampBoundingBoxes", "SetClampingMode"), _LOSES),
    **dict.fromkeys(("FiveCrop", "TenCrop"), "makes several images of one; RandomCrop draws one of them"),
    **dict.fromkeys(("MixUp", "CutMix"), _BATCHES),
    **dict.fromkeys(("ConvertBoundingBoxFormat", "ToPureTensor", "ToPILImage"), "gives fields of another kind"),
}
# These move the image and refuse all that belongs to it.
_OF_IMAGES_ALONE = (v2.AutoAugment, v2.AugMix, v2.TrivialAugmentWide, v2.RandAugment)

# Transforms that do the same to an image of any size, so that they can come after the resizing.
_OF_ANY_SIZE = (
    *(v2.RandomHorizontalFlip, v2.RandomVerticalFlip, v2.ColorJitter, v2.RandomGrayscale, v2.RandomPhotometricDistort),
    *(v2.RandomAutocontrast, v2.RandomEqualize, v2.RandomInvert, v2.RandomPosterize, v2.RandomSolarize),
    *(v2.RandomChannelPermutation, v2.RandomErasing, RandAugment),
)


class Transform:
    """Decode, turn upright, augment, resize into the token budget, cut into patches.

    A JPEG is decoded no larger than what follows needs: where no augmentation depends on the image's size, or where
    the first one is a `RandomResizedCrop` with its default interpolation.

    Args:
        max_tokens: Most patches per image; larger images are scaled down, aspect kept.
        augment: torchvision v2 transforms on the uint8 image and its annotations, e.g. a
            `torchvision.transforms.v2.RandomHorizontalFlip`. Their random numbers are a function of (seed, sample
            position).
        at_full_size: Augment the image before it is resized into the budget, always: slower, but the augmented picture
            is the same whatever the budget and the backbone.

    Raises:
        ValueError: A transform that cannot be used, such as one that cannot move several lists of boxes.
    """

    def __init__(
        self, max_tokens: int = 256, augment: list[torch.nn.Module] | None = None, at_full_size: bool = False
    ) -> None:
        self.max_tokens, self.at_full_size = max_tokens, at_full_size
        self.augment = list(augment or [])
        for step in each_step(self.augment):
            name = type(step).__name__
            if name in _REFUSED:
                raise ValueError(f"augment: {name} {_REFUSED[name]}")
            if isinstance(step, v2.RandomErasing) and step.value is None:
                raise ValueError(
                    "augment: RandomErasing.value: found random, whose numbers are those of normalised "
                    "pixels; expected 0 to 255, or one for each colour"
                )

    def describe(self) -> list[dict[str, str]]:
        """The augmentation in words that differ where it does: each step's class and its plain settings."""
        return [
            {"class_path": f"{type(step).__module__}.{type(step).__qualname__}", **_settings(step)}
            for step in each_step(self.augment)
        ]

    @property
    def flips(self) -> bool:
        """Whether any step may mirror the image."""
        return any("Flip" in type(step).__name__ for step in each_step(self.augment))

    @property
    def keeps_size(self) -> bool:
        """Whether the number of patches depends on the image's size alone."""
        return all(type(step) in _OF_ANY_SIZE for step in self.augment)

    def __call__(
        self,
        sample: Sample,
        preprocessing: Preprocessing,
        random_seed: int | None,
        max_tokens: int | None = None,
        check: Callable[[Tensor], None] | None = None,
    ) -> Prepared:
        """Prepare one sample.

        Args:
            preprocessing: The backbone's.
            random_seed: Seeds the augmentation. None (validation) leaves it out and decodes the whole image, so that
                pixels are those of `Encoder.embed_image`.
            max_tokens: In place of the transform's own.
            check: Called with the augmented picture before it is resized, see `picture`.

        Returns:
            `patches`, `size_hw`, `scale`, and the sample's annotations in the resized image's pixels, as tensors.

        Raises:
            UnreadableSample: The image cannot be decoded.
            ValueError: A field of the sample is not declared, or has another shape than its kind.
        """

        def fit(size: Size) -> Size:
            return preprocessing.fit_hw(*size, max_tokens or self.max_tokens)

        fields, scale = self._augmented(sample, preprocessing, random_seed, _as_it_is if self.at_full_size else fit)
        height, width = fields["image"].shape[-2:]
        size = fit((height, width))
        picture_CHW = plain(fields.pop("image"))
        if check is not None:
            check(picture_CHW)
        cut = preprocessing.cut(picture_CHW, size)
        if size != (height, width):
            fields = {name: move(value, (0, 0, height, width), size) for name, value in fields.items()}
        cut["scale"] = (scale[0] * cut["scale"][0], scale[1] * cut["scale"][1])
        return unwrap(fields, size) | cut

    def picture(self, sample: Sample, random_seed: int) -> Tensor:
        """The augmented picture that `__call__` resizes and cuts, where it augments `at_full_size`.

        Returns:
            uint8 (3, height, width).
        """
        assert self.at_full_size
        fields, _ = self._augmented(without_objects(sample), Preprocessing(), random_seed, _as_it_is)
        image: Tensor = plain(fields["image"])
        return image

    def _augmented(
        self, sample: Sample, preprocessing: Preprocessing, random_seed: int | None, fit: Callable[[Size], Size]
    ) -> tuple[Fields, tuple[float, float]]:
        """The fields of a sample after its augmentation, the image among them, and their scale to the original."""
        image: Any = sample.get("image")
        if not isinstance(image, EncodedImage) and (getattr(image, "dtype", "") != np.uint8 or image.shape[2:] != (3,)):
            found = f"{image.dtype} {image.shape}" if hasattr(image, "dtype") else shorten(image)
            raise ValueError(
                f"image of sample {sample['key']!r}: found {found}; expected an EncodedImage or a NumPy array, uint8 "
                "(height, width, 3)"
            )
        full = upright_hw(image)
        as_stored = isinstance(image, EncodedImage) and not sample.get("annotated_upright")
        orientation = image.orientation if as_stored else 1  # of the annotations
        canvas = full if orientation < 5 else full[::-1]
        fields = {name: turn(value, orientation) for name, value in wrap(sample, canvas).items()}
        steps = self.augment if random_seed is not None else []
        with torch.random.fork_rng(devices=[], enabled=bool(steps)):
            if steps and random_seed is not None:
                torch.default_generator.manual_seed(random_seed)  # torch.manual_seed seeds every GPU too, in 0.3 ms
            region, size, left = _plan_reading(full, steps, fit)
            fields = {name: move(value, region, size) for name, value in fields.items()}
            # So large that the region still has the pixels that it is shown with.
            needed = (-(-full[0] * size[0] // region[2]), -(-full[1] * size[1] // region[3]))
            pixels_CHW = _crop(read_upright(image, (0, 0) if random_seed is None else needed), full, region)
            cropped = len(left) < len(steps)  # by the first step, which is bilinear
            fields = drop_outside(fields, size) if cropped else fields
            pixels_CHW = resize(pixels_CHW, size, "bilinear" if cropped else preprocessing.interpolation)
            fields["image"] = tv_tensors.Image(pixels_CHW)
            for step in left:
                fields = _after(fields, step)
        if fields["image"].dtype != torch.uint8:
            raise ValueError(f"augment: gives an image of {fields['image'].dtype}; expected torch.uint8")
        return fields, (size[0] / region[2], size[1] / region[3])


def _as_it_is(size: Size) -> Size:
    return size


def each_step(steps: Iterable[Any]) -> Iterator[Any]:
    """The transforms, and those inside of `Compose`, `RandomApply` and the like, which keep them in a plain list."""
    for step in steps:
        yield step
        yield from each_step(getattr(step, "transforms", ()))


def _settings(step: Any) -> dict[str, str]:
    """What of a step is numbers, words, or lists of them, by name; not what torch keeps in every module."""
    hidden = vars(torch.nn.Module()).keys() | {"transforms"}

    def is_plain(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return all(map(is_plain, value))
        if isinstance(value, dict):
            return all(map(is_plain, [*value, *value.values()]))
        return value is None or isinstance(value, bool | int | float | str | Enum)

    own = {name: value for name, value in vars(step).items() if name not in hidden and is_plain(value)}
    return {name: str(own[name]) for name in sorted(own)}


def _after(fields: Fields, step: torch.nn.Module) -> Fields:
    """The fields after a transform, without what it moved out of the image.

    Raises:
        ValueError: A transform of images alone, for a sample whose boxes, points, masks or maps would have to move.
    """
    if isinstance(step, v2.RandomErasing):  # which warns that it leaves boxes as they are
        return fields | {"image": step(fields["image"])}
    try:
        fields = step(fields)
    except TypeError as error:
        name = type(step).__name__
        if not any(isinstance(one, _OF_IMAGES_ALONE) for one in each_step([step])):
            raise
        raise ValueError(
            f"augment: {name} moves the image without its boxes, points, masks and maps; expected "
            "indiclip.loading.rand_augment.RandAugment"
        ) from error
    return drop_outside(fields, tuple(fields["image"].shape[-2:]))


def _plan_reading(full: Size, steps: list[Any], fit: Callable[[Size], Size]) -> tuple[Region, Size, list[Any]]:
    """Which part (top, left, height, width) of the upright image is wanted at which size, and what is left to do."""
    # Torchvision's own default is the word.
    bilinear = (v2.InterpolationMode.BILINEAR, "bilinear")
    crops = bool(steps) and type(steps[0]) is v2.RandomResizedCrop
    if crops and steps[0].antialias and steps[0].interpolation in bilinear:  # as we resize
        canvas = tv_tensors.Image(torch.empty(3, *full, device="meta"))
        at = steps[0].make_params([canvas])
        height, width = steps[0].size
        region, size, steps = (at["top"], at["left"], at["height"], at["width"]), (int(height), int(width)), steps[1:]
    else:
        region, size = (0, 0, *full), full
    late = all(type(step) in _OF_ANY_SIZE for step in steps)
    return region, fit(size) if late else size, steps


def _crop(image_CHW: Tensor, full: Size, region: Region) -> Tensor:
    """A region, given in the pixels of the full image, of one that may have been decoded smaller."""
    found = image_CHW.shape[-2:]
    top, left, height, width = (round(place * found[i % 2] / full[i % 2]) for i, place in enumerate(region))
    return image_CHW[:, top : top + max(height, 1), left : left + max(width, 1)]
