"""Images as patches: any size in, a padded batch with coordinates and a mask out (NaFlex).

Shape letters: see `indiclip.types`; C channels.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.naflex_transforms import get_image_size_for_seq
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms.v2 import functional as TF

from indiclip.images import to_rgb
from indiclip.types import Images

AnyImage = Image.Image | np.ndarray | Tensor


@lru_cache(maxsize=4096)
def fit_hw(
    height: int, width: int, patch_size: int, max_tokens: int, canvas_hw: tuple[int, int] | None = None
) -> tuple[int, int]:
    """The size, in whole patches, to which an image is resized: aspect kept, never enlarged by a patch or more.

    Args:
        height: Of the image in pixels.
        width: Of the image in pixels.
        patch_size: Side of a patch in pixels.
        max_tokens: Most patches.
        canvas_hw: Of a backbone of one size, instead of `max_tokens`; see `fit_canvas_hw`.

    Returns:
        (height, width) in pixels, multiples of `patch_size`.
    """
    if canvas_hw is not None:
        return fit_canvas_hw(height, width, patch_size, canvas_hw)
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


def fit_canvas_hw(height: int, width: int, patch_size: int, canvas_hw: tuple[int, int]) -> tuple[int, int]:
    """As `fit_hw`, for a canvas of one size: the image fills it as far as its aspect allows."""
    ratio = min(canvas_hw[0] / height, canvas_hw[1] / width)
    rows, columns = (max(1, round(side * ratio / patch_size)) for side in (height, width))
    return min(rows * patch_size, canvas_hw[0]), min(columns * patch_size, canvas_hw[1])


def resize(image_CHW: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """uint8 -> uint8, bilinear with antialias; the same tensor where nothing changes."""
    if tuple(image_CHW.shape[-2:]) == size_hw:
        return image_CHW
    resized: Tensor = TF.resize(image_CHW, list(size_hw), antialias=True)
    return resized


def patchify(image_CHW: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """A uint8 image of whole patches -> `(patches_NP, coords_N2)`, row by row; inside a patch row, column, channel."""
    C, height, width = image_CHW.shape
    H, W, p = height // patch_size, width // patch_size, patch_size
    patches_NP = image_CHW.reshape(C, H, p, W, p).permute(1, 3, 2, 4, 0).reshape(H * W, p * p * C)
    return patches_NP, _coords(H, W)


@lru_cache(maxsize=4096)
def _coords(H: int, W: int) -> Tensor:
    """(row, column) of each patch, (H * W, 2); shared, not to be written to."""
    return torch.cartesian_prod(torch.arange(H), torch.arange(W))


def unpatchify(images: Images, index: int) -> np.ndarray:
    """The resized picture of one image of a batch, uint8 (height, width, 3)."""
    height, width = images["sizes_hw"][index]
    patches_NP = images["patches_BNP"][index].cpu()
    p = int((patches_NP.shape[-1] // 3) ** 0.5)
    rows, columns = height // p, width // p
    cells = patches_NP[: rows * columns].reshape(rows, columns, p, p, 3)
    return cells.permute(0, 2, 1, 3, 4).reshape(height, width, 3).numpy()


def stack(
    patches: Sequence[tuple[Tensor, Tensor]],
    sizes_hw: list[tuple[int, int]],
    scale: list[tuple[float, float]],
) -> Images:
    """Pad the `(patches_NP, coords_N2)` of several images to the longest of them."""
    patches_BNP = pad_sequence([cells_NP for cells_NP, _ in patches], batch_first=True)
    coords_BN2 = pad_sequence([coords_N2 for _, coords_N2 in patches], batch_first=True)
    counts_B1 = torch.tensor([[len(cells_NP)] for cells_NP, _ in patches])
    valid_BN = torch.arange(patches_BNP.shape[1]) < counts_B1
    return Images(patches_BNP=patches_BNP, coords_BN2=coords_BN2, valid_BN=valid_BN, sizes_hw=sizes_hw, scale=scale)


def batch_images(
    images: Sequence[AnyImage], patch_size: int, max_tokens: int, canvas_hw: tuple[int, int] | None = None
) -> Images:
    """Resize and cut images of any kind and size.

    Raises:
        ValueError: Something that is no image, naming its position.
    """
    if not images:
        raise ValueError("images: the list is empty")
    patches, sizes, scale = [], [], []
    for position, image in enumerate(images):
        pixels_CHW = _to_uint8(image, position)
        height, width = pixels_CHW.shape[-2:]
        if height * width == 0:
            raise ValueError(f"image {position}: found {width}x{height} pixels; expected at least 1x1")
        size = fit_hw(height, width, patch_size, max_tokens, canvas_hw)
        patches.append(patchify(resize(pixels_CHW, size), patch_size))
        sizes.append(size)
        scale.append((size[0] / height, size[1] / width))
    return stack(patches, sizes, scale)


def _to_uint8(image: AnyImage, position: int) -> Tensor:
    if isinstance(image, Image.Image):
        pixels: Tensor = TF.pil_to_tensor(to_rgb(ImageOps.exif_transpose(image)))
        return pixels
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    if isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] == 3:
        if image.dtype == torch.uint8:
            return image.cpu()
        if image.is_floating_point() and image.numel() and float(image.min()) >= 0 and float(image.max()) <= 1:
            return (image.detach().cpu() * 255).round().to(torch.uint8)
    found = f"{type(image).__name__} {getattr(image, 'dtype', '')} {tuple(getattr(image, 'shape', ()))}"
    raise ValueError(
        f"image {position}: found {found}; expected a PIL image, a uint8 array (height, width, 3), or a uint8 or 0..1 "
        "float tensor (3, height, width)"
    )
