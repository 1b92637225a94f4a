"""What `pack` makes shards of: a folder, a table, or a COCO file. Each gives the parts of a sample at a number."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from indiclip.datasets.captions import LANGUAGES, column_place, read_table
from indiclip.datasets.coco_file import Entry, read_captions, read_coco
from indiclip.datasets.inventory import Inventory
from indiclip.datasets.tables import Strings, existing
from indiclip.webdataset.tar_members import IMAGES

_UNSAFE = re.compile(r"[\x00-\x20\x7f./\\:*?\"<>|\ud800-\udfff]+")  # in a file name on some system, or in a key


class Item(NamedTuple):
    """A sample before its image is read."""

    image: Path
    texts: dict[str, bytes]  # `txt`, `json`, `cls`


class Items(Protocol):
    """A source.

    Attributes:
        keys: One per sample, fit for shards.
        names: What to call each sample in messages.
        classes: Class names, where the source has classes.
        inventory: What is known of its files beside the samples.
    """

    keys: Strings
    names: Strings
    classes: list[str]
    inventory: Inventory

    def __getitem__(self, index: int) -> Item:
        """Raises `ValueError` or `OSError` where the sample cannot be used."""


def open_source(
    path: str,
    images: str | None = None,
    captions: str | None = None,
    image_column: str = "file",
    caption_column: str = "caption",
    classes: list[str] | None = None,
) -> Items:
    """The source at a path.

    Args:
        path: A folder, a table or a COCO file.
        images: The folder of its images; None takes the one that the table or the file is in.
        captions: COCO's captions JSON of the same images.
        image_column: Of a table.
        caption_column: Of a table.
        classes: The names that a folder's classes are numbered by; None takes them in alphabetical order.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: Another kind of file, or one without samples.
    """
    found = existing(path)
    if captions and found.suffix != ".json":
        raise ValueError(f"--captions: {found} is no COCO .json file")
    if found.is_dir() and images:
        raise ValueError(f"--images: the images are those in the folder {found}")
    if found.is_dir():
        return FolderItems(found, classes)
    folder = existing(images) if images else found.parent
    if found.suffix == ".json":
        return CocoItems(found, folder, existing(captions) if captions else None)
    if found.suffix in (".csv", ".tsv", ".parquet"):
        return TableItems(found, folder, image_column, caption_column)
    raise ValueError(f"{found}: expected a folder, a .csv, .tsv or .parquet table, or a COCO .json file")


class FolderItems:
    """`CLASS/*.jpg`, or `x.jpg` with `x.txt` or `x.json` beside it."""

    def __init__(self, folder: Path, classes: list[str] | None) -> None:
        self._folder, self.inventory = folder, Inventory()
        found = sorted(_images_in(folder))
        subfolders = sorted(entry for entry in folder.iterdir() if entry.is_dir())
        in_classes = {entry.name: sorted(_images_in(entry)) for entry in subfolders}
        in_classes = {name: images for name, images in in_classes.items() if images}
        if found and in_classes:
            where = f"{folder}: images in the folder and in {len(in_classes)} folders of it"
            raise ValueError(f"{where}; expected either CLASS/*.jpg, or x.jpg with x.txt beside it")
        if not found and not in_classes:
            raise ValueError(f"{folder}: no images ({', '.join(IMAGES)}) in it or in its {len(subfolders)} folders")
        self.classes = [] if found else list(classes or in_classes)
        if unknown := sorted(in_classes.keys() - set(self.classes)):
            raise ValueError(f"{folder}: {unknown[0]!r} is not among the {len(self.classes)} classes of classes.txt")
        relative = [image.relative_to(folder) for image in found or chain(*in_classes.values())]
        self.names = Strings(map(str, relative))
        self.keys = unique_keys(_stem(str(path)) for path in relative)

    def __getitem__(self, index: int) -> Item:
        image = inside(self._folder, self.names[index])
        texts = {}
        for extension in ("txt", "json"):
            beside = Path(self.names[index]).with_suffix(f".{extension}")
            if (self._folder / beside).is_file():
                texts[extension] = inside(self._folder, str(beside)).read_bytes()
        if self.classes:
            texts["cls"] = str(self.classes.index(Path(self.names[index]).parts[0])).encode()
        return Item(image, texts)


class TableItems:
    """A column of image files and one of captions. A column `language` or `lang`, or a caption column that is called by
    a language's code, says the captions' language.
    """

    def __init__(self, table: Path, folder: Path, image_column: str, caption_column: str) -> None:
        self._folder, self.inventory = folder, Inventory()
        self.classes: list[str] = []
        header, rows, lines = read_parquet(table) if table.suffix == ".parquet" else read_table(table)
        image, caption = (column_place(name, header, table) for name in (image_column, caption_column))
        images = [row[image].strip() for row in rows]
        self._images = Strings(images)
        self._captions = Strings(row[caption] for row in rows)
        language = next((header.index(name) for name in ("language", "lang") if name in header), None)
        of_column = caption_column if caption_column in LANGUAGES else ""
        self._languages = Strings(of_column if language is None else row[language].strip() for row in rows)
        self.names = Strings(f"{table.name}: line {line}" for line in lines)
        self.keys = unique_keys(map(_stem, images))

    def __getitem__(self, index: int) -> Item:
        if not self._images[index]:
            raise ValueError("no image is named")
        texts = {"txt": self._captions[index].encode()}
        if language := self._languages[index]:
            texts["json"] = _dumps({"language": language}).encode()
        return Item(inside(self._folder, self._images[index]), texts)


class CocoItems:
    """Images of a COCO file: `.json` is the image's entry with its captions and annotations.

    The captions of a file of their own are counted; boxes are when they are in a shard.
    """

    def __init__(self, file: Path, folder: Path, captions: Path | None) -> None:
        coco = read_coco(file)
        self._folder, self.inventory, self.classes = folder, Inventory(), coco.classes
        entries = coco.images.entries
        of_row: list[list[Entry]] = [[] for _ in entries]
        for row, label, entry in zip(coco.rows.tolist(), coco.labels.tolist(), coco.annotations, strict=True):
            of_row[row].append({**entry, "class": label})
        if captions:
            texts = read_captions(coco.images, captions, self.inventory)
            self.inventory.used["captions"] = sum(map(len, texts))
            entries = [{**entry, "captions": of_image} for entry, of_image in zip(entries, texts, strict=True)]
        # As JSON in one buffer, which the processes share; each would copy Python objects.
        self._entries = Strings(_dumps({**entry, "annotations": of_row[row]}) for row, entry in enumerate(entries))
        self._files = Strings(coco.images.names)
        self.names = Strings(f"image {key}" for key in coco.images.id_texts())
        self.keys = unique_keys(coco.images.groups())

    def __getitem__(self, index: int) -> Item:
        return Item(inside(self._folder, self._files[index]), {"json": self._entries[index].encode()})


def inside(folder: Path, name: str) -> Path:
    """A file of a folder.

    Raises:
        ValueError: The name, or a link, leads out of it.
    """
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} lies outside the folder {folder}")
    return path


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


def _stem(name: str) -> str:
    return re.sub(r"\.[^./]*$", "", name)


def _dumps(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False, separators=(",", ":"))


def read_parquet(file: Path) -> tuple[list[str], list[list[str]], list[int]]:
    """As `read_table`; a missing value is an empty text.

    Raises:
        ValueError: pyarrow is not installed, or no Parquet file.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{file}: Parquet needs the package pyarrow: pip install pyarrow") from None
    try:
        table = parquet.read_table(file)
    except ArrowException as error:
        raise ValueError(f"{file}: broken Parquet: {error}") from error
    columns = [["" if value is None else str(value) for value in one.to_pylist()] for one in table.columns]
    rows = [list(row) for row in zip(*columns, strict=True)]
    return table.column_names, rows, list(range(1, len(rows) + 1))


def _images_in(folder: Path) -> list[Path]:
    return [
        entry for entry in folder.iterdir() if entry.suffix[1:].lower() in IMAGES and not entry.name.startswith(".")
    ]
