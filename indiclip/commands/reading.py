"""What `check` and `stats` share: shards cut into ranges of samples, so that many processes can read one shard."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from indiclip.webdataset.shards import Shards

_SAMPLES = 256  # of a range: a second's work


class Range(NamedTuple):
    """Samples `first` to `last - 1` of a shard."""

    url: str
    first: int
    last: int


def ranges(url: str, count: int) -> list[Range]:
    """All samples of a shard."""
    return [Range(url, first, min(first + _SAMPLES, count)) for first in range(0, count, _SAMPLES)]


@lru_cache(maxsize=32)
def opened(url: str) -> Shards:
    """One shard; those used last stay open."""
    return Shards(url)


def all_captions(parts: dict[str, bytes], entry: dict[str, Any], caption: str | None) -> list[tuple[str, str]]:
    """Every caption of a sample: (the language that the sample declares or nothing, text).

    Args:
        parts: The sample's members.
        entry: Its JSON: `language` or `lang` of the caption; `captions` as a list, or by language.
        caption: As `read_caption` gives it.
    """
    declared = entry.get("language") or entry.get("lang")
    language = declared if isinstance(declared, str) else ""
    found = [(language, caption)] if caption is not None else []
    more = entry.get("captions")
    if isinstance(more, dict):
        found += [(str(name), text) for name, text in more.items()]
    elif isinstance(more, list):
        found += [(language, text) for text in more]
    return [(name, text.strip()) for name, text in found if isinstance(text, str) and text.strip()]
