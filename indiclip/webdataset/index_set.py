"""The index of all shards of a dataset, mapped into memory, so that the processes of a machine share its pages.

A process that finds none makes it from the shards' own indexes, which it builds where they are missing, while others
wait. It lies in the cache folder under a name that follows from what the shards and the indexes beside them are (size,
time of change, inode), so that a start looks at their directory entries only; a server is asked as before. Small
datasets, and those without a cache folder, have it in the memory of each process.

On disk it is a folder: one raw file for each column, and `about.json` with version, kinds, lengths and a digest. Every
byte of the shards' indexes has been checked when it is made; at a start its lengths and `about.json` are.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.progress import track

from indiclip.datasets.inventory import Inventory
from indiclip.webdataset import cache, tar_index
from indiclip.webdataset.sample_columns import BLOCK, KINDS, NARROW_LABELS, SampleColumns
from indiclip.webdataset.tar_index import ShardInfo, TarIndex

MAPPED = 2**18  # samples from which it is kept as files; fewer take up to 4 MiB in each process
INDEXED = ".indexed"  # in the cache folder: its time is that of the newest index that a command put there
_VERSION = 1
_SHOW_PROGRESS = 8  # shards to index; fewer are done before one looks
_ASK_AT_ONCE = 16  # answers of servers and file systems waited for together
_RECENT = 2_000_000_000  # ns since the change of a file, whose clock may not tell a second change
_UNUSED = 7 * 24 * 3600.0  # seconds since it was last opened, after which one of a former state is removed
_CHUNK = 2**22  # labels that are made narrower at a time

_KINDS: dict[str, np.dtype[Any]] = KINDS | {
    "starts": np.dtype("<i8"),
    "ends": np.dtype("<i8"),
    "has_crc": np.dtype("?"),
    "shard_data": np.dtype("u1"),
    "shard_ends": np.dtype("<i8"),
}


class IndexSet:
    """What is known of the shards of a dataset and their samples.

    Attributes:
        columns: What is known of each sample, shard after shard.
        starts: int64 (shards + 1,): the first sample of each shard; at the end the number of samples.
        has_crc: bool (shards,): whether `crcs` were computed.
        max_label: The largest; -1 or less where there is none.
        inventory: What the shards hold; an example begins with its shard.
        damaged: (number of the shard, key, reason) of what is lost to all samples.
    """

    def __init__(self, arrays: dict[str, np.ndarray], about: dict[str, Any], folder: Path | None = None) -> None:
        self.starts: np.ndarray = arrays["starts"]
        self.has_crc: np.ndarray = arrays["has_crc"]
        self._ends, self._shard_data, self._shard_ends = (arrays[name] for name in ("ends", "shard_data", "shard_ends"))
        self.columns = SampleColumns(**{name: arrays[name] for name in KINDS})
        self.columns.check_kinds()
        if not len(self.starts) - 1 == len(self._ends) == len(self.has_crc) == len(self._shard_ends):
            raise ValueError("starts: not of these shards")
        if self.starts[-1] != len(self.columns):
            raise ValueError("starts: not of these samples")
        self.max_label = int(about["max_label"])
        self.inventory = Inventory.of_summary(about["inventory"])
        self.damaged = [(int(shard), str(key), str(reason)) for shard, key, reason in about["damaged"]]
        self._folder = folder

    def shard(self, number: int) -> ShardInfo:
        """What is known of a shard as a whole."""
        begin = int(self._shard_ends[number - 1]) if number else 0
        return ShardInfo.of_json(json.loads(self._shard_data[begin : int(self._shard_ends[number])].tobytes()))

    def extent(self, shard: int, sample: int) -> tuple[int, int]:
        """Where the first header of a sample begins in its shard, and where the next sample does, in bytes."""
        blocks, is_last = self.columns.blocks, sample + 1 == self.starts[shard + 1]
        return int(blocks[sample]) * BLOCK, int(self._ends[shard] if is_last else int(blocks[sample + 1]) * BLOCK)

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder} if self._folder else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        if folder := state["_folder"]:
            self.__init__(*_read(folder), folder)  # type: ignore[misc]  # mapped again; a pickle would copy it
        else:
            self.__dict__.update(state)


def index_set(urls: list[str]) -> IndexSet:
    """The index of shards; made now where it is not in the cache folder.

    Raises:
        FileNotFoundError: A shard is not there.
        ValueError: One is no tar.
    """
    name, folder = _name(urls), None
    with ExitStack() as held:
        with suppress(OSError):  # a cache that cannot be made or locked holds none
            place = cache.folder() / name
            if found := load(place):
                return found
            held.enter_context(cache.locked(place, "index-"))  # one process makes it for all of the machine
            folder = place
        return (folder and load(folder)) or _make(urls, folder)


def load(folder: Path) -> IndexSet | None:
    """The index that lies in a folder; None where there is none that can be used."""
    if folder.is_symlink() or not folder.is_dir():
        return None
    try:
        return IndexSet(*_read(folder), folder)
    except Exception:  # torn or odd content raises anything; it is made anew
        return None


def _read(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The columns, mapped, and `about.json`; raises anything where they are not what `_Writer` made."""
    text = (folder / "about.json").read_text()
    digest, _, text = text.partition("\n")
    about = json.loads(text)
    if digest != _digest(text) or about["version"] != _VERSION:
        raise ValueError("another version, or torn")
    arrays = {}
    for name, kind in _KINDS.items():
        file, size = folder / name, about["bytes"][name]
        kind = NARROW_LABELS if name == "labels" and about["narrow_labels"] else kind
        if file.stat().st_size != size or size % kind.itemsize:
            raise ValueError(f"{file}: expected {size:,} bytes")
        column = np.memmap(file, kind, "r") if size else np.empty(0, kind)
        arrays[name] = column.reshape(-1, 2) if name == "sizes_hw" else column
    with suppress(OSError):  # another user's
        os.utime(folder)  # in use
    return arrays, about


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _name(urls: list[str]) -> str:
    """Of the folder: of the list of shards, and of their state and that of the indexes beside them."""
    chunks = [urls[first : first + 256] for first in range(0, len(urls), 256)]
    with ThreadPoolExecutor(_ASK_AT_ONCE) as pool:
        states = list(pool.map(lambda chunk: [_state(url) for url in chunk], chunks))
        remote = list(pool.map(cache.stat, filter(cache.is_remote, urls)))
    indexed = 0
    with suppress(OSError):
        indexed = (cache.folder() / INDEXED).stat().st_mtime_ns
    return f"{_prefix(urls)}{_digest(repr((_VERSION, states, remote, indexed)))}"


def _prefix(urls: list[str]) -> str:
    paths = [url if cache.is_remote(url) else os.path.abspath(url) for url in urls]  # noqa: PTH100 (1e5 of them)
    return f"set-{_digest(repr(paths))[:16]}-"


def _state(url: str) -> list[tuple[Any, ...]]:
    """What changes with a shard on disk or the index beside it."""
    states: list[tuple[Any, ...]] = []
    for file in [] if cache.is_remote(url) else [url, str(tar_index.index_path(url))]:
        try:
            found = os.stat(file)  # noqa: PTH116 (a Path takes longer than to look)
        except FileNotFoundError:
            if file == url:
                raise
            continue
        is_recent = time.time_ns() - found.st_ctime_ns < _RECENT
        more = (cache.fingerprint(Path(file)),) if is_recent else ()
        states.append((found.st_size, found.st_ctime_ns, found.st_ino, *more))
    return states


def _make(urls: list[str], folder: Path | None) -> IndexSet:
    """Make the index from those of the shards, and keep it in the folder where it is large."""
    for left in folder.parent.glob(f"{folder.name}-*.making") if folder else []:  # by a killed process
        shutil.rmtree(left, ignore_errors=True)
    try:
        return _written(urls, folder)
    except cache.NoCopy:
        raise
    except OSError as error:
        if folder is None or error.errno not in cache.NOT_WRITABLE:
            raise
        return _written(urls, None)  # in the memory of each process


def _written(urls: list[str], folder: Path | None) -> IndexSet:
    prefix, parent = (f"{folder.name}-", folder.parent) if folder else ("indiclip-index-", None)
    with tempfile.TemporaryDirectory(".making", prefix, parent, ignore_cleanup_errors=True) as name:
        part = Path(name)
        with _Writer(part) as writer:
            for url, index in zip(urls, indexes(urls), strict=True):
                writer.add(cache.shown(url), index)
        if folder is None or writer.samples < MAPPED:
            arrays, about = _read(part)
            return IndexSet({column: np.array(array) for column, array in arrays.items()}, about)
        for file in part.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
            file.chmod(0o644)
        part.chmod(0o755)
        if folder.is_symlink():
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    for other in folder.parent.glob(f"{_prefix(urls)}*"):  # of a former state of these shards
        with suppress(OSError):
            if time.time() - other.stat().st_mtime > _UNUSED:
                shutil.rmtree(other, ignore_errors=True)
    return IndexSet(*_read(folder), folder)


class _Writer:
    """Writes the columns of one shard after the other."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.samples = folder, 0
        self._files: dict[str, IO[bytes]] = {name: (folder / name).open("wb") for name in _KINDS}
        self._key_bytes, self._shard_bytes = 0, 0
        self._has_labels, self._max_label, self._any_crc = False, -1, False
        self._inventory, self._damaged = Inventory(), list[tuple[int, str, str]]()
        self._shards = 0
        self._put("starts", np.zeros(1, np.int64))

    def add(self, shown: str, index: TarIndex) -> None:
        """Append a shard.

        Args:
            shown: The shard in messages.
        """
        columns, info = index.columns, json.dumps(index.info.to_json()).encode()
        apart = columns.apart.copy()
        apart["sample"] += self.samples
        labels, crcs = columns.labels, columns.crcs
        self._has_labels = self._has_labels or len(labels) > 0
        self._max_label = max(self._max_label, int(labels.max(initial=-1)))
        shard = {
            "blocks": columns.blocks,
            "sizes_hw": columns.sizes_hw,
            "labels": labels if len(labels) else np.full(len(index), -1),
            "crcs": crcs if len(crcs) else np.zeros(len(index)),
            "key_data": columns.key_data,
            "key_firsts": columns.key_firsts + self.samples,
            "key_ends": columns.key_ends + self._key_bytes,
            "apart": apart,
            "starts": [self.samples + len(index)],
            "ends": [index.info.end],
            "has_crc": [index.info.has_crc],
            "shard_data": np.frombuffer(info, np.uint8),
            "shard_ends": [self._shard_bytes + len(info)],
        }
        for name, column in shard.items():
            self._put(name, np.asarray(column))
        self.samples, self._any_crc = self.samples + len(index), self._any_crc or index.info.has_crc
        self._key_bytes, self._shard_bytes = self._key_bytes + len(columns.key_data), self._shard_bytes + len(info)
        self._inventory += Inventory.of_summary(index.inventory.summary(), f"{shown}: ")
        self._damaged += [(self._shards, key, reason) for key, reason in index.damaged]
        self._shards += 1

    def _put(self, name: str, column: np.ndarray) -> None:
        self._files[name].write(np.ascontiguousarray(column, _KINDS[name]).data)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()
        if error[0] is None:
            self._finish()

    def _finish(self) -> None:
        """Drop columns that say nothing, and write `about.json`."""
        labels, narrow = self._folder / "labels", self._max_label < 2**15
        if not self._any_crc:
            os.truncate(self._folder / "crcs", 0)
        if not self._has_labels:
            os.truncate(labels, 0)
        elif narrow:
            with labels.open("rb") as wide, (self._folder / "narrow").open("wb") as file:
                while chunk := wide.read(4 * _CHUNK):
                    file.write(np.frombuffer(chunk, KINDS["labels"]).astype(NARROW_LABELS).data)
            (self._folder / "narrow").replace(labels)
        about = {
            "version": _VERSION,
            "bytes": {name: (self._folder / name).stat().st_size for name in _KINDS},
            "narrow_labels": narrow,
            "max_label": self._max_label,
            "inventory": self._inventory.summary(),
            "damaged": self._damaged,
        }
        text = json.dumps(about)
        (self._folder / "about.json").write_text(f"{_digest(text)}\n{text}")


def indexes(urls: list[str]) -> Iterator[TarIndex]:
    """Each shard's index: the one beside it, or in the cache folder, or one that is built now and kept there."""
    with ThreadPoolExecutor(_ASK_AT_ONCE) as pool:
        versions = list(pool.map(cache.stat, urls))
        there = list(pool.map(tar_index.has_index, urls, versions))
    missing = [i for i, found in enumerate(there) if not found]
    quiet, kept = len(missing) < _SHOW_PROGRESS, dict[int, TarIndex]()
    for i in track(missing, description="indexing shards", disable=quiet, transient=True):
        built, is_kept = _built(urls[i], versions[i])
        if not is_kept:
            kept[i] = built
    for i, (url, version) in enumerate(zip(urls, versions, strict=True)):
        index = kept.pop(i) if i in kept else tar_index.find_index(url, version)
        yield index if index is not None else _built(url, version)[0]


def _built(url: str, version: cache.Stat) -> tuple[TarIndex, bool]:
    """A shard's new index, and whether it could be kept."""
    tar = cache.local_tar(url, version)
    try:
        index = tar_index.build(tar, version)
    except ValueError as error:
        raise ValueError(f"{cache.shown(url)}: {error}") from error
    with suppress(OSError):  # a full or read-only cache costs the time to index again
        index.save(cache.cached_name(url, version, ".index.npz"))
        return index, True
    return index, False
