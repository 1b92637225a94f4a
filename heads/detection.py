"""Detection: FCOS on a simple feature pyramid (see `indiclip.tasks.fcos`), the COCO metric, pictures.

Shape letters: see `indiclip.types`; A cells of all scales, C classes, R boxes of a batch, M boxes of an image, K
detections of an image.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torchvision import ops

from indiclip.head import Datasets, Frame, Head, Losses, Measure, Picture, Prediction, same_classes
from indiclip.tasks.detection_metric import (
    DETECTION_MEASURES,
    DetectionMetric,
    detections,
    draw_detections,
    matches_at_half,
)
from indiclip.tasks.fcos import FCOSHead, FCOSOutputs, Locations, Pyramid, assign, fcos_losses, make_locations
from indiclip.types import Batch, Features, Rows, class_names, on_device

if TYPE_CHECKING:
    from indiclip.datasets.base import SampleDataset
    from indiclip.encoder import Encoder

__all__ = ["Detection", "DetectionMetric", "matches_at_half"]

_SCALES = (4.0, 2.0, 1.0, 0.5, 0.25, 0.125)


class Detection(Head):
    """Boxes with classes.

    Args:
        num_classes: Number of classes, background not counted: all that the dataset has.
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
        **common: Of every `Head`.

    Raises:
        ValueError: `scales` is no such list, or not one of `num_classes` and `classes` is given.
    """

    title = "Detection"
    metric: DetectionMetric
    required_fields = ("boxes_xyxy", "classes")
    embeds_images = embeds_text = False

    def __init__(
        self,
        num_classes: int | None = None,
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
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if (num_classes is None) == (not classes):
            raise ValueError(f"heads.{self.name}: give one of num_classes and classes")
        self.check_range(1, out_channels=out_channels, detections_per_image=detections_per_image, topk=topk)
        self.check_range(0, 1, score_thresh=score_thresh, nms_thresh=nms_thresh)
        self.scales = [2.0, 1.0, 0.5] if scales is None else [float(scale) for scale in scales]
        halving = all(finer == 2 * coarser for finer, coarser in pairwise(self.scales))
        if not self.scales or not halving or not set(self.scales) <= set(_SCALES):
            raise ValueError(
                f"heads.{self.name}.scales: {scales}; expected some of {list(_SCALES)}, each half of the one before"
            )
        self.num_classes, self.out_channels, self.num_convs = num_classes or len(classes or ()), out_channels, num_convs
        self.reach, self.center_sampling_radius = reach, center_sampling_radius
        self.score_thresh, self.nms_thresh = score_thresh, nms_thresh
        self.detections_per_image, self.topk = detections_per_image, topk
        self.classes = classes

    def bind(self, encoder: "Encoder") -> None:
        self.pyramid = Pyramid(encoder.backbone.width, self.out_channels, self.scales)
        self.towers = FCOSHead(self.out_channels, self.num_convs, self.num_classes)
        self.metric = DetectionMetric()

    def check(self, train: Datasets, held_out: Datasets) -> None:
        datasets = {**train, **held_out}
        same_classes(self.task, datasets)
        for dataset in datasets.values():
            self._numbers(dataset.classes, type(dataset).__name__)

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
        levels = self.pyramid(map_BDHW, mask_BHW)
        of_levels = [self.towers(map_BDHW, mask_BHW) for map_BDHW, mask_BHW in levels]
        outputs = FCOSOutputs(*(torch.cat(parts, 1) for parts in zip(*of_levels, strict=True)))
        sizes_hw = [(level.shape[2], level.shape[3]) for level, _ in levels]
        strides = [features.stride / scale for scale in self.scales]
        return outputs, make_locations(sizes_hw, strides, self.reach, map_BDHW.device)

    def loss(self, features: Features, batch: Batch, encoder: "Encoder") -> Losses:
        outputs, locations = self(features)
        boxes, classes_R, crowd_R = self._truth(batch)
        radius = self.center_sampling_radius
        assigned = assign(locations, boxes.values.float(), classes_R, crowd_R, boxes.index_BM, radius)
        return Losses(fcos_losses(outputs, *assigned))

    def predict(self, features: Features, batch: Batch, encoder: "Encoder") -> list[Prediction]:
        """`boxes_xyxy` (K, 4) in resized pixels, `scores` (K,) in 0..1, best first, and `labels` (K,)."""
        outputs, locations = self(features)
        centerness_BA1 = outputs.centerness_BA.sigmoid()[..., None]
        scores_BAC = (outputs.logits_BAC.sigmoid() * centerness_BA1).sqrt() * outputs.valid_BA[..., None]
        sizes_hw = batch["images"]["sizes_hw"]
        found = []
        for scores_AC, ltrb_A4, size_hw in zip(scores_BAC, outputs.ltrb_BA4, sizes_hw, strict=True):
            scores_K, order_K = scores_AC.flatten().topk(min(self.topk, scores_AC.numel()))
            kept_K = scores_K > self.score_thresh
            scores_K, order_K = scores_K[kept_K], order_K[kept_K]
            cells_K, labels_K = order_K // scores_AC.shape[1], order_K % scores_AC.shape[1]
            boxes_K4 = ops.clip_boxes_to_image(locations.boxes(ltrb_A4)[cells_K], size_hw)
            best_K = ops.batched_nms(boxes_K4, scores_K, labels_K, self.nms_thresh)[: self.detections_per_image]
            found.append({"boxes_xyxy": boxes_K4[best_K], "scores": scores_K[best_K], "labels": labels_K[best_K]})
        return found

    def to_json(self, prediction: Prediction, frame: Frame) -> dict[str, Any]:
        names = self.classes or frame.class_names or [str(label) for label in range(self.num_classes)]
        return {"detections": detections(prediction, names, frame)}

    def update_metric(self, predictions: list[Prediction], features: Features, batch: Batch) -> None:
        boxes, classes_R, crowd_R = self._truth(batch)
        area = batch["targets"].get("area")
        for i, (prediction, scale_hw) in enumerate(zip(predictions, batch["images"]["scale"], strict=True)):
            rows = boxes.rows_of(i)
            own_M = classes_R[rows] >= 0
            target = [value_R[rows][own_M] for value_R in (boxes.values, classes_R, crowd_R)]
            self.metric.update(prediction, target, scale_hw, None if area is None else area.values[rows][own_M])

    def measures(self, held_out: "SampleDataset") -> dict[str, Measure]:
        return dict(DETECTION_MEASURES)

    def visualize(self, image_HW3: np.ndarray, prediction: Prediction, target: Prediction) -> Picture:
        theirs = target.get("class_names") or [str(label) for label in range(self.num_classes)]
        own = theirs if self.classes is None else self.classes
        if "classes" not in target:
            return draw_detections(image_HW3, prediction, None, None, own)
        number_C = torch.tensor(self._numbers(theirs, "the source"))
        gt_classes_M = number_C[target["classes"]]
        shown_M = (gt_classes_M >= 0) & ~target.get("crowd", torch.zeros_like(gt_classes_M).bool())
        gt_M4, gt_classes_M = target["boxes_xyxy"][shown_M], gt_classes_M[shown_M]
        return draw_detections(image_HW3, prediction, gt_M4, gt_classes_M, own)
