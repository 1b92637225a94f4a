"""Counting: images with a point on every object of one class."""

from itertools import chain, compress
from typing import Any

import numpy as np

from indiclip.datasets.base import SampleDataset
from indiclip.datasets.coco_file import (
    TOLERANCE,
    Entry,
    Wheres,
    check_all,
    check_unique,
    read_boxes,
)
from indiclip.datasets.inventory import Inventory
from indiclip.datasets.tables import (
    Strings,
    check_files,
    column,
    existing,
    is_number,
    is_text,
    load_json,
    name_in,
)
from indiclip.images import UnreadableSample, read_header, read_image
from indiclip.names import shorten
from indiclip.types import Sample


class CountingPoints(SampleDataset):
    """Images with `points_xy`, `count_class`, `count_label`, and `boxes_xyxy`, `classes` where boxes are known.

    The annotation file is a JSON list of `{file_name, class_name, count, points: [[x, y], ...]}`, with `boxes` as
    [x, y, width, height], as many, or null, in pixels of the image as stored. Boxes thinner than one pixel are dropped
    and counted.

    Args:
        images: Folder of the image files.
        annotations: The JSON file.
        tolerance: Pixels by which a point or box may lie out of its image; so much is moved inside, and counted.

    Attributes:
        classes: The class names, sorted; `count_label` is the place among them.
        counts: int64 (number of images,).
        inventory: Images, points and boxes of the file.

    Raises:
        FileNotFoundError: The JSON, the folder, or images in it are missing.
        ValueError: Malformed JSON, a missing key, a value of another type, a count that is not the number of points or
            boxes, a point or box out of its image, normalised points, a duplicated image. Names the file and the image.
    """

    classes: list[str]
    sizes_hw: np.ndarray

    def __init__(self, images: str, annotations: str, tolerance: float = TOLERANCE) -> None:
        self.folder, file = existing(images), existing(annotations)
        entries = load_json(file)
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{file}: found {type(entries).__name__} {shorten(entries)}; expected a list of images")
        where = f"{file}: entry"
        names, class_names, points, counts = (
            column(entries, name, where) for name in ("file_name", "class_name", "points", "count")
        )
        numbers, wheres = Wheres(f"{where} number", range(1, len(names) + 1)), Wheres(f"{file}:", names)
        check_all(names, lambda name: isinstance(name, str), numbers, "file_name", "text")
        names = [name_in(self.folder, name) for name in names]
        check_unique(names, f"{file}: image")
        check_files(self.folder, names, str(file))
        check_all(class_names, is_text, wheres, "class_name", "text")
        check_all(points, _is_points, wheres, "points", "[[x, y], ...]")
        boxes = [entry.get("boxes") for entry in entries]
        for i, count in enumerate(counts):
            if type(count) is not int or count != len(points[i]):
                raise ValueError(f"{wheres[i]}: count is {shorten(count)}, but there are {len(points[i])} points")
            if boxes[i] is not None and not (isinstance(boxes[i], list) and len(boxes[i]) == count):
                found = f"{wheres[i]}: boxes is {shorten(boxes[i])}"
                raise ValueError(f"{found}; expected null or a list of {count} [x, y, width, height]")
        self.classes = sorted(set(class_names))
        check_unique(self.classes, f"{file}: class")
        self._labels = np.searchsorted(self.classes, class_names)
        self._names, self.counts, self._inventory = Strings(names), np.array(counts), Inventory()
        self.sizes_hw = np.array([self._size_hw(entry, names[i], wheres[i]) for i, entry in enumerate(entries)])
        self._boxed = np.array(list(map(bool, boxes)))
        self._place(list(chain(*points)), list(chain(*filter(None, boxes))), tolerance, f"{file}:")

    def _place(self, points: list[Any], boxes: list[Any], tolerance: float, where: str) -> None:
        """Points and boxes of all images, one after the other, inside their images."""
        image = np.repeat(np.arange(len(self)), self.counts)  # of each point
        boxed, names = self._boxed[image], [self._names[i] for i in image.tolist()]
        sizes_hw, wheres = np.where(self.sizes_hw == 0, 2**31, self.sizes_hw)[image], Wheres(where, names)
        points_xy, edges = np.array(points, dtype=np.float64).reshape(-1, 2), sizes_hw[:, ::-1].astype(np.float32)
        for i in np.flatnonzero(~((points_xy >= -tolerance) & (points_xy <= edges + tolerance)).all(1)):  # NaN too
            (x, y), (height, width) = points_xy[i].tolist(), sizes_hw[i]
            raise ValueError(f"{wheres[i]}: the point {[x, y]} lies outside the image of {width}x{height} pixels")
        if points and (points_xy <= 1).all():
            raise ValueError(f"{where} all {len(points)} points lie from 0 to 1: normalised? Expected pixels")
        self.inventory.present.update(images=len(self), points=len(image))
        outside = np.asarray(((points_xy < 0) | (points_xy > edges)).any(1))
        self.inventory.count_each("altered", "points", "moved into the image", wheres, outside)
        # The edges are exclusive.
        self._points_xy = points_xy.astype(np.float32).clip(0, np.nextafter(edges, np.float32(0)))
        entries, wheres = [{"bbox": box} for box in boxes], Wheres(where, list(compress(names, boxed)))
        kept, self._boxes_xyxy, *_ = read_boxes(entries, sizes_hw[boxed], wheres, tolerance, self.inventory)
        self.inventory.used.update(images=len(self), points=len(image), boxes=len(kept))
        self._images = image, image[boxed][kept]  # of each point, of each box

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        """The file name. Reads and decodes nothing."""
        return self._names[index]

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        key, label = self.key(index), int(self._labels[index])
        points, boxes = (slice(*np.searchsorted(image, (index, index + 1))) for image in self._images)
        image = read_image(self.folder / key, key)
        sample = Sample(image=image, key=key, points_xy=self._points_xy[points].copy())
        sample["annotated_upright"] = tuple(self.sizes_hw[index].tolist()) != image.size_hw
        sample["count_class"], sample["count_label"] = self.classes[label], label
        if self._boxed[index]:
            sample["boxes_xyxy"] = self._boxes_xyxy[boxes].copy()
            sample["classes"] = np.full(len(sample["boxes_xyxy"]), label)
        return sample

    def _size_hw(self, entry: Entry, name: str, where: str) -> tuple[int, int]:
        """Of the image as annotated; (0, 0) where its file is damaged, which its reader says."""
        try:
            header = read_header(self.folder / name)
        except UnreadableSample:
            return 0, 0
        said = (entry.get("height", header.size_hw[0]), entry.get("width", header.size_hw[1]))
        if said not in (header.size_hw, header.upright_hw) or {*map(type, said)} != {int}:
            raise ValueError(f"{where}: the file has (height, width) {header.size_hw}, the entry says {shorten(said)}")
        return said


def _is_points(found: Any) -> bool:
    return isinstance(found, list) and all(
        isinstance(point, list) and len(point) == 2 and all(map(is_number, point)) for point in found
    )
