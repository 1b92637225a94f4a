"""Detection: FCOS on a simple feature pyramid, the COCO metric, pictures.

From one map of the backbone ViTDet's pyramid (Li et al., arXiv:2203.16527, section 3) makes a few scales; at every
cell of every scale FCOS (Tian et al., arXiv:2006.09214) answers with class scores, the distances to the four sides of
a box, and how central the cell is in it. What differs from torchvision's FCOS: an image gives the same answer
whatever lies beside it in the batch (norms are over channels alone, cells outside an image are zero before every
convolution and count nowhere), and nothing waits for the GPU in training.

Shape letters: see `indiclip.types`; A cells of all scales, C classes, R boxes of a batch, M boxes of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics
from PIL import Image, ImageDraw, ImageFont
from timm.layers import LayerNorm2d  # type: ignore[attr-defined]
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchmetrics.utilities import dim_zero_cat
from torchvision import ops

from indiclip.head import Datasets, Head, Losses, classes_of, same_classes
from indiclip.types import Batch, Features, Rows, class_names, on_device

if TYPE_CHECKING:
    from indiclip.encoder import Encoder

_SCALES = (4.0, 2.0, 1.0, 0.5, 0.25, 0.125)
_PRIOR = 0.01  # first score of every class, so that the many empty cells do not swamp the first steps (focal loss)
_DRAWN_SCORE = 0.3  # detections below are left out of pictures,
_DRAWN_OVERLAP = 0.5  # and those that overlap a better one of any class more than this (IoU)
_TINY = 1e-7  # no division by zero
_ABSENT = -1.0  # what COCO's evaluation says where there is no such object


class Detection(Head):
    """Boxes with classes.

    Args:
        num_classes: Number of classes, background not counted: all that the dataset has.
        task: Which batch it reads.
        weight: Factor of its losses.
        out_channels: Width of the pyramid and of the towers.
        num_convs: 3x3 convolutions of each of the two towers.
        scales: Sizes of the pyramid's maps relative to the backbone's, each half of the one before.
        reach: A scale is for boxes whose furthest side is up to this many of its strides away from the cell (FCOS: 8);
            the coarsest one takes all that are larger.
        center_sampling_radius: Cells up to this many strides around a box's centre are positive (FCOS: 1.5).
        score_thresh: Detections below are dropped.
        nms_thresh: Of two boxes of a class that overlap more than this (IoU), the better one is kept.
        detections_per_image: Most boxes per image; COCO counts 100.
        topk: Most candidates per image before overlapping ones are removed.
        classes: Instead of `num_classes`, the names of some of the dataset's classes, in any order: objects of the
            others are background.
        name: See `Head`.

    Raises:
        ValueError: `scales` is no such list, or not one of `num_classes` and `classes` is given.
    """

    metric: DetectionMetric
    required_fields = ("boxes_xyxy", "classes")
    embeds_images = embeds_text = False

    def __init__(
        self,
        num_classes: int | None = None,
        task: str = "detection",
        weight: float = 1.0,
        out_channels: int = 256,
        num_convs: int = 4,
        scales: list[float] | None = None,
        reach: float = 8.0,
        center_sampling_radius: float = 1.5,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.6,
        detections_per_image: int = 100,
        topk: int = 1000,
        classes: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(task, weight, name)
        if (num_classes is None) == (not classes):
            raise ValueError(f"heads.{self.name}: give one of num_classes and classes")
        self.scales = [2.0, 1.0, 0.5] if scales is None else [float(scale) for scale in scales]
        if (
            not self.scales
            or any(s not in _SCALES for s in self.scales)
            or any(a != 2 * b for a, b in zip(self.scales, self.scales[1:], strict=False))
        ):
            raise ValueError(
                f"heads.detection.scales: {scales}; expected some of {list(_SCALES)}, each half of the one before"
            )
        self.num_classes, self.out_channels, self.num_convs = num_classes or len(classes or ()), out_channels, num_convs
        self.reach, self.center_sampling_radius = reach, center_sampling_radius
        self.score_thresh, self.nms_thresh = score_thresh, nms_thresh
        self.detections_per_image, self.topk = detections_per_image, topk
        self.classes = classes

    def bind(self, encoder: Encoder) -> None:
        self.pyramid = Pyramid(encoder.backbone.width, self.out_channels, self.scales)
        self.towers = FCOSHead(self.out_channels, self.num_convs, self.num_classes)
        self.metric = DetectionMetric()

    def check(self, train: Datasets, held_out: Datasets) -> None:
        datasets = {**train, **held_out}
        same_classes(self.task, datasets)
        for dataset in datasets.values():
            self._numbers(classes_of(dataset), type(dataset).__name__)

    def _numbers(self, names: Sequence[str], source: str) -> list[int]:
        """The head's number of each of a source's classes, -1 for those that it does not detect."""
        if self.classes is None:
            if len(names) != self.num_classes:
                raise ValueError(
                    f"heads.{self.name}.num_classes: found {self.num_classes}, expected {len(names)}, the number of "
                    f"classes of {source}"
                )
            return list(range(self.num_classes))
        for name in self.classes:
            if name not in names:
                raise ValueError(f"heads.{self.name}.classes: {name!r} is none of the {len(names)} classes of {source}")
        return [self.classes.index(name) if name in self.classes else -1 for name in names]

    def _truth(self, batch: Batch) -> tuple[Rows, Tensor, Tensor]:
        """Boxes, their classes in the head's numbers and whether each is a crowd, (R,)."""
        boxes, classes_R = self.target(batch, "boxes_xyxy"), self.target(batch, "classes").values
        crowd = batch["targets"].get("crowd")
        crowd_R = torch.zeros_like(classes_R, dtype=torch.bool) if crowd is None else crowd.values
        if self.classes is not None or "origin" in batch:
            number_C = self._numbers(class_names(batch), f"the source of task {self.task!r}")
            if self.classes is not None:
                classes_R = on_device(number_C, classes_R.device)[classes_R]
        return boxes, classes_R, crowd_R

    def forward(self, features: Features) -> tuple[FCOSOutputs, Locations]:
        """The outputs of the cells of all scales, and where these lie."""
        map_BDHW, mask_BHW = features.map()
        levels = self.pyramid(map_BDHW, None if features.valid_BN is None else mask_BHW)
        outputs = FCOSOutputs.cat([self.towers(map_BDHW, mask_BHW) for map_BDHW, mask_BHW in levels])
        sizes_hw = [(level.shape[2], level.shape[3]) for level, _ in levels]
        strides = [features.stride / scale for scale in self.scales]
        return outputs, make_locations(sizes_hw, strides, self.reach, map_BDHW.device)

    def loss(self, features: Features, batch: Batch, encoder: Encoder) -> Losses:
        outputs, locations = self(features)
        boxes, classes_R, crowd_R = self._truth(batch)
        radius = self.center_sampling_radius
        assigned = assign(locations, boxes.values.float(), classes_R, crowd_R, boxes.index_BM, radius)
        return Losses(fcos_losses(outputs, *assigned))

    def predict(self, features: Features, batch: Batch, encoder: Encoder) -> list[dict[str, Any]]:
        """`boxes_xyxy` (K, 4) in resized pixels, `scores` (K,) in 0..1, best first, and `labels` (K,)."""
        outputs, locations = self(features)
        centerness_BA1 = outputs.centerness_BA.sigmoid()[..., None]
        scores_BAC = (outputs.logits_BAC.sigmoid() * centerness_BA1).sqrt() * outputs.valid_BA[..., None]
        return [
            self._decode(scores_AC, ltrb_A4, locations, size_hw)
            for scores_AC, ltrb_A4, size_hw in zip(
                scores_BAC, outputs.ltrb_BA4, batch["images"]["sizes_hw"], strict=True
            )
        ]

    def _decode(
        self, scores_AC: Tensor, ltrb_A4: Tensor, locations: Locations, size_hw: tuple[int, int]
    ) -> dict[str, Any]:
        """The best boxes of one image."""
        scores_K, order_K = scores_AC.flatten().topk(min(self.topk, scores_AC.numel()))
        kept_K = scores_K > self.score_thresh
        scores_K, order_K = scores_K[kept_K], order_K[kept_K]
        cells_K, labels_K = order_K // scores_AC.shape[1], order_K % scores_AC.shape[1]
        boxes_K4 = ops.clip_boxes_to_image(locations.boxes(ltrb_A4)[cells_K], size_hw)
        best_K = ops.batched_nms(boxes_K4, scores_K, labels_K, self.nms_thresh)[: self.detections_per_image]
        return {"boxes_xyxy": boxes_K4[best_K], "scores": scores_K[best_K], "labels": labels_K[best_K]}

    def update_metric(self, predictions: list[dict[str, Any]], features: Features, batch: Batch) -> None:
        boxes, classes_R, crowd_R = self._truth(batch)
        for i, (prediction, scale_hw) in enumerate(zip(predictions, batch["images"]["scale"], strict=True)):
            rows = boxes.rows_of(i)
            own_M = classes_R[rows] >= 0
            boxes_M4, classes_M, crowd_M = (value_R[rows][own_M] for value_R in (boxes.values, classes_R, crowd_R))
            self.metric.update_image(prediction, (boxes_M4, classes_M, crowd_M), scale_hw)

    def visualize(
        self, image_HW3: np.ndarray, prediction: dict[str, Any], target: dict[str, Any], class_names: Sequence[str] = ()
    ) -> tuple[np.ndarray, str]:
        theirs = class_names or [str(label) for label in range(self.num_classes)]
        number_C = torch.tensor(self._numbers(theirs, "the source"))
        own = theirs if self.classes is None else self.classes
        gt_classes_M = number_C[target["classes"]]
        shown_M = (gt_classes_M >= 0) & ~target.get("crowd", torch.zeros_like(gt_classes_M).bool())
        gt_M4, gt_classes_M = target["boxes_xyxy"][shown_M], gt_classes_M[shown_M]
        certain_K = prediction["scores"] >= _DRAWN_SCORE
        boxes_K4, scores_K, labels_K = (prediction[name][certain_K] for name in ("boxes_xyxy", "scores", "labels"))
        best_K = ops.nms(boxes_K4, scores_K, _DRAWN_OVERLAP)
        boxes_K4, scores_K, labels_K = boxes_K4[best_K], scores_K[best_K], labels_K[best_K]
        hits = sum(hits_at_half(boxes_K4, labels_K, gt_M4, gt_classes_M))
        words = [f"{own[k]} {s:.2f}" for k, s in zip(labels_K.tolist(), scores_K.tolist(), strict=True)]
        picture = draw_boxes(image_HW3, [(gt_M4, None, "#ffffff"), (boxes_K4, words, "#ff3d7f")])
        present = [own[k] for k in gt_classes_M.tolist()]
        return picture, (
            f"{hits} of {len(present)} found, {len(words) - hits} false (IoU ≥ 0.5, score ≥ {_DRAWN_SCORE})\n"
            f"white is the truth: {', '.join(sorted(present)) or 'nothing'}"
        )


class Pyramid(nn.Module):
    """ViTDet's simple feature pyramid: every scale straight from the backbone's one map."""

    def __init__(self, width: int, out_channels: int, scales: list[float]) -> None:
        super().__init__()
        self.scales = scales
        self.resize = nn.ModuleList(_resize(width, scale) for scale in scales)
        self.project = nn.ModuleList(
            nn.ModuleList(
                [
                    ConvNorm(max(width // int(max(scale, 1)), 1), out_channels, kernel_size=1),
                    ConvNorm(out_channels, out_channels, kernel_size=3),
                ]
            )
            for scale in scales
        )

    def forward(self, map_BDHW: Tensor, mask_BHW: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        """A `(map, mask)` per scale; the mask is None where every cell is valid."""
        levels = []
        for scale, resize, project in zip(self.scales, self.resize, self.project, strict=True):
            if scale < 1 and mask_BHW is not None:  # a padded cell must not win the maximum
                map_BDhw = resize(map_BDHW.masked_fill(~mask_BHW[:, None], -torch.inf))
            else:
                map_BDhw = resize(map_BDHW)
            mask_Bhw = None if mask_BHW is None else _resize_mask(mask_BHW, scale)
            if mask_Bhw is not None:
                map_BDhw = map_BDhw.masked_fill(~mask_Bhw[:, None], 0)
            for layer in cast(nn.ModuleList, project):
                map_BDhw = layer(map_BDhw, mask_Bhw)
            levels.append((map_BDhw, mask_Bhw))
        return levels


class FCOSHead(nn.Module):
    """FCOS' two towers of convolutions, shared by all scales: one for classes, one for boxes and centerness."""

    def __init__(self, channels: int, num_convs: int, num_classes: int) -> None:
        super().__init__()
        self.class_tower = nn.ModuleList(ConvNorm(channels, channels, 3, act=True) for _ in range(num_convs))
        self.box_tower = nn.ModuleList(ConvNorm(channels, channels, 3, act=True) for _ in range(num_convs))
        self.class_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.ltrb = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        for layer in (self.class_logits, self.ltrb, self.centerness):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(cast(Tensor, layer.bias))
        nn.init.constant_(cast(Tensor, self.class_logits.bias), -math.log((1 - _PRIOR) / _PRIOR))

    def forward(self, map_BDHW: Tensor, mask_BHW: Tensor | None) -> FCOSOutputs:
        classes_BDHW = boxes_BDHW = map_BDHW
        for class_layer, box_layer in zip(self.class_tower, self.box_tower, strict=True):
            classes_BDHW = class_layer(classes_BDHW, mask_BHW)
            boxes_BDHW = box_layer(boxes_BDHW, mask_BHW)
        ltrb_BA4 = _cells(self.ltrb(boxes_BDHW)).clamp(max=6).exp()
        centerness_BA = _cells(self.centerness(boxes_BDHW))[..., 0]
        valid_BA = torch.ones_like(centerness_BA, dtype=torch.bool) if mask_BHW is None else mask_BHW.flatten(1)
        return FCOSOutputs(_cells(self.class_logits(classes_BDHW)), ltrb_BA4, centerness_BA, valid_BA)


class ConvNorm(nn.Module):
    """Convolution, norm over channels and, if asked, ReLU; zero outside the images."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, act: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = LayerNorm2d(out_channels)
        self.act = act

    def forward(self, map_BDHW: Tensor, mask_BHW: Tensor | None) -> Tensor:
        map_BDHW = self.norm(self.conv(map_BDHW))
        if self.act:
            map_BDHW = F.relu(map_BDHW)
        return map_BDHW if mask_BHW is None else map_BDHW * mask_BHW[:, None]


@dataclass
class FCOSOutputs:
    """What the towers say, in float32.

    Attributes:
        logits_BAC: Of the classes.
        ltrb_BA4: Distances from the cell's centre to the box's left, top, right, bottom, in strides; positive.
        centerness_BA: Its logit.
        valid_BA: False for cells outside the image.
    """

    logits_BAC: Tensor
    ltrb_BA4: Tensor
    centerness_BA: Tensor
    valid_BA: Tensor

    @classmethod
    def cat(cls, levels: list[FCOSOutputs]) -> FCOSOutputs:
        names = ("logits_BAC", "ltrb_BA4", "centerness_BA", "valid_BA")
        return cls(*(torch.cat([getattr(level, name) for level in levels], 1) for name in names))


@dataclass
class Locations:
    """The cells of all scales.

    Attributes:
        centres_A2: (x, y) in pixels.
        strides_A: Side of a cell in pixels; not whole where a scale above 1 divides an odd stride.
        reach_A2: The least and the most distance to a box's furthest side that the cell answers for, in strides.
    """

    centres_A2: Tensor
    strides_A: Tensor
    reach_A2: Tensor

    def ltrb(self, boxes_XA4: Tensor) -> Tensor:
        """Distances (X, A, 4) from every cell's centre to a box's sides, in strides; positive inside.

        Args:
            boxes_XA4: A box for each cell, or (X, 1, 4), one for all of them.
        """
        low_XA2, high_XA2 = self.centres_A2 - boxes_XA4[..., :2], boxes_XA4[..., 2:] - self.centres_A2
        return torch.cat([low_XA2, high_XA2], -1) / self.strides_A[:, None]

    def boxes(self, ltrb_A4: Tensor) -> Tensor:
        """The inverse: one box (x1, y1, x2, y2) per cell."""
        reach_A4 = ltrb_A4 * self.strides_A[:, None]
        return torch.cat([self.centres_A2 - reach_A4[:, :2], self.centres_A2 + reach_A4[:, 2:]], -1)


def make_locations(
    sizes_hw: list[tuple[int, int]], strides: list[float], reach: float, device: torch.device
) -> Locations:
    """The locations of maps of these sizes and strides, finest first."""
    centres, all_strides, limits = [], [], []
    for level, ((rows, columns), stride) in enumerate(zip(sizes_hw, strides, strict=True)):
        y_H = (torch.arange(rows, device=device) + 0.5) * stride
        x_W = (torch.arange(columns, device=device) + 0.5) * stride
        centres.append(torch.cartesian_prod(y_H, x_W).flip(-1).reshape(-1, 2))
        all_strides.append(torch.full((rows * columns,), stride, device=device))
        least = reach * strides[level - 1] / stride if level else 0.0
        most = reach if level < len(strides) - 1 else math.inf
        limits.append(torch.stack([torch.full_like(all_strides[-1], limit) for limit in (least, most)], 1))
    return Locations(torch.cat(centres), torch.cat(all_strides), torch.cat(limits))


def assign(
    locations: Locations, boxes_R4: Tensor, classes_R: Tensor, crowd_R: Tensor, index_BM: Tensor, radius: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Which box every cell of each image answers for: the smallest whose centre is near and whose size suits.

    Args:
        locations: The cells, the same for all images.
        boxes_R4: The boxes of all images.
        classes_R: -1 for those that are background.
        crowd_R: Whether each is a crowd.
        index_BM: The boxes of each image, R where there is none, see `Rows`.
        radius: How near, in strides.

    Returns:
        `(classes_BA, ltrb_BA4, ignored_BA)`: class, -1 for background; distances to the box's sides (1 for background);
        whether the cell lies in a crowd and so is neither.
    """
    ltrb_RA4 = locations.ltrb(boxes_R4[:, None])
    inside_RA = (ltrb_RA4.amin(-1) > 0) & (classes_R >= 0)[:, None]
    off_centre_RA = (ltrb_RA4[..., :2] - ltrb_RA4[..., 2:]).abs().amax(-1) / 2
    furthest_RA = ltrb_RA4.amax(-1)
    suits_RA = (furthest_RA > locations.reach_A2[:, 0]) & (furthest_RA <= locations.reach_A2[:, 1])
    match_RA = inside_RA & suits_RA & (off_centre_RA < radius) & ~crowd_R[:, None]
    area_R1 = (boxes_R4[:, 2:] - boxes_R4[:, :2]).prod(-1, keepdim=True)
    # One row more, for images with fewer boxes than the most; and one box, so that there is a smallest one without any.
    area_RA = F.pad(torch.where(match_RA, area_R1, torch.inf), (0, 0, 0, 1), value=torch.inf)
    index_BM = F.pad(index_BM, (0, 1), value=len(boxes_R4))
    least_BA, place_BA = area_RA[index_BM].min(1)
    positive_BA, box_BA = least_BA < torch.inf, index_BM.gather(1, place_BA)
    classes_BA = torch.where(positive_BA, F.pad(classes_R, (0, 1))[box_BA], -1)
    ltrb_BA4 = locations.ltrb(F.pad(boxes_R4, (0, 0, 0, 1))[box_BA])
    in_crowd_RA = F.pad(inside_RA & crowd_R[:, None], (0, 0, 0, 1))
    ignored_BA = in_crowd_RA[index_BM].any(1) & ~positive_BA
    return classes_BA, torch.where(positive_BA[..., None], ltrb_BA4, 1.0), ignored_BA


def fcos_losses(outputs: FCOSOutputs, classes_BA: Tensor, ltrb_BA4: Tensor, ignored_BA: Tensor) -> dict[str, Tensor]:
    """Focal loss of the classes, generalised IoU of the boxes and cross-entropy of the centerness (FCOS, section 3).

    All are sums over the batch, divided by its number of positive cells. Every cell takes part with a weight of 0 or
    1, so that no index has to be known on the host and every parameter gets a gradient, if only zero.
    """
    positive_BA = (classes_BA >= 0) & outputs.valid_BA
    counted_BA = outputs.valid_BA & ~ignored_BA
    num_positive = positive_BA.sum().clamp(min=1)
    one_hot_BAC = F.one_hot(classes_BA + 1, outputs.logits_BAC.shape[-1] + 1)[..., 1:].to(outputs.logits_BAC.dtype)
    focal_BAC = ops.sigmoid_focal_loss(outputs.logits_BAC, one_hot_BAC)
    box_BA = giou_loss(outputs.ltrb_BA4, ltrb_BA4)
    across_BA22 = ltrb_BA4.reshape(*ltrb_BA4.shape[:2], 2, 2)  # (left, top), (right, bottom)
    centerness_BA = (across_BA22.amin(-2) / across_BA22.amax(-2)).prod(-1).sqrt()
    cross_entropy_BA = F.binary_cross_entropy_with_logits(outputs.centerness_BA, centerness_BA, reduction="none")
    return {
        "classification": (focal_BAC.sum(-1) * counted_BA).sum() / num_positive,
        "box": (box_BA * positive_BA).sum() / num_positive,
        "centerness": (cross_entropy_BA * positive_BA).sum() / num_positive,
    }


def giou_loss(ltrb_BA4: Tensor, gt_ltrb_BA4: Tensor) -> Tensor:
    """1 less the generalised IoU (Rezatofighi et al., arXiv:1902.09630) of boxes around the same point, (B, A).

    In strides: overlap is the same at any place and size. To the last bit torchvision's, gradients too, which indexes
    by a mask and so waits for the GPU.
    """
    left, top, right, bottom = ltrb_BA4.unbind(-1)
    gt_left, gt_top, gt_right, gt_bottom = gt_ltrb_BA4.unbind(-1)
    width = torch.minimum(right, gt_right) + torch.minimum(left, gt_left)
    both = width * (torch.minimum(bottom, gt_bottom) + torch.minimum(top, gt_top))
    either = (right + left) * (bottom + top) + (gt_right + gt_left) * (gt_bottom + gt_top) - both
    iou = both / (either + _TINY)
    left, top, right, bottom = ltrb_BA4.unbind(-1)  # anew, so that gradients are added up in torchvision's order
    width = torch.maximum(right, gt_right) + torch.maximum(left, gt_left)
    around = width * (torch.maximum(bottom, gt_bottom) + torch.maximum(top, gt_top))
    return 1 - (iou - (around - either) / (around + _TINY))


class DetectionMetric(torchmetrics.Metric):
    """COCO's average precision, in the original images' pixels (COCO's small, medium, large are in those).

    The area of an object is its box's; COCO's own is its mask's. Rows and counts instead of a list per image, because
    torchmetrics gathers lists only where every rank has equally many.
    """

    full_state_update = False
    detections: list[Tensor]
    truths: list[Tensor]
    counts: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        # Flat and of one type, so that a rank without any image can take part in the gathering.
        self.add_state("detections", default=[], dist_reduce_fx="cat")  # x1 y1 x2 y2 score label, again and again
        self.add_state("truths", default=[], dist_reduce_fx="cat")  # x1 y1 x2 y2 crowd label
        self.add_state("counts", default=[], dist_reduce_fx="cat")  # detections and truths of each image

    def update(self, detections_K6: Tensor, truths_M6: Tensor) -> None:
        """Add an image."""
        self.detections.append(detections_K6.flatten())
        self.truths.append(truths_M6.flatten())
        self.counts.append(detections_K6.new_tensor([len(detections_K6), len(truths_M6)]))

    def update_image(
        self, prediction: dict[str, Tensor], target: tuple[Tensor, Tensor, Tensor], scale_hw: tuple[float, float]
    ) -> None:
        """Add an image from the resized pixels of `Detection.predict` and of the batch."""
        scale_4 = prediction["boxes_xyxy"].new_tensor([scale_hw[1], scale_hw[0]] * 2)
        columns = (prediction["boxes_xyxy"] / scale_4, prediction["scores"][:, None], prediction["labels"][:, None])
        boxes_M4, classes_M, crowd_M = target
        self.update(torch.cat(columns, 1), torch.cat([boxes_M4 / scale_4, crowd_M[:, None], classes_M[:, None]], 1))

    def compute(self) -> dict[str, Tensor]:
        """`ap` (IoU 0.50:0.95), `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large` and the recalls `ar1`, `ar10`,
        `ar100`, `ar_small`, `ar_medium`, `ar_large`; without those that have no object.
        """
        counts_I2 = dim_zero_cat(self.counts).reshape(-1, 2).long()
        detections = torch.split(dim_zero_cat(self.detections).reshape(-1, 6), counts_I2[:, 0].tolist())
        truths = torch.split(dim_zero_cat(self.truths).reshape(-1, 6), counts_I2[:, 1].tolist())
        # COCO's thresholds in float64: torchmetrics' own are float32, so that a recall of just 0.6 misses "0.6".
        coco = MeanAveragePrecision(
            backend="faster_coco_eval",
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            sync_on_compute=False,
        )
        coco.update(
            [{"boxes": rows[:, :4], "scores": rows[:, 4], "labels": rows[:, 5].long()} for rows in detections],
            [{"boxes": rows[:, :4], "iscrowd": rows[:, 4].long(), "labels": rows[:, 5].long()} for rows in truths],
        )
        numbers = {_metric_name(name): value for name, value in coco.compute().items() if name != "classes"}
        return {name: value for name, value in numbers.items() if value.numel() == 1 and value != _ABSENT}


def _metric_name(name: str) -> str:
    """torchmetrics' names as COCO's: map_50 -> ap50, mar_100 -> ar100, map_small -> ap_small."""
    kind, _, rest = name.removeprefix("m").partition("_")
    return kind + (rest if rest.isdigit() else f"_{rest}" * bool(rest))


def hits_at_half(boxes_K4: Tensor, labels_K: Tensor, gt_M4: Tensor, gt_classes_M: Tensor) -> list[bool]:
    """For each detection, best first, whether it finds an object that none before it has: same class, IoU >= 0.5."""
    iou_KM = ops.box_iou(boxes_K4, gt_M4) * (labels_K[:, None] == gt_classes_M)
    hits = []
    for iou_M in iou_KM:
        best = int(iou_M.argmax()) if len(iou_M) else -1
        hits.append(best >= 0 and bool(iou_M[best] >= 0.5))
        if hits[-1]:
            iou_KM[:, best] = 0
    return hits


def draw_boxes(image_HW3: np.ndarray, layers: list[tuple[Tensor, list[str] | None, str]]) -> np.ndarray:
    """Boxes in `(boxes_xyxy, words, colour)` layers on an image enlarged to at least 320 pixels."""
    factor = max(1, -(-320 // min(image_HW3.shape[:2])))
    picture = Image.fromarray(image_HW3).resize((image_HW3.shape[1] * factor, image_HW3.shape[0] * factor))
    canvas = ImageDraw.Draw(picture)
    font = ImageFont.load_default(12)
    for boxes_M4, words, colour in layers:
        for i, (x1, y1, x2, y2) in enumerate((boxes_M4 * factor).tolist()):
            canvas.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=colour, width=2)
            if words is not None:
                place = (x1 + 3, max(y1 - 15, 0))
                canvas.rectangle(canvas.textbbox(place, words[i], font=font), fill=colour)
                canvas.text(place, words[i], fill="#ffffff", font=font)
    return np.asarray(picture)


def _cells(map_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C) in float32: box arithmetic in bfloat16 would be off by pixels."""
    return map_BCHW.permute(0, 2, 3, 1).flatten(1, 2).float()


def _resize(width: int, scale: float) -> nn.Module:
    """From the backbone's map to one scale of the pyramid (ViTDet, section 3: transposed convolution, max-pooling)."""
    if scale < 1:
        return nn.MaxPool2d(round(1 / scale), ceil_mode=True)
    layers: list[nn.Module] = []
    for step in range(int(math.log2(scale))):
        layers += [LayerNorm2d(width), nn.GELU()] if step else []
        layers.append(nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2))
        width //= 2
    return nn.Sequential(*layers)


def _resize_mask(mask_BHW: Tensor, scale: float) -> Tensor:
    if scale < 1:
        return F.max_pool2d(mask_BHW[:, None].float(), round(1 / scale), ceil_mode=True)[:, 0] > 0
    return mask_BHW.repeat_interleave(int(scale), 1).repeat_interleave(int(scale), 2)
