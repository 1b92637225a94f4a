"""Detectors of torchvision on the encoder's features: FCOS, Faster R-CNN, Mask R-CNN. COCO metric, pictures.

For taking a trained encoder into torchvision: what this head learns is torchvision's own detector, to the name of each
weight, and `tools/finetune_torchvision.py` writes it with its backbone. torchvision's losses wait for the GPU and are
normalised on each rank alone. To train boxes beside other tasks, take `heads.detection`.

Shape letters: see `indiclip.types`; M boxes of an image.
"""

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList

from indiclip.export.torchvision_backbone import Pyramid, build_detector
from indiclip.head import Datasets, Frame, Head, Losses, Measure, Picture, Prediction, same_classes
from indiclip.tasks.detection_metric import DETECTION_MEASURES, DetectionMetric, detections, draw_detections
from indiclip.types import Batch, Features, targets_of

if TYPE_CHECKING:
    from indiclip.datasets.base import SampleDataset
    from indiclip.encoder import Encoder


class TorchvisionDetector(Head):
    """Boxes with classes, by a detector of torchvision.

    Args:
        num_classes: Number of classes, background not counted: all that the dataset has.
        detector: Which one. `MaskRCNN` learns from `masks` too; its score is that of its boxes.
        out_channels: Width of the feature pyramid; FCOS needs a multiple of 32.
        scales: Sizes of the pyramid's maps relative to the backbone's, each half of the one before; one coarser map is
            added. None is four from a stride of 4 pixels on.
        options: More arguments of torchvision's class, e.g. `{box_detections_per_img: 200}`; and `num_convs`, of the
            towers of FCOS.
        **common: Of every `Head`.

    Raises:
        ValueError: A number out of its range.
    """

    title = "Detection by torchvision"
    metric: DetectionMetric
    required_fields: tuple[str, ...] = ("boxes_xyxy", "classes")
    embeds_images = embeds_text = False

    def __init__(
        self,
        num_classes: int,
        detector: Literal["FCOS", "FasterRCNN", "MaskRCNN"] = "FasterRCNN",
        out_channels: int = 256,
        scales: list[float] | None = None,
        options: dict[str, Any] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.check_range(1, num_classes=num_classes, out_channels=out_channels)
        if detector == "FCOS" and out_channels % 32:
            raise ValueError(f"heads.{self.name}.out_channels: found {out_channels}; FCOS needs a multiple of 32")
        if detector == "MaskRCNN":
            self.required_fields = (*self.required_fields, "masks")
        self.num_classes, self.kind = num_classes, detector
        self.out_channels, self.scales, self.options = out_channels, scales, dict(options or {})
        self.first_label = 0 if detector == "FCOS" else 1  # the R-CNNs' class 0 is the background

    def bind(self, encoder: "Encoder") -> None:
        own = encoder.backbone
        self.pyramid = Pyramid(own.width, own.stride, self.out_channels, self.scales)
        self._maps = _GivenMaps(self.pyramid.strides, self.out_channels)
        kind = getattr(detection, self.kind)
        try:
            self.detector = build_detector(kind, self._maps, self.num_classes + self.first_label, **self.options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"heads.{self.name}.options: {error}") from error
        if self.kind == "FCOS":  # its distances, in sizes of anchors, go through a ReLU: at 0 some never come alive
            nn.init.ones_(cast(Any, self.detector).head.regression_head.bbox_reg.bias)
        self._images = _GivenImages()
        cast(Any, self.detector).transform = self._images
        self.metric = DetectionMetric()

    def check(self, train: Datasets, held_out: Datasets) -> None:
        datasets = {**train, **held_out}
        same_classes(self.task, datasets)
        for key, dataset in datasets.items():
            if len(dataset.classes) != self.num_classes:
                raise ValueError(
                    f"heads.{self.name}.num_classes: found {self.num_classes}, expected {len(dataset.classes)}, the "
                    f"number of classes of {key}"
                )

    def forward(self, features: Features, sizes_hw: list[tuple[int, int]], targets: Any = None) -> Any:
        """Losses in training, else torchvision's detections in resized pixels."""
        map_BDHW, _ = features.map()
        # As torchvision's own transform pads a batch: then the strides read off the maps' sizes are exact.
        cells = self.pyramid.strides[-1] // features.stride or 1
        map_BDHW = F.pad(map_BDHW, (0, -map_BDHW.shape[3] % cells, 0, -map_BDHW.shape[2] % cells))
        self._maps.given = self.pyramid(map_BDHW)
        canvas_hw = [side * features.stride for side in map_BDHW.shape[2:]]
        self._images.given = ImageList(torch.empty(len(sizes_hw), 3, *canvas_hw, device="meta"), sizes_hw)
        return self.detector([torch.empty(3, *size_hw, device="meta") for size_hw in sizes_hw], targets)

    def loss(self, features: Features, batch: Batch, encoder: "Encoder") -> Losses:
        sizes_hw = batch["images"]["sizes_hw"]
        return Losses(self(features, sizes_hw, [self._truth(batch, image) for image in range(len(sizes_hw))]))

    def _truth(self, batch: Batch, image: int) -> dict[str, Tensor]:
        """The targets of one image as torchvision wants them, without crowds and boxes of no area."""
        own = targets_of(batch, image)
        boxes_M4 = own["boxes_xyxy"].float()
        kept_M = (boxes_M4[:, 2:] > boxes_M4[:, :2]).all(1)
        if "crowd" in own:
            kept_M &= ~own["crowd"]
        truth = {"boxes": boxes_M4[kept_M], "labels": own["classes"][kept_M] + self.first_label}
        if self.kind == "MaskRCNN":
            truth["masks"] = own["masks"][kept_M]
        return truth

    def predict(self, features: Features, batch: Batch, encoder: "Encoder") -> list[Prediction]:
        """`boxes_xyxy` (K, 4) in resized pixels, `scores` (K,) in 0..1, best first, and `labels` (K,)."""
        found = self(features, batch["images"]["sizes_hw"])
        return [
            {"boxes_xyxy": one["boxes"], "scores": one["scores"], "labels": one["labels"] - self.first_label}
            for one in found
        ]

    def to_json(self, prediction: Prediction, frame: Frame) -> dict[str, Any]:
        names = frame.class_names or [str(label) for label in range(self.num_classes)]
        return {"detections": detections(prediction, names, frame)}

    def update_metric(self, predictions: list[Prediction], features: Features, batch: Batch) -> None:
        for image, (prediction, scale_hw) in enumerate(zip(predictions, batch["images"]["scale"], strict=True)):
            own = targets_of(batch, image)
            crowd_M = own.get("crowd", torch.zeros_like(own["classes"], dtype=torch.bool))
            self.metric.update(prediction, [own["boxes_xyxy"], own["classes"], crowd_M], scale_hw, own.get("area"))

    def measures(self, held_out: "SampleDataset") -> dict[str, Measure]:
        return dict(DETECTION_MEASURES)

    def visualize(self, image_HW3: np.ndarray, prediction: Prediction, target: Prediction) -> Picture:
        names = target.get("class_names") or [str(label) for label in range(self.num_classes)]
        if "classes" not in target:
            return draw_detections(image_HW3, prediction, None, None, names)
        shown_M = ~target.get("crowd", torch.zeros_like(target["classes"]).bool())
        return draw_detections(image_HW3, prediction, target["boxes_xyxy"][shown_M], target["classes"][shown_M], names)


class _GivenMaps(nn.Module):
    """In place of a detector's backbone: gives it maps that are there already."""

    image_mean = image_std = (0.0, 0.0, 0.0)  # of no use: no pixel is read

    def __init__(self, strides: list[int], out_channels: int) -> None:
        super().__init__()
        self.strides, self.out_channels = strides, out_channels
        self.given: OrderedDict[str, Tensor] = OrderedDict()

    def forward(self, pixels: Tensor) -> "OrderedDict[str, Tensor]":
        return self.given


class _GivenImages(nn.Module):
    """In place of a detector's transform: the images are resized and batched already."""

    given: ImageList

    def forward(self, images: Any, targets: Any) -> Any:
        return self.given, targets

    def postprocess(self, found: Any, sizes_hw: Any, original_hw: Any) -> Any:
        return found
