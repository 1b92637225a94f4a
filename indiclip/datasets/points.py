"""Counting: images with a point on every object of one class."""

from __future__ import annotations

from typing import Any

import numpy as np

from indiclip.datasets.base import SampleDataset
from indiclip.datasets.tables import Strings, check_files, column, existing, is_number, load_json, xywh_to_xyxy
from indiclip.images import read_header, read_image
from indiclip.types import Sample

_TOLERANCE = 1.0  # pixels by which a point may lie outside; so much is moved inside


class CountingPoints(SampleDataset):
    """Images with `points_xy`, `count_class`, `count_label`, and `boxes_xyxy`, `classes` where boxes are known.

    The annotation file is a JSON list of `{file_name, class_name, count, points: [[x, y], ...]}`, with `boxes` as
    [x, y, width, height] or null, in pixels of the image as stored.

    Args:
        images: Folder of the image files.
        annotations: The JSON file.

    Attributes:
        classes: The class names, sorted; `count_label` is the place among them.
        counts: int64 (number of images,).

    Raises:
        FileNotFoundError: The JSON, the folder, or images in it are missing.
        ValueError: Malformed JSON, a missing key, a count that is not the number of points or boxes, a point or box
            outside its image, an empty class name, an image that is there twice. Names the file and the image.
    """

    classes: list[str]
    sizes_hw: np.ndarray

    def __init__(self, images: str, annotations: str) -> None:
        self.folder, file = existing(images), existing(annotations)
        entries = load_json(file)
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{file}: found {type(entries).__name__} {str(entries)[:40]}; expected a list of images")
        names, class_names, points, counts = (
            column(entries, name, f"{file}: entry") for name in ("file_name", "class_name", "points", "count")
        )
        wheres = [f"{file}: {name}" for name in names]
        if len(set(names)) < len(names):
            twice = next(name for place, name in enumerate(names) if name in names[:place])
            raise ValueError(f"{file}: {twice} is there twice; expected one entry per image")
        check_files(self.folder, names, str(file))
        for where, name in zip(wheres, class_names, strict=True):
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"{where}: the class_name is {name!r}; expected text")
        self._names = Strings(names)
        self.sizes_hw = np.array([self._size_hw(entry, where) for entry, where in zip(entries, wheres, strict=True)])
        self.classes = sorted(set(class_names))
        self._labels = np.array([self.classes.index(name) for name in class_names])
        self.counts = np.array([_count(*found) for found in zip(points, counts, wheres, strict=True)])
        self._starts = np.cumsum([0, *self.counts])
        self._points_xy = self._place(points, wheres)
        self._read_boxes(entries, wheres)

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        """The file name. Reads and decodes nothing."""
        return self._names[index]

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        key, label = self.key(index), int(self._labels[index])
        at = slice(*self._starts[index : index + 2].tolist())
        image = read_image(self.folder / key, key)
        sample = Sample(image=image, key=key, points_xy=self._points_xy[at].copy())
        sample["annotated_upright"] = tuple(self.sizes_hw[index].tolist()) != image.size_hw
        sample["count_class"], sample["count_label"] = self.classes[label], label
        if self._boxed[index]:
            sample["boxes_xyxy"] = self._boxes_xyxy[at].copy()
            sample["classes"] = np.full(len(sample["boxes_xyxy"]), label)
        return sample

    def _size_hw(self, entry: dict[str, Any], where: str) -> tuple[int, int]:
        header = read_header(self.folder / entry["file_name"])
        said = (entry.get("height", header.size_hw[0]), entry.get("width", header.size_hw[1]))
        if said not in (header.size_hw, header.upright_hw):
            raise ValueError(f"{where}: the file has (height, width) {header.size_hw}, the entry says {said}")
        return said

    def _place(self, points: list[Any], wheres: list[str]) -> np.ndarray:
        """All points, one image after the other, inside their images."""
        of_images = []
        for found, (height, width), where in zip(points, self.sizes_hw, wheres, strict=True):
            points_xy = np.array(found, dtype=np.float32).reshape(-1, 2)
            edges = np.array([width, height], dtype=np.float32)
            outside = ~((points_xy >= -_TOLERANCE) & (points_xy <= edges + _TOLERANCE)).all(1)  # NaN too
            if outside.any():
                point = points_xy[outside][0].tolist()
                raise ValueError(f"{where}: the point {point} lies outside the image of {width}x{height} pixels")
            of_images.append(points_xy.clip(0, np.nextafter(edges, np.float32(0))))  # the edges are exclusive
        return np.concatenate(of_images)

    def _read_boxes(self, entries: list[dict[str, Any]], wheres: list[str]) -> None:
        """Boxes beside the points; zeros where an image has none."""
        boxes_xywh = np.zeros((len(self._points_xy), 4))
        self._boxed = np.array([bool(entry.get("boxes")) for entry in entries])
        for i in np.flatnonzero(self._boxed):
            found, count = entries[i]["boxes"], self.counts[i]
            if len(found) != count or any(len(box) != 4 or min(box[2:]) <= 0 for box in found):
                raise ValueError(
                    f"{wheres[i]}: {len(found)} boxes; expected {count} of [x, y, width, height], as points"
                )
            boxes_xywh[self._starts[i] : self._starts[i + 1]] = found
        each = np.repeat(np.arange(len(entries)), self.counts)
        self._boxes_xyxy = xywh_to_xyxy(boxes_xywh, self.sizes_hw[each], [wheres[i] for i in each])


def _count(points: Any, count: Any, where: str) -> int:
    if not isinstance(points, list) or not all(_is_point(point) for point in points):
        raise ValueError(f"{where}: points is {str(points)[:40]}; expected [[x, y], ...]")
    if count != len(points):
        raise ValueError(f"{where}: count is {count!r}, but there are {len(points)} points")
    return len(points)


def _is_point(point: Any) -> bool:
    return isinstance(point, list) and len(point) == 2 and all(map(is_number, point))
