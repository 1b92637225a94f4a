"""Image-text pairs in the WebDataset format: tars whose members `key.jpg`, `.txt`, `.json`, `.cls` make a sample.

The members' places are indexed once, so that any sample is one read away and the order is free; webdataset reads a
shard from its start, which cannot be resumed exactly. Only the extensions below are ever read: nothing is unpickled,
no link is followed.
"""

from __future__ import annotations

import gzip
import json
import mmap
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections import Counter, OrderedDict
from glob import glob
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from braceexpand import braceexpand
from torch.utils.data import Dataset

from indiclip.data.images import EncodedImage, UnreadableSample
from indiclip.data.tables import Strings, existing, stable_hash
from indiclip.types import Sample

_IMAGES = ("jpg", "jpeg", "png", "webp")
_READ = (*_IMAGES, "txt", "json", "cls")
_SUFFIX = re.compile(r"\.(tar|tar\.gz|tgz)$")
_MEMBER = re.compile(r"^((?:.*/)?[^./]+)\.([^/]+)$")  # webdataset's rule: the key ends at the file name's first dot
_OPEN_FILES = 64  # per process; thousands of shards would exceed the usual limit of 1,024

# Where a sample's bytes are in its shard: (offset, length), length -1 where there is none.
_PLACES = np.dtype([("shard", "i4"), ("image", "i8", 2), ("txt", "i8", 2), ("json", "i8", 2), ("label", "i8")])
_NOWHERE = (0, -1)

Parts = dict[str, tuple[int, int]]  # extension -> (offset, length)


class Shards(Dataset[Sample]):
    """Samples with `image`, and `caption`, `label` where the shards have them.

    A caption is the `.txt`, else `caption` or `text` of the `.json`, else made from the class. A label is the `.cls`,
    else `label` or `cls` of the `.json`.

    Args:
        urls: Files, globs or brace expansions (`train-{0000..0009}.tar.gz`), one or a list. A `.tar.gz` is unpacked
            once into a cache folder (`INDICLIP_CACHE`, else ~/.cache/indiclip).
        classes: The classes' names, or a text file with one per line.
        caption: A template such as `a photo of a {}` that makes a caption of the class where there is no text.

    Attributes:
        classes: Names of the classes; empty where not given.
        labels: int64 (number of samples,): -1 where a sample has none.
        left_out: How many members were left out, by extension; `(link)`, `(outside)`: a name with `..`, `(unnamed)`:
            no key or no extension, `(no image)`: text without an image.

    Raises:
        FileNotFoundError: A shard or the class file is missing.
        ValueError: A broken tar; duplicate keys; an empty caption; a label that is no class; an image without text
            and label. Names the shard and the member.
    """

    def __init__(
        self, urls: str | list[str], classes: str | list[str] | None = None, caption: str | None = None
    ) -> None:
        self.classes = read_classes(classes)
        if caption is not None and ("{}" not in caption or not self.classes):
            raise ValueError(f"caption: the template {caption!r} needs a {{}} for the class's name, and `classes`")
        self.template = caption
        self.paths = expand(urls)
        self.left_out: Counter[str] = Counter()
        self._files = _Files([_plain_tar(path) for path in self.paths])
        keys: list[str] = []
        places: list[np.ndarray] = []
        for shard, path in enumerate(self.paths):
            members = _members(path, self._files.paths[shard], self.left_out)
            with _mapped(self._files.paths[shard]) as data:
                rows = [self._row(f"{path}: {key}", shard, parts, data) for key, parts in members.items()]
            places.append(np.array(rows, dtype=_PLACES))
            keys.extend(f"{_stem(path)}/{key}" for key in members)
        self._places, self._keys = np.concatenate(places), Strings(keys)
        if not keys:
            raise ValueError(f"{self.paths[0]}: no images in {len(self.paths)} shards; left out: {dict(self.left_out)}")
        self.labels: np.ndarray = np.ascontiguousarray(self._places["label"])
        self._has_labels = bool((self.labels >= 0).any())

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        """`shard/member` without the folder: it stays when the data moves or grows. Reads and decodes nothing."""
        return self._keys[index]

    def __getitem__(self, index: int) -> Sample:
        place, key = self._places[range(len(self))[index]], self.key(index)
        sample = Sample(image=EncodedImage(self._files.read(place["shard"], place["image"], key), key, str(self.paths[place["shard"]])), key=key)
        caption = self._caption(place, key)
        if caption:
            sample["caption"] = caption
        if self._has_labels:
            sample["label"] = int(place["label"])
        return sample

    def _caption(self, place: Any, key: str) -> str | None:
        if place["txt"][1] >= 0:
            return self._files.read(place["shard"], place["txt"], key).decode().strip()
        if place["json"][1] >= 0:
            entry = json.loads(self._files.read(place["shard"], place["json"], key))
            if (caption := _json_caption(entry)) is not None:
                return str(caption).strip()
        return self.template.replace("{}", self.classes[place["label"]]) if self.template else None

    def _row(self, where: str, shard: int, parts: Parts, data: mmap.mmap) -> tuple[Any, ...]:
        """Check a sample's text and label, and say where its parts are."""
        text = {name: _text(f"{where}.{name}", data, *parts[name]) for name in ("txt", "json", "cls") if name in parts}
        entry = _json(f"{where}.json", text["json"]) if "json" in text else {}
        caption, caption_in = (text["txt"], "txt") if "txt" in text else (_json_caption(entry), "json")
        if caption is not None and not (isinstance(caption, str) and caption.strip()):
            raise ValueError(f"{where}.{caption_in}: the caption is {caption!r}; expected text")
        found = entry.get("label", entry.get("cls"))
        label = self._label(f"{where}.cls", text["cls"]) if "cls" in text else self._label(f"{where}.json", found)
        image = next(name for name in _IMAGES if name in parts)
        if caption is None and label < 0:
            raise ValueError(f"{where}.{image}: neither text (.txt, .json) nor label (.cls) beside the image")
        return shard, parts[image], parts.get("txt", _NOWHERE), parts.get("json", _NOWHERE), label

    def _label(self, where: str, found: Any) -> int:
        if found is None:
            return -1
        label = int(found) if isinstance(found, str) and found.strip().isdecimal() else found
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise ValueError(f"{where}: the label is {found!r}; expected a whole number from 0")
        if self.classes and label >= len(self.classes):
            raise ValueError(
                f"{where}: the label is {label}; expected 0 to {len(self.classes) - 1} ({self.classes[-1]})"
            )
        return label


def read_classes(classes: str | list[str] | None) -> list[str]:
    """Class names from a list or a text file with one per line.

    Raises:
        FileNotFoundError: No such file.
        ValueError: An empty name or one that is there twice.
    """
    where = classes if isinstance(classes, str) else "classes"
    lines = existing(classes).read_text("utf-8").splitlines() if isinstance(classes, str) else classes or []
    names = [name.strip() for name in lines]
    for number, name in enumerate(names):
        if not name or name in names[:number]:
            raise ValueError(f"{where}: class {number} is {name!r}; expected one name per class, each once")
    return names


def expand(urls: str | list[str]) -> list[Path]:
    """Brace expansions and globs -> shard files in order.

    Raises:
        FileNotFoundError: A file is missing, or a glob finds none.
        ValueError: No shards, no tar, or two shards of one name (their keys would not be unique).
    """
    paths: list[Path] = []
    for url in [urls] if isinstance(urls, str) else urls:
        for name in map(os.path.expanduser, braceexpand(url)):
            found = sorted(glob(name)) or [str(existing(name))]  # noqa: PTH207 (Path.glob takes no absolute pattern)
            paths.extend(Path(file) for file in found)
    if not paths:
        raise ValueError("urls: no shards given")
    seen: dict[str, Path] = {}
    for path in paths:
        if not _SUFFIX.search(path.name):
            raise ValueError(f"urls: {path} is no shard; expected .tar, .tar.gz or .tgz")
        if _stem(path) in seen:
            raise ValueError(
                f"urls: {seen[_stem(path)]} and {path} have one name, so keys would be duplicate; make them two sources"
            )
        seen[_stem(path)] = path
    return paths


class _Files:
    """Reads parts of files. Descriptors open at first use and are left out of a pickle; children of a fork may share
    them, because `pread` moves no common position."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, file: int, place: Any, key: str) -> bytes:
        """The bytes at (offset, length) `place` of the file with this number."""
        offset, length = int(place[0]), int(place[1])
        try:
            if file not in self._open:
                self._open[file] = os.open(self.paths[file], os.O_RDONLY | os.O_CLOEXEC)
                if len(self._open) > _OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
            data = os.pread(self._open[file], length, offset)
        except OSError as error:
            raise UnreadableSample(key, f"{self.paths[file]}: {error.strerror}") from error
        if len(data) != length:
            raise UnreadableSample(key, f"{self.paths[file]} has become shorter since it was indexed")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def _members(path: Path, tar_path: Path, left_out: Counter[str]) -> dict[str, Parts]:
    """key -> its parts, for every sample of a tar that has an image."""
    samples: dict[str, Parts] = {}
    try:
        # Undecodable names stay apart and can be stored.
        with tarfile.open(tar_path, "r:", errors="backslashreplace") as tar:
            for member in tar:
                if member.isdir():
                    continue
                name = member.name.removeprefix("./")
                key, extension = match.groups() if (match := _MEMBER.match(name)) else ("", "(unnamed)")
                if not member.isreg() or member.issparse():
                    extension = "(link)"
                elif member.name.startswith("/") or ".." in PurePosixPath(name).parts:
                    extension = "(outside)"
                _add(samples, path, key, extension.lower(), (member.offset_data, member.size), left_out)
            # tarfile takes a damaged header for the end of the archive.
            with tar_path.open("rb") as file:
                file.seek(tar.offset)
                if (block := file.read(512)).strip(b"\0") or len(block) not in (0, 512):
                    raise tarfile.ReadError(f"no valid header at byte {tar.offset}")
    except tarfile.TarError as error:
        raise ValueError(f"{path}: broken tar: {error}") from error
    for key in [key for key, parts in samples.items() if not any(name in parts for name in _IMAGES)]:
        del samples[key]
        left_out["(no image)"] += 1
    return samples


def _add(
    samples: dict[str, Parts], path: Path, key: str, extension: str, place: tuple[int, int], left_out: Counter[str]
) -> None:
    if extension not in _READ:
        left_out[extension] += 1
        return
    parts = samples.setdefault(key, {})
    if extension in parts or (extension in _IMAGES and any(name in parts for name in _IMAGES)):
        twice = extension if extension in parts else f"{next(name for name in _IMAGES if name in parts)}, {extension}"
        raise ValueError(f"{path}: duplicate key {key!r} ({twice}); expected one member of a kind")
    parts[extension] = place


def _plain_tar(path: Path) -> Path:
    """The shard itself, or its unpacked copy in the cache: one file per (path, size, time), renamed when complete."""
    if path.name.endswith(".tar"):
        return path
    status = path.stat()
    identity = stable_hash(f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}")
    folder = Path(os.environ.get("INDICLIP_CACHE") or Path.home() / ".cache" / "indiclip")
    target = folder / f"{_stem(path)}-{identity:016x}.tar"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(dir=folder, suffix=".part")
    try:
        with gzip.open(path) as packed, os.fdopen(descriptor, "wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
        Path(part).replace(target)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: broken gzip: {error}") from error
    finally:
        Path(part).unlink(missing_ok=True)
    return target


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _stem(path: Path) -> str:
    return _SUFFIX.sub("", path.name)


def _text(where: str, data: mmap.mmap, offset: int, length: int) -> str:
    try:
        return data[offset : offset + length].decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: the text is not UTF-8: {error.reason} at byte {error.start}") from error


def _json(where: str, text: str) -> dict[str, Any]:
    try:
        entry = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: broken JSON: {error}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: found a JSON {type(entry).__name__}; expected an object")
    return entry


def _json_caption(entry: dict[str, Any]) -> Any:
    return entry.get("text") if entry.get("caption") is None else entry["caption"]
