"""The state of a study: what is counted, which runs are done, which are next, and at which learning rates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median

from _study_flops import Counted, count_arm
from _study_grid import PREPARED, Grid, Run, arm_content, digest_of
from _study_runs import Costs, Place, how_ended, last_line, metrics, planned_runs, train
from _study_scores import score, scored
from _study_slice import FORK, Task

from indiclip import json_lines
from indiclip.names import check_choice, did_you_mean

_FLOPS = 4e10  # of a core in a second, where nothing was timed yet


class Study:
    """A grid and the folder of its runs.

    Args:
        grid: What is to be done.
        root: Of the study.
    """

    def __init__(self, grid: Grid, root: Path) -> None:
        self.grid, self.root = grid, root
        self.counted = count(grid, root)
        self.runs = planned_runs(grid, self.counted)

    def place(self, run: Run) -> Place:
        return Place(self.root, run)

    def rate(self, arm: str) -> float | None:
        """The learning rate that was best for an arm; None where it is not known yet, or is the config's own."""
        rates = self.grid.learning_rates
        if len(rates) < 2:
            return rates[0] if rates else None
        values = self.rates(arm)
        if len(values) < len(rates):
            return None
        sign = 1 if self.grid.select.better == "higher" else -1
        return max(values, key=lambda rate: sign * values[rate] if math.isfinite(values[rate]) else -math.inf)

    def rates(self, arm: str) -> dict[float, float]:
        """Learning rate -> what validation gave, of those that were tried; NaN of one that diverged.

        Raises:
            ValueError: Validation has no such metric.
        """
        places = [self.place(run) for run in self.runs["rates"] if run.arm == arm]
        done = [place for place in places if place.is_done(self.grid)]
        return {place.run.lr or 0.0: self._validated(place) for place in done}

    def _validated(self, place: Place) -> float:
        found, metric = metrics(place), self.grid.select.metric
        if found and metric not in found:
            names = [name for name in found if name.startswith("val/")]
            raise ValueError(
                f"{self.grid.file}: select.metric: found {metric!r}{did_you_mean(metric, names)}; "
                f"expected one of {', '.join(names)}"
            )
        value = found.get(metric)
        return math.nan if value is None else float(value)

    def seeds(self) -> list[Run]:
        """The full runs whose learning rate is known; the first seed of all arms, then the next."""
        tuned = len(self.grid.learning_rates) > 1
        rates = {arm: self.rate(arm) for arm in self.grid.arms}
        runs = [
            replace(run, lr=rates[run.arm]) for run in self.runs["seeds"] if not tuned or rates[run.arm] is not None
        ]
        return sorted(runs, key=lambda run: self.grid.seeds.index(run.seed))

    def todo(self) -> Iterator[Task]:
        """What is left and can be begun now, in the order in which it is to be."""
        costs, before, seeds = Costs(self.root), self.runs["reference"], self.seeds()
        for place in map(self.place, [*before, *seeds]):
            missing = {*place.run.marks} - scored(place, self.grid).keys()
            if missing and place.is_done(self.grid) and metrics(place):
                place.check_snapshots(missing)
                seconds = costs.scoring() * len(missing)
                key = (place.run.arm, place.run.name, "score")
                yield Task(key, seconds, partial(score, place, self.grid), partial(_scoring_ended, place))
        for place in map(self.place, [*self.runs["timing"], *before, *self.runs["rates"], *seeds]):
            if not place.is_done(self.grid):
                key = (place.run.arm, place.run.name, "train")
                yield Task(key, self.run_seconds(place.run, costs), partial(train, place, self.grid), place.end)

    def first(self, *names: str) -> list[Task]:
        """What is left of the runs of these names; see `check_names`, which the first that is done fails."""
        self.check_names()
        return [task for task in self.todo() if task.key[1] in names]

    def check_names(self) -> None:
        """Raise ValueError where the timed runs have no such validation, or weights before training no such score."""
        for place in map(self.place, self.runs["timing"]):
            self._validated(place)
        (before,) = self.runs["reference"]
        if found := scored(self.place(before), self.grid).get(before.steps):
            for number, name in enumerate(self.grid.main):
                check_choice(f"{self.grid.file}: main[{number}]", name, found)

    def step_seconds(self, arm: str, costs: Costs) -> float:
        """CPU-seconds of a step; of an arm that was not timed by its FLOPs, as fast as those that were."""
        if own := costs.step(arm):
            return own
        flops = {name: counted.step_flops for name, counted in self.counted.items()}
        rates = [flops[name] / seconds for name in flops if (seconds := costs.step(name))]
        return flops[arm] / (median(rates) if rates else _FLOPS)

    def run_seconds(self, run: Run, costs: Costs) -> float:
        """CPU-seconds of a training."""
        return costs.overhead(run.arm) + run.steps * self.step_seconds(run.arm, costs)

    def left(self) -> tuple[int, float]:
        """How many runs are not done and scored, and about how many CPU-seconds they take."""
        costs, runs, seconds = Costs(self.root), 0, 0.0
        for run in [run for kind in self.runs.values() for run in kind]:
            place = self.place(run)
            trains = not place.state().get("done") and not place.state().get("diverged")
            missing = 0 if place.state().get("diverged") else len({*run.marks} - scored(place, self.grid).keys())
            runs += bool(trains or missing)
            seconds += trains * self.run_seconds(run, costs) + missing * costs.scoring()
        return runs, seconds


def _scoring_ended(place: Place, status: int) -> str:
    return f"{place.folder}: scoring {how_ended(status)}: {last_line(place.file('log'))}" if status else ""


def count(grid: Grid, root: Path) -> dict[str, Counted]:
    """Steps and FLOPs of each arm, counted in another process; what was counted before is read."""
    prepared, file = root / PREPARED, root / "counted.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    known = dict(before)
    with ProcessPoolExecutor(1, mp_context=FORK) as pool:

        def counted(arm: str, steps: int | None, flops: float | None) -> Counted:
            key = digest_of([arm_content(grid, arm, prepared), steps, flops])
            try:
                if key not in known:
                    words = [*grid.words(arm, prepared), "--data.num_workers=0"]
                    known[key] = asdict(pool.submit(count_arm, words, steps, flops).result())
            except (ValueError, FileNotFoundError) as error:
                raise ValueError(f"{grid.file}: arms.{arm}: {error}") from error
            stages = tuple((int(begin), float(flops)) for begin, flops in known[key]["stages"])
            return Counted(known[key]["steps"], known[key]["flops"], stages)

        control = counted(grid.control, grid.budget.steps, grid.budget.flops)
        flops = grid.budget.flops or control.flops
        others = {arm: counted(arm, None, flops) for arm in grid.arms if arm != grid.control}
    if known != before:
        root.mkdir(parents=True, exist_ok=True)
        json_lines.write_whole(file, json.dumps(known).encode())
    return {arm: others.get(arm, control) for arm in grid.arms}
