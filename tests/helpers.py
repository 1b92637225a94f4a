"""Small models and batches for tests."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.head import Losses, WholeBatch, computed
from indiclip.loading.collate import pack
from indiclip.preprocessing import Preprocessing
from indiclip.ratios import over_all_ranks
from indiclip.text import TextTower
from indiclip.tokenizers import ByteTokenizer
from indiclip.types import Batch, Features, Images

ARCHITECTURE = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def tiny_encoder(seed: int = 0, embed_dim: int = 64, lengths: tuple[int, ...] = (16, 32), **options: Any) -> Encoder:
    """Patch 8, width 32, one block."""
    torch.manual_seed(seed)
    backbone = NaFlexViT(width=32, depth=1, num_heads=2, patch_size=8)
    return Encoder(backbone, TextTower(ByteTokenizer(), ARCHITECTURE), embed_dim, lengths, **options)


def batch_images(
    images: list[Any], patch_size: int, max_tokens: int, canvas_hw: tuple[int, int] | None = None
) -> Images:
    """What a backbone of this patch size gets of images."""
    return Preprocessing(patch_size, canvas_hw).batch(images, max_tokens)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A uint8 picture of noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def only_caption(sample: dict[str, Any]) -> str:
    """The text of a sample that has one in one language."""
    ((text,),) = sample["captions"].values()
    return str(text)


def caption_batch(captions: list[str], labels: list[int] | None = None, side: int = 24) -> Batch:
    """A contrastive batch of noise."""
    images = batch_images([noise(side, side, i) for i in range(len(captions))], 8, 64)
    targets = packed({"caption": captions} | ({"label": labels} if labels else {}))
    return Batch(images=images, targets=targets, keys=[str(i) for i in range(len(captions))])


def features_of(maps_HWD: list[Tensor], stride: int = 8) -> Features:
    """Token maps of any sizes as one padded batch, shuffled; the padding holds numbers that must not matter."""
    grid_hw = (max(m.shape[0] for m in maps_HWD), max(m.shape[1] for m in maps_HWD))
    full = all(m.shape[:2] == grid_hw for m in maps_HWD)
    B, N, D = len(maps_HWD), max(m.shape[0] * m.shape[1] for m in maps_HWD), maps_HWD[0].shape[-1]
    tokens_BND, coords_BN2 = torch.full((B, N, D), 7.0), torch.zeros(B, N, 2, dtype=torch.long)
    valid_BN = torch.zeros(B, N, dtype=torch.bool)
    for i, map_HWD in enumerate(maps_HWD):
        rows, columns, _ = map_HWD.shape
        order = torch.arange(rows * columns) if full else torch.randperm(rows * columns)  # maps alike need no places
        tokens_BND[i, : len(order)] = map_HWD.reshape(-1, D)[order]
        coords_BN2[i, : len(order)] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))[order]
        valid_BN[i, : len(order)] = True
    return Features(tokens_BND, coords_BN2, None if full else valid_BN, grid_hw, stride)


def packed(lists: dict[str, list[Any]]) -> dict[str, Any]:
    """Targets of a batch from lists over its images, None where an image has none."""
    count = len(next(iter(lists.values())))
    return pack([{name: of[i] for name, of in lists.items() if of[i] is not None} for i in range(count)])


def step_losses(output: Losses | WholeBatch) -> Losses:
    """The numbers that a head's losses are where its batch is the whole step."""
    return Losses(*map(over_all_ranks, computed(output)))
