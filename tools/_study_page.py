"""A study's page: every number, the bad ones too, with paired intervals, curves, costs and commands."""

from __future__ import annotations

import math
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _study_figures import curves, forest
from _study_grid import command
from _study_runs import Costs, common_step, curve
from _study_scores import Scores, directions, scored
from _study_statistics import NO_DIFFERENCE, Difference, holm, paired, pooled

from indiclip import json_lines
from indiclip.evals.protocols.metrics import Interval, parity_gap
from indiclip.evals.reports.page import write_page

if TYPE_CHECKING:
    from _study_prepare import Prepared
    from study import Study


@dataclass(frozen=True)
class Compared:
    """An arm beside the control, by one score and at equal FLOPs or equal steps.

    Attributes:
        own: By the arm's own spread, `pooled` by that of all arms; each with its corrected p-value and verdict.
        images: Over images instead of seeds; None of a score that is no share of images.
    """

    own: Difference
    own_p: float
    own_verdict: str
    pooled: Difference
    pooled_p: float
    pooled_verdict: str
    images: Interval | None = None


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

    def compared(self, name: str, equal: str) -> dict[str, Compared]:
        """Each arm beside the control by a score, at equal `FLOPs` or `steps`."""
        others = [arm for arm in self.grid.arms if arm != self.grid.control]
        if equal == "steps":
            others = [arm for arm in others if arm not in self.grid.not_at_equal_steps]
        sides = {arm: self._sides(arm, name, equal) for arm in others}
        own = {arm: self._signed(arm, paired(*side)) for arm, side in sides.items()}
        control = self.values(self.grid.control, name)
        whole = {arm: side[0] for arm, side in sides.items() if control and side[0].keys() >= control.keys()}
        of_pool = pooled(whole | {self.grid.control: control}, own)
        own_p, pooled_p = ([*holm([of[arm].p for arm in others])] for of in (own, of_pool))
        direction = self.direction(name)
        return {
            arm: Compared(
                own[arm],
                own_p[place],
                own[arm].verdict(own_p[place], direction),
                of_pool[arm],
                pooled_p[place],
                of_pool[arm].verdict(pooled_p[place], direction),
                self._over_images(arm, name) if equal == "FLOPs" else None,
            )
            for place, arm in enumerate(others)
        }

    def _sides(self, arm: str, name: str, equal: str) -> tuple[dict[int, float], dict[int, float]]:
        if equal == "FLOPs":
            return self.values(arm, name), self.values(self.grid.control, name)
        steps = common_step(self.study.counted[arm].steps, self.study.counted[self.grid.control].steps)
        return self.values(arm, name, steps[0]), self.values(self.grid.control, name, steps[1])

    def _signed(self, arm: str, difference: Difference) -> Difference:
        """Of an arm that leaves something out: what that something gives."""
        if arm not in (self.grid.reversed or {}):
            return difference
        return Difference(-difference.value, -difference.high, -difference.low, difference.p, difference.num)

    def reached(self, arm: str) -> float:
        """At which share of the budget an arm's validations are where the control's end, a mean over seeds; NaN where
        they never are.
        """
        sign = 1.0 if self.grid.better == "higher" else -1.0
        validations = {
            name: [curve(place, self.grid.metric) for place in self.places if place.run.arm == name]
            for name in (arm, self.grid.control)
        }
        ends = [points[-1][1] for points in validations[self.grid.control] if points]
        shares = [_crossing(points, float(np.mean(ends)), sign) for points in validations[arm] if points and ends]
        return float(np.mean(shares)) / self.study.counted[arm].steps if shares else math.nan

    def _over_images(self, arm: str, name: str) -> Interval | None:
        """Newcombe's paired interval over the images, which all seeds share; None of folds, where they do not."""
        if self.grid.folds or arm in (self.grid.reversed or {}):
            return None
        hits: dict[str, list[np.ndarray]] = {arm: [], self.grid.control: []}
        for place in self.places:
            file = place.folder / f"hits-{place.run.steps}.npz"
            if place.run.arm in hits and file.exists():
                with np.load(file) as content:
                    hits[place.run.arm] += [content[name]] if name in content else []
        own, control = hits[arm], hits[self.grid.control]
        count = min(len(own), len(control))
        if not count or len({len(hit_N) for hit_N in (*own, *control)}) > 1:
            return None
        image_N = np.tile(np.arange(len(own[0])), count)
        return parity_gap(np.concatenate(own[:count]), np.concatenate(control[:count]), cluster_N=image_N)


def _crossing(points: list[tuple[int, float]], goal: float, sign: float) -> float:
    """The step at which a curve reaches a goal, between two points in proportion; NaN where it never does."""
    before = (0, math.nan)
    for step, value in points:
        if sign * value >= sign * goal:
            share = (goal - before[1]) / (value - before[1]) if value != before[1] else 1.0
            return before[0] + (step - before[0]) * (share if math.isfinite(share) else 1.0)
        before = (step, value)
    return math.nan


def write_study(study: Study, prepared: Prepared, failed: list[str]) -> Path:
    """Write `study.html` and `study.md`, with what went wrong meanwhile; the page's path."""
    results = Results(study)
    grid, costs = study.grid, Costs(study.root)
    main = [name for name in grid.main if name in results.names] or results.names[:4]
    tables = {equal: {name: results.compared(name, equal) for name in results.names} for equal in ("FLOPs", "steps")}
    values = {
        "title": grid.title,
        "grid": grid,
        "results": results,
        "main": main,
        "tables": tables,
        "forests": {name: forest(results, name, tables["FLOPs"][name]) for name in main},
        "curves": {arm: curves(results, arm) for arm in grid.arms},
        "costs": _costs(study, results, costs),
        "rates": {arm: study.rates(arm) for arm in grid.arms},
        "spent": costs.total(),
        "commands": _commands(study),
        "diverged": {
            f"{p.run.arm}, {p.run.name}": p.state()["diverged"] for p in _places(study) if "diverged" in p.state()
        },
        "references": _references(study, prepared),
        "failed": failed,
        "left": study.left(),
        "machine": f"{os.cpu_count()} cores of {platform.machine()}, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "NO_DIFFERENCE": NO_DIFFERENCE,
        "signed": signed,
        "ends": ends,
        "mean_of": lambda numbers: f"{np.mean([*numbers]):.3f}" if numbers else "–",
        "shown_arm": lambda arm: f"{grid.reversed[arm]} (in the control)" if arm in (grid.reversed or {}) else arm,
    }
    json_lines.write_whole(study.root / "study.md", markdown(results, main, tables).encode())
    return write_page(study.root / "study.html", "study.html", **values)


def markdown(results: Results, main: list[str], tables: dict[str, Any]) -> str:
    """A table of the main scores: means over seeds, and beside the control the difference with its own interval."""
    grid = results.grid
    lines = [f"| arm | steps | {' | '.join(main)} |", "|---" * (2 + len(main)) + "|"]
    for arm in grid.arms:
        cells = []
        for name in main:
            own = [*results.values(arm, name).values()]
            cell = f"{np.mean(own):.3f}" if own else "–"
            if own and arm != grid.control:
                of = tables["FLOPs"][name][arm]
                cell += f" ({signed(of.own.value)}, {ends(of.own)}; {of.own_verdict}; pooled {of.pooled_verdict})"
            cells.append(cell)
        lines.append(f"| {arm} | {results.study.counted[arm].steps} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def signed(value: float) -> str:
    return "–" if not math.isfinite(value) else f"{value:+.3f}"


def ends(difference: Difference | Interval | None) -> str:
    """Of an interval."""
    if difference is None or not math.isfinite(difference.low + difference.high):
        return "–"
    return f"{difference.low:+.3f} to {difference.high:+.3f}"


def _references(study: Study, prepared: Prepared) -> dict[str, Scores]:
    """What is no arm: weights that learned nothing, and runs that were prepared."""
    (untrained,) = study.runs["reference"]
    found = {f"{name} (prepared)": prepared.scores(name) for name in prepared.items}
    found[untrained.name] = scored(study.place(untrained), study.grid).get(untrained.steps, {})
    return {name: scores for name, scores in found.items() if scores}


def _places(study: Study) -> list[Any]:
    return [study.place(run) for kind in study.runs.values() for run in kind]


def _costs(study: Study, results: Results, costs: Costs) -> list[dict[str, Any]]:
    control = study.counted[study.grid.control]
    rows = []
    for arm, counted in study.counted.items():
        runs = [row["cpu_seconds"] for row in costs.rows if row["arm"] == arm and row["run"].startswith("seed-")]
        rows.append(
            {
                "arm": arm,
                "stages": counted.stages,
                "steps": counted.steps,
                "flops": counted.flops,
                "relative": counted.flops / counted.steps / (control.flops / control.steps),
                "step_seconds": costs.step(arm),
                "seconds": sum(runs),
                "lr": study.rate(arm),
                "reached": results.reached(arm),
            }
        )
    return rows


def _commands(study: Study) -> dict[str, str]:
    """Of each arm, with the first seed."""
    first = {run.arm: run for run in reversed(study.seeds())}
    return {
        arm: command(study.place(run).words(study.grid), study.grid.environment(run.seed))
        for arm in study.grid.arms
        if (run := first.get(arm))
    }
