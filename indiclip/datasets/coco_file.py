"""The lists of COCO's JSON files: read in one way for training, packing and benchmarks.

Ids are whole numbers or text. An image's may be text in one list and a number in the other: 42 and "42" are one image,
as no two ids of a list may read alike. Everything else is taken as it stands or refused.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from indiclip.datasets.inventory import Inventory
from indiclip.datasets.tables import column, is_number, is_text, load_json, name_in, xywh_to_xyxy
from indiclip.names import shorten

TOLERANCE = 2.0  # pixels by which a box may reach out of its image: tools round
_MIN_SIDE = 1.0  # pixels; COCO's few thinner boxes are slips of an annotator, too thin to be learnt from
_WHOLE = re.compile("0|-?[1-9][0-9]{0,18}")  # a number as Python would write it
_CLIPPED = 0.01  # pixels; less is the rounding of x + width

Entry = dict[str, Any]
Id = int | str


class Wheres(Sequence[str]):
    """What to call each entry of a list in messages, by its id; put together only for those that are asked for."""

    def __init__(self, prefix: str, ids: Sequence[Any]) -> None:
        self.prefix, self.ids = prefix, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        return f"{self.prefix} {shorten(self.ids[index])}"


class CocoImages(NamedTuple):
    """The list `images`, N of them."""

    entries: list[Entry]
    names: list[str]  # of the files in their folder
    row_of: dict[Id, int]  # id, as a number and as text -> place in the list
    wheres: Wheres

    def id_texts(self) -> list[str]:
        """The ids as text."""
        return list(map(str, self.wheres.ids))

    def groups(self) -> list[str]:
        """Of each image, the key of the first one of the same file."""
        first: dict[str, str] = {}
        return [first.setdefault(name, key) for name, key in zip(self.names, self.id_texts(), strict=True)]

    def sizes_hw(self) -> np.ndarray:
        """int64 (N, 2).

        Raises:
            ValueError: A height or width is missing or no whole number of pixels.
        """
        sides = [column(self.entries, side, self.wheres.prefix) for side in ("height", "width")]
        sizes = list(zip(*sides, strict=True))
        check_all(sizes, is_size, self.wheres, "(height, width)", "whole pixels")
        return np.array(sizes, dtype=np.int64).reshape(-1, 2)


class CocoFile(NamedTuple):
    """An annotation file with M annotations."""

    images: CocoImages
    annotations: list[Entry]
    wheres: Wheres  # of the annotations
    rows: np.ndarray  # int64 (M,): place of each one's image
    labels: np.ndarray  # int64 (M,): class of each one
    classes: list[str]  # names, in the order of the category ids
    category_ids: list[Id]  # of the classes


class CocoBoxes(NamedTuple):
    """The boxes that are used, K of M."""

    kept: np.ndarray  # int64 (K,): their places among the annotations
    xyxy: np.ndarray  # float32 (K, 4)
    crowd: np.ndarray  # bool (K,)
    area: np.ndarray  # float32 (K,): of the object, as annotated; the box's where nothing is said


def read_coco(file: Path, folder: Path) -> CocoFile:
    """The three lists; whether boxes lie in their images is for `read_boxes`.

    Raises:
        ValueError: Malformed JSON, a missing key, an id or name of another type or duplicated, an unknown image or
            category. One line with the file and the id.
    """
    content = load_json(file, ("images", "annotations", "categories"))
    images, entries = read_images(content["images"], file, folder), content["annotations"]
    classes, category_ids = _read_categories(content["categories"], f"{file}: category")
    class_of = {category_id: number for number, category_id in enumerate(category_ids)}
    wheres = _read_ids(entries, f"{file}: annotation")
    rows = _look_up(column(entries, "image_id", wheres.prefix), images.row_of, wheres, "image")
    labels = _look_up(column(entries, "category_id", wheres.prefix), class_of, wheres, "category")
    images.sizes_hw()
    _box_columns(entries, wheres)
    return CocoFile(images, entries, wheres, rows, labels, classes, category_ids)


def read_images(entries: list[Entry], file: Path, folder: Path) -> CocoImages:
    """The list `images`.

    Raises:
        ValueError: An `id` or `file_name` is missing or of another type, or an id is duplicated.
    """
    wheres = _read_ids(entries, f"{file}: image")
    names = column(entries, "file_name", wheres.prefix)
    check_all(names, lambda name: isinstance(name, str) and name != "", wheres, "file_name", "text")
    row_of = {alias: row for row, image_id in enumerate(wheres.ids) for alias in _aliases(image_id)}
    return CocoImages(entries, [name_in(folder, name) for name in names], row_of, wheres)


def _read_categories(entries: list[Entry], where: str) -> tuple[list[str], list[Id]]:
    """Names in the order of their ids, and the ids."""
    wheres, names = _read_ids(entries, where), column(entries, "name", where)
    check_all(names, is_text, wheres, "name", "text")
    check_unique(names, where)
    ids = list(wheres.ids)
    if ids:
        like_first = f"{type(ids[0]).__name__}, as the first is {shorten(ids[0])}"
        check_all(ids, lambda found: type(found) is type(ids[0]), wheres, "id", like_first)
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return [names[i] for i in order], [ids[i] for i in order]


def _read_ids(entries: list[Entry], where: str) -> Wheres:
    ids = column(entries, "id", where)
    check_all(ids, _is_id, Wheres(f"{where} number", range(1, len(ids) + 1)), "id", "a whole number or text")
    check_unique(ids, where)
    return Wheres(where, ids)


def check_unique(ids: Sequence[Id], where: str) -> None:
    """Raise a `ValueError`, which begins with `where`, where two ids or names read alike."""
    texts = [unicodedata.normalize("NFC", str(found).strip()) for found in ids]
    if len(set(texts)) < len(texts):
        (repeated, count), *_ = Counter(texts).most_common(1)
        raise ValueError(f"{where} {shorten(repeated)} is duplicated, {count} times; expected each id and name once")


def _look_up(ids: list[Any], known: Mapping[Id, int], wheres: Wheres, what: str) -> np.ndarray:
    """The number that each id stands for, int64."""
    expected = f"the id of one of the {what} entries"
    check_all(ids, _is_id, wheres, f"{what}_id", expected)
    numbers = list(map(known.get, ids))
    if None in numbers:
        check_all(ids, known.__contains__, wheres, f"{what}_id", expected)
    return np.array(numbers, dtype=np.int64)


def read_boxes(
    entries: list[Entry], sizes_hw: np.ndarray, wheres: Wheres, tolerance: float, inventory: Inventory
) -> CocoBoxes:
    """`bbox`, `iscrowd` and `area` of annotations.

    Args:
        entries: M annotations.
        sizes_hw: (M, 2) of the image of each.
        wheres: What to call each in messages.
        tolerance: Pixels by which a box may reach out of its image; so much is clipped.
        inventory: The boxes are counted in it, those that are used left to the caller.

    Raises:
        ValueError: A box of another type or out of its image, an `iscrowd` that is neither 0 nor 1, an `area` that is
            no number of pixels.
    """
    inventory.present["boxes"] += len(entries)
    boxes_xywh, crowd, area = _box_columns(entries, wheres)
    boxes_xyxy = xywh_to_xyxy(boxes_xywh, sizes_hw, wheres, tolerance)
    ends, edges = boxes_xywh[:, :2] + boxes_xywh[:, 2:], sizes_hw[:, ::-1]
    reaches_out = (boxes_xywh[:, :2] < -_CLIPPED).any(1) | (ends > edges + _CLIPPED).any(1)
    thick = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2] >= _MIN_SIDE).all(1)
    reason = "thinner than a pixel" + ", all from 0 to 1: normalised?" * bool((boxes_xywh <= 1).all())
    inventory.count_each("left_out", "boxes", reason, wheres, ~thick)
    inventory.count_each("altered", "boxes", "clipped to the image", wheres, thick & reaches_out)
    return CocoBoxes(np.flatnonzero(thick), boxes_xyxy[thick], crowd[thick], area[thick])


def _box_columns(entries: list[Entry], wheres: Wheres) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`bbox`, float64 (M, 4), `iscrowd`, bool (M,), and `area`, float32 (M,), of the types that they must have."""
    boxes = column(entries, "bbox", wheres.prefix)
    check_all(boxes, _is_box, wheres, "bbox", "[x, y, width, height]")
    crowd = [entry.get("iscrowd", 0) for entry in entries]
    check_all(crowd, lambda found: type(found) in (int, bool) and found in (0, 1), wheres, "iscrowd", "0 or 1")
    boxes_xywh = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    given = [entry.get("area") for entry in entries]
    check_all(given, _is_area, wheres, "area", "a number of pixels")
    area = [w * h if own is None else own for own, (w, h) in zip(given, boxes_xywh[:, 2:].tolist(), strict=True)]
    return boxes_xywh, np.array(crowd, dtype=bool), np.array(area, dtype=np.float32)


def read_boxes_of_image(
    entry: Entry, where: str, inventory: Inventory, num_classes: int = 2**31, tolerance: float = TOLERANCE
) -> tuple[CocoBoxes, Wheres]:
    """The boxes of an image's own entry, as shards hold it: `height`, `width` and the list `annotations`, each with its
    `class`.

    Returns:
        The boxes, and what to call each of the annotations in messages.

    Raises:
        ValueError: As `read_boxes`, and where size or list are missing, or a class is none of `num_classes`.
    """
    size_hw, entries = (entry.get("height"), entry.get("width")), entry.get("annotations")
    if not is_size(size_hw):
        raise ValueError(f"(height, width) is {shorten(size_hw)}; expected whole pixels")
    if not isinstance(entries, list):
        raise ValueError(f"annotations is {shorten(entries)}; expected a list")
    ids = [one.get("id", place) if isinstance(one, dict) else place for place, one in enumerate(entries)]
    wheres, sizes_hw = Wheres(where, ids), np.tile(np.array(size_hw, np.int64), (len(entries), 1))
    boxes = read_boxes(entries, sizes_hw, wheres, tolerance, inventory)
    classes, expected = column(entries, "class", where), f"0 to {num_classes - 1}"
    check_all(classes, lambda found: type(found) is int and 0 <= found < num_classes, wheres, "class", expected)
    return boxes, wheres


def read_captions(images: CocoImages, file: Path | None, inventory: Inventory) -> list[list[str]]:
    """The captions of each image: those of COCO's captions JSON, or else those that the images' entries carry.

    Args:
        images: The images.
        file: The captions JSON; it may be of more images.
        inventory: The captions are counted in it, those that are used left to the caller.

    Raises:
        ValueError: A caption that is no text. One line with the file and the id.
    """
    if file is not None:
        return join_captions(load_json(file, ("annotations",))["annotations"], images, file, inventory)
    lists = [[] if (texts := entry.get("captions")) is None else texts for entry in images.entries]
    check_all(lists, lambda texts: isinstance(texts, list), images.wheres, "captions", "a list of texts")
    for row, texts in enumerate(lists):
        if texts:
            check_all(texts, is_text, [images.wheres[row]] * len(texts), "a caption", "text")
            inventory.present["captions"] += len(texts)
    return [[text.strip() for text in texts] for texts in lists]


def join_captions(entries: list[Entry], images: CocoImages, file: Path, inventory: Inventory) -> list[list[str]]:
    """As `read_captions`, from the list `annotations`."""
    where = f"{file}: annotation"
    texts, ids = (column(entries, name, where) for name in ("caption", "image_id"))
    wheres = Wheres(where, [entry.get("id", place) for place, entry in enumerate(entries)])
    check_all(texts, is_text, wheres, "caption", "text")
    check_all(ids, _is_id, wheres, "image_id", "a whole number or text")
    rows = [images.row_of.get(image_id, -1) for image_id in ids]
    of_row: list[list[str]] = [[] for _ in images.names]
    for row, text in zip(rows, texts, strict=True):
        if row >= 0:
            of_row[row].append(text.strip())
    inventory.present["captions"] += len(entries)
    inventory.count_each("left_out", "captions", "of images that are not at hand", wheres, np.array(rows, np.int64) < 0)
    return of_row


def check_all(
    values: Sequence[Any], is_right: Callable[[Any], bool], wheres: Sequence[str], name: str, expected: str
) -> None:
    """Check a column.

    Raises:
        ValueError: The first value that is not right; begins with its entry of `wheres`.
    """
    if not all(map(is_right, values)):  # as fast as Python can
        place, found = next((place, found) for place, found in enumerate(values) if not is_right(found))
        raise ValueError(f"{wheres[place]}: {name} is {shorten(found)}; expected {expected}")


def is_size(size_hw: Sequence[Any]) -> bool:
    """Whether height and width are whole numbers of pixels."""
    return all(type(side) is int and 0 < side < 2**31 for side in size_hw)


def _is_box(found: Any) -> bool:
    """Whether a value of a JSON file is four numbers."""
    return type(found) is list and len(found) == 4 and all(map(is_number, found))


def _is_area(found: Any) -> bool:
    return found is None or (is_number(found) and 0 <= found < math.inf)


def _is_id(found: Any) -> bool:
    return type(found) in (int, str)  # True is an int, and True == 1 == 1.0


def _aliases(image_id: Id) -> tuple[Id, ...]:
    """The id as it stands, and the number as text or the text as a number."""
    if isinstance(image_id, int):
        return image_id, str(image_id)
    return (image_id, int(image_id)) if _WHOLE.fullmatch(image_id) else (image_id,)
