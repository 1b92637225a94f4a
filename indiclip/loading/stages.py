"""Fewer tokens where they suffice: smaller images, dropped patches and other batches for the first part of a run.

What an image is given is a function of the step's number alone, so nothing has to be saved to resume.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from indiclip.names import check_range
from indiclip.steps import check_ends, start_within


class TokenBudget(NamedTuple):
    """The patches of an image."""

    max_tokens: int  # most, before any is dropped; larger images are scaled down
    drop: float = 0.0  # share that is left out

    def kept(self, counts: np.ndarray | int) -> np.ndarray:
        """How many of so many patches stay: the nearest whole number, halves up, and at least one."""
        return np.maximum(1, np.floor(np.asarray(counts) * (1 - self.drop) + 0.5)).astype(np.int64)

    @property
    def most_kept(self) -> int:
        """Patches of the largest image after the drop."""
        return int(self.kept(self.max_tokens))


@dataclass
class Stage:
    """The beginning of a run, up to a step.

    Args:
        until: Its end: a share of the run's steps below 1, or the number of the first step behind it. The run's length
            is `trainer.max_steps` or `max_epochs`; a run that goes on with another one has other shares.
        max_tokens: In place of the source's.
        drop: In place of the source's.
        batch_size: In place of the source's, where that has one; of all sources of the task alike.
    """

    until: float
    max_tokens: int | None = None
    drop: float | None = None
    batch_size: int | None = None


def check_stages(stages: Sequence[Stage], key: str) -> None:
    """Raise ValueError for a stage that ends nowhere or changes nothing, or for bad tokens."""
    for i, stage in enumerate(stages):
        own = f"{key}[{i}]"
        if stage.max_tokens is None and stage.drop is None and stage.batch_size is None:
            raise ValueError(f"{own}: changes nothing; expected max_tokens, drop or batch_size beside until")
        check_range({f"{own}.max_tokens": stage.max_tokens, f"{own}.batch_size": stage.batch_size}, 1)
        check_range({f"{own}.drop": stage.drop}, 0, 1, without=1)
    check_ends([stage.until for stage in stages], key)


def stage_ends(stages: Sequence[Stage], run_steps: int | None, key: str) -> list[int]:
    """The number of the first step behind each stage.

    Args:
        run_steps: Of the whole run; None where it has no end.
        key: Of the stages in the YAML.

    Raises:
        ValueError: A stage that goes beyond the run, or is a share of one without an end.
    """
    return [start_within(f"{key}[{i}].until", stage.until, run_steps) for i, stage in enumerate(stages)]
