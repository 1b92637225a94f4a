"""Distillation: the student's similarities between images and captions follow those of teachers.

MobileCLIP (Vasu, Pouransari, Faghri, Vemulapalli, Tuzel, CVPR 2024, arXiv:2311.17049), MobileCLIP 2 (Faghri et al.,
TMLR 2025, arXiv:2508.20691); the formula is in `indiclip.tasks.distillation_loss`.
Shape letters: see `indiclip.types`; T teachers.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torchmetrics import MetricCollection

from indiclip.head import Head, Losses, Prediction, WholeBatch
from indiclip.tasks.distillation_loss import DistillationLoss
from indiclip.tasks.online_teacher import OnlineTeacher
from indiclip.types import Batch, Features

if TYPE_CHECKING:
    from indiclip.encoder import Encoder


class Distillation(Head):
    """Compares the distributions over a batch's captions and images with those of teachers, at all trained lengths.

    The teachers' embeddings come with the samples, from a cache (`data.overrides: [{task: ..., teachers: ...}]`), or
    from a teacher that runs beside. Stands beside a contrastive head of the same task, whose `weight` of 0 leaves the
    distillation alone: MobileCLIP's (1 - l) and l are the two weights.

    The student's factor on the cosines is the head's own and learned: labels of 0 and 1 drive that of the contrastive
    loss up, to the bound at last, while this one is best where the teachers' distributions are met. Of a run whose
    contrastive head has weight 0 it is what is read, exported and taught with: that head's stays as it began, and its
    logged loss is at that factor.

    Args:
        teacher: One that runs in each step, in place of a cache: slower, but it sees what augmentations there are.
        length_weights: Weight of each of the encoder's lengths, ascending; None is equal.
        init_logit_scale: The student's factor on the cosines at the start.
        max_logit_scale: Most that it may become.
        **common: Of every `Head`.
    """

    title = "Distillation"
    metric: MetricCollection
    loss_fields: tuple[str, ...] = ("caption", "teacher_image", "teacher_text", "teacher_scale")
    needs_all_patches = reads_objects = False

    def __init__(
        self,
        teacher: OnlineTeacher | None = None,
        length_weights: list[float] | None = None,
        init_logit_scale: float = 1 / 0.07,
        max_logit_scale: float = 100.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.check_range(1e-3, 1e6, max_logit_scale=max_logit_scale, init_logit_scale=init_logit_scale)
        self.online, self.length_weights = teacher, length_weights
        self._scales = (init_logit_scale, max_logit_scale)
        if teacher is not None:
            self.loss_fields = ("caption",)

    def bind(self, encoder: "Encoder") -> None:
        self.distance = DistillationLoss(encoder.lengths, self.length_weights, *self._scales, f"heads.{self.name}.")
        self.metric = MetricCollection({})  # what the student learns, the contrastive head's says
        self.teacher = None if self.online is None else self.online.beside(encoder, f"heads.{self.name}.teacher")

    def fingerprint(self) -> dict[str, int]:
        crc32 = None if self.teacher is None else self.teacher.crc32
        return {} if crc32 is None else {"crc32_of_teacher": crc32}

    def tower_copies(self) -> list[nn.Module]:
        copied = self.teacher.encoder if self.teacher is not None else None
        return [] if copied is None else [copied.backbone, copied.text]

    def loss(self, features: Features, batch: Batch, encoder: "Encoder") -> WholeBatch:
        captions = self.target(batch, "caption")
        image_BD, text_BD = encoder.pool_features(features), encoder.pool_text(captions)
        if self.teacher is not None:
            taught = self.teacher.embed(batch["images"], captions)
        else:
            names = ("teacher_image", "teacher_text", "teacher_scale")
            taught = tuple(self.target(batch, name).values.unflatten(0, (len(captions), -1)) for name in names)
        return WholeBatch(partial(self.distances, encoder), (image_BD, text_BD, *taught))

    def after_step(self, encoder: "Encoder", progress: float, made: Tensor) -> None:
        self.distance.bound_scale()

    def distances(
        self,
        encoder: "Encoder",
        image_BD: Tensor,
        text_BD: Tensor,
        teacher_image_BTE: Tensor,
        teacher_text_BTE: Tensor,
        scale_BT: Tensor,
    ) -> Losses:
        """The loss of the pooled vectors of all pairs of this rank; the scales are the same for all of them."""
        image_BE, text_BE = encoder.project_image(image_BD), encoder.project_text(text_BD)
        return Losses({"loss": self.distance(image_BE, text_BE, teacher_image_BTE, teacher_text_BTE, scale_BT[0])})

    def predict(self, features: Features, batch: Batch, encoder: "Encoder") -> list[Prediction]:
        """Nothing: the student's embeddings are the contrastive head's to give."""
        return [{} for _ in batch["keys"]]

    def update_metric(self, predictions: list[Prediction], features: Features, batch: Batch) -> None:
        """Nothing: held-out samples have no teachers."""
