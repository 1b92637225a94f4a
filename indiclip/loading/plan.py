"""Which samples make up step k: a pure function of (seed, task, k), so that nothing has to be saved to resume.

A batch has either a fixed number of samples, from every source of its task in proportion to their weights; or as many
as a budget of tokens holds, from one source, and the steps are shared out by the weights. Which samples of a source
they are is decided in `indiclip.loading.sampler`.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from indiclip.loading.grouped_sampler import GroupedSampler, block, check_groups
from indiclip.loading.sampler import BatchSpec, SourceInfo, SourceSampler

_CYCLE = 100  # steps in which sources with a token budget take turns: the finest share is one of them


class SampleRef(NamedTuple):
    """Where a sample of a step comes from."""

    source: int  # which source of the task
    index: int  # type: ignore[assignment]  # which sample of the source (hides tuple.index)
    position: int  # how many samples of the source came before it in the whole run, but for those of its window


class Plan:
    """The samples of every step of one task.

    Args:
        task: Name of the task; two tasks with the same data see it in different orders.
        sources: What is known of each source.
        weights: Share of each source, any positive scale.
        spec: The size of a batch over all ranks.
        seed: Seed of the run.
        shuffle: False gives each source once, in its own order (held-out data).
        window: Shards among which samples are shuffled.

    Raises:
        ValueError: A source that is empty, has no positive weight, or whose share is less than one sample per batch;
            a token budget that is too small.
    """

    def __init__(
        self,
        task: str,
        sources: Sequence[SourceInfo],
        weights: Sequence[float],
        spec: BatchSpec,
        seed: int,
        shuffle: bool = True,
        window: int = 16,
    ) -> None:
        self.task, self.sizes, self.shuffle = task, [source.size for source in sources], shuffle
        self.epoch_sizes = [source.epoch_size for source in sources]
        for number, weight in enumerate(weights):
            if not 0 < weight < math.inf:
                raise ValueError(f"data: source {number} of task {task!r} has weight {weight}; expected more than 0")
        if spec.tokens is not None and spec.tokens < spec.samples * spec.max_tokens:
            raise ValueError(
                f"data: batch_tokens {spec.tokens} of task {task!r} does not hold {spec.samples} images "
                f"(batch_multiple) of {spec.max_tokens} tokens ({spec.option})"
            )
        if spec.tokens is not None and not shuffle:
            spec = spec.fixed(spec.max_tokens)
        self._turns: list[int] | None = None  # which source a step is from, in a cycle
        if spec.tokens is None:
            self.counts = apportion(spec.samples, weights)
        else:
            self.counts = apportion(_CYCLE if len(weights) > 1 else 1, weights)
            # Each source as often as its count says, evenly mixed.
            turns = [((i + 0.5) / count, source) for source, count in enumerate(self.counts) for i in range(count)]
            self._turns = [source for _, source in sorted(turns)]
        self._check(spec)
        entropy = (seed, zlib.crc32(task.encode()))
        self._samplers = [
            self._sampler(source, self._spec_of(number, source, spec), (*entropy, number), window)
            for number, source in enumerate(sources)
            if shuffle
        ]
        # Of each source: the window that its batches begin with, and the number of the first of them.
        self._windows, self._first = [(0, 0)] * len(sources), [0] * len(sources)
        self._next: tuple[int, Plan] | None = None  # from a step on

    def then(self, step: int, plan: "Plan") -> None:
        """Have another plan for all steps from this one on, of the same sources in batches of another size.

        Each source goes on with the window of shards behind the one it is in: the windows and their order are the same,
        so no sample comes twice in an epoch, but for less than a batch where two windows meet. What is left of the
        window waits for the next epoch.
        """
        for source, sampler in enumerate(self._samplers):
            later = plan._samplers[source]
            # Batches of groups are of one size in all stages, see `Source`.
            assert isinstance(sampler, SourceSampler)
            assert isinstance(later, SourceSampler)
            if done := self._batches_before(step, source):
                plan._windows[source] = sampler.window_after(self._first[source] + done - 1)
            else:
                plan._windows[source] = self._windows[source]
            plan._first[source] = later.first_batch(*plan._windows[source])
        self._next = (step, plan)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every source has been gone through, at least one.

        Those of its last samples that do not fill a batch (with a token budget: `BatchSpec.samples`) belong to the next
        epoch's first window, and may come somewhat later.
        """
        if self._turns is None:
            return max(-(-size // count) for size, count in zip(self.epoch_sizes, self.counts, strict=True))
        epochs = (max(1, sampler.batches_in_first_epoch) for sampler in self._samplers)
        return max(-(-steps * len(self._turns) // count) for steps, count in zip(epochs, self.counts, strict=True))

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> list[SampleRef]:
        """A rank's samples of a step: every `world_size`-th of the step's, from number `rank` on.

        Of a source with groups of shards they are a block of its part, as many. Of held-out data every sample comes
        once: the last steps are shorter, then empty.
        """
        refs: list[SampleRef] = []
        before = 0  # samples of the step from earlier sources
        for source, sampler, number in self._batches(step):
            if isinstance(sampler, GroupedSampler):
                samples = sampler.samples
                mine = sampler.batch(number, *block(samples, before, rank, world_size))
            else:
                whole = sampler.batch(number)
                samples, mine = len(whole[0]), _dealt(*whole, before, rank, world_size)
            refs += _refs(source, *mine)
            before += samples
        if not self.shuffle:
            for source, indices in self._in_order(step):
                refs += _refs(source, *_dealt(indices, indices, before, rank, world_size))
                before += len(indices)
        return refs

    def next_shards(self, step: int, rank: int = 0, world_size: int = 1) -> list[tuple[int, list[int]]]:
        """(source, its shards) that a rank reads after those of this step, to be fetched in time."""
        found, before = [], 0
        for source, sampler, number in self._batches(step):
            if isinstance(sampler, GroupedSampler):
                mine = block(sampler.samples, before, rank, world_size)
                found.append((source, sampler.next_shards(number, *mine)))
            else:
                found.append((source, sampler.next_shards(number)))
            before += self.counts[source] if self._turns is None else 0
        return found

    def _in_order(self, step: int) -> Iterator[tuple[int, np.ndarray]]:
        """(source, indices) of the samples of a step of held-out data, over all ranks."""
        for source, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            yield source, np.arange(min(step * count, size), min((step + 1) * count, size))

    def _sampler(
        self, source: SourceInfo, spec: BatchSpec, entropy: tuple[int, ...], window: int
    ) -> SourceSampler | GroupedSampler:
        if source.groups == 1:
            return SourceSampler(source, spec, entropy, window)
        check_groups(f"data: shard_groups of task {self.task!r}", source, spec.samples)
        return GroupedSampler(source, spec.samples, entropy, window)

    def _batches(self, step: int) -> list[tuple[int, SourceSampler | GroupedSampler, int]]:
        """(source, its sampler, number of its batch) of which a shuffled step is made."""
        if self._next is not None and step >= self._next[0]:
            return self._next[1]._batches(step - self._next[0])
        sources = range(len(self._samplers)) if self._turns is None else [self._turns[step % len(self._turns)]]
        return [
            (source, self._samplers[source], self._first[source] + self._batches_before(step, source))
            for source in sources
        ]

    def _batches_before(self, step: int, source: int) -> int:
        """Batches of a source in the steps before this one."""
        if self._turns is None:
            return step
        cycle, turn = divmod(step, len(self._turns))
        return cycle * self.counts[source] + self._turns[:turn].count(source)

    def _spec_of(self, number: int, source: SourceInfo, spec: BatchSpec) -> BatchSpec:
        """The batches of a source.

        With a token budget and shuffled lengths they are of one size: nearly every batch has an image about as long as
        the longest of the source, so the budget is used, and what a batch holds does not decide how large it is.
        """
        if spec.tokens is None:
            return BatchSpec(self.counts[number])
        if source.lengths is not None:
            return spec
        samples = spec.fixed(source.longest or spec.max_tokens).samples
        at_most = max(1, source.epoch_size // spec.samples) * spec.samples  # none twice in a batch
        return BatchSpec(min(samples, at_most))

    def _check(self, spec: BatchSpec) -> None:
        for number, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            if size < 1:
                raise ValueError(f"data: source {number} of task {self.task!r} has no samples")
            if count < 1:
                where = f"{_CYCLE} steps" if self._turns else f"a batch of {spec.samples}"
                raise ValueError(
                    f"data: source {number} of task {self.task!r} gets no sample in {where}; raise its weight"
                    + " or the batch_size" * (self._turns is None)
                )


def _dealt(
    indices: np.ndarray, positions: np.ndarray, before: int, rank: int, world_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Those of a source's samples that a rank has where the samples of a step, `before` first, are dealt in turn."""
    mine = slice((rank - before) % world_size, None, world_size)
    return indices[mine], positions[mine]


def _refs(source: int, indices: np.ndarray, positions: np.ndarray) -> list[SampleRef]:
    return [SampleRef(source, *pair) for pair in zip(indices.tolist(), positions.tolist(), strict=True)]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` in proportion to `weights` (largest remainders)."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
