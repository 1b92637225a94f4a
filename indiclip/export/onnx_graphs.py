"""Both sides of an encoder as modules of plain tensors, which torch exports with free sizes.

One override touches a private part of timm's NaFlexVit, tried with timm 1.0.31: its positions for whole images, where
the run samples the table instead of resizing it.

Shape letters: see `indiclip.types`; C classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indiclip.backbone import Backbone, NaFlexViT
from indiclip.canvas_backbone import CanvasBackbone
from indiclip.encoder import Encoder
from indiclip.types import Features


class ImageGraph(nn.Module):
    """uint8 pixels (B, 3, height, width) -> unit-length embeddings."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        for name in ("mean", "std"):
            numbers = torch.tensor(getattr(encoder.backbone, name)).reshape(3, 1, 1) * 255
            self.register_buffer(name, numbers, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        normalised = (pixels.float() - cast(Tensor, self.mean)) / cast(Tensor, self.std)
        return self.encoder.embed_features(_read(self.encoder.backbone, normalised))


class TextGraph(nn.Module):
    """Token ids (B, T) and their mask -> unit-length embeddings."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.text, self.pool, self.projection = encoder.text, encoder.text_pool, encoder.text_projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        valid_BT = attention_mask.bool()
        pooled_BD = self.pool(self.text(input_ids, valid_BT), valid_BT)
        return F.normalize(self.projection(pooled_BD), dim=-1)


class ClassGraph(nn.Module):
    """uint8 pixels -> cosines with the classes, and the probabilities of `Encoder.zero_shot`."""

    def __init__(self, encoder: Encoder, class_CE: Tensor, scale: float) -> None:
        super().__init__()
        self.image, self.scale = ImageGraph(encoder), scale
        self.register_buffer("class_EC", class_CE.T.contiguous())

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        cosines_BC = self.image(pixels) @ cast(Tensor, self.class_EC)
        return cosines_BC, (self.scale * cosines_BC).softmax(1)


def _read(backbone: Backbone, pixels: Tensor) -> Features:
    """Features of normalised pixels, whose height and width may be free."""
    if isinstance(backbone, CanvasBackbone):
        return backbone.read_pixels(pixels)
    vit: Any = backbone.vit
    tokens_BKD = vit.forward_features(pixels)
    num_prefix = vit.num_prefix_tokens
    grid_hw = (pixels.shape[2] // backbone.patch_size, pixels.shape[3] // backbone.patch_size)
    prefix_BKD = tokens_BKD[:, :num_prefix] if num_prefix else None
    tokens_BND = tokens_BKD[:, num_prefix:]
    return Features(tokens_BND, _coords(grid_hw), None, grid_hw, backbone.stride, prefix_BKD)


@contextmanager
def positions_as_trained(backbone: Backbone) -> Iterator[None]:
    """Let a NaFlexViT sample its table of positions for whole images too, where it does so for patches."""
    embeds: Any = backbone.vit.embeds if isinstance(backbone, NaFlexViT) else None
    if embeds is None or not embeds.pos_embed_use_grid_sample:
        yield
        return
    embeds._apply_learned_pos_embed = partial(_sample_positions, embeds)
    try:
        yield
    finally:
        del embeds._apply_learned_pos_embed


def _sample_positions(embeds: Any, x_BND: Tensor, grid_size: tuple[int, int]) -> None:
    coords_BN2 = _coords(grid_size).expand(x_BND.shape[0], -1, -1)
    embeds._apply_learned_naflex_pos_embed_grid_sample(x_BND, coords_BN2)


def _coords(grid_hw: tuple[int, int]) -> Tensor:
    H, W = grid_hw
    rows_HW = torch.arange(H)[:, None].expand(H, W)
    columns_HW = torch.arange(W)[None].expand(H, W)
    return torch.stack([rows_HW, columns_HW], -1).reshape(1, H * W, 2)
