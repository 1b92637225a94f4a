"""What every dataset can say of its samples without reading them."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch.utils.data import Dataset

from indiclip.datasets.inventory import Inventory
from indiclip.types import Quarantined, Sample


class SampleDataset(Dataset[Sample], ABC):
    """Samples by number. A dataset of one's own gives the first three methods; all else has a default.

    Attributes:
        classes: Names of the classes that `label` and `classes` of its samples number; empty where it has none.
        category_ids: What its file calls each of `classes`, as COCO's 1 to 90 with gaps; empty where it has no numbers
            for them.
        labels: int (number of samples,): the class of each sample, -1 where it has none; None where they are unknown.
        clusters: int (number of samples,): which cluster each sample is in, from 0; None where they are unknown.
        sizes_hw: int (number of samples, 2): height and width of each image as stored, 0 where its header is
            unreadable; None where they are unknown.
        starts: int (number of shards + 1,): the samples of shard i are `starts[i]` to `starts[i + 1] - 1`; None where
            there are no shards.
        inventory: What its files hold, used and left out by reason.
        captioned: False where images without a caption may be among them that have no class to name either.
        damaged: What of its files is lost to all samples, such as the rest of a truncated shard.
        is_generated: Whether its samples are drawn, so that no photograph is among them.
    """

    classes: Sequence[str] = ()
    category_ids: Sequence[int] = ()
    labels: np.ndarray | None = None
    clusters: np.ndarray | None = None
    sizes_hw: np.ndarray | None = None
    starts: np.ndarray | None = None
    damaged: Sequence[Quarantined] = ()
    captioned = True
    is_generated = False
    _inventory: Inventory | None = None  # of a reader of files

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples."""

    @abstractmethod
    def key(self, index: int) -> str:
        """The id of a sample: unique, the same in every run and on every machine. Reads and decodes nothing."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """A sample.

        Raises:
            UnreadableSample: It cannot be read; another stands in for it.
        """

    @property
    def inventory(self) -> Inventory:
        """What its files hold; without files of its own, its samples."""
        if self._inventory is not None:
            return self._inventory
        inventory = Inventory()
        inventory.present["samples"] = inventory.used["samples"] = len(self)
        return inventory

    def group(self, index: int) -> str:
        """Samples of one group are of one picture: `Split` keeps them on one side. Reads and decodes nothing."""
        return self.key(index)

    def captions(self, index: int) -> dict[str, list[str]]:
        """All captions of a sample by language (BCP-47, "" where it is unknown). Decodes no image."""
        return {}

    def prefetch(self, shards: list[int]) -> None:
        """Bring shards near that will soon be read."""


class Keyed(Protocol):
    """What has samples with keys, as a `SampleDataset`."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...


def fingerprint(samples: Keyed) -> dict[str, int]:
    """How many samples there are, and a sum over the keys of about a thousand of them."""
    size = len(samples)
    keys = [samples.key(index) for index in range(0, size, 1 + size // 1000)]
    return {"samples": size, "crc32_of_keys": zlib.crc32(repr(keys).encode(errors="backslashreplace"))}
