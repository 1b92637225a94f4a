"""Shards of images with boxes: what `indiclip shards pack` makes of a COCO file, read for training.

A sample's `.json` has the image's `height`, `width`, `captions` and `annotations`; each annotation has its `class` as a
number from 0 in the order of the category ids.
"""

from typing import Any

from indiclip.datasets.coco import box_fields, check_own_mask
from indiclip.datasets.coco_file import read_boxes_of_image
from indiclip.datasets.inventory import Inventory
from indiclip.images import EncodedImage
from indiclip.types import Sample
from indiclip.webdataset.shards import Shards, read_captions


class BoxShards(Shards):
    """Images with boxes, and optionally masks and DensePose, in the form that `CocoDetection` gives them.

    Malformed annotations make a sample unreadable. Boxes thinner than a pixel are dropped.

    Args:
        urls: As of `Shards`.
        classes: The `classes.txt` beside the shards, or the names.
        masks: Also give `masks`; all zeros where an annotation's `segmentation` is an empty list.
        densepose: Also give the `dp_*` fields, of the annotations that have them.
        captioned: Whether every image has a caption, as image-text heads need it; one without is unreadable to them.

    Attributes:
        densepose: Whether body surfaces are given.
        captioned: As given.
    """

    _units = ("members", "samples", "boxes")

    def __init__(
        self,
        urls: str | list[str],
        classes: str | list[str],
        masks: bool = False,
        densepose: bool = False,
        captioned: bool = False,
    ) -> None:
        super().__init__(urls, classes)
        self._with_masks, self.densepose, self.captioned = masks, densepose, captioned

    def _fields(self, index: int, image: EncodedImage, parts: dict[str, bytes], entry: dict[str, Any]) -> Sample:
        fields = box_fields(entry, image, len(self.classes), self._with_masks, self.densepose)
        if captions := read_captions(parts, entry):
            fields["captions"] = captions
        return fields


def check_boxes(entry: dict[str, Any], image: EncodedImage, num_classes: int) -> None:
    """Check all that `box_fields` could be asked for; masks and DensePose where the annotations have them.

    Raises:
        ValueError: As `box_fields`.
    """
    box_fields(entry, image, num_classes, masks=False, densepose=True)
    boxes, wheres = read_boxes_of_image(entry, "annotation", Inventory())
    for i in boxes.kept:
        check_own_mask(entry["annotations"][i], [entry["height"], entry["width"]], wheres[i])
