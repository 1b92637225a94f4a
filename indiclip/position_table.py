"""The learned position table of a NaFlexViT, read at each patch's place in its image, of which others may be missing.

Shape letters: see `indiclip.types`; (H, W) cells of the table, K neighbours of a place along an axis.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from timm.models.naflexvit import NaFlexEmbeds
from torch import Tensor

from indiclip.types import on_device

_grids: ContextVar[Tensor | None] = ContextVar("grids", default=None)
_SHARPNESS = -0.75  # of torch's bicubic interpolation


class TableEmbeds(NaFlexEmbeds):
    """timm's patch embedding, which reads its table by `embedding_bag` where timm does by `grid_sample`.

    The numbers are the same. It is several times faster, on a GPU its gradient is the same each time, and where patches
    are missing the size of the whole grid need not be guessed from those that are left, see `whole_grids`.
    Overrides a method that is private to timm; tried with timm 1.0.31, beside whose own it is tested.
    """

    pos_embed: Tensor

    def _apply_learned_naflex_pos_embed_grid_sample(self, x: Tensor, patch_coord: Tensor) -> None:
        grids_B2 = _grids.get()
        if grids_B2 is None:
            grids_B2 = patch_coord.amax(1) + 1
        if self.pos_embed_ar_preserving:
            grids_B2 = grids_B2.amax(1, keepdim=True).expand_as(grids_B2)
        # In half precision a place would be another one.
        table_HWD = self.pos_embed[0].to(torch.promote_types(self.pos_embed.dtype, torch.float32))
        coords_BN2 = patch_coord.to(table_HWD.dtype)
        places_BN2 = _places(coords_BN2, grids_B2, table_HWD.shape[:2], self.pos_embed_align_corners)
        x += read(table_HWD, places_BN2, self.pos_embed_interp_mode).to(x.dtype)


def tell_places(embeds: NaFlexEmbeds) -> bool:
    """Make timm's patch embedding one that knows the places of patches among which others are missing, if it can be."""
    learned = embeds.pos_embed_type == "learned" and embeds.pos_embed_use_grid_sample
    if type(embeds) is NaFlexEmbeds and learned and embeds.pos_embed_interp_mode in ("bicubic", "bilinear"):
        embeds.__class__ = TableEmbeds
    return isinstance(embeds, TableEmbeds)


@contextmanager
def whole_grids(grids: Sequence[tuple[int, int]], device: torch.device) -> Iterator[None]:
    """What is embedded inside is part of images with so many rows and columns of patches."""
    token = _grids.set(on_device(grids, device))
    try:
        yield
    finally:
        _grids.reset(token)


def read(table_HWD: Tensor, places_BN2: Tensor, mode: str) -> Tensor:
    """A table between its cells (B, N, D), as `torch.nn.functional.grid_sample` with its border padding.

    Args:
        table_HWD: Vectors.
        places_BN2: Row and column, in cells; whole numbers are their centres.
        mode: `bicubic` or `bilinear`.
    """
    first_BN2 = places_BN2.floor()
    after_BN2 = places_BN2 - first_BN2
    if mode == "bicubic":
        weights_BN2K, first = _cubic(after_BN2), -1
    else:
        weights_BN2K, first = torch.stack([1 - after_BN2, after_BN2], -1), 0
    B, N, _, K = weights_BN2K.shape
    H, W, D = table_HWD.shape
    cells_BN2K = first_BN2.long()[..., None] + torch.arange(first, first + K, device=places_BN2.device)
    rows_BNK, columns_BNK = cells_BN2K[:, :, 0].clamp(0, H - 1), cells_BN2K[:, :, 1].clamp(0, W - 1)
    cells = (rows_BNK[..., None] * W + columns_BNK[..., None, :]).reshape(B * N, K * K)
    weights = (weights_BN2K[:, :, 0, :, None] * weights_BN2K[:, :, 1, None, :]).reshape(B * N, K * K)
    return F.embedding_bag(cells, table_HWD.reshape(H * W, D), per_sample_weights=weights, mode="sum").reshape(B, N, D)


def _places(coords_BN2: Tensor, grids_B2: Tensor, cells: Sequence[int], align_corners: bool) -> Tensor:
    """Rows and columns of patches as those of the table's cells."""
    scale_2, grids_B12 = on_device(tuple(cells), coords_BN2.device), grids_B2[:, None]
    if align_corners:
        return coords_BN2 / (grids_B12 - 1).clamp(min=1) * (scale_2 - 1)
    return (coords_BN2 + 0.5) / grids_B12 * scale_2 - 0.5


def _cubic(after: Tensor) -> Tensor:
    """Weights (..., 4) of the two cells before a place and of the two behind it (Keys, 1981)."""

    def near(x: Tensor) -> Tensor:
        return ((_SHARPNESS + 2) * x - (_SHARPNESS + 3)) * x * x + 1

    def far(x: Tensor) -> Tensor:
        return _SHARPNESS * (((x - 5) * x + 8) * x - 4)

    return torch.stack([far(after + 1), near(after), near(1 - after), far(2 - after)], -1)
