"""The index of a shard: where its samples' parts are, how large the images are, and what is wrong with it.

Built once by a pass over the tar's headers, the images' headers and the labels; kept as an `.npz` beside the shard or
in the cache folder. Nothing in it can run code.
"""

import json
import mmap
import re
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from indiclip.datasets.coco_file import read_boxes_of_image
from indiclip.datasets.inventory import Inventory
from indiclip.datasets.tables import Strings, decode_text, parse_json
from indiclip.images import HEAD_BYTES, UnreadableSample, header
from indiclip.webdataset import cache
from indiclip.webdataset.cache import Stat
from indiclip.webdataset.tar_members import IMAGES, TEXTS, TRUNCATED, key_and_extension, members

ROW = np.dtype(
    [(f"{part}{what}", kind) for part in ("image", "txt", "json") for what, kind in (("", "i8"), ("_bytes", "i4"))]
    + [("label", "i4"), ("height", "i4"), ("width", "i4"), ("crc", "u4")]
)
DUPLICATED, NO_IMAGE = "duplicated", "without an image"
BAD_LABEL = -2  # there is one, but it is no whole number from 0
_VERSION = 4
_FINGERPRINT = re.compile(r"\d{1,18}:[0-9a-f]{8}")

_SHOW_PROGRESS = 8  # shards to index; fewer are done before one looks
_ASK_AT_ONCE = 16  # servers' answers waited for together

Parts = dict[str, tuple[int, int]]  # extension -> (offset, length)


@dataclass
class TarIndex:
    """What is known of a shard.

    Attributes:
        rows: One per sample, `ROW`: offset and length of each part (length -1: none), label (-1: none, `BAD_LABEL`),
            height and width of the image as stored (0: its header cannot be read), CRC-32 of the image's bytes.
        keys: The samples' keys, in the order of their first members.
        inventory: Its members, samples, and boxes where it has annotations; an example is a member's name.
        damaged: (key, reason) of what is lost: the rest of a truncated tar, a duplicated member.
        version: Of the shard that it was made from.
        fingerprint: Of the plain tar; see `cache.fingerprint`.
        has_crc: Whether `crc` was computed.
    """

    rows: np.ndarray
    keys: Strings
    inventory: Inventory
    damaged: list[tuple[str, str]]
    version: Stat
    fingerprint: str
    has_crc: bool

    @property
    def tar_bytes(self) -> int:
        """Size of the plain tar."""
        return int(self.fingerprint.partition(":")[0])

    def save(self, file: Path) -> None:
        """Write the file whole or not at all.

        Raises:
            OSError: The folder cannot be written to.
        """
        about = {
            "version": _VERSION,
            "shard": self.version,
            "fingerprint": self.fingerprint,
            "has_crc": self.has_crc,
            "inventory": self.inventory.summary(),
            "damaged": self.damaged,
        }
        buffers = self.keys.buffers()
        encoded = np.frombuffer(json.dumps(about).encode(), np.uint8)
        with cache.new_file(file) as part, part.open("wb") as target:
            np.savez(target, about=encoded, rows=self.rows, key_bytes=buffers[0], key_ends=buffers[1])

    @classmethod
    def load(cls, file: Path) -> "TarIndex | None":
        """Read an index; None where there is none that can be used."""
        if not file.exists():
            return None
        try:
            with np.load(file, allow_pickle=False) as arrays:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in arrays.zip.infolist()):
                    return None  # it could unpack to any size
                about = json.loads(arrays["about"].tobytes())
                rows, buffers = arrays["rows"], (arrays["key_bytes"], arrays["key_ends"])
            known = about["version"] == _VERSION and _FINGERPRINT.fullmatch(about["fingerprint"])
            if not known or not _is_sound(rows, *buffers):
                return None
            damaged = [(str(key), str(reason)) for key, reason in about["damaged"]]
            inventory = Inventory.of_summary(about["inventory"])
            inventory.verify()
            size, stamp, crc = about["shard"]
            version = Stat(int(size), str(stamp), str(crc))
            keys = Strings.of_buffers(*buffers)
            return cls(rows, keys, inventory, damaged, version, about["fingerprint"], bool(about["has_crc"]))
        except Exception:  # torn or odd content raises anything; the shard is indexed anew
            return None


def _is_sound(rows: np.ndarray, key_bytes: np.ndarray, key_ends: np.ndarray) -> bool:
    """Whether arrays of a file are what `TarIndex.save` writes."""
    kinds = rows.dtype == ROW and key_bytes.dtype == np.uint8 and key_ends.dtype in (np.uint32, np.int64)
    if not kinds or key_bytes.ndim != 1 or rows.ndim != 1 or key_ends.shape != (len(rows) + 1,):
        return False
    in_order = (key_ends[1:] >= key_ends[:-1]).all()
    return bool(in_order and key_ends[0] == 0 and key_ends[-1] == len(key_bytes))


def build(tar: Path, version: Stat, crc: bool = False) -> TarIndex:
    """Index a plain tar.

    Args:
        tar: The file.
        version: Of the shard that it is, or is a copy of.
        crc: Also compute the CRC-32 of every image, which reads the whole file.

    Raises:
        ValueError: No tar.
    """
    inventory, damaged = Inventory(), list[tuple[str, str]]()
    samples = _samples(tar, inventory, damaged)
    rows = np.zeros(len(samples), ROW)
    if samples:
        with tar.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for place, (key, parts) in enumerate(samples.items()):
                entry = _entry(parts, data)
                rows[place] = _row(parts, data, entry, crc)
                if "annotations" in entry:
                    _count_boxes(entry, key, inventory)
    return TarIndex(rows, Strings(samples), inventory, damaged, version, cache.fingerprint(tar), crc)


def indexes(urls: list[str], crc: bool = False) -> list[TarIndex]:
    """Each shard's index: the one beside it, or in the cache folder, or one that is built now and kept there."""
    with ThreadPoolExecutor(_ASK_AT_ONCE) as pool:
        versions = list(pool.map(cache.stat, urls))
        found = dict(enumerate(map(find_index, urls, versions)))
    missing = [i for i, index in found.items() if index is None]
    quiet = len(missing) < _SHOW_PROGRESS
    for i in track(missing, description="indexing shards", disable=quiet, transient=True):
        url, version = urls[i], versions[i]
        index = build(cache.local_tar(url, version), version, crc)
        with suppress(OSError):  # a full or read-only cache costs the time to index again
            index.save(cache.cached_name(url, version, ".index.npz"))
        found[i] = index
    return [index for index in found.values() if index is not None]


def find_index(url: str, version: cache.Stat) -> TarIndex | None:
    """The index of this version of a shard, where there is one beside it or in the cache folder."""
    for file in _candidates(url, version):
        index = TarIndex.load(file)
        if index is not None and _belongs(index, file, url, version):
            index.version = version
            return index
    return None


def _candidates(url: str, version: cache.Stat) -> Iterator[Path]:
    """Where its index may lie. The cache comes last, so that none is needed where an index lies beside the shard."""
    if not cache.is_remote(url):
        yield index_path(url)
    elif "?" not in url and (copy := cache.remote_file(f"{url}.index.npz")):  # a signature is of the shard's URL only
        yield copy
    with suppress(OSError):  # a cache that cannot be made holds none
        if not (cached := cache.cached_name(url, version, ".index.npz")).is_symlink():
            yield cached


def index_path(url: str) -> Path:
    """Where a shard's index lies beside it."""
    return Path(f"{url}.index.npz")


def _belongs(index: TarIndex, file: Path, url: str, version: cache.Stat) -> bool:
    if index.version == version:
        return True
    if index.version.size != version.size:
        return False
    if cache.is_remote(url):  # moved: its copy is looked at when it is made
        return True
    # Moved: the checksum is of three places only, so what was changed, or came to its place, later is indexed anew.
    return index.version.crc == version.crc and Path(url).stat().st_ctime_ns <= file.stat().st_ctime_ns


def _samples(tar: Path, inventory: Inventory, damaged: list[tuple[str, str]]) -> dict[str, Parts]:
    """key -> its parts, for every sample of a tar that has an image."""
    samples: dict[str, Parts] = {}
    for name, member in members(tar, damaged):
        inventory.present["members"] += 1
        key, extension = key_and_extension(name, member)
        parts = samples.get(key, {})
        if extension not in (*IMAGES, *TEXTS):
            inventory.leave_out("members", _reason(extension), name)
        elif extension in parts or (extension in IMAGES and any(other in parts for other in IMAGES)):
            inventory.leave_out("members", DUPLICATED, name)
            damaged.append((key, f"{name} is {DUPLICATED}, or beside another image; the first counts"))
        else:
            samples.setdefault(key, parts)[extension] = (member.offset_data, member.size)
            inventory.used["members"] += 1
    for name in [name for name, reason in damaged if reason.startswith(TRUNCATED)]:
        inventory.present["members"] += 1
        inventory.leave_out("members", "cut off by the end of the file", name)
    inventory.present["samples"] = len(samples)
    for key in [key for key, parts in samples.items() if not any(name in parts for name in IMAGES)]:
        parts = samples.pop(key)
        inventory.used["members"] -= len(parts)
        inventory.leave_out("members", NO_IMAGE, f"{key}.{next(iter(parts))}", len(parts))
        inventory.leave_out("samples", NO_IMAGE, key)
    inventory.used["samples"] = len(samples)
    return samples


def _reason(extension: str) -> str:
    """Why a member is left out: what `key_and_extension` says, or its kind; of `frame.0001.png` that is `.*.png`."""
    before, dot, last = extension.rpartition(".")
    return extension if " " in extension else f".{'*' * bool(before)}{dot}{last[:12]}"


def _count_boxes(entry: dict[str, Any], key: str, inventory: Inventory) -> None:
    """Count the boxes of an image, and those that `BoxShards` drops."""
    found = Inventory()
    try:
        boxes, _ = read_boxes_of_image(entry, f"{key}: annotation", found)
        found.used["boxes"] = len(boxes.kept)
    except ValueError:
        found, annotations = Inventory(), entry["annotations"]
        if isinstance(annotations, list):
            found.present["boxes"] = len(annotations)
            found.leave_out("boxes", "of an unreadable image", key, len(annotations))
    inventory += found


def _entry(parts: Parts, data: mmap.mmap) -> dict[str, Any]:
    """The object in a sample's `.json`; empty where there is none, or it is broken, which its reader says."""
    offset, length = parts.get("json", (0, 0))
    try:
        entry = parse_json(decode_text(data[offset : offset + length], ""))
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _row(parts: Parts, data: mmap.mmap, entry: dict[str, Any], crc: bool) -> tuple[int, ...]:
    """A sample's `ROW`."""
    offset, length = next(parts[name] for name in IMAGES if name in parts)
    texts = (parts.get(name, (0, -1)) for name in ("txt", "json"))
    size_hw = _size_hw(data, offset, offset + length)
    checksum = zlib.crc32(data[offset : offset + length]) if crc else 0
    return (offset, length, *chain(*texts), _label(parts, data, entry), *size_hw, checksum)


def _size_hw(data: mmap.mmap, begin: int, end: int) -> tuple[int, int]:
    """(height, width) as stored; (0, 0) where the bytes are no readable image."""
    try:
        return header(data[begin : min(begin + HEAD_BYTES, end)], lambda: data[begin:end]).size_hw
    except UnreadableSample:
        return 0, 0


def _label(parts: Parts, data: mmap.mmap, entry: dict[str, Any]) -> int:
    if "cls" in parts:
        offset, length = parts["cls"]
        text = data[offset : offset + length]
        return int(text) if text.strip().isdigit() and len(text) < 10 else BAD_LABEL
    return label_of(entry)


def label_of(entry: dict[str, Any]) -> int:
    """The class that a sample's `.json` says; -1 where it says none, `BAD_LABEL` where it is no whole number from 0."""
    found = entry.get("label", entry.get("cls"))
    if found is None:
        return -1
    return found if type(found) is int and 0 <= found < 2**31 else BAD_LABEL
