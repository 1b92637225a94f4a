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

from pathlib import Path

import numpy as np

from indiclip.datasets.table_reader import KINDS
from indiclip.evals.cards.card import Card
from indiclip.evals.images.caption_files import find_caption_file, read_caption_file
from indiclip.evals.images.duplicates import duplicates, shared_captions
from indiclip.evals.images.folder_layout import read_folders
from indiclip.evals.images.items import FileImages, Items, by_language
from indiclip.evals.images.labels import class_groups, draw_candidates, missing_classes
from indiclip.evals.images.reading import Reading
from indiclip.evals.images.shard_layout import find_shards, read_shards
from indiclip.evals.images.table_layout import read_table
from indiclip.images import EXTENSIONS, storable

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
    files = [root / f"{card.folder}{kind}" for kind in (*KINDS, *_CAPTION_FILES)]
    found = [root / card.folder] if (root / card.folder).is_dir() else list(filter(Path.is_file, files))
    source = next(iter(found), None)
    needed = card.class_source.names_file if card.class_source else ""
    if source is None or not (source / needed).exists():
        return None
    return read_items(card, source, skip_unknown)


def read_items(card: Card, source: Path, skip_unknown: bool = False) -> Items:
    """The images of a card in a folder, a table or a file of captions; see the module and `find_items`."""
    reading = Reading(card, skip_unknown)
    if card.class_source:
        reading.card, reading.notes = card.class_source.with_file(card, source / card.class_source.names_file)
    items = _read(reading, source)
    items.notes = [*reading.notes, *reading.left_out(str(source))]
    found = "".join(f"; {note}" for note in items.notes)
    if not len(items):
        raise NoImages(f"{source}: no images ({', '.join(EXTENSIONS)}) of the card {card.id}{found}")
    if not items.tested_N.any():
        raise FileNotFoundError(f"{source}: images of the split `train` only; there is nothing to score{found}")
    items.keys = list(map(storable, items.keys))
    if items.tested_N.all():
        items.is_train = None
    elif not any(protocol.uses_gallery for protocol in card.protocols):
        count = len(items) - items.tested_N.sum()
        items.notes.append(f"{source}: left out: {count:,} training images, which no protocol of the card uses")
    if "text" in card.required_fields:
        items.notes += draw_candidates(items)
    items.groups = class_groups(items.card, items.labels)
    items.notes += [*missing_classes(items), *duplicates(items), *shared_captions(items)]
    for protocol in items.card.protocols:
        try:
            protocol.check(items)
        except ValueError as error:
            raise ValueError(f"{next(iter(_tables(source)), source)}: {error} (card {card.id})") from error
    items.notes = list(map(storable, items.notes))
    return items


def _read(reading: Reading, source: Path) -> Items:
    card, fields = reading.card, reading.card.required_fields
    if source.is_file():
        read = _read_captions if source.suffix.lower() in _CAPTION_FILES else read_table
        return read(reading, source)
    if shards := find_shards(source):
        if others := sorted(fields - {"class", "text", "captions"}):
            raise ValueError(
                f"{source}: shards, which have no columns; expected a table with {', '.join(others)} in it"
            )
        return read_shards(reading, source, shards)
    tables = _tables(source)
    if fields == {"captions"} and (file := find_caption_file(source, any_json=not tables)):
        return _read_captions(reading, file)
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise ValueError(f"{source}: several tables, {names}; expected one that lists the images")
    if tables:
        return read_table(reading, tables[0])
    if fields == {"captions"}:
        raise FileNotFoundError(f"{source}: no captions: no shards, no table, no file of captions (see {card.file})")
    if others := sorted(fields - {"class", "text", "instance"}):
        raise FileNotFoundError(f"{source}: no table; expected one with the columns file and {', '.join(others)}")
    return read_folders(reading, source)


def _tables(source: Path) -> list[Path]:
    """The tables of a folder."""
    files = source.iterdir() if source.is_dir() else ()
    return sorted(file for file in files if file.suffix.lower() in KINDS and file.name[0] != "." and file.is_file())


def _read_captions(reading: Reading, file: Path) -> Items:
    card = reading.card
    if card.required_fields != {"captions"}:
        raise ValueError(f"{file}: captions, and the card {card.id} asks for {', '.join(sorted(card.required_fields))}")
    names, captions, notes = read_caption_file(file)
    reading.notes += notes
    images, labels = FileImages.named_in(file, names), np.full(len(names), -1, dtype=np.int64)
    return Items(card, images, names, labels, captions=by_language(captions))
