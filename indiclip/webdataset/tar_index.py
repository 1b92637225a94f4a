"""The index of a shard: where its samples are, how large the images are, and what is wrong with it.

Built once by a pass over the tar's headers, the images' headers and the labels; kept as an `.npz` beside the shard or
in the cache folder, whose own checksums are of every byte. Nothing in it can run code. Those of many shards become one
in `indiclip.webdataset.index_set`.
"""

import json
import mmap
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from indiclip.datasets.coco_file import read_boxes_of_image
from indiclip.datasets.inventory import Inventory
from indiclip.datasets.tables import decode_text, parse_json
from indiclip.images import HEAD_BYTES, UnreadableSample, header
from indiclip.webdataset import cache
from indiclip.webdataset.cache import Stat
from indiclip.webdataset.sample_columns import (
    APART,
    BLOCK,
    KINDS,
    LONGEST_SIDE,
    MOST_BLOCKS,
    NARROW_LABELS,
    PARTS,
    SampleColumns,
    pack_keys,
)
from indiclip.webdataset.tar_members import IMAGES, TEXTS, TRUNCATED, key_and_extension, members, sample_at

DUPLICATED, NO_IMAGE = "duplicated", "without an image"
BAD_LABEL = -2  # there is one, but it is no whole number from 0
_VERSION = 5
_FINGERPRINT = re.compile(r"\d{1,18}:[0-9a-f]{8}")

_MOST_READ = 2**28  # bytes of a sample that are read at once
_MOST_UNUSED = 2**16  # bytes between its parts that are read with them, beside as many as the parts have

Parts = dict[str, tuple[int, int]]  # extension -> (offset, length)


class ShardInfo(NamedTuple):
    """What is known of a shard as a whole."""

    version: Stat  # that its index was made from
    fingerprint: str  # of the plain tar; see `cache.fingerprint`
    has_crc: bool  # whether `crcs` were computed
    end: int  # of its last sample, in bytes

    @property
    def tar_bytes(self) -> int:
        """Size of the plain tar."""
        return int(self.fingerprint.partition(":")[0])

    def to_json(self) -> list[Any]:
        """As `of_json` takes it."""
        return [*self.version, *self[1:]]

    @classmethod
    def of_json(cls, found: list[Any]) -> "ShardInfo":
        """Raises anything where it is not what `to_json` gave."""
        size, stamp, crc, fingerprint, has_crc, end = found
        assert _FINGERPRINT.fullmatch(fingerprint)
        return cls(Stat(int(size), str(stamp), str(crc)), fingerprint, bool(has_crc), int(end))


@dataclass
class TarIndex:
    """What is known of a shard.

    Attributes:
        columns: What is known of each sample.
        info: Of the shard as a whole.
        inventory: Its members, samples, and boxes where it has annotations; an example is a member's name.
        damaged: (key, reason) of what is lost: the rest of a truncated tar, a duplicated member.
    """

    columns: SampleColumns
    info: ShardInfo
    inventory: Inventory
    damaged: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.columns)

    def save(self, file: Path) -> None:
        """Write the file whole or not at all.

        Raises:
            OSError: The folder cannot be written to.
        """
        about = {
            "version": _VERSION,
            "shard": self.info.to_json(),
            "inventory": self.inventory.summary(),
            "damaged": self.damaged,
        }
        encoded = np.frombuffer(json.dumps(about).encode(), np.uint8)
        columns = {name: getattr(self.columns, name) for name in KINDS}
        with cache.new_file(file) as part, part.open("wb") as target:
            np.savez(target, about=encoded, **columns)

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
                if about["version"] != _VERSION:
                    return None
                columns = SampleColumns(**{name: arrays[name] for name in KINDS})
            columns.check()
            info = ShardInfo.of_json(about["shard"])
            if info.has_crc and len(columns.crcs) != len(columns):
                return None
            damaged = [(str(key), str(reason)) for key, reason in about["damaged"]]
            inventory = Inventory.of_summary(about["inventory"])
            inventory.verify()
            return cls(columns, info, inventory, damaged)
        except Exception:  # torn or odd content raises anything; the shard is indexed anew
            return None


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
    samples, begins, end = _samples(tar, inventory, damaged)
    if end > MOST_BLOCKS * BLOCK:
        raise ValueError(f"{end:,} bytes; expected at most {MOST_BLOCKS * BLOCK:,} in one shard")
    rows, apart = np.zeros((len(samples), 4), np.int64), np.zeros(len(samples), APART)
    is_apart = np.zeros(len(samples), bool)
    ends = [*begins[1:], end]
    if samples:
        with tar.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for place, (key, parts) in enumerate(samples.items()):
                entry = _entry(parts, data)
                rows[place] = _row(parts, data, entry, crc)
                if not _stands_together(data, begins[place], ends[place], key, parts):
                    is_apart[place], apart[place] = True, (place, *_places(parts))
                if "annotations" in entry:
                    _count_boxes(entry, key, inventory)
    labels = rows[:, 2].astype(NARROW_LABELS if rows[:, 2].max(initial=0) < 2**15 else KINDS["labels"])
    columns = SampleColumns(
        (np.array(begins, np.int64) // BLOCK).astype(np.uint32),
        np.where(rows[:, :2] > LONGEST_SIDE, 0, rows[:, :2]).astype(np.int16),
        labels if (labels != -1).any() else labels[:0],
        rows[:, 3].astype(np.uint32) if crc else np.empty(0, np.uint32),
        **pack_keys(list(samples)),
        apart=apart[is_apart],
    )
    return TarIndex(columns, ShardInfo(version, cache.fingerprint(tar), crc, end), inventory, damaged)


def find_index(url: str, version: cache.Stat) -> TarIndex | None:
    """The index of this version of a shard, where there is one beside it or in the cache folder."""
    for file in _candidates(url, version):
        index = TarIndex.load(file)
        if index is not None and _belongs(index, file, url, version):
            index.info = index.info._replace(version=version)
            return index
    return None


def has_index(url: str, version: cache.Stat) -> bool:
    """Whether there is a file that may be an index of this version of a shard."""
    return any(file.exists() for file in _candidates(url, version))


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
    if index.info.version == version:
        return True
    if index.info.version.size != version.size:
        return False
    if cache.is_remote(url):  # moved: its copy is looked at when it is made
        return True
    # Moved: the checksum is of three places only, so what was changed, or came to its place, later is indexed anew.
    return index.info.version.crc == version.crc and int(version.stamp) <= file.stat().st_ctime_ns


def _samples(
    tar: Path, inventory: Inventory, damaged: list[tuple[str, str]]
) -> tuple[dict[str, Parts], list[int], int]:
    """key -> its parts, for every sample of a tar that has an image; where the first header of each begins; where the
    last one ends.
    """
    samples: dict[str, Parts] = {}
    begins, end = dict[str, int](), 0
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
            begins.setdefault(key, member.offset)
            inventory.used["members"] += 1
            end = member.offset_data + member.size
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
    return samples, [begins[key] for key in samples], end


def _stands_together(data: mmap.mmap, begin: int, end: int, key: str, parts: Parts) -> bool:
    """Whether a sample's parts are found in the bytes up to the next one, without much beside them."""
    used = sum(length for _, length in parts.values())
    if end - begin > min(_MOST_READ, 2 * used + _MOST_UNUSED):
        return False
    try:
        return sample_at(data, begin, end) == (key, parts)
    except ValueError:
        return False


def _places(parts: Parts) -> Iterator[int]:
    """Offset and length of each of `PARTS`."""
    image = next(parts[name] for name in IMAGES if name in parts)
    for part in PARTS:
        yield from image if part == "image" else parts.get(part, (0, -1))


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


def _row(parts: Parts, data: mmap.mmap, entry: dict[str, Any], crc: bool) -> tuple[int, int, int, int]:
    """Height and width of a sample's image, label, CRC-32 of the image's bytes."""
    offset, length = next(parts[name] for name in IMAGES if name in parts)
    checksum = zlib.crc32(data[offset : offset + length]) if crc else 0
    return (*_size_hw(data, offset, offset + length), _label(parts, data, entry), checksum)


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
