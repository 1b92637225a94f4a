"""Which samples make up step k: a pure function of (seed, task, k), so that nothing has to be saved to resume.

A batch takes the same number of samples from each source of its task in every step (by their weights), and each
source is gone through in epochs of its own, shuffled anew each time.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Place(NamedTuple):
    """Where a sample of a step comes from."""

    source: int  # which source of the task
    index: int  # type: ignore[assignment]  # which sample of the source (hides tuple.index)
    position: int  # how many samples of the source came before it in the whole run


class Plan:
    """The samples of every step of one task.

    Args:
        task: Name of the task; two tasks with the same data see it in different orders.
        sizes: Number of samples of each source.
        weights: Share of each source in a batch, any positive scale.
        batch_size: Samples per step over all ranks.
        seed: Seed of the run.
        shuffle: False gives each source in its own order (validation).

    Raises:
        ValueError: A source that is empty, has no positive weight, or whose share is less than one sample per batch.
    """

    def __init__(
        self,
        task: str,
        sizes: Sequence[int],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        self.task, self.sizes, self.seed, self.shuffle = task, list(sizes), seed, shuffle
        for source, weight in enumerate(weights):
            if not 0 < weight < math.inf:
                raise ValueError(f"data: source {source} of task {task!r} has weight {weight}; expected more than 0")
        self.counts = apportion(batch_size, weights)
        for source, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            if size < 1:
                raise ValueError(f"data: source {source} of task {task!r} has no samples")
            if count < 1:
                raise ValueError(
                    f"data: source {source} of task {task!r} gets no sample in a batch of {batch_size}; raise its "
                    "weight or the batch_size"
                )
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # source -> its newest epoch and the order in it

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every source has been gone through at least once."""
        return max(-(-size // count) for size, count in zip(self.sizes, self.counts, strict=True))

    def batch(self, step: int) -> list[Place]:
        """The samples of a step, over all ranks, in order."""
        places = []
        for source, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            for position in range(step * count, (step + 1) * count):
                epoch, offset = divmod(position, size)
                index = int(self._order(source, epoch)[offset]) if self.shuffle else offset
                places.append(Place(source, index, position))
        return places

    def pass_through(self, step: int) -> list[Place]:
        """As `batch`, but every sample once: the last steps are shorter, then empty."""
        return [place for place in self.batch(step) if place.position < self.sizes[place.source]]

    def _order(self, source: int, epoch: int) -> np.ndarray:
        # Only the newest is kept: an order is as long as its source, and every worker holds its own.
        if source not in self._orders or self._orders[source][0] != epoch:
            entropy = [self.seed, zlib.crc32(self.task.encode()), source, epoch]
            self._orders[source] = epoch, np.random.default_rng(entropy).permutation(self.sizes[source])
        return self._orders[source][1]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` in proportion to `weights` (largest remainders)."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
