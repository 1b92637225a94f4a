"""Which samples make up step k: a pure function of (seed, task, k), so that nothing has to be saved to resume.

Each source is gone through in epochs. Its shards are put into windows by the seed; an epoch takes the windows in an
order of its own and shuffles the samples of each, so that reads stay within a few shards. Where the images' sizes are
known, a batch is made of images of similar length in tokens, so that little is padded.

A batch has either a fixed number of samples, from every source of its task in proportion to their weights; or as many
as a budget of tokens holds, from one source, and the steps are shared out by the weights.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_CYCLE = 100  # steps in which sources with a token budget take turns: the finest share is one of them


class SampleRef(NamedTuple):
    """Where a sample of a step comes from."""

    source: int  # which source of the task
    index: int  # type: ignore[assignment]  # which sample of the source (hides tuple.index)
    position: int  # how many samples of the source came before it in the whole run, but for those of its window


class SourceInfo(NamedTuple):
    """What a plan has to know of a source."""

    size: int  # number of samples
    starts: np.ndarray | None = None  # shard i has the samples starts[i] to starts[i + 1] - 1; None: one shard
    lengths: Callable[[np.ndarray], np.ndarray] | None = None  # indices -> tokens of these images; None: all the same


class BatchSpec(NamedTuple):
    """How many samples make a batch."""

    samples: int  # in a batch; with `tokens`, their number is a multiple of it
    tokens: int | None = None  # most tokens of a batch, each image padded to the longest
    max_tokens: int = 1  # of an image
    option: str = "max_tokens"  # that decides it, for messages


class Plan:
    """The samples of every step of one task.

    Args:
        task: Name of the task; two tasks with the same data see it in different orders.
        sources: What is known of each source.
        weights: Share of each source, any positive scale.
        budget: The size of a batch over all ranks.
        seed: Seed of the run.
        shuffle: False gives each source in its own order (validation).
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
        budget: BatchSpec,
        seed: int,
        shuffle: bool = True,
        window: int = 16,
    ) -> None:
        self.task, self.sizes, self.shuffle = task, [source.size for source in sources], shuffle
        for number, weight in enumerate(weights):
            if not 0 < weight < math.inf:
                raise ValueError(f"data: source {number} of task {task!r} has weight {weight}; expected more than 0")
        if budget.tokens is not None and budget.tokens < budget.samples * budget.max_tokens:
            raise ValueError(
                f"data: batch_tokens {budget.tokens} of task {task!r} does not hold {budget.samples} images "
                f"(batch_multiple) of {budget.max_tokens} tokens ({budget.option})"
            )
        if budget.tokens is not None and not shuffle:  # held-out: in order, so many that any fit
            samples = budget.tokens // budget.max_tokens // budget.samples * budget.samples
            budget = BatchSpec(samples)
        self._turns: list[int] | None = None  # which source a step is from, in a cycle
        if budget.tokens is None:
            self.counts = apportion(budget.samples, weights)
        else:
            self.counts = apportion(_CYCLE if len(weights) > 1 else 1, weights)
            self._turns = take_turns(self.counts)
        self._check(budget)
        self._streams = [
            SourceSampler(
                source, budget if self._turns else BatchSpec(count), (seed, zlib.crc32(task.encode()), number), window
            )
            for number, (source, count) in enumerate(zip(sources, self.counts, strict=True))
            if shuffle
        ]

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every source has been gone through, at least one.

        Those of its last samples that do not fill a batch (with a token budget: `BatchSpec.samples`) belong to the next
        epoch's first window, and may come somewhat later.
        """
        if self._turns is None:
            return max(-(-size // count) for size, count in zip(self.sizes, self.counts, strict=True))
        epochs = (max(1, stream.batches_in_first_epoch) for stream in self._streams)
        return max(-(-steps * len(self._turns) // count) for steps, count in zip(epochs, self.counts, strict=True))

    def batch(self, step: int) -> list[SampleRef]:
        """The samples of a step, over all ranks, in order."""
        if not self.shuffle:
            return [
                SampleRef(source, position % size, position)
                for source, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True))
                for position in range(step * count, (step + 1) * count)
            ]
        if self._turns is None:
            return [SampleRef(i, *pair) for i, stream in enumerate(self._streams) for pair in stream.batch(step)]
        source, number = self._turn(step)
        return [SampleRef(source, *pair) for pair in self._streams[source].batch(number)]

    def next_shards(self, step: int) -> list[tuple[int, list[int]]]:
        """(source, its shards) that are read after those of this step, to be fetched in time."""
        if not self.shuffle:
            return []
        if self._turns is None:
            return [(i, stream.next_shards(step)) for i, stream in enumerate(self._streams)]
        source, number = self._turn(step)
        return [(source, self._streams[source].next_shards(number))]

    def pass_through(self, step: int) -> list[SampleRef]:
        """As `batch`, but every sample once: the last steps are shorter, then empty."""
        return [place for place in self.batch(step) if place.position < self.sizes[place.source]]

    def _turn(self, step: int) -> tuple[int, int]:
        """With a token budget: whose turn it is, and the number of that source's batch."""
        assert self._turns is not None
        cycle, turn = divmod(step, len(self._turns))
        source = self._turns[turn]
        return source, cycle * self.counts[source] + self._turns[:turn].count(source)

    def _check(self, budget: BatchSpec) -> None:
        for number, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            if size < 1:
                raise ValueError(f"data: source {number} of task {self.task!r} has no samples")
            if count < 1:
                where = f"{_CYCLE} steps" if self._turns else f"a batch of {budget.samples}"
                raise ValueError(
                    f"data: source {number} of task {self.task!r} gets no sample in {where}; raise its weight"
                    + " or the batch_size" * (self._turns is None)
                )


class SourceSampler:
    """The batches of one source, epoch after epoch without a seam.

    The samples in the order of the stream are cut into chunks of `budget.samples`; the chunks that end in a window
    are sorted anew by length. What is left of a window, less than a chunk, goes into the next one's. A chunk is a
    batch, or several neighbours are, as many as the tokens allow.
    """

    def __init__(self, samples: SourceInfo, budget: BatchSpec, entropy: tuple[int, ...], window: int) -> None:
        self.samples, self.budget, self._entropy = samples, budget, entropy
        starts = np.asarray([0, samples.size] if samples.starts is None else samples.starts, dtype=np.int64)
        order = self._rng(0).permutation(len(starts) - 1)
        self._starts = starts
        self._windows = [order[first : first + window].tolist() for first in range(0, len(order), window)]
        self._sizes = np.array([np.diff(starts)[shards].sum() for shards in self._windows])
        self._epoch_at: tuple[int, np.ndarray, np.ndarray] = (-1, self._sizes, self._sizes)
        self._shuffled: dict[tuple[int, int], np.ndarray] = {}
        self._made: tuple[tuple[int, int], list[np.ndarray]] | None = None
        if budget.tokens is not None:
            self._needed = np.array([self._batches_needed(number) for number in range(len(self._windows))])
            self._first_batch = [0]  # of each epoch that has been asked for

    @property
    def batches_in_first_epoch(self) -> int:
        """Batches that end in the first epoch; of a fixed size, the one across its end too.

        With a token budget there is none where the source has less than `BatchSpec.samples`.
        """
        if self.budget.tokens is None:
            return -(-self.samples.size // self.budget.samples)
        return int(self._batch_counts(0).sum())

    def batch(self, number: int) -> list[tuple[int, int]]:
        """(index, position) of the samples of a batch."""
        epoch, ordinal, first = self._place_of(number)
        if self._made is None or self._made[0] != (epoch, ordinal):
            self._made = (epoch, ordinal), self._batches(epoch, ordinal)
        return [(index, position) for index, position in self._made[1][number - first].tolist()]

    def next_shards(self, number: int) -> list[int]:
        """The shards of the window after the one that a batch belongs to."""
        epoch, ordinal = self._place_of(number)[:2]
        epoch, ordinal = (epoch, ordinal + 1) if ordinal + 1 < len(self._windows) else (epoch + 1, 0)
        shards: list[int] = self._windows[self._rng(1, epoch).permutation(len(self._windows))[ordinal]]
        return shards

    def _place_of(self, number: int) -> tuple[int, int, int]:
        """The epoch and window that a batch belongs to, and the number of that window's first batch."""
        if self.budget.tokens is not None:
            return self._batch_at(number)
        chunk = self.budget.samples
        epoch, ordinal = self._window_at((number + 1) * chunk - 1)
        return epoch, ordinal, self._span(epoch, ordinal)[0] // chunk

    def _batches(self, epoch: int, ordinal: int) -> list[np.ndarray]:
        """The batches, (samples, 2) of index and position, whose last chunks end in a window."""
        chunk, (begin, end) = self.budget.samples, self._span(epoch, ordinal)
        first, last = begin // chunk * chunk, end // chunk * chunk
        indices = np.concatenate([self._indices(first, min(begin, last)), self._indices(begin, last)])
        pairs = np.stack([indices, np.arange(first, last)], axis=1)
        longest = np.ones(len(pairs), np.int64)
        if self.samples.lengths is not None and len(pairs):
            lengths = self.samples.lengths(indices)
            by_length = np.argsort(-lengths, kind="stable")  # equal lengths stay shuffled
            pairs, longest = pairs[by_length], lengths[by_length]
        elif self.budget.tokens is not None:
            longest *= self.budget.max_tokens
        cuts = list(range(chunk, len(pairs), chunk))
        if self.budget.tokens is not None:
            needed = int(self._batch_counts(epoch)[ordinal])
            cuts = cut(longest[::chunk].tolist(), self.budget.tokens // chunk, needed)
            cuts = [place * chunk for place in cuts]
        batches = np.split(pairs, cuts) if len(pairs) else []
        return [batches[i] for i in self._rng(3, epoch, ordinal).permutation(len(batches))]

    def _indices(self, first: int, last: int) -> np.ndarray:
        """The samples at some positions of the stream."""
        found = [np.empty(0, np.int64)]
        while first < last:
            epoch, ordinal = self._window_at(first)
            begin, end = self._span(epoch, ordinal)
            found.append(self._shuffle(epoch, ordinal)[first - begin : min(last, end) - begin])
            first = end
        return np.concatenate(found)

    def _shuffle(self, epoch: int, ordinal: int) -> np.ndarray:
        """The samples of a window in the order of an epoch."""
        key = (epoch, ordinal)
        if key not in self._shuffled:
            indices = self._of_window(self._order(epoch)[0][ordinal])
            while len(self._shuffled) > 1:  # this window's and the one before
                del self._shuffled[next(iter(self._shuffled))]
            self._shuffled[key] = self._rng(2, epoch, ordinal).permutation(indices)
        return self._shuffled[key]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The windows in the order of an epoch, and where each begins in it, the end included."""
        if self._epoch_at[0] != epoch:
            order = self._rng(1, epoch).permutation(len(self._windows))
            self._epoch_at = epoch, order, np.cumsum([0, *self._sizes[order]])
        return self._epoch_at[1], self._epoch_at[2]

    def _window_at(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.samples.size)
        return epoch, int(np.searchsorted(self._order(epoch)[1], offset, side="right")) - 1

    def _span(self, epoch: int, ordinal: int) -> tuple[int, int]:
        """The positions of a window, the last one excluded."""
        begins, before = self._order(epoch)[1], epoch * self.samples.size
        return before + int(begins[ordinal]), before + int(begins[ordinal + 1])

    def _batch_at(self, number: int) -> tuple[int, int, int]:
        """With a token budget: the epoch and window of a batch, and the number of that window's first batch."""
        while self._first_batch[-1] <= number:
            epoch = len(self._first_batch) - 1
            self._first_batch.append(self._first_batch[-1] + int(self._batch_counts(epoch).sum()))
        epoch = int(np.searchsorted(self._first_batch, number, side="right")) - 1
        firsts = self._first_batch[epoch] + np.cumsum([0, *self._batch_counts(epoch)])
        ordinal = int(np.searchsorted(firsts, number, side="right")) - 1
        return epoch, ordinal, int(firsts[ordinal])

    def _batch_counts(self, epoch: int) -> np.ndarray:
        """With a token budget: the number of batches of each window of an epoch."""
        order, begins = self._order(epoch)
        chunks = np.diff((epoch * self.samples.size + begins) // self.budget.samples)
        one_more = chunks - self._sizes[order] // self.budget.samples
        return np.asarray(self._needed[order, one_more])

    def _batches_needed(self, number: int) -> tuple[int, int]:
        """Batches that hold a window's samples, with as many chunks as it fills and with one more.

        Which samples come over from another window depends on the epoch, so they are counted as the longest images.
        """
        assert self.budget.tokens is not None
        chunk, most = self.budget.samples, self.budget.max_tokens
        counts = np.zeros(most + 1, np.int64)
        if self.samples.lengths is None:
            counts[most] = self._sizes[number]
        else:
            counts += np.bincount(self.samples.lengths(self._of_window(number)), minlength=most + 1)
        counts[most] += chunk - 1
        longer = np.cumsum(counts[::-1])  # samples of at least most, most - 1, ... tokens
        total = int(self._sizes[number]) // chunk
        longest = most - np.searchsorted(longer, np.arange(total + 1) * chunk, side="right")
        budget = self.budget.tokens // chunk
        return tuple(len(cut(longest[:chunks].tolist(), budget)) + (chunks > 0) for chunks in (total, total + 1))  # type: ignore[return-value]

    def _of_window(self, number: int) -> np.ndarray:
        """The samples of a window, shard by shard."""
        shards = self._windows[number]
        return np.concatenate([np.arange(self._starts[shard], self._starts[shard + 1]) for shard in shards])

    def _rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([*self._entropy, *purpose])


def cut(longest: Sequence[int], budget: int, parts: int = 0) -> list[int]:
    """Where to cut a row of chunks into batches of at most `budget`: their number times the first one's length.

    Args:
        longest: Tokens of the longest image of each chunk, in descending order.
        budget: Tokens of a batch, divided by the samples of a chunk.
        parts: At least so many batches, which the largest are halved for.
    """
    cuts, place = [], 0
    while place < len(longest):
        place += max(1, budget // longest[place])
        cuts.append(place)
    cuts = cuts[:-1]
    while len(cuts) + 1 < min(parts, len(longest)):
        edges = [0, *cuts, len(longest)]
        largest = max(range(len(edges) - 1), key=lambda i: edges[i + 1] - edges[i])
        cuts.insert(largest, (edges[largest] + edges[largest + 1]) // 2)
    return cuts


def take_turns(counts: Sequence[int]) -> list[int]:
    """The numbers of sources, each as often as its count says, evenly mixed."""
    turns = [((i + 0.5) / count, source) for source, count in enumerate(counts) for i in range(count)]
    return [source for _, source in sorted(turns)]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` in proportion to `weights` (largest remainders)."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
