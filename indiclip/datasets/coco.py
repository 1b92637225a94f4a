"""COCO annotation files: boxes, masks, captions and DensePose.

Boxes are in the frame of the image file as stored, unless the size that the JSON gives is that of the photo turned by
its EXIF orientation. `Transform` turns image and boxes together.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from indiclip.datasets import densepose as dp
from indiclip.datasets.base import SampleDataset
from indiclip.datasets.masks import check_mask, check_room, decode_mask
from indiclip.datasets.tables import Strings, check_files, column, existing, is_number, load_json, xywh_to_xyxy
from indiclip.images import EncodedImage, UnreadableSample, read_image
from indiclip.types import Sample

_MIN_SIDE = 1.0  # pixels; COCO's few thinner boxes are slips of an annotator, too thin to be learnt from

Entry = dict[str, Any]


class CocoDetection(SampleDataset):
    """Images with boxes, and optionally masks, captions and DensePose.

    The category ids (in COCO 1 to 90 with gaps) become classes 0 to K - 1 in the order of the ids. What a box reaches
    over the image's edge, up to one pixel, is clipped; boxes thinner than one pixel are dropped and counted.

    Args:
        images: Folder of the image files.
        annotations: JSON file in COCO's format. Its images may carry a list `captions` themselves.
        captions: COCO's captions JSON of the same images, instead.
        masks: Also give `masks`; all zeros where an annotation's `segmentation` is an empty list.
        densepose: Also give the `dp_*` fields, of the annotations that have them.
        keep_empty: False leaves out images without a box (with `densepose`: without an annotated body).
        captioned: True leaves out images without a caption.

    Attributes:
        classes: Names in the order of the classes.
        densepose: Whether body surfaces are given.
        captioned: Whether every image has a caption.
        left_out: How many boxes were left out because they are thinner than a pixel.

    Raises:
        FileNotFoundError: The JSON, the folder, or images in it are missing.
        ValueError: Malformed JSON, a missing key, an unknown image or category, a box outside its image, DensePose
            values out of range. One line with the file and the id.
    """

    def __init__(
        self,
        images: str,
        annotations: str,
        captions: str | None = None,
        masks: bool = False,
        densepose: bool = False,
        keep_empty: bool = True,
        captioned: bool = False,
    ) -> None:
        self.folder, self._file = existing(images), existing(annotations)
        self._with_masks, self.densepose = masks, densepose
        content = load_json(self._file, ("images", "annotations", "categories"))
        row_of = self._read_images(content["images"])
        self.classes, class_of = read_categories(content["categories"], f"{self._file}: category")
        self._read_annotations(content["annotations"], row_of, class_of)
        self._read_captions(content["images"], row_of, existing(captions) if captions else None)
        # The images that are given, by their place in the file.
        kept = np.ones(len(row_of), bool) if keep_empty else self._annotated()
        with_caption = np.diff(self._caption_starts) > 0
        if captioned:
            kept &= with_caption
        self._rows = np.flatnonzero(kept)
        self.sizes_hw = self._sizes_hw[self._rows]
        self.captioned = bool(with_caption[self._rows].all())
        if len(self._rows) == 0:
            asked = "annotated " * (not keep_empty) + "captioned " * captioned
            raise ValueError(f"{self._file}: no {asked}images; expected at least one")

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        """The image id as text. Reads and decodes nothing."""
        return str(self._ids[self._rows[index]])

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

    def _annotated(self) -> np.ndarray:
        """bool: which images have a box (with `densepose`: a body)."""
        counted = self._is_person if self.densepose else np.ones(len(self._classes), bool)
        sums = np.concatenate([[0], np.cumsum(counted)])[self._starts]
        return np.asarray(np.diff(sums) > 0)

    def _read_images(self, images: list[Entry]) -> dict[Any, int]:
        """Columns of the images. Returns image id -> row."""
        where = f"{self._file}: image"
        ids, names = unique_ids(column(images, "id", where), where), column(images, "file_name", where)
        sizes = list(zip(column(images, "height", where), column(images, "width", where), strict=True))
        for image_id, size in zip(ids, sizes, strict=True):
            if not all(isinstance(side, int) and 0 < side < 2**31 for side in size):
                raise ValueError(f"{where} {image_id}: (height, width) is {size}; expected whole pixels")
        check_files(self.folder, names, str(self._file))
        self._ids, self._names = np.array(ids), Strings(names)
        self._sizes_hw = np.array(sizes, dtype=np.int64).reshape(-1, 2)
        return {image_id: row for row, image_id in enumerate(ids)}

    def _read_annotations(self, entries: list[Entry], row_of: Mapping[Any, int], class_of: Mapping[Any, int]) -> None:
        """Columns of the annotations, in the order of the images; those of image row r are at `_starts[r : r + 2]`."""
        where = f"{self._file}: annotation"
        wheres = [f"{where} {entry_id}" for entry_id in unique_ids(column(entries, "id", where), where)]
        rows = look_up(column(entries, "image_id", where), row_of, wheres, "image")
        classes = look_up(column(entries, "category_id", where), class_of, wheres, "category")
        boxes_xywh = read_bboxes(column(entries, "bbox", where), wheres)
        boxes_xyxy = xywh_to_xyxy(boxes_xywh, self._sizes_hw[rows], wheres)
        thick = is_thick(boxes_xyxy)
        self.left_out = Counter({"boxes thinner than a pixel": int((~thick).sum())})

        kept = np.flatnonzero(thick)[np.argsort(rows[thick], kind="stable")]
        self._starts = np.searchsorted(rows[kept], np.arange(len(row_of) + 1))
        self._boxes_xyxy, self._classes = boxes_xyxy[kept], classes[kept]
        self._crowd = np.array([bool(entries[i].get("iscrowd", 0)) for i in kept], dtype=bool)
        # As JSON in one buffer: as Python objects, COCO's polygons take gigabytes.
        if self._with_masks:
            sizes = self._sizes_hw[rows].tolist()
            codes = (check_mask(entries[i].get("segmentation"), sizes[i], wheres[i]) for i in kept)
            self._segments = Strings(json.dumps(code) for code in codes)
        if self.densepose:
            people = [dp.person(entries[i], wheres[i]) for i in kept]
            self._is_person = np.array([person is not None for person in people], dtype=bool)
            self._people = Strings(json.dumps(person) for person in people)

    def _read_captions(self, images: list[Entry], row_of: Mapping[Any, int], file: Path | None) -> None:
        """Columns of the captions, in the order of the images."""
        of_row: list[list[Any]] = [[] for _ in images]
        if file is None:
            of_row = [image.get("captions") or [] for image in images]
            wheres = [f"{self._file}: image {image['id']}" for image in images]
        else:
            entries = load_json(file, ("annotations",))["annotations"]
            texts, ids = (column(entries, name, f"{file}: annotation") for name in ("caption", "image_id"))
            for image_id, text in zip(ids, texts, strict=True):
                if image_id in row_of:  # the file may be of more images than are at hand
                    of_row[row_of[image_id]].append(text)
            wheres = [f"{file}: image {image['id']}" for image in images]
        for where, texts in zip(wheres, of_row, strict=True):
            if not isinstance(texts, list):
                raise ValueError(f"{where}: captions is {texts!r}; expected a list of texts")
            for text in texts:
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(f"{where}: a caption is {text!r}; expected text")
        self._captions = Strings(text.strip() for texts in of_row for text in texts)
        self._caption_starts = np.cumsum([0, *map(len, of_row)])


def read_categories(entries: list[Entry], where: str) -> tuple[list[str], dict[Any, int]]:
    """Names in the order of their ids, and category id -> class.

    Raises:
        ValueError: An id or a name is missing or there twice.
    """
    ids, names = unique_ids(column(entries, "id", where), where), column(entries, "name", where)
    unique_ids(names, where)
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return [str(names[i]) for i in order], {ids[i]: number for number, i in enumerate(order)}


def unique_ids(ids: list[Any], where: str) -> list[Any]:
    """The same ids, or names.

    Raises:
        ValueError: One is there twice, or is neither a number nor text; begins with `where`.
    """
    for found in ids:
        if not isinstance(found, int | str):
            raise ValueError(f"{where}: found {found!r}; expected a number or text")
    if len(set(ids)) < len(ids):
        raise ValueError(f"{where} {Counter(ids).most_common(1)[0][0]!r} is there twice; expected each once")
    return ids


def look_up(ids: list[Any], known: Mapping[Any, int], wheres: Sequence[str], what: str) -> np.ndarray:
    """The number that each id stands for, int64.

    Raises:
        ValueError: One that is not known; begins with its entry of `wheres`.
    """
    for found, where in zip(ids, wheres, strict=True):
        if not isinstance(found, int | str) or found not in known:
            raise ValueError(f"{where}: {what}_id {found!r} is not among the {len(known)} ids of {what!r} entries")
    return np.array([known[found] for found in ids], dtype=np.int64)


def read_bboxes(boxes: list[Any], wheres: Sequence[str]) -> np.ndarray:
    """`bbox` entries as float64 (M, 4): left, top, width, height.

    Raises:
        ValueError: Not four numbers; begins with the box's entry of `wheres`.
    """
    for box, where in zip(boxes, wheres, strict=True):
        if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
            raise ValueError(f"{where}: bbox is {str(box)[:40]}; expected [x, y, width, height]")
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def is_thick(boxes_xyxy: np.ndarray) -> np.ndarray:
    """bool (M,): which boxes are at least a pixel wide and high."""
    return np.asarray((boxes_xyxy[:, 2:] - boxes_xyxy[:, :2] >= _MIN_SIDE).all(1))


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
