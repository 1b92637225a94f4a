"""What every head that finds boxes is scored with, COCO's average precision, and how its finds are drawn and written.

Shape letters: see `indiclip.types`; M boxes of an image, K detections of an image.
"""

import re
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision import ops
from torchvision.utils import draw_bounding_boxes

from indiclip.head import ListMetric, Prediction
from indiclip.presentation import Frame, Line, Measure, Panel, Picture, plain

_DRAWN_SCORE = 0.3  # detections below are left out of pictures,
_DRAWN_OVERLAP = 0.5  # and those that overlap a better one of any class more than this (IoU)
_DRAWN_SIDE = 320  # pixels that a picture's shorter side has at least
_ABSENT = -1.0  # what COCO's evaluation says where there is no such object
_RIGHT, _WRONG = "#19d3c5", "#ff9a3d"  # of boxes, which a label tells apart too

_SIZES = {"small": "small (below 32² pixels)", "medium": "medium (32² to 96²)", "large": "large (from 96²)"}
# How people read the numbers of `DetectionMetric`.
DETECTION_MEASURES = MappingProxyType(
    {
        "ap50": Measure("AP at IoU 0.5", "higher", trivial=0.0, answer="finding nothing", main=True),
        "ap75": Measure("AP at IoU 0.75", "higher", trivial=0.0, answer="finding nothing"),
        "ap": Measure("AP, mean over IoU 0.5 to 0.95", "higher", trivial=0.0, answer="finding nothing"),
    }
    | {f"ap_{size}": Measure(f"AP of {words} objects", "higher") for size, words in _SIZES.items()}
    | {f"ar{most}": Measure(f"recall with {most} boxes per image", "higher") for most in (1, 10, 100)}
    | {f"ar_{size}": Measure(f"recall of {words} objects", "higher") for size, words in _SIZES.items()}
)


class DetectionMetric(ListMetric):
    """COCO's average precision, in the original images' pixels (COCO's small, medium, large are in those).

    The area of an object is that of its annotation, which in COCO's files is its mask's; its box's where it has none.
    """

    def update(
        self,
        prediction: Prediction,
        target: Sequence[Tensor],
        scale_hw: tuple[float, float],
        area_M: Tensor | None = None,
    ) -> None:
        """Add an image.

        Args:
            prediction: `boxes_xyxy` (K, 4) in resized pixels, `scores` (K,) and `labels` (K,).
            target: Boxes (M, 4) in resized pixels, classes (M,), whether each is a crowd (M,).
            scale_hw: Of the resized image to the original one.
            area_M: Of each object, in resized pixels; None or 0 is its box's.
        """
        boxes_M4, classes_M, crowd_M = target
        scale_4 = boxes_M4.new_tensor([scale_hw[1], scale_hw[0]] * 2)
        boxes_K4 = prediction["boxes_xyxy"] / scale_4
        box_area_M = (boxes_M4[:, 2:] - boxes_M4[:, :2]).prod(1)
        area_M = box_area_M if area_M is None else torch.where(area_M > 0, area_M, box_area_M)
        # Rounded, as an object of just 32 x 32 pixels is both small and medium.
        area_M = (area_M.double() / (scale_hw[0] * scale_hw[1])).round(decimals=2)
        self.add(
            {"boxes": boxes_K4, "scores": prediction["scores"], "labels": prediction["labels"].long()},
            {"boxes": boxes_M4 / scale_4, "labels": classes_M, "iscrowd": crowd_M.long(), "area": area_M},
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


def matches_at_half(boxes_K4: Tensor, labels_K: Tensor, gt_M4: Tensor, gt_classes_M: Tensor) -> list[int]:
    """For each detection, best first, which object it finds that none before it has, same class and IoU >= 0.5; else
    -1.
    """
    same_KM = labels_K[:, None] == gt_classes_M
    iou_KM = F.pad(ops.box_iou(boxes_K4, gt_M4) * same_KM, (0, 1))  # one more, so that there is a best without any
    matches = []
    for iou_M in iou_KM:
        best = int(iou_M.argmax())
        matches.append(best if iou_M[best] >= 0.5 else -1)
        if matches[-1] >= 0:
            iou_KM[:, best] = 0
    return matches


def detections(prediction: Prediction, names: Sequence[str], frame: Frame) -> list[dict[str, Any]]:
    """What was found, best first, as `Head.to_json` has it: `class`, `score` and `bbox` (x, y, width, height).

    Args:
        prediction: As of `DetectionMetric.update`.
        names: Of the classes.
        frame: The original image.
    """
    xyxy_K4 = frame.boxes(prediction["boxes_xyxy"].float())
    xywh_K4 = torch.cat([xyxy_K4[:, :2], xyxy_K4[:, 2:] - xyxy_K4[:, :2]], 1)
    columns = (prediction["labels"].long().tolist(), prediction["scores"].tolist(), xywh_K4.tolist())
    return [
        {"class": names[label], "score": plain(score), "bbox": plain(box)}
        for label, score, box in zip(*columns, strict=True)
    ]


def draw_detections(
    image_HW3: np.ndarray,
    prediction: Prediction,
    gt_M4: Tensor | None,
    gt_classes_M: Tensor | None,
    names: Sequence[str],
) -> Picture:
    """The better detections on a held-out image beside its true boxes, and a line that counts them.

    Args:
        image_HW3: uint8 RGB.
        prediction: As of `DetectionMetric.update`.
        gt_M4: The true boxes, in the image's pixels; None where they are unknown.
        gt_classes_M: Their classes.
        names: Of the classes.
    """
    is_known = gt_M4 is not None and gt_classes_M is not None
    gt_M4 = torch.zeros(0, 4) if gt_M4 is None else gt_M4
    gt_classes_M = torch.zeros(0, dtype=torch.long) if gt_classes_M is None else gt_classes_M
    best_K = ops.nms(prediction["boxes_xyxy"], prediction["scores"], _DRAWN_OVERLAP)
    best_K = best_K[prediction["scores"][best_K] >= _DRAWN_SCORE]
    boxes_K4, scores_K, labels_K = (prediction[name][best_K] for name in ("boxes_xyxy", "scores", "labels"))
    matches = matches_at_half(boxes_K4, labels_K, gt_M4, gt_classes_M)
    is_hit = [match >= 0 for match in matches]
    is_found = [place in matches for place in range(len(gt_M4))]

    finds = [
        f"{names[k]} {score:.2f}{'' if hit else ' ✗'}"
        for k, score, hit in zip(labels_K.tolist(), scores_K.tolist(), is_hit, strict=True)
    ]
    truths = [f"{names[k]}{'' if found else ' ✗'}" for k, found in zip(gt_classes_M.tolist(), is_found, strict=True)]
    if not is_known:
        words = [word.removesuffix(" ✗") for word in finds]
        found = _boxes_panel("model", image_HW3, boxes_K4, words, [True] * len(words))
        return [found], [Line(f"{len(finds)} found (score ≥ {_DRAWN_SCORE})")]
    panels = [
        _boxes_panel("model", image_HW3, boxes_K4, finds, is_hit),
        _boxes_panel("truth", image_HW3, gt_M4, truths, is_found),
    ]
    hits = sum(is_hit)
    said = f"{hits} of {len(gt_M4)} found, {len(finds) - hits} wrong (IoU ≥ 0.5, score ≥ {_DRAWN_SCORE})"
    return panels, [Line(said), Line("teal: found; orange and ✗: of the model wrong, of the truth missed")]


def _boxes_panel(title: str, image_HW3: np.ndarray, boxes_M4: Tensor, words: list[str], is_right: list[bool]) -> Panel:
    """Boxes on an image, which is enlarged so that their lines are thin."""
    zoom = max(1, -(-_DRAWN_SIDE // min(image_HW3.shape[:2])))
    picture_3HW = torch.from_numpy(image_HW3.repeat(zoom, 0).repeat(zoom, 1)).permute(2, 0, 1)
    colours = [_RIGHT if right else _WRONG for right in is_right]
    if len(boxes_M4):
        picture_3HW = draw_bounding_boxes(picture_3HW, boxes_M4 * zoom, colors=colours, width=3)
    corners = (boxes_M4[:, :2].float() * zoom).tolist()
    labels = [(x, y, label) for (x, y), label in zip(corners, words, strict=True)][::-1]  # the best lies on top
    return Panel(picture_3HW.permute(1, 2, 0).numpy(), title, labels)
