"""Pixels <-> patches: a padded batch with coordinates and a mask (NaFlex).

Shape letters: see `indiclip.types`; C channels.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from indiclip.types import Images


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


def drop_patches(patches: tuple[Tensor, Tensor], num_kept: int, random_seed: int) -> tuple[Tensor, Tensor]:
    """Some of an image's patches, of `patchify`, with their coordinates and in their order (FLIP, arXiv 2212.00794).

    Args:
        num_kept: How many; each is as likely as any other.
        random_seed: Decides which.
    """
    patches_NP, coords_N2 = patches
    generator = torch.Generator().manual_seed(random_seed)
    kept = torch.randperm(len(patches_NP), generator=generator)[:num_kept].sort().values
    return patches_NP[kept], coords_N2[kept]


def unpatchify(images: Images, index: int) -> np.ndarray:
    """The resized picture of one image of a batch, uint8 (height, width, 3)."""
    height, width = images["sizes_hw"][index]
    patches_NP = images["patches_BNP"][index].cpu()
    p = int((patches_NP.shape[-1] // 3) ** 0.5)
    rows, columns = height // p, width // p
    cells = patches_NP[: rows * columns].reshape(rows, columns, p, p, 3)
    return cells.permute(0, 2, 1, 3, 4).reshape(height, width, 3).numpy()


def stack(prepared: Sequence[Mapping[str, Any]]) -> Images:
    """Pad several images to the longest of them; each has its `patches` as of `patchify`, `size_hw` and `scale`."""
    patches, sizes_hw, scale = ([one[field] for one in prepared] for field in ("patches", "size_hw", "scale"))
    num_patches = [len(cells_NP) for cells_NP, _ in patches]
    patches_BNP = pad_sequence([cells_NP for cells_NP, _ in patches], batch_first=True)
    coords_BN2 = pad_sequence([coords_N2 for _, coords_N2 in patches], batch_first=True)
    valid_BN = torch.arange(patches_BNP.shape[1]) < torch.tensor(num_patches)[:, None]
    return Images(
        patches_BNP=patches_BNP,
        coords_BN2=coords_BN2,
        valid_BN=valid_BN,
        sizes_hw=sizes_hw,
        scale=scale,
        num_patches=num_patches,
    )
