"""The phases of a run: where its images, batches or heads change, and what a step of each takes.

A head takes part from its `start` on, a source's `stages` have other images and batches, and its `views` begin when
they are told to: between these a step is like any other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from indiclip.planning.step_model import TaskModel, step_model
from indiclip.steps import first_step


class RunPhases:
    """Counts steps of a model on its data; what was counted once is not counted again.

    Args:
        model: A `MultiTask`; its weights are not read.
        data: A `MultiTaskData`.
        world: Ranks that share each batch.
        autocast: Data type of mixed precision.
    """

    def __init__(self, model: Any, data: Any, world: int = 1, autocast: torch.dtype | None = None) -> None:
        self.model, self.data, self.world, self._options = model, data, world, (world, autocast)
        self._known: dict[tuple[Any, ...], dict[str, TaskModel]] = {}

    def borders(self, num_steps: int) -> list[int]:
        """The first step of each phase of a run of so many steps, ascending from 0."""
        changes = [head.start for head in self.model.each_head()]
        changes += [change for source in self.data.train for change in source.changes]
        steps = {0, *(first_step(change, num_steps) for change in changes)}
        return sorted(step for step in steps if step < num_steps)

    def heads(self, step: int, num_steps: int) -> list[str]:
        """The names of those that take part in a step."""
        return [head.name for head in self.model.each_head() if first_step(head.start, num_steps) <= step]

    def tasks(self, step: int, num_steps: int) -> dict[str, TaskModel]:
        """Task -> its part of a rank's step, as it is where the task has a batch."""
        heads = self.heads(step, num_steps)
        passed = [
            (number, change)
            for number, source in enumerate(self.data.train)
            for change in source.changes
            if first_step(change, num_steps) <= step
        ]
        key = (*heads, *passed)
        if key not in self._known:
            with self._with_heads(heads):
                self._known[key] = step_model(self.model, self.data, *self._options, at=(num_steps, step))
        return self._known[key]

    def flops(self, first: int, end: int, num_steps: int) -> float:
        """Of a rank's steps from `first` to before `end`, all of one phase; the optimizer aside."""
        return sum(
            (-(-end // of.every) - -(-first // of.every)) * sum(count.flops for count in of.counts(self.world).values())
            for of in self.tasks(first, num_steps).values()
        )

    @contextmanager
    def _with_heads(self, names: list[str]) -> Iterator[None]:
        every = self.model.heads
        self.model.heads = nn.ModuleDict({name: every[name] for name in names})
        try:
            yield
        finally:
            self.model.heads = every
