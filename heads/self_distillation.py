"""Self-distillation: the student learns to say of crops and of hidden patches what its own average says of an image.

With options this is the loss of DINOv2 (arXiv:2304.07193), that of SigLIP 2's last fifth (arXiv:2502.14786; SILC,
arXiv:2310.13355; TIPS, arXiv:2410.16512), and that of TIPSv2 (arXiv:2604.12012).

Shape letters: see `indiclip.types` and `indiclip.tasks.self_distillation_losses`.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from indiclip.chunked_cross_entropy import chunked_cross_entropy
from indiclip.head import Head, ListMetric, Losses, Measure, Prediction, WholeBatch
from indiclip.tasks.block_masks import MaskKind, masks_of
from indiclip.tasks.masked_images import patches_of_tokens, patches_per_side, with_hidden_tokens
from indiclip.tasks.self_distillation_losses import Centring, Projector, Targets, dino_loss, koleo_loss
from indiclip.teacher import Teacher
from indiclip.types import Batch, Features, Images, in_float32, random_seeds

if TYPE_CHECKING:
    from indiclip.datasets.base import SampleDataset
    from indiclip.encoder import Encoder


class _Rows(NamedTuple):
    """What the losses are of; empty where a loss is not there.

    `_seen` are the teacher's crops, without masks for it and with masks for the student.
    """

    teacher_seen_BGC: Tensor
    student_BSC: Tensor  # of the crops that the teacher sees too, if more than one, and of local ones
    pooled_seen_BGD: Tensor
    teacher_tokens_RC: Tensor
    student_tokens_RC: Tensor
    weights_R: Tensor


class SelfDistillation(Head):
    """Three losses between the encoder and a teacher, which is an average of it.

    - `dino`: from each of the student's crops to predict the teacher's prototypes of another crop, see `dino_loss`.
    - `ibot`: from crops with hidden patches to predict the teacher's prototypes of those patches, which it sees.
    - `koleo`: the student's vectors of crops keep away from each other.

    They are logged with their weights. The teacher has a copy of the backbone, of its pooling and of this head's
    layers; it begins as they are at the head's `start`, and after each step moves towards them. It lies in the
    checkpoint, but neither in the optimizer, nor in the averages of the EMA callback, nor in what is exported. Held-out
    images are scored as they are, once the teacher has begun, see `PrototypeMetric`.

    Args:
        global_view: Name of the views that the teacher sees.
        local_view: Name of views that only the student sees; None is none.
        dino_weight: Of `dino`.
        ibot_weight: Of `ibot`.
        koleo_weight: Of `koleo`, a sum over the global crops of an image.
        hidden_dim: Of the layers between tokens and prototypes.
        bottleneck_dim: Of the sphere on which the prototypes lie.
        num_prototypes: How many, for images and for patches each.
        student_temperature: Of its softmax over prototypes.
        teacher_temperature: Likewise.
        centring: `sinkhorn` over the step's whole batch, of all ranks, or `mean`; see `Targets`.
        momentum: Share of the teacher that stays in a step.
        final_momentum: That of the run's last step, to which it rises by half a cosine; None is always `momentum`.
        head_only: The teacher has no backbone of its own: it is the student's, in evaluation mode and without a
            gradient, and averages are of the layers alone (TIPSv2). No copy, and no step of the backbone is lost.
        mask_kind: `block`, `large_block` or `random`, see `indiclip.tasks.block_masks.masks_of`.
        mask_share: Of the global crops that have hidden patches.
        mask_ratio: Least and largest share of such a crop's patches that are hidden.
        visible_weight: Of the same loss on patches that are not hidden, a mean over a crop's as that over the hidden
            ones (iBOT++ of TIPSv2); 0 is iBOT.
        **common: Of every `Head`.

    Raises:
        ValueError: An option out of its range.
    """

    title = "Self-distillation"
    metric: "PrototypeMetric"
    embeds_images = embeds_text = False
    needs_all_patches = reads_objects = False
    mixes = True  # it reads views alone, which are not mixed
    begun: Tensor

    def __init__(
        self,
        global_view: str = "global",
        local_view: str | None = "local",
        dino_weight: float = 1.0,
        ibot_weight: float = 1.0,
        koleo_weight: float = 0.1,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_prototypes: int = 65536,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        centring: Centring = "sinkhorn",
        momentum: float = 0.994,
        final_momentum: float | None = None,
        head_only: bool = False,
        mask_kind: MaskKind = "block",
        mask_share: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        visible_weight: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.check_range(dino_weight=dino_weight, ibot_weight=ibot_weight, koleo_weight=koleo_weight)
        self.check_range(visible_weight=visible_weight)
        self.check_range(1, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim)
        self.check_range(2, num_prototypes=num_prototypes)  # of one, everybody says the same
        last = momentum if final_momentum is None else final_momentum
        self.check_range(0, 1, momentum=momentum, final_momentum=last, mask_share=mask_share)
        for name, temperature in {"student": student_temperature, "teacher": teacher_temperature}.items():
            if temperature <= 0:
                raise ValueError(f"heads.{self.name}.{name}_temperature: found {temperature:g}; expected more than 0")
        if ibot_weight and not visible_weight:  # else nothing is hidden, and nothing to be said
            self.check_range(0, 1, 0, **{"mask_share": mask_share, "mask_ratio[1]": mask_ratio[1]})
        if not 0 <= mask_ratio[0] <= mask_ratio[1] <= 1:
            raise ValueError(
                f"heads.{self.name}.mask_ratio: found {list(mask_ratio)}; expected 0 <= least <= largest <= 1"
            )
        if visible_weight and not ibot_weight:
            raise ValueError(f"heads.{self.name}.visible_weight: found {visible_weight:g} without an ibot_weight")
        if not dino_weight and not ibot_weight:
            raise ValueError(f"heads.{self.name}: dino_weight and ibot_weight are 0; expected one of them above")
        if not ibot_weight:
            self.note_idle("with ibot_weight 0", mask_kind=mask_kind, mask_share=mask_share, mask_ratio=mask_ratio)
        elif not mask_share:
            self.note_idle("with mask_share 0", mask_kind=mask_kind, mask_ratio=mask_ratio)
        self.global_view, self.local_view = global_view, local_view if dino_weight else None
        self.dino_weight, self.ibot_weight, self.koleo_weight = dino_weight, ibot_weight, koleo_weight
        self.projector = partial(
            Projector, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, num_prototypes=num_prototypes
        )
        self.temperature, self.make_targets = student_temperature, partial(Targets, num_prototypes, teacher_temperature)
        self.centring, self.momentum, self.final_momentum = centring, momentum, last
        self.head_only, self.visible_weight = head_only, visible_weight
        self.masks = partial(masks_of, share=mask_share, ratio=mask_ratio, kind=mask_kind)
        self.required_views = tuple(name for name in (global_view, self.local_view) if name is not None)
        self.pools_images = bool(dino_weight or koleo_weight)

    def bind(self, encoder: "Encoder") -> None:
        backbone = encoder.backbone
        widths = {"image": backbone.pooled_width} if self.dino_weight else {}
        if self.ibot_weight:
            widths["patch"] = backbone.width
            patches_per_side(backbone, f"heads.{self.name}.ibot_weight", ", or ibot_weight 0")
            self.mask_P = nn.Parameter(torch.zeros(3 * backbone.patch_size**2))
        self.student = nn.ModuleDict({name: self.projector(width) for name, width in widths.items()})
        self.targets = nn.ModuleDict({name: self.make_targets(centring=self.centring) for name in widths})
        self.teacher = Teacher(encoder, self.student, has_backbone=not self.head_only)
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))
        self.metric = PrototypeMetric()

    def check_views(self, counts: Mapping[str, int]) -> None:
        if self.dino_weight and self.local_view is None and counts[self.global_view] < 2:
            raise ValueError(
                f"heads.{self.name}.local_view: found none, and one {self.global_view!r} view of each image; expected "
                "two, of which one is compared with the other, or dino_weight 0"
            )

    def tower_copies(self) -> list[nn.Module]:
        return [] if self.teacher.backbone is None else [self.teacher.backbone]

    def begin(self, encoder: "Encoder") -> None:
        self.teacher.follow(encoder, 0.0, self.student)
        self.begun.fill_(True)

    def after_step(self, encoder: "Encoder", progress: float, made: Tensor) -> None:
        left = (1 + math.cos(math.pi * progress)) / 2
        momentum = self.final_momentum - (self.final_momentum - self.momentum) * left
        self.teacher.follow(encoder, momentum, self.student, made)
        for targets in self.targets.values():
            cast(Targets, targets).update(made)

    def loss(self, features: Features, batch: Batch, encoder: "Encoder") -> WholeBatch:
        seen, B = batch["views"][self.global_view], len(batch["keys"])
        several = len(seen["num_patches"]) > B
        rows: dict[str, Tensor] = {}
        crops: list[Tensor] = []  # the student goes first: autocast would remember its weights without gradients
        rows_R = weights_R = torch.zeros(0, dtype=torch.long)
        if self.ibot_weight or self.koleo_weight or several:
            hidden = seen
            if self.ibot_weight:
                hidden, rows_R, weights_R = self._hide(seen, batch, encoder)
            of_seen = encoder.features(hidden)
            if self.ibot_weight:
                rows["student_tokens_RC"] = self.student["patch"](_rows_of(of_seen, rows_R))
            if self.koleo_weight or (self.dino_weight and several):
                rows["pooled_seen_BGD"] = _by_image(encoder.pool_features(of_seen), B)
            if self.dino_weight and several:
                crops.append(self.student["image"](rows["pooled_seen_BGD"]))
        if self.local_view is not None:
            of_local = encoder.features(batch["views"][self.local_view])
            crops.append(self.student["image"](_by_image(encoder.pool_features(of_local), B)))
        if crops:
            rows["student_BSC"] = torch.cat(crops, 1)
        with torch.no_grad():
            of_teacher = self.teacher.features(seen, encoder)
            if self.dino_weight:
                pooled_BGD = _by_image(self.teacher.pool_features(of_teacher, encoder), B)
                rows["teacher_seen_BGC"] = self.teacher.layers["image"](pooled_BGD)
            if self.ibot_weight:
                rows["teacher_tokens_RC"] = self.teacher.layers["patch"](_rows_of(of_teacher, rows_R))
        empty = of_teacher.tokens.new_zeros(B, 0, 0)
        given = {name: in_float32(rows.get(name, empty)) for name in _Rows._fields} | {"weights_R": weights_R}
        return WholeBatch(partial(self._losses, several), tuple(given[name] for name in _Rows._fields))

    def _losses(self, several: bool, *tensors: Tensor) -> Losses:
        """The losses of this rank's whole batch."""
        rows, terms = _Rows(*tensors), {}
        with torch.autocast(rows.student_BSC.device.type, enabled=False):
            if self.dino_weight:
                said_RK = self._said_by_teacher("image", rows.teacher_seen_BGC.flatten(0, 1))(slice(None))
                targets_BGK = said_RK.reshape(*rows.teacher_seen_BGC.shape[:2], -1)
                logits_BSK = _projector(self.student, "image").logits(rows.student_BSC)
                loss = dino_loss(targets_BGK, logits_BSK, self.temperature, same_crops=several)
                terms["dino"] = self.dino_weight * loss
            if self.ibot_weight:
                said = self._said_by_teacher("patch", rows.teacher_tokens_RC)
                unit_RC, unit_KC = _projector(self.student, "patch").units(rows.student_tokens_RC)
                loss, _ = chunked_cross_entropy(unit_RC / self.temperature, unit_KC, said, rows.weights_R.detach())
                terms["ibot"] = self.ibot_weight * loss / len(rows.student_BSC)
            if self.koleo_weight:
                crops = rows.pooled_seen_BGD.unbind(1)
                terms["koleo"] = self.koleo_weight * torch.stack([koleo_loss(x_BD) for x_BD in crops]).sum()
        return Losses(terms)

    @torch.no_grad()
    def _said_by_teacher(self, name: str, points_RC: Tensor) -> Callable[[slice], Tensor]:
        """What gives the teacher's distributions of some of these points."""
        return cast(Targets, self.targets[name]).of(*_projector(self.teacher.layers, name).units(points_RC))

    def _hide(self, images: Images, batch: Batch, encoder: "Encoder") -> tuple[Images, Tensor, Tensor]:
        """The teacher's crops as the student sees them, and what it is to predict: places of tokens, their weights."""
        patches, weight = patches_of_tokens(images, encoder.backbone), self.visible_weight
        masks = self.masks(random_seeds(batch), [of.shape[:2] for of in patches])
        hidden, rows_R, weights_R = with_hidden_tokens(images, masks, patches, self.mask_P, encoder.backbone, weight)
        per_image = len(masks) // len(batch["keys"])
        return hidden, rows_R, weights_R / per_image

    def predict(self, features: Features, batch: Batch, encoder: "Encoder") -> list[Prediction]:
        """The prototypes that are nearest to the image: `prototype`, the student's, and `teacher_prototype`.

        Nothing before the teacher has begun, and where prototypes of images are not trained.
        """
        if not self.dino_weight or not self.begun:
            return [{} for _ in batch["keys"]]
        of_teacher = self.teacher.features(batch["images"], encoder)
        pooled = encoder.pool_features(features), self.teacher.pool_features(of_teacher, encoder)
        nearest: list[list[int]] = []
        with torch.autocast(features.tokens.device.type, enabled=False):
            for layers, pooled_BD in zip((self.student, self.teacher.layers), pooled, strict=True):
                projector = _projector(layers, "image")
                nearest.append(projector.logits(projector(in_float32(pooled_BD))).argmax(1).tolist())
        names = ("prototype", "teacher_prototype")
        return [dict(zip(names, pair, strict=True)) for pair in zip(*nearest, strict=True)]

    def update_metric(self, predictions: list[Prediction], features: Features, batch: Batch) -> None:
        if predictions and predictions[0]:
            self.metric.update(predictions)

    def measures(self, held_out: "SampleDataset") -> dict[str, Measure]:
        return {
            "used_prototypes": Measure("prototypes in use (exp of their entropy; 1 is a collapse)"),
            "agreement": Measure("images of which student and teacher choose the same prototype"),
        }


class PrototypeMetric(ListMetric):
    """Whether the prototypes of held-out images say something: of how good the features are it says nothing.

    `agreement` is the share of images of which student and teacher choose the same one. `used_prototypes` is how many
    the student uses, as the exponential of the entropy of its choices: 1 where all images have the same.
    """

    def update(self, predictions: list[Prediction]) -> None:
        """Add a batch of `SelfDistillation.predict`."""
        for prediction in predictions:
            self.add(prediction["prototype"], prediction["teacher_prototype"])

    def compute(self) -> dict[str, Tensor]:
        rows_R2 = torch.tensor(self.rows_of_all_ranks()).reshape(-1, 2)
        shares = torch.unique(rows_R2[:, 0], return_counts=True)[1].double() / len(rows_R2)
        return {
            "agreement": (rows_R2[:, 0] == rows_R2[:, 1]).float().mean().to(self.device),
            "used_prototypes": torch.special.entr(shares).sum().exp().float().to(self.device),
        }


def _projector(layers: nn.ModuleDict, name: str) -> Projector:
    return cast(Projector, layers[name])


def _by_image(x: Tensor, number: int) -> Tensor:
    """(B * G, D), image by image, -> (B, G, D)."""
    return x.reshape(number, -1, x.shape[-1])


def _rows_of(features: Features, rows_R: Tensor) -> Tensor:
    """Tokens at places among all B * N."""
    return features.tokens_BND.flatten(0, 1).index_select(0, rows_R)
