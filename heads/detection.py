"""Detection: FCOS on a simple feature pyramid, the COCO metric, pictures.

From one map of the backbone ViTDet's pyramid (Li et al., arXiv:2203.16527, section 3) makes a few scales; at every
cell of every scale FCOS (Tian et al., arXiv:2006.09214) answers with class scores, the distances to the four sides of
a box, and how central the cell is in it. What differs from torchvision's FCOS: an image gives the same answer
whatever lies beside it in the batch (norms are over channels alone, cells outside an image are zero before every
convolution and count nowhere), and nothing waits for the GPU in training.

Shape letters: see `indiclip.types`; A cells of all scales, C classes, M boxes of an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics
from PIL import Image, ImageDraw, ImageFont
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision import ops

from indiclip.head import Head
from indiclip.types import Batch, Features

if TYPE_CHECKING:
    from indiclip.encoder import Encoder

_SCALES = (4.0, 2.0, 1.0, 0.5, 0.25, 0.125)
_PRIOR = 0.01  # first score of every class, so that the many empty cells do not swamp the first steps (focal loss)
_DRAWN_SCORE = 0.3  # detections below are left out of pictures
_ABSENT = -1.0  # what COCO's evaluation says where there is no such object


class Detection(Head):
    """Boxes with classes.

    Args:
        num_classes: Number of classes, background not counted.
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

    Raises:
        ValueError: `scales` is no such list.
    """

    metric: DetectionMetric

    def __init__(
        self,
        num_classes: int,
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
    ) -> None:
        super().__init__(task, weight)
        self.scales = [2.0, 1.0, 0.5] if scales is None else [float(scale) for scale in scales]
        if not self.scales or any(s not in _SCALES for s in self.scales) or any(
            a != 2 * b for a, b in zip(self.scales, self.scales[1:], strict=False)
        ):
            raise ValueError(
                f"heads.detection.scales: {scales}; expected some of {list(_SCALES)}, each half of the one before"
            )
        self.num_classes, self.out_channels, self.num_convs = num_classes, out_channels, num_convs
        self.reach, self.center_sampling_radius = reach, center_sampling_radius
        self.score_thresh, self.nms_thresh = score_thresh, nms_thresh
        self.detections_per_image, self.topk = detections_per_image, topk
        self.class_names: list[str] = [str(label) for label in range(num_classes)]

    def build(self, encoder: Encoder) -> None:
        self.pyramid = Pyramid(encoder.backbone.width, self.out_channels, self.scales)
        self.towers = Towers(self.out_channels, self.num_convs, self.num_classes)
        self.metric = DetectionMetric()

    def check(self, dataset: Any) -> None:
        names = list(getattr(dataset, "classes", None) or [])
        if len(names) != self.num_classes:
            raise ValueError(
                f"heads.detection.num_classes: found {self.num_classes}, expected {len(names)}, the number of classes "
                f"of {type(dataset).__name__}"
            )
        self.class_names = names

    def forward(self, features: Features) -> tuple[Answers, Grid]:
        """The answers of the cells of all scales, and where these lie."""
        map_BDHW, mask_BHW = features.map()
        levels = self.pyramid(map_BDHW, None if bool_all(features) else mask_BHW)
        answers = Answers.cat([self.towers(map_BDHW, mask_BHW) for map_BDHW, mask_BHW in levels])
        sizes_hw = [(level.shape[2], level.shape[3]) for level, _ in levels]
        strides = [features.stride / scale for scale in self.scales]
        return answers, make_grid(sizes_hw, strides, self.reach, map_BDHW.device)

    def loss(self, features: Features, batch: Batch, encoder: Encoder) -> dict[str, Tensor]:
        answers, grid = self(features)
        assigned = [
            assign(grid, boxes_M4, classes_M, crowd_M, self.center_sampling_radius)
            for boxes_M4, classes_M, crowd_M in _targets(batch, grid.centres_A2.device)
        ]
        classes_BA, sides_BA4, ignored_BA = (torch.stack(parts) for parts in zip(*assigned, strict=True))
        return fcos_losses(answers, classes_BA, sides_BA4, ignored_BA)

    def predict(self, features: Features, batch: Batch, encoder: Encoder) -> list[dict[str, Any]]:
        """`boxes_xyxy` (K, 4) in resized pixels, `scores` (K,) in 0..1, best first, and `labels` (K,)."""
        answers, grid = self(features)
        centerness_BA1 = answers.centerness_BA.sigmoid()[..., None]
        scores_BAC = (answers.logits_BAC.sigmoid() * centerness_BA1).sqrt() * answers.valid_BA[..., None]
        return [
            self._decode(scores_AC, sides_A4, grid, size_hw)
            for scores_AC, sides_A4, size_hw in zip(
                scores_BAC, answers.sides_BA4, batch["images"]["sizes_hw"], strict=True
            )
        ]

    def _decode(self, scores_AC: Tensor, sides_A4: Tensor, grid: Grid, size_hw: tuple[int, int]) -> dict[str, Any]:
        """The best boxes of one image."""
        scores_K, order_K = scores_AC.flatten().topk(min(self.topk, scores_AC.numel()))
        kept_K = scores_K > self.score_thresh
        scores_K, order_K = scores_K[kept_K], order_K[kept_K]
        cells_K, labels_K = order_K // scores_AC.shape[1], order_K % scores_AC.shape[1]
        boxes_K4 = ops.clip_boxes_to_image(grid.boxes(sides_A4)[cells_K], size_hw)
        best_K = ops.batched_nms(boxes_K4, scores_K, labels_K, self.nms_thresh)[: self.detections_per_image]
        return {"boxes_xyxy": boxes_K4[best_K], "scores": scores_K[best_K], "labels": labels_K[best_K]}

    def update_metric(self, predictions: list[dict[str, Any]], batch: Batch) -> None:
        device = predictions[0]["scores"].device
        for prediction, target, scale_hw in zip(
            predictions, _targets(batch, device), batch["images"]["scale"], strict=True
        ):
            self.metric.update_image(prediction, target, scale_hw)

    def draw(self, image_HW3: np.ndarray, prediction: dict[str, Any], target: dict[str, Any]) -> tuple[np.ndarray, str]:
        crowd_M = target.get("crowd")
        single_M = torch.ones(len(target["classes"]), dtype=torch.bool) if crowd_M is None else ~crowd_M
        gt_M4, gt_classes_M = target["boxes_xyxy"][single_M], target["classes"][single_M]
        drawn_K = prediction["scores"] >= _DRAWN_SCORE
        boxes_K4, scores_K, labels_K = (prediction[name][drawn_K] for name in ("boxes_xyxy", "scores", "labels"))
        hits = sum(hits_at_half(boxes_K4, labels_K, gt_M4, gt_classes_M))
        words = [f"{self.class_names[k]} {s:.2f}" for k, s in zip(labels_K.tolist(), scores_K.tolist(), strict=True)]
        picture = draw_boxes(image_HW3, [(gt_M4, None, "#ffffff"), (boxes_K4, words, "#ff3d7f")])
        missed = [self.class_names[k] for k in gt_classes_M.tolist()]
        return picture, (
            f"{hits} of {len(missed)} found, {len(words) - hits} false (IoU ≥ 0.5, score ≥ {_DRAWN_SCORE})\n"
            f"white is the truth: {', '.join(sorted(missed)) or 'nothing'}"
        )
