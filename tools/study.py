"""Does a training signal help? Experiments over seeds at equal budgets in FLOPs, and a page with what came out.

    INDICLIP_DATA=... python tools/study.py conf/study/signals.yaml --dry_run       # runs, FLOPs, CPU-hours
    INDICLIP_DATA=... python tools/study.py conf/study/signals.yaml --jobs 2        # the same line goes on

Every arm of the grid (see `_study_grid`) is trained by `indiclip fit` for as many steps as its planner's FLOPs buy of
the budget, forward, backward and every head counted: they are exact on a machine that others use too, where seconds
are not. First each arm is timed for some steps and untrained weights are scored, then short runs choose each arm's
learning rate among the same rates, by validation, and then it is trained with every seed. A run is one process with one
thread. Its weights are scored at its end, on test data that chose nothing, and at the last step of a shorter run that
it is compared with: equal FLOPs and equal steps are read from the same run.

Nothing that is done is done again: a slice ends after `--minutes`, by Ctrl-C or by SIGTERM, with a checkpoint of what
runs, and the same command goes on. Whenever it ends it writes `study.html` and `study.md` from what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from _study_flops import Counted, count_arm
from _study_grid import PREPARED, TIMING, Grid, Run, arm_content, digest_of
from _study_page import write_study
from _study_prepare import Prepared
from _study_read import read_grid
from _study_runs import UNTRAINED, Costs, Place, how_ended, last_line, metrics, planned_runs, train
from _study_scores import score, scored
from _study_slice import FORK, Slice, Task
from jsonargparse.typing import NonNegativeFloat, PositiveInt

from indiclip import json_lines
from indiclip.names import check_choice, did_you_mean
from indiclip.quiet import quiet_torchao
from indiclip.training.run_folder import lock, unlock

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
        costs, untrained, seeds = Costs(self.root), self.runs["reference"], self.seeds()
        for place in map(self.place, [*untrained, *seeds]):
            missing = {*place.run.marks} - scored(place, self.grid).keys()
            if missing and place.is_done(self.grid) and metrics(place):
                seconds = costs.scoring() * len(missing)
                key = (place.run.arm, place.run.name, "score")
                yield Task(key, seconds, partial(score, place, self.grid), partial(_scoring_ended, place))
        for place in map(self.place, [*self.runs["timing"], *untrained, *self.runs["rates"], *seeds]):
            if not place.is_done(self.grid):
                key = (place.run.arm, place.run.name, "train")
                yield Task(key, self.run_seconds(place.run, costs), partial(train, place, self.grid), place.end)

    def first(self, *names: str) -> list[Task]:
        """What is left of the runs of these names."""
        return [task for task in self.todo() if task.key[1] in names]

    def check_names(self) -> None:
        """Raise ValueError where the timed runs have no such validation, or the untrained weights no such score."""
        for place in map(self.place, self.runs["timing"]):
            self._validated(place)
        (untrained,) = self.runs["reference"]
        if found := scored(self.place(untrained), self.grid).get(untrained.steps):
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


def without_prepared(grid: Grid) -> Grid:
    """For a plan before all is prepared: the grid of those arms that need nothing of it; of none without control."""
    needing = [arm for arm, words in grid.arms.items() if any("{folder}" in word for word in (*grid.base, *words))]
    needing = [*grid.arms] if grid.control in needing else needing
    if needing:
        print(f"counted and timed once that is prepared: {', '.join(needing)}", flush=True)
    return replace(grid, arms={arm: words for arm, words in grid.arms.items() if arm not in needing})


def show_plan(study: Study) -> None:
    """Print runs, FLOPs and CPU-hours."""
    grid, costs = study.grid, Costs(study.root)
    print(f"{grid.title}\n{len(grid.arms)} arms, {len(grid.seeds)} seeds, {len(grid.learning_rates)} learning rates")
    print(
        f"{'arm':24} {'FLOPs a step':>13} {'steps':>7} {'FLOPs':>10} {'s a step':>9} {'s a run':>8} scored after steps"
    )
    for arm, counted in study.counted.items():
        run = next(run for run in study.runs["seeds"] if run.arm == arm)
        estimated = " " if costs.step(arm) else "~"
        seconds = f"{estimated}{study.step_seconds(arm, costs):8.3f} {study.run_seconds(run, costs):8.0f}"
        stages = " then ".join(f"{flops:.2e}" for _, flops in counted.stages)
        print(
            f"{arm:24} {stages:>13} {counted.steps:7} {counted.flops:10.3e} {seconds} {', '.join(map(str, run.marks))}"
        )
    show_cost(study)


def show_cost(study: Study) -> None:
    """Print what is left and what was spent; the seconds of arms that were not timed are estimates."""
    runs, seconds = study.left()
    done = sum(Costs(study.root).total().values())
    print(f"{runs} runs are left: about {seconds / 3600:.2f} CPU-hours; spent {done / 3600:.2f}", flush=True)


def work(grid: Grid, root: Path, part: Slice, dry_run: bool) -> int:
    """Prepare, time, choose rates, train and score, as far as the slice goes; the status of the command."""
    prepared = Prepared(grid, root)
    if [*prepared.todo()]:
        seconds, others = prepared.cpu_seconds(), without_prepared(grid)
        print(f"to prepare: {', '.join(prepared.items)}, about {seconds / 3600:.2f} CPU-hours", flush=True)
        if dry_run:
            grid = others
        else:
            if others.arms:
                show_plan(Study(others, root))
            part.work(prepared.todo)
            if [*prepared.todo()]:
                print("what is prepared is not done; the same command goes on")
                return part.status(left=1)
    if not grid.arms:
        return part.status(left=0)
    study = Study(grid, root)
    first = partial(study.first, *([TIMING] if dry_run else [TIMING, UNTRAINED]))
    if first():
        show_cost(study)
        part.work(first)
    study.check_names()
    show_plan(study)
    if dry_run:
        return part.status(left=0)
    if any(name == UNTRAINED for _, name, _ in part.failed):
        print("untrained weights are not scored: nothing more is trained")
        return part.status(left=1)
    part.work(study.todo)
    print(write_study(study, prepared, [*part.failed.values()]))
    runs, seconds = study.left()
    if runs:
        print(f"{runs} runs are left, about {seconds / 3600:.2f} CPU-hours; the same command goes on")
    return part.status(runs)


def main(words: list[str] | None = None) -> int:
    """Returns 0 where all is done, 1 where something failed, 2 for a wrong grid, 3 where runs are left, else 128 +
    the signal.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--runs", type=_folder, default=Path("runs/study"), help="folder of all studies")
    parser.add_argument("--jobs", type=PositiveInt, default=1, help="processes at a time, of one thread each")
    minutes = "of this slice; what runs then has two more to save"
    parser.add_argument("--minutes", type=NonNegativeFloat, default=140.0, help=minutes)
    parser.add_argument("--dry_run", action="store_true", help="time the arms and print the plan")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    quiet_torchao()
    import indiclip.training.cli  # noqa: F401  # for all processes, which are forked

    try:
        grid = read_grid(given.grid, build=True)
        root = given.runs / grid.name
        root.mkdir(parents=True, exist_ok=True)
        lock(root)
        return work(grid, root, Slice(given.jobs, given.minutes), given.dry_run)
    except (ValueError, FileNotFoundError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # such as of a full disk
        print(f"study: {error}; the same command goes on", file=sys.stderr)
        return 1
    finally:
        unlock()


def _folder(text: str) -> Path:
    path = Path(text).resolve()
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise argparse.ArgumentTypeError(f"found {text!r}; expected a folder, and {part} is a file")
    return path


if __name__ == "__main__":
    sys.exit(main())
