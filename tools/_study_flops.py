"""How many FLOPs a run has, by the planner: forward, backward and the optimizer's products, of every head and stage.

A head takes part from its `start` on, and a source's `stages` have other images: the step is counted for each
combination that occurs, and a run is the sum over its steps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Counted:
    """What an arm costs.

    Attributes:
        steps: Of a run.
        flops: Of a run.
        stages: (first step, FLOPs of a step from there on, the mean), ascending.
    """

    steps: int
    flops: float
    stages: tuple[tuple[int, float], ...]

    @property
    def step_flops(self) -> float:
        """FLOPs of a step, the mean over the run."""
        return self.flops / self.steps

    def flops_until(self, step: float) -> float:
        """FLOPs of the first so many steps, or of a part of one."""
        ends = [*(begin for begin, _ in self.stages[1:]), self.steps]
        return sum(
            flops * max(0.0, min(step, end) - begin) for (begin, flops), end in zip(self.stages, ends, strict=True)
        )


class RunCounter:
    """FLOPs of the steps of a model on its data.

    Args:
        model: A `MultiTask`.
        data: Its `MultiTaskData`.
    """

    def __init__(self, model: Any, data: Any) -> None:
        from indiclip.planning.memory import weigh
        from indiclip.planning.run_phases import RunPhases

        self.phases, self.update = RunPhases(model, data), weigh(model).update.flops

    def stages(self, steps: int) -> tuple[tuple[int, float], ...]:
        """(first step, FLOPs of a step from there on, the mean) of a run of so many steps."""
        return tuple((begin, flops / (end - begin)) for begin, end, flops in self._phases(steps))

    def _phases(self, steps: int) -> Iterator[tuple[int, int, float]]:
        """(first step, the one behind the last, FLOPs) of each phase."""
        for begin, end in pairwise([*self.phases.borders(steps), steps]):
            yield begin, end, (end - begin) * self.update + self.phases.flops(begin, end, steps)

    def total(self, steps: int) -> float:
        """FLOPs of a run of so many steps."""
        return sum(flops for _, _, flops in self._phases(steps))

    def counted(self, steps: int) -> Counted:
        return Counted(steps, self.total(steps), self.stages(steps))

    def within(self, flops: float) -> int:
        """The most steps that a run within so many FLOPs has; 0 where not even one is."""
        if self.total(1) > flops:
            return 0
        low, high = 1, 2
        while self.total(high) <= flops:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.total(middle) <= flops else (low, middle)
        return low


def count_arm(words: list[str], steps: int | None, flops: float | None) -> Counted:
    """Count the run of a config of so many steps, or the longest within so many FLOPs, without training it.

    Args:
        words: Of `indiclip fit`.

    Raises:
        ValueError: A config that does not fit, or not one step within the FLOPs.
    """
    from indiclip.commands.config_samples import build_run
    from indiclip.training.checks import check

    given = sys.argv[:]
    try:
        model, data, _ = build_run(words)
    finally:
        sys.argv[:] = given
    check(model, data, "fit")
    counter = RunCounter(model, data)
    if steps is None:
        assert flops is not None
        try:
            steps = counter.within(flops)
        except ValueError as error:  # a number of steps that a shorter run has not
            raise ValueError(f"{error}, which suits arms with different numbers of steps") from error
    if steps < 1:
        raise ValueError(f"budget: {flops:.3g} FLOPs; one step takes {counter.total(1):.3g}")
    return counter.counted(steps)
