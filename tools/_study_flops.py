"""How many FLOPs a run has, by the planner: forward, backward and the optimizer's products, of every head and stage.

A head takes part from its `start` on, and a source's `stages` have other images: the step is counted for each
combination that occurs, and a run is the sum over its steps.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from indiclip.steps import first_step


@dataclass(frozen=True)
class Counted:
    """What an arm costs.

    Attributes:
        steps: Of a run.
        flops: Of a run.
        stages: (first step, FLOPs of a step from there on), ascending.
    """

    steps: int
    flops: float
    stages: tuple[tuple[int, float], ...]


class RunCounter:
    """Counts steps of a model on its data; what was counted once is not counted again.

    Args:
        model: A `MultiTask`.
        data: Its `MultiTaskData`.
    """

    def __init__(self, model: Any, data: Any) -> None:
        from indiclip.planning.memory import weigh

        self.model, self.data = model, data
        self.heads = {name: head.start for name, head in model.heads.items()}
        self.update = weigh(model).update.flops
        self._known: dict[tuple[Any, ...], float] = {}

    def stages(self, steps: int) -> tuple[tuple[int, float], ...]:
        """(first step, FLOPs of a step from there on) of a run of so many steps."""
        ends = [stage.until for source in self.data.train for stage in source.stages]
        begins = sorted({0, *(first_step(place, steps) for place in (*self.heads.values(), *ends))})
        return tuple((begin, self._flops(begin, steps)) for begin in begins if begin < steps)

    def total(self, steps: int) -> float:
        """FLOPs of a run of so many steps."""
        stages = self.stages(steps)
        ends = [*(begin for begin, _ in stages[1:]), steps]
        return sum((end - begin) * flops for (begin, flops), end in zip(stages, ends, strict=True))

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

    def _flops(self, step: int, steps: int) -> float:
        from torch import nn

        from indiclip.planning.step_model import step_model

        names = tuple(name for name, start in self.heads.items() if first_step(start, steps) <= step)
        sources = [_at(source, step, steps) for source in self.data.train]
        tasks = {self.model.heads[name].task for name in names}
        sources = [source for source in sources if source.task in tasks]
        key = (names, *((source.task, source.max_tokens, source.drop) for source in sources))
        if key not in self._known:
            every = self.model.heads
            self.model.heads = nn.ModuleDict({name: every[name] for name in names})
            try:
                data = SimpleNamespace(train=sources, seed=self.data.seed, preprocessing=self.data.preprocessing)
                counted = step_model(self.model, data, 1, None).values()
                self._known[key] = sum(count.flops for of in counted for count in of.counts(1).values())
            finally:
                self.model.heads = every
        return self._known[key] + self.update


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
        steps = counter.within(flops)
    if steps < 1:
        raise ValueError(f"budget: {flops:.3g} FLOPs; one step takes {counter.total(1):.3g}")
    return counter.counted(steps)


def _at(source: Any, step: int, steps: int) -> Any:
    """A source as it is in a step, without stages."""
    ends = [first_step(stage.until, steps) for stage in source.stages]
    number = next((number for number, end in enumerate(ends) if step < end), None)
    if not source.stages:
        return source
    budget = source.budgets[len(ends) if number is None else number]
    plain = replace(source, stages=[], max_tokens=budget.max_tokens, drop=budget.drop)
    plain.required_fields = source.required_fields
    return plain
