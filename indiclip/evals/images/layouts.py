"""Where the images of a card lie: finds the layout of a folder and reads it into `Items`.

- Class folders: `<class>/**/*.jpg`, also `train/<class>/`, `test/<class>/`.
- A table (.csv, .tsv, .parquet): columns `file` and `class`, and `split`, `text` (what is written on the image), and
  captions in columns that are called by their language or `caption`. An image may have several rows of captions.
- Shards of the WebDataset format (.tar, .tar.gz) with `cls`, a number that counts the lines of classes.txt or
  classnames.txt beside them, or a class's name; `txt` with a caption per line. Shards called `train*` are for training.
- clip-benchmark's folder: classnames.txt, `<split>/nshards.txt`, `<split>/0.tar`, ...
- Files of captions: see `indiclip.evals.images.caption_files`.

A class is called by its id or its English name. Images of the split `train` are the gallery of probes; `test` is
scored, or `val` where there is no `test`.
"""

from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from indiclip.datasets.captions import CaptionColumns
from indiclip.datasets.folders import list_images
from indiclip.datasets.inventory import Inventory
from indiclip.datasets.table_reader import KINDS, Table
from indiclip.datasets.tables import check_files, decode_text
from indiclip.evals.cards.card import Card
from indiclip.evals.cards.imagenet import is_imagenet, with_babel
from indiclip.evals.images.caption_files import find_caption_file, read_caption_file
from indiclip.evals.images.items import FileImages, Images, Items, TableImages, key_of
from indiclip.evals.images.labels import class_groups, draw_candidates, missing_classes, read_class_list
from indiclip.evals.images.shard_layout import find_shards, read_shards, subfolders
from indiclip.evals.images.splits import choose, is_split
from indiclip.images import EXTENSIONS
from indiclip.names import did_you_mean

_BABEL = "babel_imagenet.json"


def find_items(card: Card, root: Path) -> Items | None:
    """The images of a card below the benchmark's folder; None where there is no folder of the card.

    Raises:
        FileNotFoundError: The folder is there and has no images.
        ValueError: What is in it does not fit the card; names the file and the class, and the nearest class.
    """
    folder = root / card.folder
    if not folder.is_dir() or (card.id == "babel_imagenet" and not (folder / _BABEL).is_file()):
        return None
    return read_items(card, folder)


def read_items(card: Card, source: Path) -> Items:
    """The images of a card in a folder, a table or a file of captions; see the module and `find_items`."""
    notes: list[str] = []
    if card.id == "babel_imagenet":
        card, notes = with_babel(card, source / _BABEL)
    items = _read(card, source)
    if not len(items):
        raise FileNotFoundError(f"{source}: no images ({', '.join(EXTENSIONS)}) of the card {card.id}")
    if not items.tested_N.any():
        raise FileNotFoundError(f"{source}: images of the split `train` only; there is nothing to score")
    items.groups = class_groups(items.card, items.labels)
    items.notes = [*notes, *items.notes, *missing_classes(items.card, items.labels[items.tested_N])]
    return items


def _read(card: Card, source: Path) -> Items:
    if source.suffix in (".json", ".jsonl") and source.is_file():
        return _of_captions(card, source)
    if source.is_file():
        return _of_table(card, source)
    if shards := find_shards(source):
        return read_shards(card, source, shards)
    if "captions" in card.required_fields and (file := find_caption_file(source)):
        return _of_captions(card, file)
    tables = sorted(entry for entry in source.iterdir() if entry.suffix in KINDS)
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise ValueError(f"{source}: several tables, {names}; expected one that lists the images")
    if tables:
        return _of_table(card, tables[0])
    if "captions" in card.required_fields:
        raise FileNotFoundError(f"{source}: no captions: no shards, no table, no file of captions (see {card.file})")
    return _of_folders(card, source)


def _of_captions(card: Card, file: Path) -> Items:
    if "captions" not in card.required_fields:
        raise ValueError(f"{file}: captions, and the card {card.id} asks for {', '.join(sorted(card.required_fields))}")
    found = read_caption_file(file)
    labels = np.full(len(found.names), -1, dtype=np.int64)
    images = FileImages(found.folder, found.names)
    return Items(card, images, list(found.names), labels, captions=found.captions, notes=found.notes)


def _of_folders(card: Card, source: Path) -> Items:
    """`<class>/*.jpg`, or `<split>/<class>/*.jpg` where all folders are called by a split."""
    notes: list[str] = []
    if is_imagenet(card) and (listed := read_class_list(card, source)):
        card, notes = listed.card, list(listed.notes)
    folders = subfolders(source)
    if folders and all(map(is_split, folders)):
        splits, split_notes = choose(folders, str(source))
        notes += split_notes
    else:
        splits = {"": False}
    names, labels, is_train = [], list[int](), list[bool]()
    inventory = Inventory()
    for split, train in splits.items():
        for folder in subfolders(source / split):
            place = _folder_class(card, source / split, folder)
            found, _, of_folder = list_images(source, f"{split}/{folder}".removeprefix("/"))
            names += found
            labels += [place] * len(found)
            is_train += [train] * len(found)
            inventory += of_folder
    notes += [f"{source}: {line}" for line in inventory.lines() if "left out" in line]
    keys = [key_of(name) for name in names]
    items = Items(
        card, FileImages(source, names), keys, np.array(labels, dtype=np.int64), notes=notes,
        is_train=np.array(is_train) if any(is_train) else None,
    )  # fmt: skip
    return _with_texts(items, [_beside(source / name) for name in names]) if "text" in card.required_fields else items


def _folder_class(card: Card, parent: Path, folder: str) -> int:
    place = card.place(folder)
    if place is None:
        hint = did_you_mean(folder, card.ids)
        raise ValueError(f"{parent / folder}: the folder is no class of the card {card.id}{hint}")
    return place


def _beside(image: Path) -> str:
    """The text beside an image."""
    file = image.with_suffix(".txt")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected what is written on {image.name}")
    return decode_text(file.read_bytes(), str(file)).strip()


def _of_table(card: Card, file: Path) -> Items:
    table = Table(file, image_column="file")
    needed = sorted(card.required_fields - {"captions"})
    names, embedded = table.images("file", file.parent)
    columns = {name: table.names(table.place(name)) for name in needed}
    used = {table.place(name) for name in ("file", "split", *needed) if name in table.header}
    train, notes = _table_splits(table) if "split" in table.header else (None, [])
    for row in table.kept:
        if not names[row]:
            table.leave_out(row, "without an image", "no image in 'file'")
    rows_of = table.rows_by_image(names)
    first_of = {name: rows[0] for name, rows in rows_of.items()}
    if embedded is None:
        folder = _image_folder(file.parent, list(first_of))
        check_files(folder, list(first_of), str(file))
        images: Images = FileImages(folder, first_of)
    else:
        images = TableImages(embedded, first_of)
    items = Items(card, images, list(first_of), np.full(len(first_of), -1, dtype=np.int64), notes=notes)
    items.is_train = None if train is None else train[list(first_of.values())]
    if "captions" in card.required_fields:
        captions = CaptionColumns(table, table.caption_columns(), "en")
        used |= captions.places
        items.captions = _by_language([captions.of_rows(rows) for rows in rows_of.values()])
    else:
        for place, (name, rows) in enumerate(rows_of.items()):
            if len(rows) > 1:
                raise ValueError(f"{table.where(rows[1])}: {name!r} is duplicated; expected one class for each image")
            items.labels[place] = card.check_place(columns["class"][rows[0]], table.where(rows[0]))
    notes += [f"{file}: {line}" for line in table.count_columns(used).lines() if "left out" in line]
    if "text" in needed:
        return _with_texts(items, [columns["text"][row] for row in first_of.values()])
    return items


def _table_splits(table: Table) -> tuple[np.ndarray, list[str]]:
    """Whether each row is for training, and notes. Rows of other splits are left out."""
    column = table.names(table.place("split"))
    for row, split in enumerate(column):
        if not is_split(split):
            raise ValueError(f"{table.where(row)}: the split {split!r}; expected train, val or test")
    splits, notes = choose(sorted(set(column)), str(table.file))
    for row, split in enumerate(column):
        if split not in splits:
            table.leave_out(row, f"of the split {split}", "it is not scored", always=True)
    return np.array([splits.get(split, False) for split in column]), notes


def _image_folder(folder: Path, names: list[str]) -> Path:
    """The table's folder, or `images` in it."""
    below = folder / "images"
    return below if names and below.is_dir() and not (folder / names[0]).is_file() else folder


def _by_language(of_images: list[dict[str, list[str]]]) -> dict[str, list[list[str]]]:
    """Language -> the captions of each image, in one line each, as other layouts have them."""
    languages = dict.fromkeys(chain.from_iterable(of_images))
    return {
        language: [[" ".join(text.split()) for text in found.get(language, [])] for found in of_images]
        for language in languages
    }


def _with_texts(items: Items, texts: list[str]) -> Items:
    for key, text in zip(items.keys, texts, strict=True):
        if not text:
            raise ValueError(f"{items.card.id}: {key}: no text; expected what is written on the image")
    candidates, notes = draw_candidates(items.card, texts, items.keys, items.labels)
    return replace(items, candidates=candidates, notes=[*items.notes, *notes])
