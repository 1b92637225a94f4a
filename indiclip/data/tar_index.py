"""The index of a shard: where its samples' parts are, how large the images are, and what is wrong with it.

Built once by a pass over the tar's headers, the images' headers and the labels; kept as an `.npz` beside the shard or
in the cache folder. Nothing in it can run code.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from rich.progress import track

from indiclip.data import cache
from indiclip.data.cache import Stat
from indiclip.data.images import EncodedImage, UnreadableSample
from indiclip.data.tables import Strings

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "json", "cls")
ROW = np.dtype(
    [(f"{part}{what}", kind) for part in ("image", "txt", "json") for what, kind in (("", "i8"), ("_bytes", "i4"))]
    + [("label", "i4"), ("height", "i4"), ("width", "i4"), ("crc", "u4")]
)
BAD_LABEL = -2  # there is one, but it is no whole number from 0
_VERSION = 1
_MEMBER = re.compile(r"^((?:.*/)?[^./]+)\.([^/]+)$")  # webdataset's rule: the key ends at the file name's first dot
_HEAD = 1 << 18  # bytes of an image that are looked at for its size
MAX_BYTES = {**dict.fromkeys(IMAGES, 2**30), **dict.fromkeys(TEXTS, 2**24)}  # of a member; more is no sample

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
        left_out: How many members are left out, by extension or reason.
        damaged: (key, reason) of what is lost: the rest of a truncated tar, a member that is there twice.
        version: Of the shard that it was made from.
        fingerprint: Of the plain tar; see `fingerprint`.
        has_crc: Whether `crc` was computed.
    """

    rows: np.ndarray
    keys: Strings
    left_out: Counter[str]
    damaged: list[tuple[str, str]]
    version: Stat
    fingerprint: str
    has_crc: bool

    def save(self, file: Path) -> None:
        """Write the file whole or not at all.

        Raises:
            OSError: The folder cannot be written to.
        """
        about = {
            "version": _VERSION,
            "size": self.version.size,
            "stamp": self.version.stamp,
            "fingerprint": self.fingerprint,
            "has_crc": self.has_crc,
            "left_out": self.left_out,
            "damaged": self.damaged,
        }
        buffers = self.keys.buffers()
        descriptor, part = tempfile.mkstemp(dir=file.parent, suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as target:
                encoded = np.frombuffer(json.dumps(about).encode(), np.uint8)
                np.savez(target, about=encoded, rows=self.rows, key_bytes=buffers[0], key_ends=buffers[1])
            Path(part).chmod(0o644)
            Path(part).replace(file)
        finally:
            Path(part).unlink(missing_ok=True)

    @classmethod
    def load(cls, file: Path) -> TarIndex | None:
        """Read an index; None where there is none that can be used."""
        try:
            with np.load(file, allow_pickle=False) as arrays:
                about = json.loads(arrays["about"].tobytes())
                rows, keys = arrays["rows"], Strings.of_buffers(arrays["key_bytes"], arrays["key_ends"])
        except (
            OSError,
            ValueError,
            KeyError,
            EOFError,
            zipfile.BadZipFile,
            zlib.error,
        ):  # missing or torn
            return None
        if about.get("version") != _VERSION or rows.dtype != ROW or len(rows) != len(keys):
            return None
        damaged = [(str(key), str(reason)) for key, reason in about["damaged"]]
        version = Stat(int(about["size"]), str(about["stamp"]))
        return cls(rows, keys, Counter(about["left_out"]), damaged, version, about["fingerprint"], about["has_crc"])


def build(tar: Path, version: Stat, crc: bool = False) -> TarIndex:
    """Index a plain tar.

    Args:
        tar: The file.
        version: Of the shard that it is, or is a copy of.
        crc: Also compute the CRC-32 of every image, which reads the whole file.

    Raises:
        ValueError: No tar.
    """
    left_out: Counter[str] = Counter()
    damaged: list[tuple[str, str]] = []
    samples = _samples(tar, left_out, damaged)
    rows = np.zeros(len(samples), ROW)
    if samples:
        with tar.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for row, parts in zip(rows, samples.values(), strict=True):
                _fill(row, parts, data, crc)
    return TarIndex(rows, Strings(samples), left_out, damaged, version, fingerprint(tar), crc)


def fingerprint(tar: Path) -> str:
    """CRC-32 of 64 KiB at the file's start, middle and end: tells whether an index may belong to it."""
    size, found = tar.stat().st_size, 0
    with tar.open("rb") as file:
        for place in (0, size // 2, max(0, size - 2**16)):
            found = zlib.crc32(os.pread(file.fileno(), 2**16, place), found)
    return f"{size}:{found:08x}"


def indexes(urls: list[str], crc: bool = False) -> list[TarIndex]:
    """Each shard's index: the one beside it, or in the cache folder, or one that is built now and kept there."""
    with ThreadPoolExecutor(_ASK_AT_ONCE) as pool:
        versions = list(pool.map(cache.stat, urls)) if any(map(cache.is_remote, urls)) else list(map(cache.stat, urls))
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
    for file in (*_beside(url), cache.cached_name(url, version, ".index.npz")):
        index = TarIndex.load(file)
        if index is not None and _belongs(index, url, version):
            index.version = version
            return index
    return None


def index_path(url: str) -> Path:
    """Where a shard's index lies beside it."""
    return Path(f"{url}.index.npz")


def _beside(url: str) -> list[Path]:
    if not cache.is_remote(url):
        return [index_path(url)]
    copy = cache.remote_file(f"{url}.index.npz")
    return [copy] if copy else []


def _belongs(index: TarIndex, url: str, version: cache.Stat) -> bool:
    if index.version == version:
        return True
    if index.version.size != version.size:
        return False
    # Moved: a plain tar shows at once whether it is the same; of another the copy is looked at when it is made.
    return cache.is_remote(url) or not url.endswith(".tar") or fingerprint(Path(url)) == index.fingerprint


def image_size_hw(head: bytes) -> tuple[int, int]:
    """(height, width) as stored, from a file's first bytes; (0, 0) where they are no readable image."""
    try:
        return EncodedImage(head, "").size_hw
    except UnreadableSample:
        return 0, 0


def _samples(tar: Path, left_out: Counter[str], damaged: list[tuple[str, str]]) -> dict[str, Parts]:
    """key -> its parts, for every sample of a tar that has an image."""
    samples: dict[str, Parts] = {}
    for name, member in members(tar, damaged):
        key, extension = key_and_extension(name, member)
        parts = samples.get(key, {})
        if extension not in (*IMAGES, *TEXTS):
            left_out[extension] += 1
        elif extension in parts or (extension in IMAGES and any(other in parts for other in IMAGES)):
            left_out["(duplicate)"] += 1
            damaged.append((key, f"{name} is there twice, or beside another image; the first counts"))
        else:
            samples.setdefault(key, parts)[extension] = (member.offset_data, member.size)
    for key in [key for key, parts in samples.items() if not any(name in parts for name in IMAGES)]:
        del samples[key]
        left_out["(no image)"] += 1
    return samples


def key_and_extension(name: str, member: tarfile.TarInfo) -> tuple[str, str]:
    """A member's key and lower-case extension; a reason such as `(link)` in its place where it is not to be read."""
    key, extension = match.groups() if (match := _MEMBER.match(name)) else ("", "(unnamed)")
    extension = extension.lower()
    if not member.isreg() or member.issparse():
        extension = "(link)"
    elif name.startswith("/") or ".." in PurePosixPath(name).parts:
        extension = "(outside)"
    elif member.size > MAX_BYTES.get(extension, member.size):
        extension = "(too large)"
    return key, extension


def members(tar: Path, damaged: list[tuple[str, str]]) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The whole members of a tar, and their names without `./`. What is broken is appended to `damaged`.

    Raises:
        ValueError: No tar.
    """
    size = tar.stat().st_size
    count, after = 0, "the start"
    try:
        # Undecodable names stay apart and can be stored.
        with tarfile.open(tar, "r:", errors="backslashreplace") as archive:
            for member in archive:
                if member.offset_data + member.size > size:
                    damaged.append((member.name, f"truncated tar: {size:,} bytes end inside of this member"))
                    return
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps all that it has seen
                count, after = count + 1, member.name
                if not member.isdir():
                    yield member.name.removeprefix("./"), member
            # tarfile takes a damaged header for the end of the archive.
            with tar.open("rb") as file:
                file.seek(archive.offset)
                block = file.read(512)
            if not block:
                raise tarfile.ReadError("no end mark")
            if block.strip(b"\0") or len(block) < 512:
                raise tarfile.ReadError(f"no valid header at byte {archive.offset:,}")
    except (tarfile.TarError, EOFError) as error:
        if not count:
            raise ValueError(f"{tar}: no tar: {error}") from error
        damaged.append((after, f"broken tar: {error}; what may have followed this member is lost"))


def _fill(row: Any, parts: Parts, data: mmap.mmap, crc: bool) -> None:
    places = {name: parts.get(name, (0, -1)) for name in ("txt", "json")}
    places["image"] = offset, length = next(parts[name] for name in IMAGES if name in parts)
    for name, place in places.items():
        row[name], row[f"{name}_bytes"] = place
    row["height"], row["width"] = image_size_hw(data[offset : offset + min(length, _HEAD)])
    row["label"] = _label(parts, data)
    if crc:
        row["crc"] = zlib.crc32(data[offset : offset + length])


def _label(parts: Parts, data: mmap.mmap) -> int:
    name = "cls" if "cls" in parts else "json"
    if name not in parts:
        return -1
    offset, length = parts[name]
    text = data[offset : offset + length]
    if name == "cls":
        return int(text) if text.strip().isdigit() and len(text) < 10 else BAD_LABEL
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return -1  # the sample is unreadable, which its reader says
    found = entry.get("label", entry.get("cls")) if isinstance(entry, dict) else None
    if isinstance(found, str) and found.strip().isdecimal():
        found = int(found)
    if found is None:
        return -1
    return found if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 2**31 else BAD_LABEL
