"""How an image becomes patches. Training, validation, the benchmark, `embed_image` and export all ask this file, so
that one image gives one tensor everywhere. Only training decodes a JPEG smaller than it is (see `loading.transforms`).

Shape letters: see `indiclip.types`.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import isqrt, prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.naflex_transforms import get_image_size_for_seq
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from indiclip.images import EncodedImage, read_image, to_rgb
from indiclip.names import nearest_beside
from indiclip.patches import patchify, stack
from indiclip.types import Images

Size = tuple[int, int]  # (height, width)
Interpolation = Literal["bilinear", "bicubic"]
Picture = EncodedImage | np.ndarray  # the latter uint8 (height, width, 3)
AnyImage = Image.Image | Picture | Tensor | bytes | str | Path


class Preprocessing(NamedTuple):
    """What a backbone asks of its images.

    Attributes:
        patch_size: Side of a patch in pixels.
        canvas_hw: The one image size of a fixed-size backbone, in pixels; None where any size goes.
        interpolation: How images are resized, always with antialias.
    """

    patch_size: int = 16
    canvas_hw: Size | None = None
    interpolation: Interpolation = "bilinear"

    @property
    def canvas_tokens(self) -> int | None:
        """Patches of the whole canvas, if there is one."""
        return None if self.canvas_hw is None else prod(self.canvas_hw) // self.patch_size**2

    def fit_hw(self, height: int, width: int, max_tokens: int) -> Size:
        """The size, in whole patches, to which an image is resized with its aspect kept.

        Within a budget an image is never enlarged by a patch or more; a canvas is filled as far as the aspect allows.

        Args:
            height: Of the image in pixels.
            width: Of the image in pixels.
            max_tokens: Most patches; without effect where there is a canvas.

        Returns:
            (height, width) in pixels, multiples of `patch_size`.
        """
        if self.canvas_hw is None:
            return _fit_budget(height, width, self.patch_size, max_tokens)
        ratio = min(self.canvas_hw[0] / height, self.canvas_hw[1] / width)
        rows, columns = (max(1, round(side * ratio / self.patch_size)) for side in (height, width))
        return min(rows * self.patch_size, self.canvas_hw[0]), min(columns * self.patch_size, self.canvas_hw[1])

    def square_hw(self, max_tokens: int) -> Size:
        """The size to which every image is stretched in square views: the canvas, or the largest square in a budget."""
        side = isqrt(max_tokens) * self.patch_size
        return self.canvas_hw or (side, side)

    def cut(self, pixels_CHW: Tensor, size_hw: Size) -> dict[str, Any]:
        """An upright image as `patches` (see `patchify`) of this size, its `size_hw`, and its `scale` to the original.

        Args:
            pixels_CHW: uint8.
            size_hw: From `fit_hw` or `square_hw`.
        """
        height, width = pixels_CHW.shape[-2:]
        return {
            "patches": patchify(resize(pixels_CHW, size_hw, self.interpolation), self.patch_size),
            "size_hw": size_hw,
            "scale": (size_hw[0] / height, size_hw[1] / width),
        }

    def batch(self, images: Sequence[AnyImage], max_tokens: int) -> Images:
        """Read, resize and cut images of any kind and size.

        Raises:
            ValueError: Something that is no image, naming its position.
            FileNotFoundError: A path that is no file.
        """
        if not images:
            raise ValueError("images: the list is empty")
        prepared = []
        for position, image in enumerate(images):
            pixels_CHW = _read_any(image, position)
            height, width = pixels_CHW.shape[-2:]
            if height * width == 0:
                raise ValueError(f"image {position}: found {width}x{height} pixels; expected at least 1x1")
            prepared.append(self.cut(pixels_CHW, self.fit_hw(height, width, max_tokens)))
        return stack(prepared)


@lru_cache(maxsize=4096)
def _fit_budget(height: int, width: int, patch_size: int, max_tokens: int) -> Size:
    _, (new_height, new_width) = get_image_size_for_seq((height, width), patch_size, max_tokens, max_ratio=1.0)
    return int(new_height), int(new_width)


def count_tokens(sizes_hw: np.ndarray, patch_size: int, max_tokens: int) -> np.ndarray:
    """Patches of each image after `fit_hw`, for many images at once: int64 (M,) of (M, 2) heights and widths."""
    sizes = np.asarray(sizes_hw, dtype=np.float64)
    low, high = np.full(len(sizes), 1e-6), np.full(len(sizes), 100.0)
    for _ in range(24):  # timm's search for the scale, step by step, down to 1e-5
        middle = (low + high) / 2
        fits = np.prod(np.ceil(sizes * middle[:, None] / patch_size), axis=1) <= max_tokens
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    cells = np.ceil(sizes * np.minimum(low, 1.0)[:, None] / patch_size)
    return np.asarray(np.maximum(cells, 1).prod(1), dtype=np.int64)


def resize(image_CHW: Tensor, size_hw: Size, interpolation: Interpolation = "bilinear") -> Tensor:
    """uint8 -> uint8 with antialias; the same tensor where nothing changes.

    PIL, with which timm and OpenCLIP resize, gives photos whose values are the same but for one grey level in 0.3% of
    them. Where a bicubic one is squashed, sharp edges may differ by more: Pillow 13 may begin with the columns then.
    """
    if tuple(image_CHW.shape[-2:]) == size_hw:
        return image_CHW
    resized: Tensor = TF.resize(image_CHW, list(size_hw), InterpolationMode(interpolation), antialias=True)
    return resized


def upright_hw(image: Picture) -> Size:
    """(height, width) of a picture after the turn that EXIF asks for."""
    return image.upright_hw if isinstance(image, EncodedImage) else (image.shape[0], image.shape[1])


def read_upright(image: Picture, min_hw: Size = (0, 0)) -> Tensor:
    """A whole picture, turned as its EXIF orientation asks: uint8 (3, height, width).

    Args:
        image: An encoded one, or pixels.
        min_hw: See `EncodedImage.decode`, of the upright picture.

    Raises:
        UnreadableSample: The image cannot be decoded.
    """
    pixels = image.decode_upright(min_hw) if isinstance(image, EncodedImage) else image
    return torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)  # PIL's are read-only


def _read_any(image: AnyImage, position: int) -> Tensor:
    """An image of any kind as uint8 (3, height, width), upright."""
    if isinstance(image, str | Path):
        path = Path(image)
        if not path.is_file():
            raise FileNotFoundError(f"image {position}: {str(path)!r} is no file{nearest_beside(path)}")
        return read_upright(read_image(path, str(path)))
    if isinstance(image, bytes):
        return read_upright(EncodedImage(image, f"image {position}"))
    if isinstance(image, Image.Image):
        try:
            pixels: Tensor = TF.pil_to_tensor(to_rgb(ImageOps.exif_transpose(image)))
        except ValueError as error:
            raise ValueError(f"image {position}: {error}") from error
        return pixels
    if isinstance(image, EncodedImage):
        return read_upright(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return read_upright(image)
    if isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] == 3:
        if image.dtype == torch.uint8:
            return image.cpu()
        if image.is_floating_point() and image.numel() and float(image.min()) >= 0 and float(image.max()) <= 1:
            return (image.detach().cpu() * 255).round().to(torch.uint8)
    found = f"{type(image).__name__} {getattr(image, 'dtype', '')} {tuple(getattr(image, 'shape', ()))}"
    raise ValueError(
        f"image {position}: found {found}; expected a path, a PIL image, a uint8 array (height, width, 3), or a uint8 "
        "or 0..1 float tensor (3, height, width)"
    )
