"""Detection: FCOS on a simple feature pyramid (see `indiclip.fcos`), the COCO metric, pictures.

Shape letters: see `indiclip.types`; A cells of all scales, C classes, R boxes of a batch, M boxes of an image, K
detections of an image.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision import ops
from torchvision.utils import draw_bounding_boxes

from indiclip.fcos import FCOSHead, FCOSOutputs, Locations, Pyramid, assign, fcos_losses, make_locations
from indiclip.head import Datasets, Head, ListMetric, Losses, Picture, Prediction, same_classes
from indiclip.types import Batch, Features, Rows, class_names, on_device

if TYPE_CHECKING:
    from indiclip.encoder import Encoder

_SCALES = (4.0, 2.0, 1.0, 0.5, 0.25, 0.125)
_DRAWN_SCORE = 0.3  # detections below are left out of pictures,
_DRAWN_OVERLAP = 0.5  # and those that overlap a better one of any class more than this (IoU)
_DRAWN_SIDE = 320  # pixels that a picture's shorter side has at least
_ABSENT = -1.0  # what COCO's evaluation says where there is no such object


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

    metric: "DetectionMetric"
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
                f"heads.detection.scales: {scales}; expected some of {list(_SCALES)}, each half of the one before"
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

    def update_metric(self, predictions: list[Prediction], features: Features, batch: Batch) -> None:
        boxes, classes_R, crowd_R = self._truth(batch)
        for i, (prediction, scale_hw) in enumerate(zip(predictions, batch["images"]["scale"], strict=True)):
            rows = boxes.rows_of(i)
            own_M = classes_R[rows] >= 0
            target = [value_R[rows][own_M] for value_R in (boxes.values, classes_R, crowd_R)]
            self.metric.update(prediction, target, scale_hw)

    def visualize(self, image_HW3: np.ndarray, prediction: Prediction, target: Prediction) -> Picture:
        theirs = target.get("class_names") or [str(label) for label in range(self.num_classes)]
        number_C = torch.tensor(self._numbers(theirs, "the source"))
        own = theirs if self.classes is None else self.classes
        gt_classes_M = number_C[target["classes"]]
        shown_M = (gt_classes_M >= 0) & ~target.get("crowd", torch.zeros_like(gt_classes_M).bool())
        gt_M4, gt_classes_M = target["boxes_xyxy"][shown_M], gt_classes_M[shown_M]

        best_K = ops.nms(prediction["boxes_xyxy"], prediction["scores"], _DRAWN_OVERLAP)
        best_K = best_K[prediction["scores"][best_K] >= _DRAWN_SCORE]
        boxes_K4, scores_K, labels_K = (prediction[name][best_K] for name in ("boxes_xyxy", "scores", "labels"))
        hits = sum(hits_at_half(boxes_K4, labels_K, gt_M4, gt_classes_M))

        zoom = max(1, -(-_DRAWN_SIDE // min(image_HW3.shape[:2])))
        picture_3HW = torch.from_numpy(image_HW3.repeat(zoom, 0).repeat(zoom, 1)).permute(2, 0, 1)
        words = [f"{own[k]} {score:.2f}" for k, score in zip(labels_K.tolist(), scores_K.tolist(), strict=True)]
        for boxes_4, labels, colour in ((gt_M4, None, "white"), (boxes_K4, words, "#ff3d7f")):
            if len(boxes_4):
                picture_3HW = draw_bounding_boxes(picture_3HW, boxes_4 * zoom, labels, colour, width=2)
        present = [own[k] for k in gt_classes_M.tolist()]
        return picture_3HW.permute(1, 2, 0).numpy(), (
            f"{hits} of {len(present)} found, {len(words) - hits} false (IoU ≥ 0.5, score ≥ {_DRAWN_SCORE})\n"
            f"white is the truth: {', '.join(sorted(present)) or 'nothing'}"
        )


class DetectionMetric(ListMetric):
    """COCO's average precision, in the original images' pixels (COCO's small, medium, large are in those).

    The area of an object is its box's; COCO's own is its mask's.
    """

    def update(self, prediction: Prediction, target: Sequence[Tensor], scale_hw: tuple[float, float]) -> None:
        """Add an image.

        Args:
            prediction: Of `Detection.predict`.
            target: Boxes (M, 4) in resized pixels, classes (M,), whether each is a crowd (M,).
            scale_hw: Of the resized image to the original one.
        """
        boxes_M4, classes_M, crowd_M = target
        scale_4 = boxes_M4.new_tensor([scale_hw[1], scale_hw[0]] * 2)
        boxes_K4 = prediction["boxes_xyxy"] / scale_4
        self.add(
            {"boxes": boxes_K4, "scores": prediction["scores"], "labels": prediction["labels"].long()},
            {"boxes": boxes_M4 / scale_4, "labels": classes_M, "iscrowd": crowd_M.long()},
        )

    def compute(self) -> dict[str, Tensor]:
        """`ap` (IoU 0.50:0.95), `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large` and the recalls `ar1`, `ar10`,
        `ar100`, `ar_small`, `ar_medium`, `ar_large`; without those that have no object.
        """
        # COCO's thresholds in float64: torchmetrics' own are float32, so that a recall of just 0.6 misses "0.6".
        coco = MeanAveragePrecision(
            backend="faster_coco_eval",
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            sync_on_compute=False,
        )
        for prediction, truth in self.rows_of_all_ranks():
            coco.update([prediction], [truth])
        return {
            re.sub(r"_(\d+)$", r"\1", name.removeprefix("m")): value  # map_50 -> ap50
            for name, value in coco.compute().items()
            if name != "classes" and value.numel() == 1 and value != _ABSENT
        }


def hits_at_half(boxes_K4: Tensor, labels_K: Tensor, gt_M4: Tensor, gt_classes_M: Tensor) -> list[bool]:
    """For each detection, best first, whether it finds an object that none before it has: same class, IoU >= 0.5."""
    same_KM = labels_K[:, None] == gt_classes_M
    iou_KM = F.pad(ops.box_iou(boxes_K4, gt_M4) * same_KM, (0, 1))  # one more, so that there is a best without any
    hits = []
    for iou_M in iou_KM:
        best = iou_M.argmax()
        hits.append(bool(iou_M[best] >= 0.5))
        if hits[-1]:
            iou_KM[:, best] = 0
    return hits
