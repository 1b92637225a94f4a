"""The phases of a run: where its images, batches or heads change, and what a step of each takes.

A head takes part from its `start` on, a source's `stages` have other images and batches, and its `views` begin when
they are told to: between these a step is like any other.
"""

from typing import Any

import torch

from indiclip.head_schedule import start_steps
from indiclip.planning.parts import SomeHeads
from indiclip.planning.step_model import TaskModel, step_model


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
        """The first step of each phase of a run of so many steps, ascending from 0.

        Raises:
            ValueError: A head, a stage or a view begins or ends beyond the run.
        """
        return sorted({0, *self._starts(num_steps).values(), *self._changes(num_steps)})

    def _starts(self, num_steps: int) -> dict[str, int]:
        return start_steps(self.model.each_head(), num_steps)

    def _changes(self, num_steps: int) -> list[int]:
        return [step for source in self.data.train for step in source.change_steps(num_steps)]

    def heads(self, step: int, num_steps: int) -> list[str]:
        """The names of those that take part in a step."""
        return [name for name, start in self._starts(num_steps).items() if start <= step]

    def tasks(self, step: int, num_steps: int) -> dict[str, TaskModel]:
        """Task -> its part of a rank's step, as it is where the task has a batch."""
        names = self.heads(step, num_steps)
        key = (*names, *(change <= step for change in self._changes(num_steps)))
        if key not in self._known:
            heads = [head for head in self.model.each_head() if head.name in names]
            model = SomeHeads(self.model.encoder, heads, getattr(self.model, "task_weights", None))
            self._known[key] = step_model(model, self.data, *self._options, at=(num_steps, step))
        return self._known[key]

    def flops(self, first: int, end: int, num_steps: int) -> float:
        """Of a rank's steps from `first` to before `end`, all of one phase; the optimizer aside."""
        return sum(
            (-(-end // of.every) - -(-first // of.every)) * sum(count.flops for count in of.counts(self.world).values())
            for of in self.tasks(first, num_steps).values()
        )
