"""COCO annotation files: boxes, masks, captions and DensePose.

Boxes are in the frame of the image file as stored, unless the size that the JSON gives is that of the photo turned by
its EXIF orientation. `Transform` turns image and boxes together.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from indiclip.datasets import densepose as dp
from indiclip.datasets.base import SampleDataset
from indiclip.datasets.coco_file import (
    TOLERANCE,
    Entry,
    Id,
    Wheres,
    look_up,
    read_boxes,
    read_captions,
    read_categories,
    read_images,
    read_sizes,
    unique_ids,
)
from indiclip.datasets.inventory import Inventory
from indiclip.datasets.masks import check_mask, check_room, decode_mask
from indiclip.datasets.tables import Strings, check_files, column, existing, load_json
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
        self._inventory = inventory = Inventory()
        content = load_json(self._file, ("images", "annotations", "categories"))
        found = read_images(content["images"], self._file)
        inventory.present["images"] = len(found.ids)
        self._keys, self._names = Strings(map(str, found.ids)), Strings(found.names)
        self._sizes_hw = read_sizes(content["images"], found, self._file)
        check_files(self.folder, found.names, str(self._file))
        self.classes, class_of = read_categories(content["categories"], self._file)
        self._read_annotations(content["annotations"], found.row_of, class_of)
        of_row = read_captions(found, existing(captions) if captions else None, inventory)
        self._captions = Strings(text for texts in of_row for text in texts)
        self._caption_starts = np.cumsum([0, *map(len, of_row)])
        self._select(keep_empty, captioned, found.wheres)
        self.sizes_hw = self._sizes_hw[self._rows]
        self._first_key = _first_keys(found.names, found.ids)

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        """The image id as text. Reads and decodes nothing."""
        return self._keys[self._rows[index]]

    def group(self, index: int) -> str:
        """The key of the file's first entry of the same picture."""
        row = int(self._rows[index])
        return self._first_key.get(self._names[row], self._keys[row])

    def captions(self, index: int) -> dict[str, list[str]]:
        """All captions of an image; COCO does not say their language."""
        row = self._rows[index]
        texts = [self._captions[i] for i in range(*self._caption_starts[row : row + 2].tolist())]
        return {"": texts} if texts else {}

    def __getitem__(self, index: int) -> Sample:
        row, key = int(self._rows[index]), self.key(index)
        image = read_image(self.folder / self._names[row], key)
        height, width = self._sizes_hw[row].tolist()
        if (height, width) not in (image.size_hw, image.upright_hw):
            reason = f"{self._names[row]} {wrong_size(image, height, width)}"
            raise UnreadableSample(key, reason, str(self._file))
        at = slice(*self._starts[row : row + 2].tolist())
        sample = Sample(image=image, key=key, boxes_xyxy=self._boxes_xyxy[at].copy(), classes=self._classes[at].copy())
        sample["crowd"] = self._crowd[at].copy()
        sample["annotated_upright"] = (height, width) != image.size_hw  # drawn in a viewer that turned the photo
        if captions := self.captions(index):
            sample["captions"] = captions
        try:
            sample.update(self._dense_fields(range(at.start, at.stop), height, width))
        except ValueError as error:
            raise UnreadableSample(key, str(error), str(self._file)) from error
        return sample

    def _dense_fields(self, numbers: range, height: int, width: int) -> Sample:
        """Masks and body surfaces of some annotations of one image, where they are asked for."""
        sample = Sample()
        if self._with_masks:
            sample["masks"] = stack_masks([json.loads(self._segments[i]) for i in numbers], height, width)
        if self.densepose:
            people = [json.loads(self._people[i]) for i in numbers if self._is_person[i]]
            sample.update(dp.fields(people, height, width))
        return sample

    def _select(self, keep_empty: bool, captioned: bool, wheres: Wheres) -> None:
        """Choose the images that are given, by their place in the file."""
        inventory, kept = self.inventory, np.ones(len(wheres), bool)
        counted = self._is_person if self.densepose else np.ones(len(self._classes), bool)
        of_images = np.concatenate([[0], np.cumsum(counted)])[self._starts]
        with_caption = np.diff(self._caption_starts) > 0
        for asked, reason, has in (
            (not keep_empty, f"without a {'body' if self.densepose else 'box'}", np.diff(of_images) > 0),
            (captioned, "without a caption", with_caption),
        ):
            if asked:
                inventory.leave_out_each("images", reason, wheres, kept & ~has)
                kept &= has
        for unit, starts in (("boxes", self._starts), ("captions", self._caption_starts)):
            counts = np.diff(starts)
            inventory.used[unit] += int(counts[kept].sum())
            example = wheres[int(kept.argmin())] if len(kept) else ""
            inventory.leave_out(unit, "of images that are left out", example, int(counts[~kept].sum()))
        self._rows = np.flatnonzero(kept)
        inventory.used["images"] = len(self._rows)
        self.captioned = bool(with_caption[self._rows].all())
        if len(self._rows) == 0:
            asked_for = "annotated " * (not keep_empty) + "captioned " * captioned
            raise ValueError(f"{self._file}: no {asked_for}images; expected at least one")

    def _read_annotations(self, entries: list[Entry], row_of: Mapping[Id, int], class_of: Mapping[Id, int]) -> None:
        """Columns of the annotations, in the order of the images; those of image row r are at `_starts[r : r + 2]`."""
        where = f"{self._file}: annotation"
        wheres = Wheres(where, unique_ids(column(entries, "id", where), where))
        rows = look_up(column(entries, "image_id", where), row_of, wheres, "image")
        classes = look_up(column(entries, "category_id", where), class_of, wheres, "category")
        boxes = read_boxes(entries, self._sizes_hw[rows], wheres, self._tolerance, self.inventory)

        order = np.argsort(rows[boxes.kept], kind="stable")
        kept = boxes.kept[order]
        self._starts = np.searchsorted(rows[kept], np.arange(len(self._keys) + 1))
        self._boxes_xyxy, self._classes, self._crowd = boxes.xyxy[order], classes[kept], boxes.crowd[order]
        # As JSON in one buffer: as Python objects, COCO's polygons take gigabytes.
        if self._with_masks:
            sizes = self._sizes_hw[rows].tolist()
            codes = (check_mask(entries[i].get("segmentation"), sizes[i], wheres[i]) for i in kept)
            self._segments = Strings(json.dumps(code) for code in codes)
        if self.densepose:
            people = [dp.person(entries[i], wheres[i]) for i in kept]
            self._is_person = np.array([person is not None for person in people], dtype=bool)
            self._people = Strings(json.dumps(person) for person in people)


def _first_keys(names: list[str], ids: list[Id]) -> dict[str, str]:
    """File name -> key of the first image of this name, where it is not the only one."""
    first: dict[str, str] = {}
    if len(set(names)) < len(names):
        repeated = {name for name, count in Counter(names).items() if count > 1}
        for name, image_id in zip(names, ids, strict=True):
            if name in repeated:
                first.setdefault(name, str(image_id))
    return first


def stack_masks(codes: Sequence[Any], height: int, width: int) -> np.ndarray:
    """uint8 (M, height, width) of codes that `check_mask` passed.

    Raises:
        ValueError: Together they are too large.
    """
    check_room(len(codes), height, width)
    return np.array([decode_mask(code, (height, width)) for code in codes], np.uint8).reshape(-1, height, width)


def wrong_size(image: EncodedImage, height: int, width: int) -> str:
    """The reason why annotations of this size do not fit an image."""
    return f"has {image.size_hw[1]}x{image.size_hw[0]} pixels, the annotations say {width}x{height}"
