"""A held-out part of a dataset that has none of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, cast

import numpy as np
from torch.utils.data import Dataset

from indiclip.datasets.tables import stable_hash
from indiclip.types import Quarantined, Sample


class Split(Dataset[Sample]):
    """The training or the held-out part, by a hash of each sample's key.

    A key never changes sides: not when the data grows, is reordered or moves to another machine.

    Args:
        dataset: A map-style dataset with `key(index)`, as all of `indiclip.data`.
        part: Which side: `train` or `val`.
        fraction: Share of the samples held out (about: every key is decided by itself).
        fold: Which of the 1 / `fraction` disjoint parts is held out, for cross-validation.
        seed: Another seed holds out other samples. The same for both parts, or they overlap.

    Raises:
        ValueError: A dataset without `key`, a fraction outside 0 to 1, or a part without samples.
    """

    def __init__(
        self,
        dataset: Dataset,  # type: ignore[type-arg]  # jsonargparse silently builds a bare Dataset where it is subscripted
        part: Literal["train", "val"],
        fraction: float = 0.2,
        seed: int = 0,
        fold: int = 0,
    ) -> None:
        if part not in ("train", "val"):
            raise ValueError(f"part: found {part!r}; expected 'train' or 'val'")
        if not 0 < fraction < 1:
            raise ValueError(f"fraction: found {fraction}; expected more than 0 and less than 1")
        low, high = fold * fraction, (fold + 1) * fraction
        if fold < 0 or high > 1 + 1e-9:
            raise ValueError(f"fold: found {fold}; expected 0 to {int(1 / fraction) - 1} with fraction {fraction}")
        if not callable(getattr(dataset, "key", None)):
            raise ValueError(f"dataset: {type(dataset).__name__} has no key(index) that tells where a sample belongs")
        self.dataset = cast(Any, dataset)
        hashes = [stable_hash(f"{seed}:{self.dataset.key(index)}") for index in range(len(self.dataset))]
        places = np.array(hashes, dtype=np.uint64) / 2.0**64
        held_out = (low <= places) & (places < high)
        self._indices = np.flatnonzero(held_out == (part == "val"))
        if len(self._indices) == 0:
            raise ValueError(
                f"{part}: no sample of {len(self.dataset)} falls here with fraction {fraction}, seed {seed}, "
                f"fold {fold}"
            )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = self.dataset[int(self._indices[index])]
        return sample

    def key(self, index: int) -> str:
        """The key in the whole dataset. Reads and decodes nothing."""
        return str(self.dataset.key(int(self._indices[index])))

    @property
    def captions(self) -> Callable[[int], Any]:
        """The dataset's own `captions(index)`, of this part; as the dataset, a part may have none."""
        of_whole = self.dataset.captions
        return lambda index: of_whole(int(self._indices[index]))

    @property
    def classes(self) -> list[str]:
        """The dataset's class names."""
        return list(self.dataset.classes)

    @property
    def labels(self) -> np.ndarray:
        """The dataset's labels, of this part."""
        return np.asarray(self.dataset.labels)[self._indices]

    @property
    def sizes_hw(self) -> np.ndarray | None:
        """The dataset's image sizes, of this part; None where it does not know them."""
        sizes = getattr(self.dataset, "sizes_hw", None)
        return None if sizes is None else np.asarray(sizes)[self._indices]

    @property
    def starts(self) -> np.ndarray | None:
        """Where each shard of the dataset begins in this part; None where there are no shards."""
        starts = getattr(self.dataset, "starts", None)
        return None if starts is None else np.searchsorted(self._indices, starts)

    def prefetch(self, shards: list[int]) -> None:
        """The dataset's own `prefetch`, where it has one."""
        if hasattr(self.dataset, "prefetch"):
            self.dataset.prefetch(shards)

    @property
    def damaged(self) -> list[Quarantined]:
        """What is lost of the whole dataset."""
        return list(getattr(self.dataset, "damaged", []))

    @property
    def captioned(self) -> bool:
        """Whether every image of the dataset has a caption."""
        return bool(getattr(self.dataset, "captioned", True))

    @property
    def left_out(self) -> Counter[str]:
        """What the whole dataset left out, by reason."""
        return Counter(getattr(self.dataset, "left_out", {}))
