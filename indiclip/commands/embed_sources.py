"""What `embed` reads: shards, folders, tables, COCO files, lists of texts and the sources of a config, each the same.

A sample is an image with its captions, or captions alone. Nothing is decoded here.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from indiclip.commands.sources import Items, image_bytes, open_source
from indiclip.datasets.base import SampleDataset
from indiclip.datasets.corpora import read_rows
from indiclip.datasets.inventory import Inventory
from indiclip.datasets.table_reader import KINDS, Table
from indiclip.datasets.tables import Strings, existing, is_text
from indiclip.images import EncodedImage, UnreadableSample, is_trouble
from indiclip.loading.source import keyed
from indiclip.names import did_you_mean
from indiclip.types import Quarantined
from indiclip.webdataset import cache
from indiclip.webdataset.shards import Shards, find, read_captions, read_entry, unreadable

Captions = dict[str, list[str]]  # by language, "" where it is unknown


class Example(NamedTuple):
    """An image, not decoded, and what is known of it."""

    image: EncodedImage | np.ndarray
    label: str | None  # a class's name, or its number
    captions: Captions
    unreadable_captions: str = ""  # why some are left out


class Source(Protocol):
    """Samples by number.

    Attributes:
        name: What the user called it.
        inventory: What its files hold.
        damaged: What of its files is lost to all samples.
        has_images: False where it holds texts alone.
        is_generated: Whether its samples are drawn.
    """

    has_images: bool
    is_generated: bool
    name: str
    inventory: Inventory
    damaged: list[Quarantined]

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Reads nothing."""

    def place(self, index: int) -> tuple[str, int]:
        """The file or folder that a sample lies in, and its number there."""

    def read(self, index: int) -> Example:
        """Raises UnreadableSample, and OSError where the machine is in trouble."""

    def captions(self, index: int) -> Captions:
        """As `read` does, without an image."""


class Sources:
    """Several sources, one after the other."""

    def __init__(self, sources: list[Source]) -> None:
        self.sources = sources
        self._starts = np.cumsum([0, *map(len, sources)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def at(self, index: int) -> tuple[Source, int]:
        """The source of a sample, and the sample's number in it."""
        number = int(self._starts.searchsorted(index, side="right")) - 1
        return self.sources[number], index - int(self._starts[number])


def open_sources(words: argparse.Namespace) -> Sources:
    """The sources that the words of the command name.

    Raises:
        FileNotFoundError: One is missing.
        ValueError: Another kind of file, one without samples, or no source at all.
    """
    for name, kinds in {"images": (*KINDS, ".json"), "captions": (".json",)}.items():
        if getattr(words, name) and not any(Path(word).suffix.lower() in kinds for word in words.sources):
            raise ValueError(f"--{name}: no SOURCE that it could belong to; expected one of {', '.join(kinds)}")
    if words.config:
        return Sources(list(_of_config(words.config, words.sources)))
    if not words.sources:
        raise ValueError("SOURCE: found none; expected shards, a folder, a table, a COCO .json, or --config")
    return Sources(list(_of_files(words)))


def _of_files(words: argparse.Namespace) -> Iterator[Source]:
    """A source for each word; shards that follow each other are one, so that their indexes are read together."""
    group: dict[str, str] = {}  # shard by name, which begins its samples' keys
    for word in words.sources:
        is_shards = _is_shards(word)
        for url in find(word) if is_shards else []:
            if cache.stem(url) in group:
                yield _ShardSource(list(group.values()))
                group = {}
            group[cache.stem(url)] = url
        if is_shards:
            continue
        if group:
            yield _ShardSource(list(group.values()))
            group = {}
        yield _of_file(word, words)
    if group:
        yield _ShardSource(list(group.values()))


def _is_shards(word: str) -> bool:
    """Whether a word names shards: what is no other file that is there, or that could be."""
    is_other = Path(word).expanduser().exists() or Path(word).suffix.lower() in (*KINDS, ".json", ".txt")
    return bool(cache.SUFFIX.search(word)) or cache.is_remote(word) or not is_other


def _of_file(word: str, words: argparse.Namespace) -> Source:
    file, captioned = existing(word), words.what == "captions"
    if words.what != "images":  # `all` takes images where there are any, and texts
        is_table = file.suffix.lower() in KINDS
        is_lines = file.suffix.lower() == ".txt"
        if is_lines or (is_table and words.image_column not in Table(file, words.on_bad_row).header):
            return _TextSource(word, file)
    images = words.images if file.is_file() else None
    coco_captions = words.captions if file.suffix.lower() == ".json" else None
    image_column, caption_column = words.image_column, words.caption_column
    items = open_source(
        word, images, coco_captions, image_column, caption_column, None, words.on_bad_row, captioned=captioned
    )
    return _ItemSource(word, items)


def _of_config(files: list[str], chosen: list[str]) -> Iterator[Source]:
    """The sources of a config, or those that the words name: `data.train`, `data.val[0]`."""
    from indiclip.commands.config_samples import build_config  # imports Lightning, which takes seconds

    _, data = build_config([word for file in files for word in ("--config", file)])
    found = keyed("data.train", data.train) | keyed("data.val", data.val)
    for word in chosen:
        if not any(_is_of(key, [word]) for key in found):
            names = ["data.train", "data.val", *found]
            expected = f"expected {', '.join(names)}"
            raise ValueError(f"{word}: no source of the config{did_you_mean(word, names)}; {expected}")
    for key, source in found.items():
        if not chosen or _is_of(key, chosen):
            yield _DatasetSource(key, source.dataset)


def _is_of(key: str, words: list[str]) -> bool:
    """Whether a source's key is one of the words, or in a list that is."""
    return key in words or key.partition("[")[0] in words


class _ShardSource:
    has_images = True
    is_generated = False

    def __init__(self, urls: list[str]) -> None:
        self._shards = Shards(urls)
        self.name = self._shards.shard(0)
        self.inventory, self.damaged = self._shards.inventory, list(self._shards.damaged)

    def __len__(self) -> int:
        return len(self._shards)

    def key(self, index: int) -> str:
        return self._shards.key(index)

    def place(self, index: int) -> tuple[str, int]:
        starts = self._shards.starts
        first = int(starts[int(starts.searchsorted(index, side="right")) - 1])
        return self._shards.shard(index), index - first

    def read(self, index: int) -> Example:
        key, shard = self._shards.key(index), self._shards.shard(index)
        with unreadable(key, shard):
            parts = self._shards.parts(index)
            image = EncodedImage(parts["image"], key, shard)
        label = int(self._shards.labels[index])
        return Example(image, str(label) if label >= 0 else None, *_captions(parts))

    def captions(self, index: int) -> Captions:
        with unreadable(self._shards.key(index), self._shards.shard(index)):
            parts = self._shards.parts(index)
            return read_captions(parts, read_entry(parts))


class _ItemSource:
    """A folder, a table or a COCO file, as `indiclip shards pack` reads it."""

    damaged: list[Quarantined]
    has_images = True
    is_generated = False

    def __init__(self, name: str, items: Items) -> None:
        self.name, self._items, self.damaged = name, items, []
        self.inventory = items.inventory

    def __len__(self) -> int:
        return len(self._items.keys)

    def key(self, index: int) -> str:
        return self._items.images[index] or self._items.keys[index]

    def place(self, index: int) -> tuple[str, int]:
        return self.name, index

    def read(self, index: int) -> Example:
        with self._unreadable(index):
            item = self._items[index]
            image = EncodedImage(image_bytes(self._items.folder, item), self.key(index), self.name)
        label = item.texts.get("cls")
        return Example(image, self._items.classes[int(label)] if label else None, *_captions(item.texts))

    def captions(self, index: int) -> Captions:
        with self._unreadable(index):
            texts = self._items[index].texts
            return read_captions(texts, read_entry(texts))

    @contextmanager
    def _unreadable(self, index: int) -> Iterator[None]:
        try:
            yield
        except UnreadableSample:
            raise
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and is_trouble(error):
                raise
            reason = f"{self._items.names[index]}: {getattr(error, 'strerror', None) or error}"
            raise UnreadableSample(self.key(index), reason, self.name) from error


class _DatasetSource:
    """A source of a config."""

    has_images = True

    def __init__(self, name: str, dataset: SampleDataset) -> None:
        self.name, self._dataset = name, dataset
        self.inventory, self.damaged = dataset.inventory, list(dataset.damaged)
        self.is_generated = dataset.is_generated
        self._knows_captions = type(dataset).captions is not SampleDataset.captions

    def __len__(self) -> int:
        return len(self._dataset)

    def key(self, index: int) -> str:
        return self._dataset.key(index)

    def place(self, index: int) -> tuple[str, int]:
        return self.name, index

    def read(self, index: int) -> Example:
        sample = self._dataset[index]
        label, classes = sample.get("label"), self._dataset.classes
        named = None if label is None else classes[label] if 0 <= label < len(classes) else str(label)
        return Example(sample["image"], named, sample.get("captions", {}))

    def captions(self, index: int) -> Captions:
        found = self._dataset.captions(index) if self._knows_captions else {}
        return found or self._dataset[index].get("captions", {})  # which says why where they cannot be read


class _TextSource:
    """Texts without images: a table with columns of languages, or a .txt with one text per line."""

    damaged: list[Quarantined]
    has_images = False
    is_generated = False

    def __init__(self, name: str, file: Path) -> None:
        self.name, self.damaged, self.inventory = name, [], Inventory()
        self._stem = file.stem
        rows = ({language: list(filter(is_text, texts)) for language, texts in row.items()} for row in read_rows(file))
        self._rows = Strings(map(json.dumps, rows))
        self.inventory.present["rows"] = self.inventory.used["rows"] = len(self)

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        return f"{self._stem}-{index:06}"

    def place(self, index: int) -> tuple[str, int]:
        return self.name, index

    def read(self, index: int) -> Example:
        raise AssertionError(f"{self.name} holds no images")

    def captions(self, index: int) -> Captions:
        texts: Captions = json.loads(self._rows[index])
        return texts


def _captions(parts: dict[str, Any]) -> tuple[Captions, str]:
    """The captions beside an image, which is not lost where they cannot be read, and why some cannot.

    Where its `.txt` and `.json` cannot be read together, the one that can be read alone is.
    """
    try:
        return read_captions(parts, read_entry(parts)), ""
    except ValueError as error:
        reason = str(error)
    for name in ("txt", "json"):
        alone = {key: part for key, part in parts.items() if key == name}
        with suppress(ValueError):  # the reason is known
            return read_captions(alone, read_entry(alone)), reason
    return {}, reason
