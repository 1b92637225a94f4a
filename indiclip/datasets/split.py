"""A held-out part of a dataset that has none of its own."""

import re
from typing import Literal

import numpy as np

from indiclip.datasets.base import SampleDataset
from indiclip.datasets.subset import Subset
from indiclip.datasets.tables import stable_hash


class Split(Subset):
    """The training or the held-out part, by a hash of each sample's group: of its picture, unless `group_by` is given.

    A group never changes sides: not when the data grows, is reordered or moves to another machine.

    Args:
        dataset: The whole dataset.
        part: Which side: `train` or `val`.
        fraction: Share of the groups held out (about: every group is decided by itself).
        seed: Another seed holds out other samples. The same for both parts, or they overlap.
        fold: Which of the 1 / `fraction` disjoint parts is held out, for cross-validation.
        group_by: A regular expression found in every key: samples for which its first group (without one, the whole
            match) is the same text stay together, such as `^[^_]+` for the frames `film7_0001`, `film7_0002`.

    Raises:
        ValueError: A fraction outside 0 to 1, a fold that is not there, a part without samples, a key in which
            `group_by` or its first group finds nothing.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        part: Literal["train", "val"],
        fraction: float = 0.2,
        seed: int = 0,
        fold: int = 0,
        group_by: str | None = None,
    ) -> None:
        if part not in ("train", "val"):
            raise ValueError(f"part: found {part!r}; expected 'train' or 'val'")
        if not 0 < fraction < 1:
            raise ValueError(f"fraction: found {fraction}; expected more than 0 and less than 1")
        low, high = fold * fraction, (fold + 1) * fraction
        if fold < 0 or high > 1 + 1e-9:
            raise ValueError(f"fold: found {fold}; expected 0 to {int(1 / fraction) - 1} with fraction {fraction}")
        if not isinstance(dataset, SampleDataset):
            raise ValueError(
                f"dataset: found {type(dataset).__name__}; expected a SampleDataset (indiclip.datasets.base)"
            )
        groups = map(dataset.group, range(len(dataset))) if group_by is None else _matches(dataset, group_by)
        places = np.array([stable_hash(f"{seed}:{group}") for group in groups], dtype=np.uint64) / 2.0**64
        held_out = (low <= places) & (places < high)
        indices = np.flatnonzero(held_out == (part == "val"))
        if len(indices) == 0:
            raise ValueError(
                f"{part}: no sample of {len(dataset)} falls here with fraction {fraction}, seed {seed}, fold {fold}"
            )
        super().__init__(dataset, indices)


def _matches(dataset: SampleDataset, pattern: str) -> list[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"group_by: {pattern!r} is no regular expression: {error}") from error
    groups = []
    for key in map(dataset.key, range(len(dataset))):
        found = expression.search(key)
        group = found and found.group(min(1, expression.groups))
        if group is None:
            raise ValueError(f"group_by: {pattern!r} is not found in the key {key!r}; expected it in every key")
        groups.append(group)
    return groups
