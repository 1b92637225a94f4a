"""The batches of a source whose shards are dealt to groups, so that each node reads its own shards only.

The shards stand in a line by the seed, and the line is cut into `groups` parts of equally many samples. Each batch has
its first samples from the first part, the next from the second, and so on, always as many. Ranks take a batch in
blocks, so that those of a node read neighbouring parts: 1/N of the line on each of N nodes, and of shards those that a
cut goes through besides. Nothing here knows how many ranks or nodes there are. An epoch of the source has every sample
once: its cuts follow from the positions in it, and move by less than a batch from one epoch to the next.

Within its part each group goes through windows of shards as `indiclip.loading.sampler` does through the whole source.
"""

from collections.abc import Iterator

import numpy as np

from indiclip.loading.sampler import SourceInfo


class GroupedSampler:
    """The batches of one source, group by group.

    Args:
        info: The source; with shards, and `groups` of them.
        samples: In a batch.
        entropy: The seed, and what tells this source from others.
        window: Shards of a group among which samples are shuffled.
    """

    def __init__(self, info: SourceInfo, samples: int, entropy: tuple[int, ...], window: int) -> None:
        assert info.starts is not None
        self.info, self.samples, self._entropy, self._window = info, samples, entropy, window
        starts = np.asarray(info.starts)
        self._shards = self._rng(0).permutation(len(starts) - 1)  # in the order of the line
        self._starts = starts[self._shards]
        self._edges = np.cumsum([0, *np.diff(starts)[self._shards]])  # between them on the line
        self._cuts = np.arange(info.groups + 1) * samples // info.groups  # between the groups' places in a batch
        self._orders: dict[int, tuple[int, np.ndarray, np.ndarray, np.ndarray]] = {}  # group -> its newest epoch's
        self._shuffled: dict[int, tuple[tuple[int, int], np.ndarray]] = {}  # group -> its newest window

    @property
    def batches_in_first_epoch(self) -> int:
        """Batches that end in the first epoch, and the one across its end."""
        return -(-self.info.size // self.samples)

    def batch(self, number: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The indices of the samples at the places `first` to `last` - 1 of a batch, and their positions."""
        found = [np.empty(0, np.int64)]
        for group, begin, end in self._places(number, first, last):
            found.extend(self._samples(group, begin, end))
        return np.concatenate(found), number * self.samples + np.arange(first, last)

    def next_shards(self, number: int, first: int, last: int) -> list[int]:
        """The shards that groups with a place among `first` to `last` - 1 read after their window of this batch."""
        shards = list[int]()
        for group, _, end in self._places(number, first, last):
            epoch = (end - 1) // self.info.size
            begins = self._order(group, epoch)[2]
            window = int(np.searchsorted(begins, self._depth(group, epoch, end - 1), side="right"))
            if window == len(begins) - 1:
                epoch, window = epoch + 1, 0
            order, edges = self._order(group, epoch)[1::2]
            if len(order):
                begin, stop = edges[order[window]], edges[order[window] + 1]
                line = slice(self._shard_at(begin), int(np.searchsorted(self._edges, stop)))
                shards.extend(self._shards[line].tolist())
        return list(dict.fromkeys(shards))

    def _places(self, number: int, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """(group, first position, the one behind the last) of the groups that have these places of a batch."""
        before = number * self.samples
        for group in range(int(np.searchsorted(self._cuts, first, side="right")) - 1, self.info.groups):
            begin, end = max(first, int(self._cuts[group])), min(last, int(self._cuts[group + 1]))
            if begin >= end:
                break
            yield group, before + begin, before + end

    def _samples(self, group: int, position: int, end: int) -> Iterator[np.ndarray]:
        """The samples at positions that are all of one group and of one batch."""
        while position < end:
            epoch = position // self.info.size
            begins = self._order(group, epoch)[2]
            depth = self._depth(group, epoch, position)
            window = int(np.searchsorted(begins, depth, side="right")) - 1
            until = min(end - position, (epoch + 1) * self.info.size - position, int(begins[window + 1]) - depth)
            inside = depth - int(begins[window])
            yield self._shuffle(group, epoch, window)[inside : inside + until]
            position += until

    def _depth(self, group: int, epoch: int, position: int) -> int:
        """How many samples of an epoch a group has given before a position."""
        counts = self._before(position) - self._before(epoch * self.info.size)
        return int(counts[group + 1] - counts[group])

    def _before(self, position: int) -> np.ndarray:
        """How many of the positions before this one belong to groups before each, all groups included at the end."""
        batches, place = divmod(position, self.samples)
        return np.asarray(batches * self._cuts + np.minimum(place, self._cuts))

    def _order(self, group: int, epoch: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """(epoch, the group's windows in its order, where each begins in it, edges between them on the line)."""
        if self._orders.get(group, (-1,))[0] != epoch:
            size = self.info.size
            begin, end = (self._before((epoch + 1) * size) - self._before(epoch * size))[group : group + 2].tolist()
            edges = self._edges[self._shard_at(begin) : int(np.searchsorted(self._edges, end)) : self._window]
            edges = np.append(np.maximum(edges, begin), end)
            order = self._rng(1, epoch, group).permutation(len(edges) - 1)
            self._orders[group] = epoch, order, np.cumsum([0, *np.diff(edges)[order]]), edges
        return self._orders[group]

    def _shuffle(self, group: int, epoch: int, window: int) -> np.ndarray:
        """The samples of a group's window in the order of an epoch."""
        known, shuffled = self._shuffled.get(group, ((-1, -1), np.empty(0, np.int64)))
        if known != (epoch, window):
            _, order, _, edges = self._order(group, epoch)
            line = np.arange(edges[order[window]], edges[order[window] + 1])
            shards = np.searchsorted(self._edges, line, side="right") - 1
            samples = line - self._edges[shards] + self._starts[shards]
            shuffled = self._rng(2, epoch, group, window).permutation(samples)
            self._shuffled[group] = (epoch, window), shuffled
        return shuffled

    def _shard_at(self, place: int) -> int:
        return int(np.searchsorted(self._edges, place, side="right")) - 1

    def _rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([*self._entropy, *purpose])


def block(samples: int, before: int, rank: int, world_size: int) -> tuple[int, int]:
    """The places that a rank takes of a source's part of a batch, the last one excluded.

    They are as many as when the whole batch were dealt out in turn, so that ranks whose parts of all sources are put
    together have equally many.

    Args:
        samples: The source's part.
        before: Samples of the batch from earlier sources.
    """

    def dealt(ranks: int) -> int:
        """How many of the source's samples ranks below this one have."""
        (whole, rest), (whole_before, rest_before) = divmod(before + samples, world_size), divmod(before, world_size)
        return (whole - whole_before) * ranks + min(rest, ranks) - min(rest_before, ranks)

    return dealt(rank), dealt(rank + 1)


def check_groups(where: str, info: SourceInfo, samples: int) -> None:
    """Check that shards can be dealt to groups.

    Args:
        where: Begins the message.
        samples: Of the source in a batch.

    Raises:
        ValueError: No shards, or fewer than groups; fewer samples; batches by length.
    """
    shards = 0 if info.starts is None else int((np.diff(info.starts) > 0).sum())
    if shards < info.groups:
        raise ValueError(
            f"{where} is {info.groups}, but the source has {shards} shards with samples; expected at least one for "
            "each group: lower it, or cut the data into more shards"
        )
    if samples < info.groups:
        raise ValueError(
            f"{where} is {info.groups}, but the source gives {samples} samples to a batch; expected at least one from "
            "each group: lower it, or raise the batch"
        )
    if info.lengths is not None:
        raise ValueError(
            f"{where} is {info.groups} and group_by_length is true; expected one of the two, since a batch by length "
            "has samples of any group"
        )
