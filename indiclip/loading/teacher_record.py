"""`teachers.json`, the record of a cache of teachers' embeddings: which sources, augmentation, teachers and parts.

Its `digest` covers all of it that training reads, and by the parts' checksums their whole content, see `teacher_parts`.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from indiclip.datasets.tables import load_json
from indiclip.names import is_whole, shorten

RECORD = "teachers.json"
PIXEL_LIBRARIES = ("torch", "torchvision", "simplejpeg", "pillow", "numpy")  # whose versions may round otherwise
_TEACHER = {
    "name": str,
    "weights": str,
    "crc32_of_weights": str,
    "crc32_of_token_ids": str,
    "logit_scale": float,
    "length": int,
    "preprocessing": dict,
}
# Keys -> what they hold; of a list with one item, what each of its items is.
_BEGUN = {
    "done": bool,
    "views": int,
    "augmentation": list,
    "dtype": str,
    "part_size": int,
    "batch_size": int,
    "sources": [{"source": str, "samples": int, "crc32_of_keys": int}],
    "teachers": [_TEACHER],
}
_PART = {"bytes": int, "checksum": str}
_SUMMARY = {
    "samples": int,
    "quarantined": int,
    "bytes_per_sample": float,
    "of_them_for_images": int,
    "largest_cosine_loss": float,
}
_DONE = {"summary": _SUMMARY, "versions": dict, "digest": str, "parts": [_PART]}
_WORDS = {bool: "true or false", str: "text", int: "a whole number", float: "a number", list: "a list", dict: "keys"}


class TeacherRecord(NamedTuple):
    """What a cache says of a teacher.

    Attributes:
        name: As the user called it.
        weights: Which they are, in words.
        crc32_of_weights: Of all of them.
        crc32_of_token_ids: Of its tokenizer.
        logit_scale: The factor on cosines that it was trained with.
        length: Of its embeddings.
        preprocessing: How it reads images, of plain types.
    """

    name: str
    weights: str
    crc32_of_weights: str
    crc32_of_token_ids: str
    logit_scale: float
    length: int
    preprocessing: dict[str, Any]


def read_record(folder: Path, compare: bool = True) -> dict[str, Any]:
    """The record of a cache that is whole, or of one that is begun: then `done` is False, and it has no digest.

    Args:
        folder: Of the cache.
        compare: False for what is written when the cache is begun alone.

    Raises:
        ValueError: Not a record, or changed since it was written; names the file and the key.
    """
    file = folder / RECORD
    record: dict[str, Any] = load_json(file)
    _check(record, _BEGUN, f"{file}: ")
    if not record["done"] or not compare:
        return record
    if "parts" not in record:
        raise ValueError(f"{file}: parts: found none, as of an earlier version of indiclip; expected their checksums")
    _check(record, _DONE, f"{file}: ")
    if (own := digest_of(record)) != record["digest"]:
        raise ValueError(f"{file}: digest: found {record['digest']!r}; expected {own!r}, that of the other entries")
    return record


def versions_of(libraries: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue  # none of them has to be there
    return found


def identity_of(record: Mapping[str, Any]) -> str:
    """Of what a cache is made from: sources, augmentation, teachers, views and types, whatever they are called."""
    teachers = [
        {name: value for name, value in teacher.items() if name not in ("name", "weights")}
        for teacher in record["teachers"]
    ]
    sources = [{name: source[name] for name in ("samples", "crc32_of_keys")} for source in record["sources"]]
    others = [record[name] for name in ("views", "augmentation", "dtype", "part_size")]
    return _hash_of([teachers, sources, others])


def digest_of(record: Mapping[str, Any]) -> str:
    """Of a cache that is whole: what it is made from, and all of its parts.

    Keys alone do not tell two downloads apart whose files are numbered alike; the parts have the sums of their pixels
    and their captions.
    """
    return _hash_of([identity_of(record), [part["checksum"] for part in record["parts"]]])


def _hash_of(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def _check(found: Any, expected: Any, file: str, key: str = "") -> None:
    """Raise ValueError where the entry of a record, or one below it, is not what `_BEGUN` and `_DONE` say."""
    kind = expected if isinstance(expected, type) else type(expected)
    fits = {int: is_whole(found) and found >= 0, float: isinstance(found, Real) and not isinstance(found, bool)}
    if not fits.get(kind, isinstance(found, kind)) or (isinstance(expected, list) and not found):
        where = f"{file}{key}: " if key else file
        raise ValueError(f"{where}found {shorten(found)}; expected {_WORDS[kind]}")
    if isinstance(expected, dict):
        for name, of_name in expected.items():
            below = f"{key}.{name}" if key else name
            if name not in found:
                raise ValueError(f"{file}{below}: found none; expected {_words(of_name)}")
            _check(found[name], of_name, file, below)
    elif isinstance(expected, list):
        for number, item in enumerate(found):
            _check(item, expected[0], file, f"{key}[{number}]")


def _words(expected: Any) -> str:
    return _WORDS[expected if isinstance(expected, type) else type(expected)]
