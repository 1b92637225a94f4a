"""What `pack` makes shards of: a folder, a table, or a COCO file. Each gives the parts of a sample at a number."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from indiclip.datasets.captions import CaptionColumns
from indiclip.datasets.coco import check_own_mask
from indiclip.datasets.coco_file import TOLERANCE, Entry, read_boxes, read_captions, read_coco
from indiclip.datasets.densepose import person
from indiclip.datasets.folders import list_images, stem
from indiclip.datasets.inventory import Inventory
from indiclip.datasets.languages import language_tag
from indiclip.datasets.table_reader import KINDS, OnBadRow, Table
from indiclip.datasets.tables import Strings, existing, why_missing
from indiclip.images import EXTENSIONS, read_file
from indiclip.webdataset.tar_members import MAX_BYTES

_UNSAFE = re.compile(r"[\x00-\x20\x7f./\\:*?\"<>|\ud800-\udfff]+")  # in a file name on some system, or in a key


class Item(NamedTuple):
    """A sample before its image is read."""

    image: str | bytes  # its file, "" where none is named, or what the table holds
    texts: dict[str, bytes]  # `txt`, `json`, `cls`


class Items(Protocol):
    """A source.

    Attributes:
        keys: One per sample, fit for shards.
        names: What to call each sample in messages.
        images: The name of each sample's image, below `folder` where it is a file; "" where none is named.
        classes: Class names, where the source has classes.
        folder: Where the images' files are.
        inventory: What the source holds, all samples used; of captions and boxes only those that are in no sample.
    """

    folder: Path
    keys: Strings
    names: Strings
    images: Strings
    classes: list[str]
    inventory: Inventory

    def __getitem__(self, index: int) -> Item:
        """Raises `ValueError` or `OSError` where the sample cannot be used."""

    def leave_out(self, index: int) -> dict[str, int]:
        """Asked once of every sample that is not packed: how many of the inventory's rows or files go with it."""


def open_source(
    path: str,
    images: str | None = None,
    captions: str | None = None,
    image_column: str = "file",
    caption_column: str = "",
    classes: list[str] | None = None,
    on_bad_row: OnBadRow = "error",
    captioned: bool = True,
) -> Items:
    """The source at a path.

    Args:
        path: A folder, a table or a COCO file.
        images: The folder of its images; None takes the one that the table or the file is in.
        captions: COCO's captions JSON of the same images.
        image_column: Of a table.
        caption_column: Of a table; "" takes all columns that training does.
        classes: The names that a folder's classes are numbered by; None takes them in alphabetical order.
        on_bad_row: Of a table: `skip` leaves out and counts malformed rows, `error` raises.
        captioned: Whether the samples of a table must have captions.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: Another kind of file, or one without samples.
    """
    found = existing(path)
    kind = found.suffix.lower()
    if captions and kind != ".json":
        raise ValueError(f"--captions: {found} is no COCO .json file")
    if found.is_dir() and images:
        raise ValueError(f"--images: the images are those in the folder {found}")
    if found.is_dir():
        return FolderItems(found, classes)
    folder = existing(images) if images else found.parent
    if kind == ".json":
        return CocoItems(found, folder, existing(captions) if captions else None)
    if kind in KINDS:
        return TableItems(found, folder, image_column, caption_column, on_bad_row, captioned)
    raise ValueError(f"{found}: expected a folder, a .csv, .tsv or .parquet table, or a COCO .json file")


class FolderItems:
    """`CLASS/**/*.jpg`, or `x.jpg` with `x.txt` or `x.json` beside it."""

    def __init__(self, folder: Path, classes: list[str] | None) -> None:
        self.folder = folder
        images, self._texts, self.inventory = list_images(folder)
        found = [name for name in images if "/" not in name]
        in_classes = sorted({name.split("/")[0] for name in images if "/" in name})
        if found and in_classes:
            where = f"{folder}: images in the folder and in {len(in_classes)} folders of it"
            raise ValueError(f"{where}; expected either CLASS/*.jpg, or x.jpg with x.txt beside it")
        if not images:
            left_out = "; ".join(self.inventory.lines()) or "no files"
            raise ValueError(f"{folder}: no images ({', '.join(EXTENSIONS)}) in it or below it; found {left_out}")
        self.classes = [] if found else list(classes or in_classes)
        if unknown := sorted({*in_classes} - {*self.classes}):
            raise ValueError(f"{folder}: {unknown[0]!r} is not among the {len(self.classes)} classes of classes.txt")
        self.names = self.images = Strings(images)
        self._num_images = Counter(map(stem, images))
        self.keys = unique_keys(map(stem, images))

    def __getitem__(self, index: int) -> Item:
        name = self.names[index]
        beside = self._texts[stem(name)].items()
        texts = {extension: read_file(self.folder / file) for extension, file in beside}
        if self.classes:
            texts["cls"] = str(self.classes.index(name.split("/")[0])).encode()
        return Item(name, texts)

    def leave_out(self, index: int) -> dict[str, int]:
        shared = stem(self.names[index])
        self._num_images[shared] -= 1  # a text goes with the last of them
        return {"files": 1 + len(self._texts[shared]) * (not self._num_images[shared])}


class TableItems:
    """The images of a table with their captions, all rows of an image together.

    The captions are those that training takes, see `CaptionTable`, or those of the column that is named.
    """

    def __init__(
        self,
        file: Path,
        folder: Path,
        image_column: str,
        caption_column: str,
        on_bad_row: OnBadRow,
        captioned: bool = True,
    ) -> None:
        self.folder, self._captioned = folder, captioned
        self.classes: list[str] = []
        table = Table(file, on_bad_row, image_column)
        images, self._embedded = table.images(image_column, folder)
        named = {table.place(caption_column): language_tag(caption_column)} if caption_column else {}
        columns = named or table.caption_columns(required=captioned)
        captions = CaptionColumns(table, columns)
        for rows in table.rows_by_image(images).values():
            empty = [row for row in rows if captions.is_empty(row)]
            for row in empty if captioned and len(empty) < len(rows) else []:  # else `pack` lists the image
                table.leave_out(row, "without a caption", "no caption", always=True)
        rows_of = table.rows_by_image(images)
        firsts = [rows[0] for rows in rows_of.values()]
        self.images = Strings(images[row] for row in firsts)
        self._captions = Strings(_dumps(captions.of_rows(rows)) for rows in rows_of.values())
        self._rows, self._num_rows = np.array(firsts), np.array(list(map(len, rows_of.values())))
        self.names = Strings(table.where(row).removeprefix(f"{file.parent}/") for row in firsts)
        self.keys = unique_keys(stem(images[row]) if images[row] else "" for row in firsts)
        self.inventory = table.inventory
        captions.inventory.present["captions"] -= captions.inventory.used.pop("captions", 0)
        self.inventory += captions.inventory
        self.inventory += table.count_columns({table.place(image_column), *captions.places})

    def __getitem__(self, index: int) -> Item:
        captions, texts = json.loads(self._captions[index]), dict[str, bytes]()
        if self._captioned and not captions:
            raise ValueError("the caption is empty; expected text")
        if sum(map(len, captions.values())) > 1:
            texts["json"] = _dumps({"captions": captions}).encode()
        else:
            for language, (text,) in captions.items():
                texts["txt"] = text.encode()
                if language:
                    texts["json"] = _dumps({"language": language}).encode()
        data = self._embedded[int(self._rows[index])] if self._embedded else None
        return Item(self.images[index] if data is None else data, texts)

    def leave_out(self, index: int) -> dict[str, int]:
        return {"rows": int(self._num_rows[index])}


class CocoItems:
    """Images of a COCO file: the `.json` has an image's size, its captions and annotations.

    Its entry is as it stands under `coco`: readers of shards would give a meaning to a `label` or `caption` in it.
    """

    def __init__(self, file: Path, folder: Path, captions: Path | None) -> None:
        coco = read_coco(file, folder)
        self.folder, self.inventory, self.classes = folder, Inventory(), coco.classes
        of_row: list[list[Entry]] = [[] for _ in coco.images.entries]
        for row, label, entry in zip(coco.rows.tolist(), coco.labels.tolist(), coco.annotations, strict=True):
            of_row[row].append({**entry, "class": label})
        sizes_hw = coco.images.sizes_hw()[coco.rows]
        for i in read_boxes(coco.annotations, sizes_hw, coco.wheres, TOLERANCE, Inventory()).kept:
            check_own_mask(coco.annotations[i], sizes_hw[i].tolist(), coco.wheres[i])
            person(coco.annotations[i], coco.wheres[i])
        texts = read_captions(coco.images, captions, self.inventory)
        different = [list(dict.fromkeys(of_image)) for of_image in texts]
        repeated = np.array(list(map(len, texts))) - list(map(len, different))
        self.inventory.count_each("left_out", "captions", "of the same words", coco.images.wheres, repeated)
        self.inventory.present["captions"] -= sum(map(len, different))  # those are counted as they are packed
        # As JSON in one buffer, which the processes share; each would copy Python objects.
        self._entries = Strings(
            _dumps(
                {name: entry[name] for name in ("id", "file_name", "height", "width")}
                | {"captions": of_image, "annotations": annotations, "coco": entry}
            )
            for entry, of_image, annotations in zip(coco.images.entries, different, of_row, strict=True)
        )
        self.images = Strings(coco.images.names)
        self.names = Strings(f"image {key}" for key in coco.images.id_texts())
        self.keys = unique_keys(coco.images.groups())

    def __getitem__(self, index: int) -> Item:
        return Item(self.images[index], {"json": self._entries[index].encode()})

    def leave_out(self, index: int) -> dict[str, int]:
        return {}


def image_bytes(folder: Path, item: Item) -> bytes:
    """The file of an item's image, up to one byte more than is allowed.

    Raises:
        ValueError: There is none in the folder.
        OSError: It cannot be read.
    """
    if isinstance(item.image, bytes):
        return item.image
    if not item.image:
        raise ValueError("no image is named")
    if why := why_missing(folder, item.image):
        raise ValueError(why)
    return read_file(folder / item.image, MAX_BYTES["jpg"] + 1)


def unique_keys(names: Iterable[str]) -> Strings:
    """File names without dots; a number is added to those that are there already."""
    keys: dict[str, None] = {}
    for name in names:
        base = key = _UNSAFE.sub("_", name).strip("_") or "_"
        count = 0
        while key in keys:
            count += 1
            key = f"{base}_{count}"
        keys[key] = None
    return Strings(keys)


def _dumps(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
