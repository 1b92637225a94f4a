"""What a study has found: each arm beside the control by every score, at equal FLOPs and at equal steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from _study_runs import common_step, curve
from _study_scores import Scores, directions, scored
from _study_state import Study
from _study_statistics import NO_DIFFERENCE, NOT_JUDGED, Difference, holm, paired, pooled

from indiclip.evals.protocols.metrics import Interval, parity_gap

DIVERGED = "diverged"
_UNDECIDED = (NO_DIFFERENCE, NOT_JUDGED)


@dataclass(frozen=True)
class Compared:
    """An arm beside the control, by one score and at equal FLOPs or equal steps.

    Attributes:
        own: By the arm's own spread, `pooled` by that of all arms; each with its corrected p-value and verdict.
        images: Over images instead of seeds; None of a score that is no share of images.
        diverged: Seeds of the arm that ended in numbers that are not finite, and are in none of these.
    """

    own: Difference
    own_p: float
    own_verdict: str
    pooled: Difference
    pooled_p: float
    pooled_verdict: str
    images: Interval | None = None
    diverged: tuple[int, ...] = ()

    @property
    def verdict(self) -> str:
        """By the pooled spread; an arm is not judged by those of its seeds alone that went well."""
        return DIVERGED if self.diverged else self.pooled_verdict

    @property
    def only_pooled(self) -> bool:
        """Whether the arm's own differences would not have said so."""
        return self.verdict not in (*_UNDECIDED, DIVERGED) and self.own_verdict in _UNDECIDED


class Results:
    """All scores of a study, by seed.

    Args:
        study: Of which some runs may be left.
    """

    def __init__(self, study: Study) -> None:
        self.study, self.grid = study, study.grid
        self.places = [study.place(run) for run in study.seeds()]
        self.scores = {(p.run.arm, p.run.seed): scored(p, self.grid) for p in self.places}
        self.better = directions(self.grid)
        self.names = [*dict.fromkeys(name for of in self.scores.values() for at in of.values() for name in at)]

    def direction(self, name: str) -> str:
        """Which direction of a score is better."""
        return self.better.get(name, "lower" if "gap_to" in name else "higher")

    def values(self, arm: str, name: str, step: int | None = None) -> dict[int, float]:
        """Seed -> score of an arm after a step; None is its last."""
        step = self.study.counted[arm].steps if step is None else step
        found: dict[int, Scores] = {
            seed: at[step] for (own, seed), at in self.scores.items() if own == arm and step in at
        }
        return {seed: at[name] for seed, at in found.items() if math.isfinite(at.get(name, math.nan))}

    def diverged(self, arm: str) -> tuple[int, ...]:
        """The seeds of an arm that diverged."""
        return tuple(place.run.seed for place in self.places if place.run.arm == arm and "diverged" in place.state())

    def compared(self, name: str, equal: str) -> dict[str, Compared]:
        """Each arm beside the control by a score, at equal `FLOPs` or `steps`."""
        others = [arm for arm in self.grid.arms if arm != self.grid.control]
        if equal == "steps":
            others = [arm for arm in others if arm not in self.grid.not_at_equal_steps]
        sides = {arm: self._sides(arm, name, equal) for arm in others}
        own = {arm: self._signed(arm, paired(*side, self.grid.folds)) for arm, side in sides.items()}
        control = self.values(self.grid.control, name)
        whole = {arm: side[0] for arm, side in sides.items() if control and side[0].keys() >= control.keys()}
        of_pool = pooled(whole | {self.grid.control: control}, own, self.grid.folds)
        own_p, pooled_p = self._corrected(own), self._corrected(of_pool)
        direction = self.direction(name)
        return {
            arm: Compared(
                own[arm],
                own_p[arm],
                own[arm].verdict(own_p[arm], direction),
                of_pool[arm],
                pooled_p[arm],
                of_pool[arm].verdict(pooled_p[arm], direction),
                self._over_images(arm, name) if equal == "FLOPs" else None,
                self.diverged(arm),
            )
            for arm in others
        }

    def _corrected(self, differences: dict[str, Difference]) -> dict[str, float]:
        """Holm's p-values of arms; those that are only screened are a family of their own."""
        corrected: dict[str, float] = {}
        for is_screened in (False, True):
            family = [arm for arm in differences if (arm in self.grid.seeds_of) == is_screened]
            corrected |= dict(zip(family, holm([differences[arm].p for arm in family]), strict=True))
        return corrected

    def _sides(self, arm: str, name: str, equal: str) -> tuple[dict[int, float], dict[int, float]]:
        if equal == "FLOPs":
            return self.values(arm, name), self.values(self.grid.control, name)
        steps = common_step(self.study.counted[arm].steps, self.study.counted[self.grid.control].steps)
        return self.values(arm, name, steps[0]), self.values(self.grid.control, name, steps[1])

    def _signed(self, arm: str, difference: Difference) -> Difference:
        """Of an arm that leaves something out: what that something gives."""
        if arm not in self.grid.reversed:
            return difference
        return Difference(-difference.value, -difference.high, -difference.low, difference.p, difference.num)

    def reached(self, arm: str) -> float:
        """At which share of the budget in FLOPs an arm's validations are where the control's end, a mean over seeds;
        NaN where they never are.
        """
        sign = 1.0 if self.grid.select.better == "higher" else -1.0
        validations = {
            name: [curve(place, self.grid.select.metric) for place in self.places if place.run.arm == name]
            for name in (arm, self.grid.control)
        }
        ends = [points[-1][1] for points in validations[self.grid.control] if points]
        if not ends:
            return math.nan
        counted = self.study.counted[arm]
        steps = [_crossing(points, float(np.mean(ends)), sign) for points in validations[arm] if points]
        shares = [counted.flops_until(step) / counted.flops if math.isfinite(step) else math.nan for step in steps]
        return float(np.mean(shares)) if shares else math.nan

    def _over_images(self, arm: str, name: str) -> Interval | None:
        """Newcombe's paired interval over the images, which all seeds share; None of folds, where they do not."""
        if self.grid.folds or arm in self.grid.reversed:
            return None
        hits: dict[str, dict[int, np.ndarray]] = {arm: {}, self.grid.control: {}}
        for place in self.places:
            file = place.folder / f"hits-{place.run.steps}.npz"
            if place.run.arm in hits and file.exists():
                with np.load(file) as content:
                    hits[place.run.arm] |= {place.run.seed: content[name]} if name in content else {}
        own, control = hits[arm], hits[self.grid.control]
        seeds = sorted(own.keys() & control.keys())
        if not seeds or len({len(of[seed]) for of in (own, control) for seed in seeds}) > 1:
            return None
        image_N = np.tile(np.arange(len(own[seeds[0]])), len(seeds))
        own_N, control_N = (np.concatenate([of[seed] for seed in seeds]) for of in (own, control))
        return parity_gap(own_N, control_N, cluster_N=image_N)


def _crossing(points: list[tuple[int, float]], goal: float, sign: float) -> float:
    """The step at which a curve reaches a goal, between two points in proportion; NaN where it never does."""
    before = (0, math.nan)
    for step, value in points:
        if sign * value >= sign * goal:
            share = (goal - before[1]) / (value - before[1]) if value != before[1] else 1.0
            return before[0] + (step - before[0]) * (share if math.isfinite(share) else 1.0)
        before = (step, value)
    return math.nan
