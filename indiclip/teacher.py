"""An average of an image encoder, for heads that learn from it.

Shape letters: see `indiclip.types`.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from indiclip.moving_average import follow
from indiclip.types import Features, Images

if TYPE_CHECKING:
    from indiclip.encoder import Encoder


class Teacher(nn.Module):
    """Copies of a backbone, of its pooling and of a head's layers, which follow these. Not trained, always evaluated.

    Args:
        encoder: Whose backbone and pooling are copied.
        layers: Of the head, by name; None is none.
        has_backbone: False uses the encoder's own backbone and pooling, as they are in each step.
        has_pool: False leaves out the copy of the pooling, for a head that reads tokens alone.

    Attributes:
        layers: The copies.
        backbone: None without one.
        image_pool: None without one.
    """

    def __init__(
        self,
        encoder: "Encoder",
        layers: nn.ModuleDict | None = None,
        has_backbone: bool = True,
        has_pool: bool = True,
    ) -> None:
        super().__init__()
        self.layers = copy.deepcopy(nn.ModuleDict() if layers is None else layers)
        self.backbone = copy.deepcopy(encoder.backbone) if has_backbone else None
        self.image_pool = copy.deepcopy(encoder.image_pool) if has_backbone and has_pool else None
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @torch.no_grad()
    def features(self, images: Images, encoder: "Encoder") -> Features:
        """As of `Encoder`. Called after the encoder's own: autocast would keep its weights without gradients."""
        if self.backbone is None:
            with _evaluating(encoder.backbone):
                return encoder.features(images)
        found: Features = self.backbone(images)
        return found

    @torch.no_grad()
    def pool_features(self, features: Features, encoder: "Encoder") -> Tensor:
        """As of `Encoder`."""
        if self.backbone is None or self.image_pool is None:
            return encoder.pool_features(features)
        if self.image_pool.kind == "tower":
            return self.backbone.pool(features)
        pooled_BD: Tensor = self.image_pool(features.tokens_BND, features.valid_BN)
        return pooled_BD

    def follow(
        self, encoder: "Encoder", momentum: float, layers: nn.ModuleDict | None = None, made: Tensor | None = None
    ) -> None:
        """Move towards what is trained.

        Args:
            encoder: As of the constructor.
            momentum: The share that stays; 0 copies.
            layers: As of the constructor.
            made: As of `Head.after_step`; None is 1.
        """
        pairs = ((self.backbone, encoder.backbone), (self.image_pool, encoder.image_pool), (self.layers, layers))
        for teacher, student in pairs:
            if teacher is not None and student is not None:
                follow(teacher, student, momentum, made)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the parts that are in training, while it lasts."""
    parts = [part for part in module.modules() if part.training]
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for part in parts:
            part.training = True
