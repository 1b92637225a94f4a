"""What `check` and `stats` share: shards cut into ranges of samples, so that many processes can read one shard."""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from indiclip.webdataset.shards import Shards

_SAMPLES = 256  # of a range: a second's work


class Range(NamedTuple):
    """Samples `first` to `last - 1` of a shard."""

    url: str
    first: int
    last: int


def ranges(counts: Iterable[tuple[str, int]]) -> list[Range]:
    """All samples of each shard, given with their number."""
    return [
        Range(url, first, min(first + _SAMPLES, count)) for url, count in counts for first in range(0, count, _SAMPLES)
    ]


@lru_cache(maxsize=32)
def opened(url: str) -> Shards:
    """One shard; those used last stay open."""
    return Shards(url)
