"""The encoder, what a run is for: images and text of any kind in, embeddings that nest out.

It knows no head, no Lightning and no config. Shape letters: see `indiclip.types`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indiclip.backbone import Backbone
from indiclip.lora import LoRA, add_lora, check_adapters, merge_lora
from indiclip.names import check_choice, check_whole, is_whole, shorten
from indiclip.pooling import ImagePool, Pool, Projection, TextPool
from indiclip.preprocessing import AnyImage
from indiclip.pretrained.init_from import InitFrom, InitialWeights
from indiclip.text import TextTower, describe
from indiclip.types import Features, Images, Texts, in_float32, on_device

_DEFAULTS: dict[str, Any] = {
    "backbone": None,
    "text": None,
    "embed_dim": 512,
    "lengths": (64, 128, 256),
    "pool": "attention",
    "text_pool": None,
    "batch_norm": False,
    "image_projection": Projection(),
    "text_projection": Projection(),
}


_CLIP_LOGIT_SCALE = math.log(100)  # that of trained CLIP models, where a model brings none
_PROMPTS = 1024  # of classes, embedded at a time


class Encoder(nn.Module):
    """Backbone, text tower, pooling and projections into one space.

    Args:
        backbone: Images -> features.
        text: Token ids -> token vectors.
        embed_dim: Length E of the full embedding, 512 by default.
        lengths: The lengths that embeddings are trained to be cut to (Matryoshka), ascending; 64, 128 and 256 by
            default. The full length is always one of them.
        pool: How the tokens of an image become one vector, `attention` by default, see `Pool`.
        text_pool: How those of a text do; None is as `pool`, and the mean where that is `tower`.
        batch_norm: Normalise what was pooled, on both sides: see `Pool`.
        image_projection: What brings an image's vector into the common space, see `Projection`; None is a matrix.
        text_projection: As `image_projection`.
        lora: Adapters for the towers, whose own weights are then frozen; see `indiclip.lora.LoRA`.
        init_from: Pretrained weights, the last of which counts for each part. What is left out above is theirs, too.

    Attributes:
        initial_logits: `logit_scale` (a logarithm) and `logit_bias` with which a contrastive loss is to begin, where
            `init_from` has them.
        initialised: What `init_from` gave, a line for each of its weights.

    Raises:
        ValueError: A part is missing, or `init_from` does not fit, see `InitialWeights`.
    """

    def __init__(
        self,
        backbone: Backbone | None = None,
        text: TextTower | None = None,
        embed_dim: int | None = None,
        lengths: Sequence[int] | None = None,
        pool: ImagePool | None = None,
        text_pool: TextPool | None = None,
        batch_norm: bool | None = None,
        image_projection: Projection | None = None,
        text_projection: Projection | None = None,
        lora: LoRA | None = None,
        init_from: list[InitFrom] | None = None,
    ) -> None:
        super().__init__()
        initial = InitialWeights(init_from or [])
        given = {name: value for name, value in locals().items() if value is not None and name in _DEFAULTS}
        chosen = _DEFAULTS | initial.parts(_DEFAULTS.keys() - given.keys()) | given
        for name, side in {"backbone": "image", "text": "text"}.items():
            if chosen[name] is None:
                raise ValueError(f"model.encoder.{name}: name one, or weights in init_from that have the part {side}")
        self._build(**chosen)
        self.initial_logits = initial.logits()
        self.initialised = initial.fill(self) if init_from else []
        self._remembered: dict[tuple[Any, ...], tuple[Any, Tensor]] | None = None
        self.lora = lora
        if lora is not None:  # last: the towers' weights must be there under their own names before
            add_lora({"image": self.backbone, "text": self.text}, lora)

    def _build(
        self,
        backbone: Backbone,
        text: TextTower,
        embed_dim: int,
        lengths: Sequence[int],
        pool: ImagePool,
        text_pool: TextPool | None,
        batch_norm: bool,
        image_projection: Projection,
        text_projection: Projection,
    ) -> None:
        check_choice("encoder.pool", pool, get_args(ImagePool))
        check_choice("encoder.text_pool", text_pool or "mean", get_args(TextPool))
        self.backbone = backbone
        self.text = text
        self.embed_dim = embed_dim
        check_whole({"encoder.embed_dim": embed_dim})
        for length in lengths:
            check_whole({"encoder.lengths": length}, 1, embed_dim)
        self.lengths = sorted({*lengths, embed_dim})
        if pool != "tower":
            backbone.remove_pool()
        self.image_pool = Pool(backbone.pooled_width, pool, batch_norm)
        self.text_pool = Pool(text.width, text_pool or ("mean" if pool == "tower" else pool), batch_norm)
        self._projections = (image_projection, text_projection)
        self.image_projection = image_projection.module(backbone.pooled_width, embed_dim)
        self.text_projection = text_projection.module(text.width, embed_dim)
        for matrix in [*self.image_projection.modules(), *self.text_projection.modules()]:
            if isinstance(matrix, nn.Linear):
                nn.init.normal_(matrix.weight, std=matrix.in_features**-0.5)

    def check_adapters(self) -> None:
        """Raise ValueError where one of LoRA's adapters would have no effect. Runs the adapted towers once."""
        towers = self.lora.towers if self.lora and not next(self.parameters()).is_meta else []
        if "image" in towers:
            patch = np.zeros((self.backbone.patch_size, self.backbone.patch_size, 3), np.uint8)
            images = self.backbone.preprocessing.batch([patch], self.backbone.max_tokens)
            check_adapters("image", self.backbone, partial(self.backbone, images))
        if "text" in towers:
            check_adapters("text", self.text, partial(self.text, *self.tokenize(["a"])))

    def merged(self) -> "Encoder":
        """This encoder, or where it has LoRA's adapters a copy in which they are part of the weights."""
        if self.lora is None:
            return self
        merged = merge_lora(self)
        merged.lora = None
        return merged

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def logit_factor(self) -> float:
        """By which `zero_shot` multiplies cosines before the softmax."""
        return math.exp(self.initial_logits.get("logit_scale", _CLIP_LOGIT_SCALE))

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """While it lasts, what is made of the same features, texts or pooled vectors is made once, whoever asks: the
        heads of a task share it, and batch norm sees it once.
        """
        self._remembered = {}
        try:
            yield
        finally:
            self._remembered = None

    def _once(self, compute: Callable[[], Tensor], of: Any, *how: Any) -> Tensor:
        """What was computed of an object, in this way, while `remembering`, else what is computed now."""
        if self._remembered is None:
            return compute()
        key = (_identity(of), *how)
        if key not in self._remembered:
            self._remembered[key] = (of, compute())  # kept with it, so that nothing else gets its place in memory
        return self._remembered[key][1]

    def features(self, images: Images) -> Features:
        """Backbone features of a batch of images."""
        return cast(Features, self.backbone(images))

    def features_behind(self, images: Images, blocks: Mapping[str, int | None]) -> dict[str, Features]:
        """As `features`, behind the block that each name stands for, of one pass; see `Head.block`."""
        if not any(block is not None for block in blocks.values()):
            return dict.fromkeys(blocks, self.features(images))
        numbers = {name: self.backbone.block_number(block) for name, block in blocks.items()}
        after = cast(Features, self.backbone(images, sorted({*numbers.values()}))).after
        return {name: after[number] for name, number in numbers.items()}

    def embed_features(self, features: Features, length: int | None = None) -> Tensor:
        """Unit-length image embeddings (B, length) of features."""
        return self.project_image(self.pool_features(features), length)

    def pool_features(self, features: Features) -> Tensor:
        """One vector per image (B, D), each for itself: before batch norm, where there is one, and the projection."""
        return self._once(lambda: self._pool_features(features), features)

    def _pool_features(self, features: Features) -> Tensor:
        if self.image_pool.kind == "tower":
            return self.backbone.pool(features)
        return cast(Tensor, self.image_pool(features.tokens_BND, features.valid_BN))

    def project_image(self, pooled_BD: Tensor, length: int | None = None, batch_statistics: bool = True) -> Tensor:
        """Unit-length image embeddings (B, length) of what `pool_features` gives."""
        return self._projected(pooled_BD, self.image_pool, self.image_projection, length, batch_statistics)

    def embed_image(
        self,
        images: AnyImage | Sequence[AnyImage] | Images,
        length: int | None = None,
        max_tokens: int = 256,
    ) -> Tensor:
        """Unit-length embeddings of images of any size.

        Args:
            images: A path, the bytes of an image file, a PIL image, a uint8 array (height, width, 3), a uint8 or 0..1
                float tensor (3, height, width), a list of any of these, or a batch of patches.
            length: Cut to this many numbers: one of `lengths`. None is the full length.
            max_tokens: Larger images are scaled down, aspect kept, to this many patches.

        Returns:
            (B, length) on the encoder's device; B is 1 for a single image.

        Raises:
            ValueError: An image of another type or that cannot be read, or a length that was not trained.
            FileNotFoundError: A path that is no file.
        """
        self._check_length(length)
        check_whole({"max_tokens": max_tokens})
        if not isinstance(images, dict):
            many = cast(list[AnyImage], list(images) if isinstance(images, list | tuple) else [images])
            budget = min(max_tokens, self.backbone.max_tokens)
            images = self.backbone.preprocessing.batch(many, budget)
        images = cast(Images, {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in images.items()})
        return self.embed_features(self.features(images), length)

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and their mask (B, T), on the encoder's device."""
        return self._on_device(*self.text.padded(self.text.tokenizer.encode(texts)))

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
        if isinstance(texts, list) and not texts:
            return torch.zeros(0, length or self.embed_dim, device=self.device)
        return self.project_text(self.pool_text(texts), length, batch_statistics)

    def pool_text(self, texts: str | list[str] | Texts) -> Tensor:
        """One vector per text (B, D), as `pool_features`; equal strings are encoded once. At least one text."""
        return self._once(lambda: self._pool_text(texts), texts)

    def _pool_text(self, texts: str | list[str] | Texts) -> Tensor:
        many = [texts] if isinstance(texts, str) else list(texts)
        if not all(isinstance(text, str) for text in many):
            raise ValueError(f"embed_text: found {shorten(texts)}; expected a string, or a list of them")
        distinct = list(dict.fromkeys(many))
        if isinstance(texts, Texts):
            token_ids = dict(zip(many, texts.token_ids, strict=True))
            rows = [token_ids[text] for text in distinct]
        else:
            rows = self.text.tokenizer.encode(distinct)
        ids_BT, valid_BT = self._on_device(*self.text.padded(rows))
        tokens_BTD = self.text(ids_BT, valid_BT, [max(len(row), 1) for row in rows])
        pooled_BD: Tensor = self.text_pool(tokens_BTD, valid_BT)
        if len(distinct) == len(many):
            return pooled_BD
        position = {text: i for i, text in enumerate(distinct)}
        return pooled_BD[on_device([position[text] for text in many], pooled_BD.device)]

    def project_text(self, pooled_BD: Tensor, length: int | None = None, batch_statistics: bool = True) -> Tensor:
        """Unit-length text embeddings (B, length) of what `pool_text` gives."""
        return self._projected(pooled_BD, self.text_pool, self.text_projection, length, batch_statistics)

    def _projected(
        self, pooled_BD: Tensor, pool: Pool, projection: nn.Module, length: int | None, batch_statistics: bool
    ) -> Tensor:
        def whole() -> Tensor:
            embedding_BE: Tensor = projection(pool.normalise(pooled_BD, batch_statistics))
            return embedding_BE

        return self._cut(self._once(whole, pooled_BD, projection, batch_statistics), length)

    def embed_classes(
        self, classes: Sequence[str], templates: Sequence[str] = ("{}",), length: int | None = None
    ) -> Tensor:
        """(C, E) unit-length embeddings of classes, each the mean of its prompts' embeddings; see `zero_shot`."""
        if not classes or not templates:
            raise ValueError("expected at least one class and one template")
        prompts = [template.replace("{}", name) for name in classes for template in templates]
        chunks = [self.embed_text(prompts[i : i + _PROMPTS], length) for i in range(0, len(prompts), _PROMPTS)]
        text_CTE = torch.cat(chunks).reshape(len(classes), len(templates), -1)
        return F.normalize(text_CTE.mean(1), dim=-1)

    def zero_shot(
        self,
        images: AnyImage | Sequence[AnyImage] | Images,
        classes: Sequence[str],
        templates: Sequence[str] = ("{}",),
        length: int | None = None,
    ) -> list[dict[str, float]]:
        """For each image the classes and their probabilities, the most probable first.

        Args:
            images: As of `embed_image`.
            classes: Names, in any language.
            templates: Prompts in which `{}` stands for the name.
            length: As of `embed_image`.
        """
        class_CE = self.embed_classes(classes, templates, length)
        logits_BC = self.logit_factor * (self.embed_image(images, length) @ class_CE.T)
        rows = [dict(zip(classes, row, strict=True)) for row in logits_BC.softmax(1).tolist()]
        return [dict(sorted(row.items(), key=lambda item: -item[1])) for row in rows]

    def to_config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this encoder without a network, weights aside (plain types only)."""
        image, text = self._projections
        return {
            "backbone": describe(self.backbone),
            "text": describe(self.text),
            "embed_dim": self.embed_dim,
            "lengths": list(self.lengths),
            "pool": self.image_pool.kind,
            "text_pool": self.text_pool.kind,
            "batch_norm": self.image_pool.norm is not None,
            "image_projection": asdict(image),
            "text_projection": asdict(text),
        } | ({"lora": asdict(self.lora)} if self.lora is not None else {})

    def _on_device(self, ids_BT: Tensor, valid_BT: Tensor) -> tuple[Tensor, Tensor]:
        # Not blocking: else the CPU would wait for what the GPU has still to do.
        return ids_BT.to(self.device, non_blocking=True), valid_BT.to(self.device, non_blocking=True)

    def _check_length(self, length: int | None) -> None:
        if length is not None and not (is_whole(length) and length in self.lengths):
            trained = ", ".join(map(str, self.lengths))
            raise ValueError(f"length: found {shorten(length)}; expected one of the trained lengths {trained}")

    @staticmethod
    def _cut(embedding_BE: Tensor, length: int | None) -> Tensor:
        return F.normalize(in_float32(embedding_BE[:, :length]), dim=-1)


def _identity(of: Features | Tensor | str | Sequence[str] | Texts) -> tuple[Any, ...]:
    """The same of what is the same. Not the object: FSDP hands on others with the same numbers, where it gathers."""
    if isinstance(of, Features):
        of = of.tokens
    if isinstance(of, Tensor):
        return (of.untyped_storage()._cdata, of.storage_offset(), of.shape, of.stride())
    return (of,) if isinstance(of, str) else tuple(of)
