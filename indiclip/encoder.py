"""The encoder, what a run is for: images and text of any kind in, embeddings that nest out.

It knows no head, no Lightning and no config. Shape letters: see `indiclip.types`.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.layers.attention_pool import AttentionPoolLatent
from torch import Tensor, nn

from indiclip.backbone import Backbone
from indiclip.lora import LoRA, add_lora, merge_lora
from indiclip.names import check_choice, shorten
from indiclip.patches import AnyImage, batch_images
from indiclip.text import TextTower, describe
from indiclip.types import Features, Images, on_device


class Encoder(nn.Module):
    """Backbone, text tower, pooling and projections into one space.

    Args:
        backbone: Images -> features.
        text: Token ids -> token vectors.
        embed_dim: Length E of the full embedding.
        lengths: The lengths that embeddings are trained to be cut to (Matryoshka), ascending. The full length is
            always one of them.
        pool: How tokens become one vector, on both sides: see `Pool`.
        batch_norm: Normalise what was pooled, on both sides: see `Pool`.
        lora: Adapters for the towers, whose own weights are then frozen; see `indiclip.lora.LoRA`.
    """

    def __init__(
        self,
        backbone: Backbone,
        text: TextTower,
        embed_dim: int = 512,
        lengths: Sequence[int] = (64, 128, 256),
        pool: Literal["attention", "mean"] = "attention",
        batch_norm: bool = False,
        lora: LoRA | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.text = text
        self.embed_dim = embed_dim
        self.lengths = sorted({*lengths, embed_dim})
        if self.lengths[0] < 1 or self.lengths[-1] > embed_dim:
            raise ValueError(f"encoder.lengths: {list(lengths)} must lie between 1 and embed_dim {embed_dim}")
        self.image_pool = Pool(backbone.width, pool, batch_norm)
        self.text_pool = Pool(text.width, pool, batch_norm)
        self.image_projection = nn.Linear(backbone.width, embed_dim, bias=False)
        self.text_projection = nn.Linear(text.width, embed_dim, bias=False)
        for projection in (self.image_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        self.lora = LoRA(**lora) if isinstance(lora, dict) else lora  # a dict is what `to_config` gives
        if self.lora is not None:  # last: the towers' weights must be there under their own names before
            add_lora({"image": self.backbone, "text": self.text}, self.lora)

    def merged(self) -> "Encoder":
        """This encoder, or where it has LoRA's adapters a copy in which they are part of the weights."""
        if self.lora is None:
            return self
        merged = merge_lora(self)
        merged.lora = None
        return merged

    @property
    def device(self) -> torch.device:
        return self.image_projection.weight.device

    def features(self, images: Images) -> Features:
        """Backbone features of a batch of images."""
        return cast(Features, self.backbone(images))

    def embed_features(self, features: Features, length: int | None = None) -> Tensor:
        """Unit-length image embeddings (B, length) of features."""
        pooled_BD = self.image_pool(features.tokens_BND, features.valid_BN)
        return self._cut(self.image_projection(pooled_BD), length)

    def embed_image(
        self,
        images: AnyImage | Sequence[AnyImage] | Images,
        length: int | None = None,
        max_tokens: int = 256,
    ) -> Tensor:
        """Unit-length embeddings of images of any size.

        Args:
            images: A PIL image, a uint8 array (height, width, 3), a uint8 or 0..1 float tensor (3, height, width), a
                list of any of these, or a batch of patches.
            length: Cut to this many numbers: one of `lengths`. None is the full length.
            max_tokens: Larger images are scaled down, aspect kept, to this many patches.

        Returns:
            (B, length) on the encoder's device; B is 1 for a single image.

        Raises:
            ValueError: An image of another type, or a length that was not trained.
        """
        self._check_length(length)
        if not isinstance(images, dict):
            many = cast(list[AnyImage], list(images) if isinstance(images, list | tuple) else [images])
            budget = min(max_tokens, self.backbone.max_tokens)
            images = batch_images(many, self.backbone.patch_size, budget, self.backbone.canvas_hw)
        images = cast(Images, {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in images.items()})
        return self.embed_features(self.features(images), length)

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and their mask (B, T), on the encoder's device."""
        return self._on_device(*self.text.tokenizer(texts))

    def embed_text(self, texts: str | list[str], length: int | None = None, batch_statistics: bool = True) -> Tensor:
        """Unit-length embeddings (B, length) of strings in any language; equal strings are encoded once.

        Args:
            texts: One or many; none give shape (0, length).
            length: Cut to this many numbers: one of `lengths`. None is the full length.
            batch_statistics: False makes batch norm, where there is one, use its running statistics in training too:
                for a handful of prompts, whose own mean and variance say little.

        Raises:
            ValueError: Something other than strings, or a length that was not trained.
        """
        self._check_length(length)
        many = [texts] if isinstance(texts, str) else list(texts)
        if not all(isinstance(text, str) for text in many):
            raise ValueError(f"embed_text: found {shorten(texts)}; expected a string, or a list of them")
        if not many:
            return torch.zeros(0, length or self.embed_dim, device=self.device)
        distinct = list(dict.fromkeys(many))
        rows = self.text.tokenizer.encode(distinct)
        ids_BT, valid_BT = self._on_device(*self.text.tokenizer.pad(rows))
        tokens_BTD = self.text(ids_BT, valid_BT, padded=len(set(map(len, rows))) > 1)
        pooled_BD = self.text_pool(tokens_BTD, valid_BT, batch_statistics)
        text_BE = self._cut(self.text_projection(pooled_BD), length)
        if len(distinct) == len(many):
            return text_BE
        position = {text: i for i, text in enumerate(distinct)}
        return text_BE[on_device([position[text] for text in many], text_BE.device)]

    def to_config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this encoder without a network, weights aside (plain types only)."""
        return {
            "backbone": describe(self.backbone),
            "text": describe(self.text),
            "embed_dim": self.embed_dim,
            "lengths": list(self.lengths),
            "pool": self.image_pool.kind,
            "batch_norm": self.image_pool.norm is not None,
        } | ({"lora": asdict(self.lora)} if self.lora is not None else {})

    def _on_device(self, ids_BT: Tensor, valid_BT: Tensor) -> tuple[Tensor, Tensor]:
        # Not blocking: else the CPU would wait for what the GPU has still to do.
        return ids_BT.to(self.device, non_blocking=True), valid_BT.to(self.device, non_blocking=True)

    def _check_length(self, length: int | None) -> None:
        if length is not None and length not in self.lengths:
            raise ValueError(f"length {length} was not trained; the trained lengths are {self.lengths}")

    @staticmethod
    def _cut(embedding_BE: Tensor, length: int | None) -> Tensor:
        return F.normalize(embedding_BE[:, :length].float(), dim=-1)


class Pool(nn.Module):
    """Valid tokens -> one vector.

    Args:
        width: Of the tokens.
        kind: `attention` lets one learned query attend to them (timm's attention pooling); `mean` is their mean.
        batch_norm: Normalise each channel over the batch. New towers give nearly the same vector for everything
            (cosines above 0.9), and short training from scratch spends most of its steps on leaving that; batch norm
            takes what is common away. `trainer.sync_batchnorm` makes the statistics those of all ranks.
    """

    def __init__(self, width: int, kind: Literal["attention", "mean"] = "attention", batch_norm: bool = False) -> None:
        super().__init__()
        check_choice("encoder.pool", kind, ("attention", "mean"))
        self.kind = kind
        num_heads = max(1, width // 64)
        num_heads = num_heads if width % num_heads == 0 else 1
        self.pool = AttentionPoolLatent(width, num_heads=num_heads) if kind == "attention" else None
        self.norm = nn.BatchNorm1d(width, affine=False) if batch_norm else None

    def forward(self, tokens_BND: Tensor, valid_BN: Tensor | None, batch_statistics: bool = True) -> Tensor:
        if self.pool is not None:
            mask = None if valid_BN is None else valid_BN[:, None, None, :]
            pooled_BD = cast(Tensor, self.pool(tokens_BND, attn_mask=mask))
        elif valid_BN is None:
            pooled_BD = tokens_BND.mean(1)
        else:
            share_BN = valid_BN / valid_BN.sum(1, keepdim=True)
            pooled_BD = torch.einsum("bnd,bn->bd", tokens_BND, share_BN.to(tokens_BND.dtype))
        if self.norm is None:
            return pooled_BD
        # One vector has no variance. Over ranks it has, and there all must take part in their exchange.
        alone = len(pooled_BD) == 1 and not isinstance(self.norm, nn.SyncBatchNorm)
        if self.training and batch_statistics and not alone:
            return cast(Tensor, self.norm(pooled_BD))
        return F.batch_norm(pooled_BD, self.norm.running_mean, self.norm.running_var, eps=self.norm.eps)
