"""COCO annotation files: boxes, masks, captions and DensePose.

Boxes are in the frame of the image file as stored, unless the size that the JSON gives is that of the photo turned by
its EXIF orientation. `Transform` turns image and boxes together.
"""

import json

import numpy as np

from indiclip.datasets import densepose as dp
from indiclip.datasets.base import SampleDataset
from indiclip.datasets.coco_file import (
    TOLERANCE,
    CocoFile,
    Entry,
    Wheres,
    read_boxes,
    read_boxes_of_image,
    read_captions,
    read_coco,
)
from indiclip.datasets.inventory import Inventory
from indiclip.datasets.masks import check_mask, check_room, decode_mask
from indiclip.datasets.tables import Strings, check_files, existing
from indiclip.images import EncodedImage, UnreadableSample, read_image
from indiclip.types import Sample


class CocoDetection(SampleDataset):
    """Images with boxes, and optionally masks, captions and DensePose.

    The category ids (in COCO 1 to 90 with gaps) become classes 0 to K - 1 in the order of the ids. Boxes thinner than
    one pixel are dropped and counted.

    Args:
        images: Folder of the image files.
        annotations: JSON file in COCO's format. Its images may carry a list `captions` themselves.
        captions: COCO's captions JSON of the same images, instead.
        masks: Also give `masks`; all zeros where an annotation's `segmentation` is an empty list.
        densepose: Also give the `dp_*` fields, of the annotations that have them.
        keep_empty: False leaves out images without a box (with `densepose`: without an annotated body).
        captioned: True leaves out images without a caption.
        tolerance: Pixels by which a box may reach out of its image; so much is clipped, and counted.

    Attributes:
        classes: Names in the order of the classes.
        category_ids: The file's, in the same order; empty where they are text.
        densepose: Whether body surfaces are given.
        captioned: Whether every image has a caption.
        inventory: Images, boxes and captions of the files.

    Raises:
        FileNotFoundError: The JSON, the folder, or images in it are missing.
        ValueError: Malformed JSON, a missing key, a value of another type, an unknown image or category, a box out of
            its image, DensePose values out of range. One line with the file and the id.
    """

    sizes_hw: np.ndarray

    def __init__(
        self,
        images: str,
        annotations: str,
        captions: str | None = None,
        masks: bool = False,
        densepose: bool = False,
        keep_empty: bool = True,
        captioned: bool = False,
        tolerance: float = TOLERANCE,
    ) -> None:
        self.folder, self._file = existing(images), existing(annotations)
        self._with_masks, self.densepose, self._tolerance = masks, densepose, tolerance
        self._inventory = Inventory()
        file = read_coco(self._file, self.folder)
        self.classes, found = file.classes, file.images
        self.category_ids = [number for number in file.category_ids if isinstance(number, int)]
        self.inventory.present["images"] = len(found.names)
        sizes_hw = found.sizes_hw()
        check_files(self.folder, found.names, str(self._file))
        of_images = self._read_annotations(file, sizes_hw)
        texts = read_captions(found, existing(captions) if captions else None, self.inventory)
        rows = self._select(of_images, texts, keep_empty, captioned, found.wheres)
        self.sizes_hw, self.captioned = sizes_hw[rows], all(texts[row] for row in rows)
        keys, groups = found.id_texts(), found.groups()
        columns = ([column[row] for row in rows] for column in (keys, groups, found.names))
        self._keys, self._groups, self._names = map(Strings, columns)
        # As JSON in one buffer: as Python objects, COCO's polygons take gigabytes.
        self._entries = Strings(json.dumps({"annotations": of_images[row], "captions": texts[row]}) for row in rows)

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        """The image id as text. Reads and decodes nothing."""
        return self._keys[index]

    def group(self, index: int) -> str:
        """The key of the first entry of the same picture."""
        return self._groups[index]

    def captions(self, index: int) -> dict[str, list[str]]:
        """All captions of an image; COCO does not say their language."""
        texts = json.loads(self._entries[index])["captions"]
        return {"": texts} if texts else {}

    def __getitem__(self, index: int) -> Sample:
        key = self.key(index)
        image, (height, width) = read_image(self.folder / self._names[index], key), self.sizes_hw[index].tolist()
        entry = json.loads(self._entries[index])
        entry |= {"height": height, "width": width, "file_name": self._names[index]}
        try:
            fields = box_fields(entry, image, len(self.classes), self._with_masks, self.densepose, self._tolerance)
        except ValueError as error:
            raise UnreadableSample(key, str(error), str(self._file)) from error
        if entry["captions"]:
            fields["captions"] = {"": entry["captions"]}
        return Sample(image=image, key=key) | fields

    def _read_annotations(self, file: CocoFile, sizes_hw: np.ndarray) -> list[list[Entry]]:
        """The annotations that are used, of each image: what a sample is made of, with their `class`."""
        entries, rows, wheres = file.annotations, file.rows, file.wheres
        kept = read_boxes(entries, sizes_hw[rows], wheres, self._tolerance, self.inventory).kept
        names = {"id", "bbox", "iscrowd", "area", *["segmentation"] * self._with_masks, *dp.NAMES * self.densepose}
        of_images: list[list[Entry]] = [[] for _ in sizes_hw]
        for i in kept.tolist():
            if self._with_masks:
                check_mask(entries[i].get("segmentation"), sizes_hw[rows[i]].tolist(), wheres[i])
            if self.densepose:
                dp.person(entries[i], wheres[i])
            used = {name: entries[i][name] for name in names & entries[i].keys()}
            of_images[rows[i]].append(used | {"class": int(file.labels[i])})
        return of_images

    def _select(
        self, of_images: list[list[Entry]], texts: list[list[str]], keep_empty: bool, captioned: bool, wheres: Wheres
    ) -> list[int]:
        """The images that are given, by their place in the file."""
        inventory, kept = self.inventory, np.ones(len(wheres), bool)
        num_boxes, num_captions = (np.array(list(map(len, lists)), np.int64) for lists in (of_images, texts))
        annotated, reason = num_boxes > 0, "without a box"
        if self.densepose:
            annotated = np.array([any("dp_masks" in one for one in found) for found in of_images], bool)
            reason = "without a body"
        for asked, why, has in (
            (not keep_empty, reason, annotated),
            (captioned, "without a caption", num_captions > 0),
        ):
            if asked:
                inventory.count_each("left_out", "images", why, wheres, kept & ~has)
                kept &= has
        for unit, counts in (("boxes", num_boxes), ("captions", num_captions)):
            inventory.used[unit] += int(counts[kept].sum())
            inventory.count_each("left_out", unit, "of images that are left out", wheres, counts * ~kept)
        inventory.used["images"] = int(kept.sum())
        if not kept.any():
            asked_for = "annotated " * (not keep_empty) + "captioned " * captioned
            raise ValueError(f"{self._file}: no {asked_for}images; expected at least one")
        return np.flatnonzero(kept).tolist()


def check_own_mask(entry: Entry, size_hw: list[int], where: str) -> None:
    """As `check_mask`, of an annotation that may have none."""
    if "segmentation" in entry:
        check_mask(entry["segmentation"], size_hw, where)


def box_fields(
    entry: Entry, image: EncodedImage, num_classes: int, masks: bool, densepose: bool, tolerance: float = TOLERANCE
) -> Sample:
    """The boxes, classes, masks and body surfaces of one image, of its entry with its `annotations`.

    Raises:
        ValueError: A key is missing, a class out of range, another size than the image's, a malformed annotation.
    """
    boxes, wheres = read_boxes_of_image(entry, "annotation", Inventory(), num_classes, tolerance)  # counted before
    height, width = entry["height"], entry["width"]
    if (height, width) not in (image.size_hw, image.upright_hw):
        found = f"{str(entry.get('file_name', 'the image'))[-60:]} has {image.size_hw[1]}x{image.size_hw[0]} pixels"
        raise ValueError(f"{found}, the annotations say {width}x{height}")
    entries, kept = entry["annotations"], boxes.kept
    classes = np.array([entries[i]["class"] for i in kept], np.int64)
    sample = Sample(boxes_xyxy=boxes.xyxy, classes=classes, crowd=boxes.crowd, area=boxes.area)
    sample["annotated_upright"] = (height, width) != image.size_hw
    if isinstance(entry.get("file_name"), str):
        sample["file_name"] = entry["file_name"]
    if masks:
        codes = [check_mask(entries[i].get("segmentation"), [height, width], wheres[i]) for i in kept]
        check_room(len(codes), height, width)
        decoded = [decode_mask(code, (height, width)) for code in codes]
        sample["masks"] = np.array(decoded, np.uint8).reshape(-1, height, width)
    if densepose:
        people = (dp.person(entries[i], wheres[i]) for i in kept)
        sample.update(dp.fields([person for person in people if person is not None], height, width))
    return sample
