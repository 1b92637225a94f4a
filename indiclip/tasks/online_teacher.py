"""A teacher that runs beside the student and sees the same patches.

Shape letters: see `indiclip.types`; T teachers, one here.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from indiclip import checkpoint
from indiclip.encoder import Encoder
from indiclip.names import check_range
from indiclip.pretrained.weights import crc32_of
from indiclip.types import Images, Texts

INITIAL = "initial"


@dataclass
class OnlineTeacher:
    """Which teacher.

    Args:
        weights: A run's folder, a checkpoint, or a dual encoder of another library, see `indiclip.checkpoint.load`; or
            `initial`, a copy of the student before its first step, of use where that is pretrained and is not to
            forget. Its backbone must read patches of the student's size, at any image size.
        which: Of a run: `auto`, `ema`, `last` or `best`.
        logit_scale: The factor on its cosines; None is the one it was trained with.
    """

    weights: str
    which: Literal["auto", "ema", "last", "best"] = "auto"
    logit_scale: float | None = None

    def beside(self, student: Encoder, key: str) -> "FrozenTeacher":
        """The teacher of a student.

        Args:
            student: As it is before its first step.
            key: In the YAML, for messages.

        Raises:
            ValueError: No such teacher, or one whose backbone reads other patches than the student's.
        """
        check_range({f"{key}.logit_scale": self.logit_scale}, without=0)
        if self.weights == INITIAL:
            encoder = copy.deepcopy(student).eval().requires_grad_(False)
        else:
            try:
                encoder = checkpoint.load(self.weights, weights=self.which)
            except (FileNotFoundError, ValueError) as error:
                raise ValueError(f"{key}.weights: {error}") from error
        own, other = student.backbone, encoder.backbone
        for name in ("patch_size", "canvas_hw", "interpolation"):
            if getattr(own, name) != getattr(other, name):
                raise ValueError(
                    f"{key}.weights: {self.weights} has {name} {getattr(other, name)}, the student "
                    f"{getattr(own, name)}, and both read the same patches; expected the same, or a cache of its "
                    "embeddings (indiclip embed --views)"
                )
        scale = encoder.logit_factor if self.logit_scale is None else self.logit_scale
        return FrozenTeacher(encoder, scale, keeps=self.weights == INITIAL)


class FrozenTeacher(nn.Module):
    """An encoder in evaluation mode and without gradients, which runs once for a batch.

    With `model.micro_batches` each part of a batch comes twice, first without gradients: what was said of it then is
    kept until it comes again, or is gone.

    Args:
        encoder: Whose embeddings are wanted.
        logit_scale: The factor on its cosines.
        keeps: Whether its weights are part of checkpoints: of a copy of the student, which a resumed run cannot make
            again. Others are read anew from where they lie.

    Attributes:
        crc32: The checksum of weights that checkpoints leave out; None of those that they have.
    """

    def __init__(self, encoder: Encoder, logit_scale: float, keeps: bool) -> None:
        super().__init__()
        self.logit_scale_ = logit_scale
        self.encoder = encoder if keeps else None
        self.crc32 = None if keeps else crc32_of(encoder.state_dict())
        self._apart: list[Any] = [] if keeps else [encoder]  # in a list, which torch does not look into
        self._said: Any = WeakTensorKeyDictionary()  # of the patches that came without gradients

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)

    def embed(self, images: Images, captions: list[str] | Texts) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (B, T, E) of images and of captions, and the factor on their cosines (B, T).

        Token ids that come with the captions are the student's.
        """
        patches_BNP = images["patches_BNP"]
        said: tuple[Tensor, Tensor, Tensor] | None = self._said.pop(patches_BNP, None)
        if said is None:
            said = self._embed(images, captions)
            if not torch.is_grad_enabled():
                self._said[patches_BNP] = said
        return said

    @torch.no_grad()
    def _embed(self, images: Images, captions: list[str] | Texts) -> tuple[Tensor, Tensor, Tensor]:
        device = images["patches_BNP"].device
        if self._apart and self._apart[0].device != device:
            self._apart[0].to(device)
        encoder: Any = self._apart[0] if self._apart else self.encoder
        image_BE = encoder.embed_features(encoder.features(images))
        text_BE = encoder.project_text(encoder.pool_text(captions if self.encoder is not None else [*captions]))
        return image_BE[:, None], text_BE[:, None], image_BE.new_full((len(captions), 1), self.logit_scale_)
