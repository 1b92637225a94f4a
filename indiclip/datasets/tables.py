"""What the datasets share: compact string columns, checks of file lists and boxes, stable hashes."""

import codecs
import hashlib
import io
import json
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from indiclip.names import did_you_mean, nearest_beside, shorten

_VISIBLE = re.compile(r"[^\s\u200b-\u200f\u2060\ufeff]")
_LEADS_OUT = re.compile(r"/|\.\.(/|$)")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and half of a surrogate pair, which JSON can hold


class Strings:
    """A read-only column of strings in one buffer.

    Millions of Python strings cost 60 bytes each, and every worker process that touches one copies its page; a buffer
    stays shared.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode(errors="surrogatepass") for text in texts]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._ends: np.ndarray = ends.astype(np.uint32) if ends[-1] < 2**32 else ends

    @classmethod
    def of_buffers(cls, data: np.ndarray, ends: np.ndarray) -> "Strings":
        """From what `buffers` gave."""
        column = cls([])
        column._bytes, column._ends = data, ends
        return column

    def buffers(self) -> tuple[np.ndarray, np.ndarray]:
        """All texts as UTF-8, and where each ends, beginning with 0."""
        return self._bytes, self._ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        data = self._bytes[self._ends[index] : self._ends[index + 1]].tobytes()
        return data.decode(errors="surrogatepass")


def stable_hash(text: str) -> int:
    """64 bits that are the same on every machine and in every run (Python's own `hash` is not)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def decode_text(data: bytes, where: str) -> str:
    """The text of a user's file: UTF-8, or UTF-16 with a byte order mark; the mark is no part of it.

    Raises:
        ValueError: Anything else; begins with `where` and names the line.
    """
    is_utf16 = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line, found = data.count(b"\n", 0, error.start) + 1, f"the byte 0x{data[error.start]:02x}"
        expected = "UTF-16 as its first bytes say" if is_utf16 else "UTF-8, or UTF-16 with a byte order mark"
        raise ValueError(f"{where}: line {line}: found {found}; expected {expected}") from error
    if text and text.count("\0") * 2 >= len(text):
        raise ValueError(f"{where}: line 1: found a NUL; expected UTF-8, or UTF-16 with a byte order mark")
    return text


def text_lines(text: str) -> list[str]:
    """The lines of a text, which end with CR, LF or both, and nowhere else."""
    return [line.removesuffix("\n") for line in io.StringIO(text, newline=None)]


def is_text(found: Any) -> bool:
    """Whether a value is a text that can be read, with something visible in it."""
    return isinstance(found, str) and bool(_VISIBLE.search(found)) and not _NO_TEXT.search(found)


def existing(path: str) -> Path:
    """A path given by the user.

    Raises:
        FileNotFoundError: It is not there; names the nearest entry of its folder.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise FileNotFoundError(f"{found}: no such file or folder{nearest_beside(found)}")
    return found


def check_files(folder: Path, names: Sequence[str], where: str) -> None:
    """Check that every image that an annotation file names is in its folder.

    Raises:
        ValueError: A name that leads out of the folder.
        FileNotFoundError: Images are missing; says how many and names the first.
    """
    # One listing, not one question per file: the folder may be on a network.
    there = {entry.name for entry in os.scandir(folder) if not entry.is_dir()}
    missing = [name for name in names if name not in there and why_missing(folder, name)]
    for name in filter(_LEADS_OUT.match, missing):
        raise ValueError(f"{where}: the image {why_missing(folder, name)}")
    if missing:
        near = _other_spelling(folder, missing[0], there) or did_you_mean(missing[0], there)
        raise FileNotFoundError(
            f"{where}: {len(missing)} of {len(names)} images are not in {folder}, first {shorten(missing[0])}{near}"
        )


def _other_spelling(folder: Path, name: str, there: Iterable[str]) -> str:
    """A hint where a file's name is written as on Windows, or as on macOS, with accents by themselves."""
    posix = name.replace("\\", "/")
    if posix != name and not why_missing(folder, posix):
        return f"; found {posix!r}: write / for a backslash"
    letters = unicodedata.normalize("NFC", name)
    if any(unicodedata.normalize("NFC", other) == letters for other in there):
        return (
            "; found the same letters in another Unicode normal form (NFC or NFD): write them as the file's name does"
        )
    return ""


def name_in(folder: Path, name: str) -> str:
    """The one spelling of a file's name, by which a picture is known: relative to the folder where it lies in it, else
    a path that begins with / or with `..`.

    Names are compared, not what links point to: a link in the folder is its owner's.
    """
    name = posixpath.normpath(name) if name else ""
    if name.startswith(("/", "..")):
        for base in (folder.absolute(), folder.resolve()):
            relative = posixpath.relpath(base / name, base)
            if not _LEADS_OUT.match(relative):
                return relative
    return name


def why_missing(folder: Path, name: str) -> str:
    """Why a file cannot be read in a folder, of its name as `name_in` gave it; "" where it is there."""
    if _LEADS_OUT.match(name):
        return f"{shorten(name, 200)} lies outside the folder {folder}"
    is_there = os.path.isfile(folder / name)  # noqa: PTH113 (Path.is_file raises for a long name)
    return "" if is_there else f"{folder / name}: no such file"


def xywh_to_xyxy(
    boxes_xywh: np.ndarray, sizes_hw: np.ndarray, where: Sequence[str], tolerance: float = 1.0
) -> np.ndarray:
    """Boxes of an annotation file -> boxes inside their images.

    Args:
        boxes_xywh: (M, 4) left, top, width, height in pixels.
        sizes_hw: (M, 2) height and width of each box's image.
        where: What to call each box in errors.
        tolerance: Pixels by which a box may lie outside; so much is clipped.

    Returns:
        float32 (M, 4): (x1, y1, x2, y2).

    Raises:
        ValueError: A number that is not finite, a negative size, a box outside its image.
    """
    boxes = np.asarray(boxes_xywh, dtype=np.float64).reshape(-1, 4)
    edges = sizes_hw[:, ::-1].astype(np.float64)
    with np.errstate(over="ignore"):  # the sum is infinite then, and lies outside
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    for wrong, what in (
        (~np.isfinite(boxes).all(1), "is not finite"),
        ((boxes[:, 2:] < 0).any(1), "has a negative size"),
        ((corners[:, :2] < -tolerance).any(1) | (corners[:, 2:] > edges + tolerance).any(1), "lies outside its image"),
    ):
        if wrong.any():
            i = int(wrong.argmax())
            raise ValueError(
                f"{where[i]}: the box [x, y, width, height] = {boxes[i].tolist()} {what} "
                f"({int(edges[i, 0])}x{int(edges[i, 1])} pixels)"
            )
    clipped = np.clip(corners, 0, np.concatenate([edges, edges], axis=1))
    return np.asarray(clipped, dtype=np.float32)


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number that NumPy can hold."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: Malformed, or an object has a key twice, of which JSON's readers take the last.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the key {shorten(repeated)} is duplicated in an object; expected it once")
    return found


def load_json(path: Path, keys: Sequence[str] = ()) -> Any:
    """A JSON file, with the keys that it must have.

    Raises:
        ValueError: Malformed, or a key is missing.
    """
    text = decode_text(path.read_bytes(), str(path))
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            found = shorten(sorted(content)) if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path}: no list {key!r}; found {found}, expected {list(keys)}")
    return content


def column(entries: Sequence[Any], name: str, where: str) -> list[Any]:
    """One value of every entry of a JSON list.

    Raises:
        ValueError: An entry lacks it; names the entry by its id, else by its place in the list.
    """
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict) or name not in entry:
            found = list(entry) if isinstance(entry, dict) else []
            label = shorten(entry["id"]) if isinstance(entry, dict) and "id" in entry else f"number {place + 1}"
            raise ValueError(f"{where} {label} has no {name!r}{did_you_mean(name, found)}")
    return [entry[name] for entry in entries]
