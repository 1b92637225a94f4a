"""Copies of remote shards are made while the samples before them are read."""

from __future__ import annotations

import threading
import warnings

from indiclip.datasets.base import SampleDataset


class Prefetch:
    """Fetches shards in a thread, a window ahead.

    Each loader worker has one and begins at another shard; the cache's locks keep two from fetching the same.
    """

    def __init__(self) -> None:
        self._asked: dict[tuple[str, int], list[int]] = {}

    def __call__(self, task: str, source: int, dataset: SampleDataset, shards: list[int], worker: int) -> None:
        """Begin to fetch, unless it was asked for before."""
        if self._asked.get((task, source)) == shards:
            return
        self._asked[task, source] = shards
        first = worker % len(shards)
        arguments = (dataset, shards[first:] + shards[:first])
        threading.Thread(target=_fetch, args=arguments, name="prefetch", daemon=True).start()


def _fetch(dataset: SampleDataset, shards: list[int]) -> None:
    try:
        dataset.prefetch(shards)
    except (OSError, ValueError) as error:  # who reads the shard meets it again; until then there is time to mend it
        warnings.warn(f"data: {error}", stacklevel=1)
