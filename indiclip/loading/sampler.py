"""The batches of one source, epoch after epoch: which samples batch k has, without looking at those before it.

The source's shards are put into windows by the seed; an epoch takes the windows in an order of its own and shuffles the
samples of each, so that reads stay within a few shards. The samples in that order, one epoch behind the other, are cut
into batches. Batches that end in the same window come in an order of their own.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from indiclip.loading.clusters import ClusterDraws

LARGEST_WINDOW = 2**22  # samples; a larger source without shards is shuffled by parts of PART random samples
PART = 2**20


class SourceInfo(NamedTuple):
    """What a plan has to know of a source."""

    size: int  # number of samples
    starts: np.ndarray | None = None  # shard i has the samples starts[i] to starts[i + 1] - 1; None: one shard
    # Indices -> tokens of these images, where those of similar length are to come together; None: they are not.
    lengths: Callable[[np.ndarray], np.ndarray] | None = None
    longest: int | None = None  # most tokens of any image; None: `BatchSpec.max_tokens`
    groups: int = 1  # more: `indiclip.loading.grouped_sampler`
    draws: ClusterDraws | None = None  # what of it comes in an epoch, and how often; None: each sample once

    @property
    def epoch_size(self) -> int:
        """Samples of an epoch."""
        return self.size if self.draws is None else self.draws.samples


class BatchSpec(NamedTuple):
    """How many samples make a batch."""

    samples: int  # in a batch; with `tokens`, their number is a multiple of it
    tokens: int | None = None  # most tokens of a batch, each image padded to the longest
    max_tokens: int = 1  # of an image
    option: str = "max_tokens"  # that decides it, for messages

    def fixed(self, longest: int) -> "BatchSpec":
        """With a token budget: as many samples as it holds, all of `longest` tokens."""
        assert self.tokens is not None
        return BatchSpec(self.tokens // longest // self.samples * self.samples)


class SourceSampler:
    """The batches of one source.

    The samples in their order are cut into chunks of `spec.samples`, and a chunk is a batch. Where images of similar
    length are to come together, the chunks that end in a window are sorted anew by length, and with a token budget a
    batch is as many neighbours as it holds. What is left of a window, less than a chunk, goes into the next one's.
    """

    def __init__(self, info: SourceInfo, spec: BatchSpec, entropy: tuple[int, ...], window: int) -> None:
        assert spec.tokens is None or info.lengths is not None
        assert info.draws is None or info.lengths is None  # whose batches are counted for every epoch alike
        self.info, self.spec, self._entropy = info, spec, entropy
        self._scattered = info.starts is None and info.size > LARGEST_WINDOW
        part, window = (PART, 1) if self._scattered else (info.size, window)
        starts = np.arange(0, info.size + part, part) if info.starts is None else info.starts
        self._starts = np.minimum(starts, info.size)
        order = self._rng(0).permutation(len(self._starts) - 1)
        self._windows = [order[first : first + window].tolist() for first in range(0, len(order), window)]
        sizes = np.diff(self._starts)
        self._sizes = np.array([sizes[shards].sum() for shards in self._windows])
        # What was made last, by epoch, or by epoch and window.
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._shuffled: dict[tuple[int, int], np.ndarray] = {}
        self._made: dict[tuple[int, int], tuple[np.ndarray, ...]] = {}
        if spec.tokens is not None:
            self._needed = np.array([self._batches_needed(number) for number in range(len(self._windows))])
            self._first_batch = [0]  # of each epoch that has been asked for

    @property
    def batches_in_first_epoch(self) -> int:
        """Batches that end in the first epoch; of a fixed size, the one across its end too.

        With a token budget there is none where the source has less than `BatchSpec.samples`.
        """
        if self.spec.tokens is None:
            return -(-self.info.epoch_size // self.spec.samples)
        return int(self._batch_counts(0).sum())

    def first_batch(self, epoch: int, ordinal: int) -> int:
        """The number of the first batch of a window, in the order of an epoch."""
        if self.spec.tokens is None:
            return self._span(epoch, ordinal)[0] // self.spec.samples
        self._count_batches(epoch)
        return self._first_batch[epoch] + int(self._batch_counts(epoch)[:ordinal].sum())

    def window_after(self, number: int) -> tuple[int, int]:
        """The epoch, and the place in it, of the window behind the one that a batch belongs to."""
        epoch, ordinal = self._place_of(number)[:2]
        return (epoch, ordinal + 1) if ordinal + 1 < len(self._windows) else (epoch + 1, 0)

    def batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The indices of a batch's samples, and their positions."""
        epoch, ordinal, first = self._place_of(number)
        if (epoch, ordinal) not in self._made:
            self._made = {(epoch, ordinal): self._batches(epoch, ordinal)}
        indices, positions, edges, order = self._made[epoch, ordinal]
        at = order[number - first]
        return indices[edges[at] : edges[at + 1]], positions[edges[at] : edges[at + 1]]

    def next_shards(self, number: int) -> list[int]:
        """The shards of the window after the one that a batch belongs to."""
        epoch, ordinal = self.window_after(number)
        return [0] if self._scattered else self._windows[int(self._order(epoch)[0][ordinal])]

    def _of_window(self, number: int) -> np.ndarray:
        """The samples of a window, shard by shard."""
        starts = self._starts
        samples = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in self._windows[number]])
        return scatter(samples, self.info.size, self._rng(4)) if self._scattered else samples

    def _place_of(self, number: int) -> tuple[int, int, int]:
        """The epoch and window that a batch belongs to, and the number of that window's first batch."""
        if self.spec.tokens is not None:
            return self._batch_at(number)
        chunk = self.spec.samples
        epoch, ordinal = self._window_at((number + 1) * chunk - 1)
        return epoch, ordinal, self._span(epoch, ordinal)[0] // chunk

    def _batches(self, epoch: int, ordinal: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The batches whose last chunks end in a window.

        Returns:
            Indices and positions of their samples, the edges between the batches, and the order in which these come.
        """
        chunk, (begin, end) = self.spec.samples, self._span(epoch, ordinal)
        first, last = begin // chunk * chunk, end // chunk * chunk
        indices = np.concatenate([self._indices(first, min(begin, last)), self._indices(begin, last)])
        positions, edges = np.arange(first, last), np.arange(0, last - first + 1, chunk)
        if self.info.lengths is not None and len(indices):
            lengths = self.info.lengths(indices)
            by_length = np.argsort(-lengths, kind="stable")  # equal lengths stay shuffled
            indices, positions = indices[by_length], positions[by_length]
            if self.spec.tokens is not None:
                longest = lengths[by_length][::chunk].tolist()
                cuts = cut(longest, self.spec.tokens // chunk, int(self._batch_counts(epoch)[ordinal]))
                edges = np.array([0, *cuts, len(longest)]) * chunk
        return indices, positions, edges, self._rng(3, epoch, ordinal).permutation(len(edges) - 1)

    def _indices(self, first: int, last: int) -> np.ndarray:
        """The samples at some positions."""
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
            indices = self._drawn(self._order(epoch)[0][ordinal], epoch)
            while len(self._shuffled) > 1:  # this window's and the one before
                del self._shuffled[next(iter(self._shuffled))]
            self._shuffled[key] = self._rng(2, epoch, ordinal).permutation(indices)
        return self._shuffled[key]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The windows in the order of an epoch, and where each begins in it, the end included."""
        if epoch not in self._orders:
            order = self._rng(1, epoch).permutation(len(self._windows))
            while len(self._orders) > 1:  # this epoch's and the one before
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = (order, np.cumsum([0, *self._sizes_in(epoch)[order]]))
        return self._orders[epoch]

    def _drawn(self, number: int, epoch: int) -> np.ndarray:
        """The samples of a window that come in an epoch, each as often as it does."""
        samples = self._of_window(number)
        return samples if self.info.draws is None else samples.repeat(self.info.draws.times(samples, epoch))

    def _sizes_in(self, epoch: int) -> np.ndarray:
        """How many samples of each window come in an epoch."""
        if self.info.draws is None:
            return self._sizes
        windows = map(self._of_window, range(len(self._windows)))
        return np.array([self.info.draws.times(samples, epoch).sum() for samples in windows])

    def _window_at(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.info.epoch_size)
        return epoch, int(np.searchsorted(self._order(epoch)[1], offset, side="right")) - 1

    def _span(self, epoch: int, ordinal: int) -> tuple[int, int]:
        """The positions of a window, the last one excluded."""
        begins, before = self._order(epoch)[1], epoch * self.info.epoch_size
        return before + int(begins[ordinal]), before + int(begins[ordinal + 1])

    def _batch_at(self, number: int) -> tuple[int, int, int]:
        """With a token budget: the epoch and window of a batch, and the number of that window's first batch."""
        while self._first_batch[-1] <= number:
            self._count_batches(len(self._first_batch))
        epoch = int(np.searchsorted(self._first_batch, number, side="right")) - 1
        firsts = self._first_batch[epoch] + np.cumsum([0, *self._batch_counts(epoch)])
        ordinal = int(np.searchsorted(firsts, number, side="right")) - 1
        return epoch, ordinal, int(firsts[ordinal])

    def _count_batches(self, epochs: int) -> None:
        """With a token budget: count the batches of so many epochs."""
        while len(self._first_batch) <= epochs:
            epoch = len(self._first_batch) - 1
            self._first_batch.append(self._first_batch[-1] + int(self._batch_counts(epoch).sum()))

    def _batch_counts(self, epoch: int) -> np.ndarray:
        """With a token budget: the number of batches of each window of an epoch."""
        order, begins = self._order(epoch)
        chunks = np.diff((epoch * self.info.size + begins) // self.spec.samples)
        one_more = chunks - self._sizes[order] // self.spec.samples
        return np.asarray(self._needed[order, one_more])

    def _batches_needed(self, number: int) -> tuple[int, int]:
        """Batches that hold a window's samples, with as many chunks as it fills and with one more.

        Which samples come over from another window depends on the epoch, so they are counted as the longest images.
        """
        assert self.spec.tokens is not None
        assert self.info.lengths is not None
        chunk, most = self.spec.samples, self.spec.max_tokens
        counts = np.bincount(self.info.lengths(self._of_window(number)), minlength=most + 1)
        counts[most] += chunk - 1
        longer = np.cumsum(counts[::-1])  # samples of at least most, most - 1, ... tokens
        total = int(self._sizes[number]) // chunk
        longest = most - np.searchsorted(longer, np.arange(total + 1) * chunk, side="right")
        budget = self.spec.tokens // chunk
        return tuple(len(cut(longest[:chunks].tolist(), budget)) + (chunks > 0) for chunks in (total, total + 1))  # type: ignore[return-value]

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


def scatter(numbers: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random one-to-one map of 0 to `size` - 1 onto itself, at some numbers, without a table of all.

    Four rounds of a Feistel network over pairs (number // side, number % side); a result outside goes through it again
    until it is inside (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002, sections 3 and 4).
    """
    side = np.uint64(math.isqrt(size - 1) + 1)
    keys = rng.integers(2**63, size=4, dtype=np.uint64)
    numbers = numbers.astype(np.uint64)
    outside = np.ones(len(numbers), dtype=bool)
    while outside.any():
        left, right = np.divmod(numbers[outside], side)
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # odd, wraps: the upper half depends on all bits
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, (left + (mixed >> np.uint64(32))) % side
        numbers[outside] = left * side + right
        outside = numbers >= size
    return numbers.astype(np.int64)
