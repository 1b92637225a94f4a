"""Some of the samples of a dataset, by number."""

import numpy as np

from indiclip.datasets.base import SampleDataset
from indiclip.datasets.inventory import Inventory
from indiclip.types import Sample


class Subset(SampleDataset):
    """The samples of these numbers, with the keys that they have in the whole dataset.

    Args:
        dataset: The whole dataset.
        indices: int, ascending.
    """

    def __init__(self, dataset: SampleDataset, indices: np.ndarray) -> None:
        self.dataset, self._indices = dataset, indices
        self.classes, self.category_ids = dataset.classes, dataset.category_ids
        self.captioned, self.damaged = dataset.captioned, dataset.damaged
        columns = (dataset.labels, dataset.clusters, dataset.sizes_hw)
        self.labels, self.clusters, self.sizes_hw = (None if column is None else column[indices] for column in columns)
        self.starts = None if dataset.starts is None else np.searchsorted(indices, dataset.starts)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[int(self._indices[index])]

    def key(self, index: int) -> str:
        """The key in the whole dataset. Reads and decodes nothing."""
        return self.dataset.key(int(self._indices[index]))

    @property
    def inventory(self) -> Inventory:
        """That of the whole dataset."""
        return self.dataset.inventory

    def group(self, index: int) -> str:
        """The group in the whole dataset."""
        return self.dataset.group(int(self._indices[index]))

    def captions(self, index: int) -> dict[str, list[str]]:
        """See `SampleDataset`."""
        return self.dataset.captions(int(self._indices[index]))

    def prefetch(self, shards: list[int]) -> None:
        """Of the whole dataset, whose shards these are."""
        self.dataset.prefetch(shards)
