"""Image-text pairs in the WebDataset format: tars whose members `key.jpg`, `.txt`, `.json`, `.cls` make a sample.

An index says where each sample's parts are, so that any sample is one read away and the order is free; webdataset reads
a shard from its start, which cannot be resumed exactly. Only the extensions below are ever read: nothing is unpickled,
no link is followed.
"""

import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from glob import escape, glob
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from indiclip.datasets.base import SampleDataset
from indiclip.datasets.coco_file import check_unique
from indiclip.datasets.inventory import Inventory
from indiclip.datasets.languages import declared_language
from indiclip.datasets.tables import decode_text, existing, is_text, parse_json, text_lines
from indiclip.images import EncodedImage, UnreadableSample, is_trouble
from indiclip.names import shorten
from indiclip.types import Quarantined, Sample
from indiclip.webdataset import cache, tar_index
from indiclip.webdataset.index_set import index_set
from indiclip.webdataset.shard_files import ShardFiles
from indiclip.webdataset.tar_members import IMAGES, sample_at

_NUMBERED = re.compile(r"_[1-9]\d*$")


class Shards(SampleDataset):
    """Samples with `image`, and `captions`, `label` where the shards have them.

    Captions are the `.txt` and `caption` of the `.json`, else its `text`, else one made from the class; `language` or
    `lang` of the `.json` says their language. `captions` of the `.json` are an object, language -> text or texts, or a
    list of texts in that language. They take turns. A label is the `.cls`, else `label` or `cls` of the `.json`.

    Args:
        urls: Files, globs or brace expansions (`train-{0000..0009}.tar.gz`), or what fsspec opens (`s3://`, `gs://`,
            `https://`), one or a list. What is packed or remote is read from a local copy: `webdataset.cache`.
        classes: The classes' names, or a text file with one per line.
        caption: A template such as `a photo of a {}` that makes a caption of the class where there is no text.

    Attributes:
        classes: Names of the classes; empty where not given.
        names: The shards' names, which begin their samples' keys.
        labels: int (number of samples,): -1 where a sample has none.
        sizes_hw: int16 (number of samples, 2): height and width as stored; 0 where the image's header is unreadable, or
            a side longer than 32,767.
        starts: int64 (number of shards + 1,): the samples of shard i are `starts[i]` to `starts[i + 1] - 1`.
        damaged: What of the shards is lost to all samples: the rest of a truncated tar, a duplicated member.

    Raises:
        FileNotFoundError: A shard or the class file is missing.
        ValueError: No tar; a label that is no class. Names the shard and the member.
    """

    labels: np.ndarray
    sizes_hw: np.ndarray
    starts: np.ndarray
    _units: tuple[str, ...] = ("members", "samples")  # of the index that its samples are made of

    def __init__(
        self, urls: str | list[str], classes: str | list[str] | None = None, caption: str | None = None
    ) -> None:
        self.classes = read_classes(classes)
        if caption is not None and ("{}" not in caption or not self.classes):
            raise ValueError(f"caption: the template {caption!r} needs a {{}} for the class's name, and `classes`")
        self.template = caption
        self.urls = expand(urls)
        self.names = [cache.stem(url) for url in self.urls]
        self._shown = [cache.shown(url) for url in self.urls]
        self._index = index_set(self.urls)
        self._files = ShardFiles(self.urls, self._index)
        self._view()
        self.damaged = [
            Quarantined("", f"{self.names[shard]}/{key}", self._shown[shard], reason)
            for shard, key, reason in self._index.damaged
        ]
        if not self.starts[-1]:
            found = "; ".join(self.inventory.lines())
            raise ValueError(f"{self._shown[0]}: no images in {len(self.urls)} shards; found {found}")
        self._has_labels = self._index.max_label >= 0
        if self.classes and self._index.max_label >= len(self.classes):
            index = int(self.labels.argmax())
            raise ValueError(
                f"{self.shard(index)}: {self.key(index)}: the label is {self.labels[index]}; expected 0 to "
                f"{len(self.classes) - 1} ({self.classes[-1]})"
            )

    def _view(self) -> None:
        """Take what is known of the samples from the index, as views of its columns."""
        columns = self._index.columns
        self.starts, self.sizes_hw = self._index.starts, columns.sizes_hw
        self.labels = columns.labels if len(columns.labels) else np.broadcast_to(np.int16(-1), len(columns))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("starts", "labels", "sizes_hw")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._view()  # a pickle would copy what is mapped

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def inventory(self) -> Inventory:
        """Members and samples; boxes where these are read."""
        return self.contents(self._units)

    def contents(self, units: tuple[str, ...] = ("members", "samples", "boxes")) -> Inventory:
        """What the shards hold, whatever of it is read."""
        summary = self._index.inventory.summary()
        return Inventory.of_summary({unit: found for unit, found in summary.items() if unit in units})

    def key(self, index: int) -> str:
        """`shard/member` without the folder: it stays when the data moves or grows. Reads and decodes nothing."""
        index = range(len(self))[index]
        return self._key(self._shard(index), index)

    def group(self, index: int) -> str:
        """The key of the first sample of its picture: `shards pack` calls more rows of a picture 21 `21_1`, `21_2`."""
        key = self.key(index)
        base = _NUMBERED.sub("", key.partition("/")[2])
        return self._first_of_many.get(base, key) if _NUMBERED.search(key) else key

    @cached_property
    def _first_of_many(self) -> dict[str, str]:
        """Member `21` -> key of it, where a shard has a `21_1`."""
        keys = {key: key.partition("/")[2] for key in map(self.key, range(len(self)))}
        bases = {_NUMBERED.sub("", member) for member in keys.values() if _NUMBERED.search(member)}
        first: dict[str, str] = {}
        for key, member in keys.items():
            if member in bases:
                first.setdefault(member, key)
        return first

    def captions(self, index: int) -> dict[str, list[str]]:
        """All captions of a sample by language; none where they are unreadable. Decodes no image."""
        try:
            parts = self.parts(index)
            return self._captions(int(self.labels[index]), parts, read_entry(parts))
        except ValueError:
            return {}

    def shard(self, index: int) -> str:
        """The shard that a sample lies in."""
        return self._shown[self._shard(range(len(self))[index])]

    def prefetch(self, shards: list[int]) -> None:
        """Make the local copies of packed or remote shards; nothing is to be done for others."""
        self._files.prefetch(shards)

    def parts(self, index: int) -> dict[str, bytes]:
        """The bytes of a sample's members: `image`, and `txt`, `json` where it has them.

        Raises:
            OSError: The shard cannot be read there.
            ValueError: It is not the shard, or the image's bytes are not those, that were indexed.
        """
        index = range(len(self))[index]
        return self._parts(self._shard(index), index)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        shard = self._shard(index)
        key, file = self._key(shard, index), self._shown[shard]
        with unreadable(key, file):
            parts = self._parts(shard, index)
            entry = read_entry(parts)
            image = EncodedImage(parts["image"], key, file)
            sample = Sample(image=image, key=key)
            sample.update(self._fields(index, image, parts, entry))
        return sample

    def _key(self, shard: int, index: int) -> str:
        return f"{self.names[shard]}/{self._index.columns.key(index)}"

    def _parts(self, shard: int, index: int) -> dict[str, bytes]:
        columns = self._index.columns
        places = columns.parts_apart(index)
        if places is not None:
            found = {name: self._files.read(shard, *place) for name, place in places.items()}
        else:
            found = self._read_together(shard, index)
        if self._index.has_crc[shard] and zlib.crc32(found["image"]) != columns.crcs[index]:
            raise ValueError("the image's bytes are not those that were indexed (CRC-32)")
        return found

    def _read_together(self, shard: int, index: int) -> dict[str, bytes]:
        """The parts of a sample whose members stand together, by one read."""
        begin, end = self._index.extent(shard, index)
        data = self._files.read(shard, begin, end - begin)
        key, places = sample_at(data, 0, len(data))
        if key != self._index.columns.key(index) or not any(name in places for name in IMAGES):
            raise ValueError(f"the shard has another sample, {shorten(key)}, there than was indexed")
        found = {"image" if name in IMAGES else name: data[at : at + length] for name, (at, length) in places.items()}
        found.pop("cls", None)  # in the index
        return found

    def _fields(self, index: int, image: EncodedImage, parts: dict[str, bytes], entry: dict[str, Any]) -> Sample:
        """What a sample has besides its image; raises `ValueError` with a reason where it cannot be used."""
        fields, label = Sample(), int(self.labels[index])
        if label == tar_index.BAD_LABEL:
            raise ValueError("the label is no whole number from 0")
        if captions := self._captions(label, parts, entry):
            fields["captions"] = captions
        elif label < 0:
            raise ValueError("neither text (.txt, .json) nor label (.cls) beside the image")
        if self._has_labels:
            fields["label"] = label
        return fields

    def _captions(self, label: int, parts: dict[str, bytes], entry: dict[str, Any]) -> dict[str, list[str]]:
        """Those beside the image, else the one that the template makes of the class."""
        captions = read_captions(parts, entry)
        if not captions and self.template and label >= 0:
            return {"": [self.template.replace("{}", self.classes[label])]}
        return captions

    def _shard(self, index: int) -> int:
        return int(self.starts.searchsorted(index, side="right")) - 1


def read_classes(classes: str | list[str] | None) -> list[str]:
    """Class names from a list or a text file with one per line.

    Raises:
        FileNotFoundError: No such file.
        ValueError: An empty or a duplicated name.
    """
    where = classes if isinstance(classes, str) else "classes"
    lines = classes or []
    if isinstance(classes, str):
        lines = text_lines(decode_text(existing(classes).read_bytes(), where))
    names = [name.strip() for name in lines]
    for number, name in enumerate(names):
        if not is_text(name) or name in names[:number]:
            raise ValueError(f"{where}: class {number} is {shorten(name)}; expected one name per class, each once")
    check_unique(names, f"{where}: class")
    return names


@contextmanager
def unreadable(key: str, file: str) -> Iterator[None]:
    """What is wrong with a sample of a shard, but not with the machine, becomes `UnreadableSample`."""
    try:
        yield
    except (cache.NoCopy, UnreadableSample):
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and is_trouble(error):
            raise
        raise UnreadableSample(key, str(error), file) from error


def expand(urls: str | list[str]) -> list[str]:
    """Brace expansions and globs -> shards in order.

    Raises:
        FileNotFoundError: A file is missing, or a glob finds none.
        ValueError: No shards, no tar, or two shards of one name (their keys would not be unique).
    """
    found = find(urls)
    seen: dict[str, str] = {}
    for url in found:
        if cache.stem(url) in seen:
            raise ValueError(
                f"urls: {seen[cache.stem(url)]} and {cache.shown(url)} have one name, so keys would be duplicate; make "
                "them two sources"
            )
        seen[cache.stem(url)] = cache.shown(url)
    return found


def find(urls: str | list[str]) -> list[str]:
    """As `expand`, but several shards may have one name."""
    cache.limit()  # a mistake there would make every sample of a copy unreadable
    found: list[str] = []
    for url in [urls] if isinstance(urls, str) else urls:
        is_there = os.path.exists(os.path.expanduser(url))  # noqa: PTH110, PTH111 (a Path makes s3:/ of s3://)
        for name in map(os.path.expanduser, [url] if is_there else braceexpand(url)):  # { may be part of a name
            found.extend(_matches(name))
    if not found:
        raise ValueError("urls: no shards given")
    for url in found:
        if not cache.SUFFIX.search(cache.shown(url)):
            raise ValueError(f"urls: {cache.shown(url)} is no shard; expected .tar, .tar.gz or .tgz")
    return found


def _matches(name: str) -> list[str]:
    if not cache.is_remote(name):
        folder, pattern = os.path.split(name)
        if os.path.exists(name):  # noqa: PTH110 (1e5 of them); [ and ] may be part of a name
            return [name]
        if Path(folder).is_dir():
            folder = escape(folder)
        found = glob(os.path.join(folder, pattern))  # noqa: PTH118, PTH207 (Path.glob takes no absolute pattern)
        return sorted(found) or [str(existing(name))]
    if "*" not in name:
        return [name]  # whether it is there is asked with its size, many at once
    found = cache.remote_glob(name)
    if not found:
        raise FileNotFoundError(f"{cache.shown(name)}: no such file")
    return found


def read_entry(parts: dict[str, bytes]) -> dict[str, Any]:
    """The object in a sample's `.json`; empty where it has none.

    Raises:
        ValueError: Broken JSON, or no object.
    """
    if "json" not in parts:
        return {}
    entry = parse_json(decode_text(parts["json"], "the .json"))
    if not isinstance(entry, dict):
        raise ValueError(f"found a JSON {type(entry).__name__}; expected an object")
    return entry


def read_captions(parts: dict[str, bytes], entry: dict[str, Any]) -> dict[str, list[str]]:
    """All captions of a sample by language, "" where it is unknown: `.txt`, and `caption`, `captions` of the `.json`.

    Raises:
        ValueError: Something that is no text, empty or no UTF-8, or a name that is no language's code.
    """
    own, texts, found = entry.get("language") or entry.get("lang"), dict[str, list[str]](), entry.get("captions")
    own = declared_language(own)
    if found is None or isinstance(found, list):
        found = {own: found or []}
    if not isinstance(found, dict):
        raise ValueError(f"captions of the .json is {shorten(found)}; expected texts by language, or a list of texts")
    for language, more in found.items():
        tag = declared_language(language)
        where = f"captions of the .json: {language}" if language else "captions of the .json"
        listed = more if isinstance(more, list) else [more]
        texts.setdefault(tag, []).extend(_checked_text(where, text) for text in listed)
    beside = [decode_text(parts["txt"], "the .txt") if "txt" in parts else None, entry.get("caption")]
    for caption in [entry.get("text")] if beside == [None, None] else reversed(beside):
        if caption is None:
            continue
        caption = _checked_text("the caption", caption)
        # One that declares no language is mostly one of the others again.
        if own or not any(caption in of_language for of_language in texts.values()):
            texts.setdefault(own, []).insert(0, caption)
    return {language: list(dict.fromkeys(of_language)) for language, of_language in texts.items() if of_language}


def _checked_text(name: str, found: Any) -> str:
    if not is_text(found):
        raise ValueError(f"{name} is {shorten(found)}; expected text")
    return str(found.strip())
