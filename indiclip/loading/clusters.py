"""Which samples of a source an epoch draws, by the clusters that they are in: large ones less often, small ones more.

A cluster of n samples gives a part of the epoch that is in proportion to n ** alpha (DynamiCS, arXiv 2604.27932: alpha
0.2, epochs of half the data, none of it twice in an epoch). Which of its samples these are goes around in the cluster
from epoch to epoch, so each of them comes as often as any other. All is a function of (seed, epoch): nothing is saved.
"""

from dataclasses import dataclass

import numpy as np

from indiclip.datasets.base import SampleDataset
from indiclip.datasets.tables import existing
from indiclip.names import check_range, reason_of

_CLUSTER_BITS, _RANDOM_BITS, _SLICE_BITS = 24, 18, 22  # of the 64-bit numbers that samples are sorted by
_LARGEST_ID = 2**_CLUSTER_BITS
_SLICE = 2**_SLICE_BITS  # samples that are sorted at a time


@dataclass
class Clusters:
    """How a source is sampled in an epoch.

    Args:
        file: A `.npy` file with a whole number from 0 per sample, in the order of the dataset, such as k-means of its
            embeddings; it is read in place. None takes the dataset's own clusters (of a table, its column `cluster`),
            or else its labels.
        alpha: Exponent of a cluster's size: 1 leaves the data as they are, 0 gives every cluster the same.
        share: Samples of an epoch, as a share of all.
        repeats: Most times that a sample may come in an epoch. What small clusters cannot give the others do.
        weights: Cluster -> factor of its part; 0 leaves it out.
    """

    file: str | None = None
    alpha: float = 0.2
    share: float = 1.0
    repeats: int = 1
    weights: dict[int, float] | None = None

    def check(self, key: str) -> None:
        """Raise ValueError for numbers that are out of range."""
        check_range({f"{key}.alpha": self.alpha}, 0, 1)
        check_range({f"{key}.share": self.share}, 0, without=0)
        check_range({f"{key}.repeats": self.repeats}, 1)
        check_range({f"{key}.weights.{cluster}": factor for cluster, factor in (self.weights or {}).items()})

    def read(self, dataset: SampleDataset, key: str) -> np.ndarray:
        """The cluster of each sample: int (number of samples,).

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: There are no clusters, not one for each sample, or other numbers than clusters have.
        """
        where, found = key, dataset.clusters if dataset.clusters is not None else dataset.labels
        if self.file is not None:
            where = f"{key}.file: {self.file}"
            found = _load(self.file, f"{key}.file")
        if found is None:
            raise ValueError(
                f"{where}: the samples of {type(dataset).__name__} have neither cluster nor label; expected {key}.file"
            )
        if found.shape != (len(dataset),) or found.dtype.kind not in "iu":
            raise ValueError(
                f"{where}: found {found.dtype} {found.shape}; expected whole numbers, one for each of {len(dataset)} "
                "samples"
            )
        if len(found) and (found.min() < 0 or found.max() >= _LARGEST_ID):
            first = int(np.flatnonzero((found < 0) | (found >= _LARGEST_ID))[0])
            raise ValueError(
                f"{where}: the cluster of sample {dataset.key(first)!r} is {found[first]}; expected one of 0 to "
                f"{_LARGEST_ID - 1} for each sample"
            )
        return found

    def shares(self, sizes: np.ndarray, key: str) -> np.ndarray:
        """How many samples of each cluster an epoch has on average: float (number of clusters,).

        Raises:
            ValueError: A weight of a cluster that is not there; an epoch that the clusters cannot fill.
        """
        weights = np.where(sizes > 0, sizes.astype(np.float64) ** self.alpha, 0.0)
        for cluster, factor in (self.weights or {}).items():
            if not 0 <= cluster < len(sizes) or not sizes[cluster]:
                raise ValueError(f"{key}.weights: there is no cluster {cluster}; there are {np.count_nonzero(sizes)}")
            weights[cluster] *= factor
        most = np.where(weights > 0, sizes * self.repeats, 0).astype(np.float64)
        samples = max(1, round(self.share * sizes.sum()))
        if most.sum() < samples:
            found = f"{samples} samples an epoch are more than {int(most.sum())}, {self.repeats} of each"
            raise ValueError(f"{key}: {found}; expected a smaller {key}.share, or more {key}.repeats")
        return _fill(weights, most, samples)


def _load(file: str, key: str) -> np.ndarray:
    try:
        return np.asarray(np.load(existing(file), mmap_mode="r", allow_pickle=False))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}: {error}") from None
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{key}: {file}: no .npy file of whole numbers: {reason_of(error)}") from error


def _fill(weights: np.ndarray, most: np.ndarray, total: int) -> np.ndarray:
    """`total` in proportion to `weights`, none above its `most`; what is above goes to the others in proportion."""
    full = weights <= 0
    shares = np.where(full, 0.0, weights * (total / weights.sum()))
    while (over := ~full & (shares > most)).any():
        full |= over
        shares[over] = most[over]
        rest = np.where(full, 0.0, weights)
        if not rest.any():
            break
        shares = np.where(full, shares, rest * ((total - shares[full].sum()) / rest.sum()))
    return shares


class ClusterDraws:
    """How often each sample comes in each epoch.

    In an epoch a cluster gives its share, rounded up or down so that the epoch has always the same number of samples.
    They are neighbours on a circle on which the cluster's samples stand in random order, behind those of the epoch
    before.

    Args:
        clusters: The cluster of each sample, int (number of samples,).
        shares: See `Clusters.shares`.
        entropy: Seeds the order and the rounding.

    Attributes:
        samples: Of an epoch.
    """

    def __init__(self, clusters: np.ndarray, shares: np.ndarray, entropy: tuple[int, ...]) -> None:
        self.samples = round(shares.sum())
        self._clusters, self._shares, self._entropy = clusters, shares, entropy
        self._sizes = cluster_sizes(clusters)
        self._places = _places(clusters, self._sizes, np.random.default_rng([*entropy, 0]))
        self._begins = np.random.default_rng([*entropy, 1]).random(len(shares)) * self._sizes
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None  # what was asked for last

    def counts(self, epoch: int) -> np.ndarray:
        """Samples of each cluster in an epoch, int64: systematic sampling of the shares."""
        offset = np.random.default_rng([*self._entropy, 2, epoch]).random()
        edges = np.minimum(np.floor(np.cumsum(self._shares) + offset), self.samples)
        edges[-1] = self.samples
        return np.asarray(np.diff(edges, prepend=0).astype(np.int64))

    def times(self, indices: np.ndarray, epoch: int) -> np.ndarray:
        """How often samples come in an epoch, int64."""
        if self._epoch is None or self._epoch[0] != epoch:
            begins = np.floor(self._begins + epoch * self._shares).astype(np.int64)
            self._epoch = (epoch, self.counts(epoch), begins % np.maximum(self._sizes, 1))
        cluster = np.asarray(self._clusters[indices])
        _, counts, begins = self._epoch
        sizes = self._sizes[cluster]
        behind = (self._places[indices].astype(np.int64) - begins[cluster]) % sizes
        return np.asarray((counts[cluster] - behind + sizes - 1) // sizes)


def cluster_sizes(clusters: np.ndarray) -> np.ndarray:
    """Samples of each cluster, int64; counted by parts, so that few are in memory."""
    parts = [np.bincount(clusters[first : first + _SLICE]) for first in range(0, len(clusters), _SLICE)]
    sizes = np.zeros(max(map(len, parts), default=0), np.int64)
    for part in parts:
        sizes[: len(part)] += part
    return sizes


def _places(clusters: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The place of each sample in its cluster, uint32 from 0, in random order.

    They are given out to one part of the samples after the other, each of them spread over all, so that neighbours come
    from everywhere.
    """
    places, seen = np.empty(len(clusters), np.uint32), np.zeros(len(sizes), np.int64)
    num_parts = max(1, -(-len(clusters) // _SLICE))
    for first in range(num_parts):
        part = clusters[first::num_parts]
        keys = part.astype(np.uint64) << np.uint64(_RANDOM_BITS)
        keys |= rng.integers(2**_RANDOM_BITS, size=len(part), dtype=np.uint64)
        keys = keys << np.uint64(_SLICE_BITS) | np.arange(len(part), dtype=np.uint64)
        keys.sort()  # several times as fast as argsort
        order = (keys & np.uint64(2**_SLICE_BITS - 1)).astype(np.int64)
        in_order = (keys >> np.uint64(_RANDOM_BITS + _SLICE_BITS)).astype(np.int64)
        counts = np.bincount(in_order, minlength=len(sizes))
        firsts = np.cumsum(counts) - counts
        places[first + order * num_parts] = np.arange(len(part)) - firsts[in_order] + seen[in_order]
        seen += counts
    return places
