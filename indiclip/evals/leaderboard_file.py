"""The rows of `leaderboard.jsonl`, of which any may be a stranger's or damaged."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from indiclip.evals.suites import INDIA
from indiclip.names import is_whole, reason_of, shorten

Row = dict[str, Any]


def read(file: Path) -> tuple[list[Row], list[str]]:
    """The newest row of every run; and why lines are no rows, which stay in the file and are in no table."""
    newest: dict[str, Row] = {}
    skipped = []
    lines = file.read_text(errors="replace").split("\n") if file.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                row = _checked(json.loads(line))
                newest.pop(row["run"], None)  # so that it stands where it was added last
                newest[row["run"]] = row
        except (ValueError, RecursionError) as error:  # half a line, as a kill leaves it, or a stranger's
            skipped.append(f"{file}: line {number} is skipped: {reason_of(error)}")
    return list(newest.values()), skipped


def _checked(found: Any) -> Row:
    """A row with all keys. Raises ValueError for a foreign one, naming the key and what was found."""
    if not isinstance(found, dict):
        raise ValueError(f"found {shorten(found)}; expected an object")
    row: Row = _ADDED | found
    if "chances" not in found and isinstance(found.get("chance"), dict):  # of an earlier version, for all languages
        row["chances"] = {card: {"en": value} for card, value in found["chance"].items()}
    for is_right, expected, keys in _KINDS:
        for key in keys:
            if key not in row:
                raise ValueError(f"has no {key!r}, so it is of no benchmark run")
            if not is_right(row[key]):
                raise ValueError(f"{key}: found {shorten(row[key])}; expected {expected}")
    return row


def _is_number(value: Any) -> bool:
    is_finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value is None or is_finite


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _numbers(count: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and len(value) == count and all(map(_is_number, value))


def _by_name(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(is_right, value.values()))


def _some(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) > 0 and all(map(is_right, value))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"[\w-]{1,64}", value))  # pages are called by it


def _is_count(value: Any) -> bool:
    return is_whole(value) and value >= 0


# What the values of some keys must be.
_KINDS: list[tuple[Callable[[Any], bool], str, tuple[str, ...]]] = [
    (_is_name, "letters and digits", ("run", "suite")),
    (_is_text, "text", ("model", "date", "data", "precision", "report", "folder")),
    (_is_count, "a whole number", ("covered", "of")),
    (_some(is_whole), "whole numbers", ("lengths",)),
    (_some(_is_text), "texts", ("views",)),
    (_by_name(_is_number), "a number for each language", ("mean",)),
    (_by_name(_numbers(2)), "two numbers for each language", ("mean_interval",)),
    (_by_name(_numbers(3)), "three numbers for each language", ("mean_gap",)),
    (_by_name(_is_text), "text for each language", ("asked",)),
    (_by_name(_is_text), "text for each card", ("titles", "metrics")),
    (_by_name(_by_name(_is_number)), "a number for each card and language", ("cards", "chances")),
    (_by_name(_by_name(_numbers(2))), "two numbers for each card and language", ("intervals",)),
    (_by_name(_by_name(_numbers(3))), "three numbers for each card and language", ("gaps",)),
]
# What rows of earlier versions do not have.
_TABLES = ("mean_interval", "mean_gap", "intervals", "gaps", "titles", "metrics", "chances", "asked")
_ADDED: Row = {"suite": INDIA, "report": "", "folder": "", "precision": "fp32"} | {key: {} for key in _TABLES}
