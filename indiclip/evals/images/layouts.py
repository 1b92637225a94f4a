"""Where the images of a card lie: finds the layout of a folder and reads it into `Items`.

- Class folders: `<class>/**/*.jpg`, also `train/<class>/`, `test/<class>/`. Images beside them are left out.
- A table (.csv, .tsv, .parquet): columns `file` and `class`, and `split`, `text` (what is written on the image), and
  captions in columns that are called by their language or `caption`. An image may have several rows of captions.
- Shards of the WebDataset format (.tar, .tar.gz) with `cls`, a number that counts the lines of classes.txt or
  classnames.txt beside them, or a class's name; `txt` with a caption per line, `json` with captions as in training.
  Shards with `train` in their name are for training.
- clip-benchmark's folder: classnames.txt, `<split>/nshards.txt`, `<split>/0.tar`, ...
- Files of captions: see `indiclip.evals.images.caption_files`.

A class is called by its id or its English name. Images of the split `train` are the gallery of probes; `test` is
scored, or `val` where there is no `test`.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from indiclip.datasets.captions import CaptionColumns
from indiclip.datasets.folders import list_images, subfolders
from indiclip.datasets.inventory import Inventory
from indiclip.datasets.table_reader import KINDS, Table
from indiclip.datasets.tables import check_files, decode_text
from indiclip.evals.cards.card import Card
from indiclip.evals.images.caption_files import find_caption_file, read_caption_file
from indiclip.evals.images.duplicates import duplicates, shared_captions
from indiclip.evals.images.items import FileImages, Images, Items, TableImages
from indiclip.evals.images.labels import (
    SKIP,
    ClassNames,
    class_groups,
    draw_candidates,
    missing_classes,
    read_class_list,
)
from indiclip.evals.images.shard_layout import by_language, find_shards, read_shards
from indiclip.evals.images.splits import choose, is_split
from indiclip.images import EXTENSIONS, is_image_name, storable
from indiclip.names import did_you_mean

_CAPTION_FILES = (".json", ".jsonl")


class NoImages(FileNotFoundError):
    """There is no image of any class of the card."""


def find_items(card: Card, root: Path, skip_unknown: bool = False) -> Items | None:
    """The images of a card below the benchmark's folder; None where there are none of the card.

    Args:
        card: The card.
        root: With a folder for each card, or a table or a file of captions that is called by it.
        skip_unknown: Leave out and count the images of other classes than the card's; they are an error else.

    Raises:
        FileNotFoundError: The folder is there and has no images.
        ValueError: What is in it does not fit the card; names the file and the class, and the nearest class.
    """
    folder = root / card.folder
    if card.class_source and card.class_source.names_file and not (folder / card.class_source.names_file).is_file():
        return None
    if folder.is_dir():
        return read_items(card, folder, skip_unknown)
    files = (root / f"{card.folder}{kind}" for kind in (*KINDS, *_CAPTION_FILES))
    file = next((file for file in files if file.is_file()), None)
    return None if file is None else read_items(card, file, skip_unknown)


def read_items(card: Card, source: Path, skip_unknown: bool = False) -> Items:
    """The images of a card in a folder, a table or a file of captions; see the module and `find_items`."""
    notes: list[str] = []
    if card.class_source and card.class_source.names_file:
        card, notes = card.class_source.with_file(card, source / card.class_source.names_file)
    items = _read(card, source, skip_unknown)
    found = "".join(f"; {note}" for note in items.notes)
    if not len(items):
        raise NoImages(f"{source}: no images ({', '.join(EXTENSIONS)}) of the card {card.id}{found}")
    if not items.tested_N.any():
        raise FileNotFoundError(f"{source}: images of the split `train` only; there is nothing to score{found}")
    items.groups = class_groups(items.card, items.labels)
    gallery = None if items.is_train is None else items.labels[items.is_train]
    if gallery is not None and not any(protocol.uses_gallery for protocol in card.protocols):
        notes.append(f"{source}: left out: {len(gallery):,} images for training, of which the card learns nothing")
    notes += [*items.notes, *missing_classes(items)]
    notes += [*duplicates(items), *shared_captions(items)]
    for protocol in items.card.protocols:
        try:
            protocol.check(items)
        except ValueError as error:
            raise ValueError(f"{next(iter(_tables(source)), source)}: {error} (card {card.id})") from error
    items.notes = list(map(storable, notes))
    return items


def _read(card: Card, source: Path, skip_unknown: bool) -> Items:
    if source.suffix.lower() in _CAPTION_FILES and source.is_file():
        return _of_captions(card, source)
    if source.is_file():
        return _of_table(card, source, skip_unknown)
    if shards := find_shards(source):
        if others := sorted(card.required_fields - {"class", "text", "captions"}):
            raise ValueError(
                f"{source}: shards, which have no columns; expected a table with {', '.join(others)} in it"
            )
        return read_shards(card, source, shards, skip_unknown)
    if card.required_fields == {"captions"} and (file := find_caption_file(source)):
        return _of_captions(card, file)
    tables = _tables(source)
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise ValueError(f"{source}: several tables, {names}; expected one that lists the images")
    if tables:
        return _of_table(card, tables[0], skip_unknown)
    if card.required_fields == {"captions"} and (file := find_caption_file(source, any_json=True)):
        return _of_captions(card, file)
    if card.required_fields == {"captions"}:
        raise FileNotFoundError(f"{source}: no captions: no shards, no table, no file of captions (see {card.file})")
    if others := sorted(card.required_fields - {"class", "text", "instance"}):
        raise FileNotFoundError(f"{source}: no table; expected one with the columns file and {', '.join(others)}")
    return _of_folders(card, source, skip_unknown)


def _tables(source: Path) -> list[Path]:
    """The tables of a folder."""
    entries = source.iterdir() if source.is_dir() else iter(())
    files = (entry for entry in entries if entry.suffix.lower() in KINDS and entry.name[0] != ".")
    return sorted(file for file in files if file.is_file())


def _of_captions(card: Card, file: Path) -> Items:
    if card.required_fields != {"captions"}:
        raise ValueError(f"{file}: captions, and the card {card.id} asks for {', '.join(sorted(card.required_fields))}")
    found = read_caption_file(file)
    labels = np.full(len(found.names), -1, dtype=np.int64)
    images = FileImages(found.folder, found.names)
    return Items(card, images, list(map(storable, found.names)), labels, captions=found.captions, notes=found.notes)


def _of_folders(card: Card, source: Path, skip_unknown: bool) -> Items:
    """`<class>/*.jpg`, or `<split>/<class>/*.jpg` where folders are called by a split."""
    notes: list[str] = []
    if card.class_source and (listed := read_class_list(card, source)):
        card, notes = listed.card, list(listed.notes)
    classes, inventory = ClassNames(card, skip_unknown), Inventory()
    splits, split_notes = _folder_splits(classes, source, inventory)
    names, labels, is_train, nested = [], list[int](), list[bool](), list[str]()
    is_open, things = "class" not in card.required_fields, list[list[str]]()  # folders are no classes, but things
    for split, train in splits.items():
        _count_strays(source, split, inventory)
        for folder in subfolders(source / split):
            below = f"{split}/{folder}".removeprefix("/")
            found, _, of_folder = list_images(source, below)
            place = -1 if is_open else _folder_class(classes, source / below, len(found))
            if place < 0 and found and not is_open:
                continue
            inventory += of_folder
            names += found
            labels += [place] * len(found)
            things += [[folder]] * len(found)
            is_train += [train] * len(found)
            nested += [name for name in found if _means_other(card, name[len(below) + 1 :].split("/")[:-1], place)]
    notes += [*split_notes, *classes.notes(str(source))]
    notes += [f"{source}: {line}" for line in inventory.lines() if "left out" in line]
    if nested:
        where = "in folders of a class that are called by another class or a split, which counts for nothing"
        notes.append(f"{source}: {len(nested):,} images lie {where}, first {nested[0]}")
    items = Items(
        card, FileImages(source, names), list(map(storable, names)), np.array(labels, dtype=np.int64), notes=notes,
        is_train=np.array(is_train) if any(is_train) else None,
    )  # fmt: skip
    if "instance" in card.required_fields:
        items.columns = {"instance": things}
    return _with_texts(items, [_beside(source / name) for name in names]) if "text" in card.required_fields else items


def _folder_splits(classes: ClassNames, source: Path, inventory: Inventory) -> tuple[dict[str, bool], list[str]]:
    """The folders of splits, as `choose` gives them, and notes; "" alone where there are none."""
    folders = subfolders(source)
    splits = list(filter(is_split, folders))
    are_classes = splits != folders and all(classes.card.place(name) is not None for name in splits)
    if not splits or are_classes:
        return {"": False}, []
    _count_strays(source, "", inventory)
    for folder in folders:
        if folder in splits or not (found := list_images(source, folder).images):
            continue
        if not classes.skip_unknown:
            found_where = f"{storable(source / folder)}: the folder lies beside {', '.join(splits)}, of splits"
            raise ValueError(f"{found_where}; expected folders of splits alone or classes alone")
        inventory.present["files"] += len(found)
        inventory.leave_out("files", "beside the folders of splits", storable(found[0]), len(found))
    return choose(splits, str(source))


def _folder_class(classes: ClassNames, folder: Path, num_images: int) -> int:
    """The class of a folder; -1 where it is left out, as is one that has neither a class nor images."""
    place = classes.card.place(folder.name)
    if place is None and num_images:
        inner = next((name for name in subfolders(folder) if classes.card.place(name) is not None), "")
        found = f"; found the folder of a class in it, {inner!r}" if inner else ""
        hint = did_you_mean(folder.name, classes.card.ids)
        beside = [name for name in subfolders(folder.parent) if classes.card.place(name) is None]
        unknown = [name for name in beside if list_images(folder.parent, name).images]
        count = f"; {len(unknown):,} folders of {folder.parent} are none" if len(unknown) > 1 else ""
        why = f"{folder}: the folder is no class of the card {classes.card.id}{hint}{found}{count}; {SKIP}"
        classes.leave_out(folder.name, num_images, why)
    return -1 if place is None else place


def _count_strays(source: Path, below: str, inventory: Inventory) -> None:
    """Images that lie in no class's folder."""
    with os.scandir(source / below) as entries:
        files = sorted(entry.name for entry in entries if entry.is_file() and entry.name[0] != ".")
    strays = list(filter(is_image_name, files))
    inventory.present["files"] += len(strays)
    if strays:
        inventory.leave_out("files", "in no folder of a class", storable(Path(below, strays[0])), len(strays))


def _means_other(card: Card, folders: list[str], place: int) -> bool:
    """Whether a folder in a class's is called by another class or by a split."""
    return any(is_split(folder) or card.place(folder) not in (None, place) for folder in folders)


def _beside(image: Path) -> str:
    """The text beside an image."""
    file = image.with_suffix(".txt")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected what is written on {image.name}")
    return decode_text(file.read_bytes(), str(file)).strip()


def _of_table(card: Card, file: Path, skip_unknown: bool) -> Items:
    if not any(protocol.embeds_images for protocol in card.protocols):
        return _of_texts(card, file)
    table, classes = Table(file, image_column="file"), ClassNames(card, skip_unknown)
    needed = sorted(card.required_fields - {"captions"})
    names, embedded = table.images("file", file.parent)
    columns = {name: table.names(table.place(name)) for name in needed}
    used = {table.place(name) for name in ("file", "split", *needed) if name in table.header}
    train, notes = _table_splits(table) if "split" in table.header else (None, [])
    captions = CaptionColumns(table, table.caption_columns(), "en") if "captions" in card.required_fields else None
    labels = np.full(len(names), -1, dtype=np.int64)
    for row in table.kept:
        if not names[row]:
            table.leave_out(row, "without an image", "no image in 'file'")
        elif captions and not needed and captions.is_empty(row):
            table.leave_out(row, "without a caption", f"{names[row]!r} has no caption", always=True)
        elif "class" in needed:
            labels[row] = classes.place(columns["class"][row], table.where(row))
            if labels[row] < 0:
                table.leave_out(row, "of a class that is not on the card", columns["class"][row], always=True)
    rows_of = table.rows_by_image(names)
    first_of = {name: rows[0] for name, rows in rows_of.items()}
    firsts = list(first_of.values())
    if embedded is None:
        folder = _image_folder(file.parent, list(first_of))
        check_files(folder, list(first_of), str(file))
        images: Images = FileImages(folder, first_of)
    else:
        images = TableImages(embedded, first_of)
    _check_rows(table, rows_of, train, "class" in needed)
    notes += classes.notes(str(file))
    cells = {name: [[columns[name][row] for row in rows] for rows in rows_of.values()] for name in needed}
    others = {name: of_images for name, of_images in cells.items() if name not in ("class", "text")}
    items = Items(card, images, list(first_of), labels[firsts], columns=others, notes=notes)
    items.is_train = None if train is None else train[firsts]
    if captions:
        used |= captions.places
        items.captions = by_language([captions.of_rows(rows) for rows in rows_of.values()])
    rows = [line for line in table.inventory.lines() if captions and "without a caption" in line]
    lines = (*rows, *table.count_columns(used).lines())
    notes += [f"{file}: {line}" for line in lines if "left out" in line]
    return _with_texts(items, [columns["text"][row] for row in firsts]) if "text" in needed else items


def _of_texts(card: Card, file: Path) -> Items:
    """A table without images: a text per row and language."""
    table = Table(file)
    columns = table.caption_columns()
    captions = CaptionColumns(table, columns, "en")
    rows = [row for row in table.kept if not captions.is_empty(row)]
    texts = by_language([captions.of_rows([row]) for row in rows])
    notes = [f"{file}: {line}" for line in table.count_columns(captions.places).lines() if "left out" in line]
    keys = [f"{file.name}:{row + 1}" for row in rows]
    return Items(card, FileImages(file.parent, []), keys, np.full(len(rows), -1), captions=texts, notes=notes)


def _check_rows(table: Table, rows_of: dict[str, list[int]], train: np.ndarray | None, once: bool) -> None:
    """Raise a `ValueError` for an image of several rows where each has `once`, or where they are of several splits."""
    for name, (first, *others) in rows_of.items():
        if others and once:
            found = f"{name!r} is duplicated, as {table.where(first)} has it"
            raise ValueError(f"{table.where(others[0])}: {found}; expected one class for each image")
        for row in others:
            if train is not None and train[row] != train[first]:
                raise ValueError(f"{table.where(row)}: {name!r} is of another split in an earlier row; expected one")


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


def _with_texts(items: Items, texts: list[str]) -> Items:
    for key, text in zip(items.keys, texts, strict=True):
        if not text:
            raise ValueError(f"{items.card.id}: {key}: no text; expected what is written on the image")
    candidates, notes = draw_candidates(items.card, texts, items.keys, items.labels)
    return replace(items, candidates=candidates, notes=[*items.notes, *notes])
