"""Does a training signal help? Experiments over seeds at equal budgets in FLOPs, and a page with what came out.

    INDICLIP_DATA=... python tools/study.py conf/study/signals.yaml --dry_run       # runs, FLOPs, CPU-hours
    INDICLIP_DATA=... python tools/study.py conf/study/signals.yaml --jobs 2        # the same line goes on

Every arm of the grid (see `_study_grid`) is trained by `indiclip fit` for as many steps as its planner's FLOPs buy of
the budget, forward, backward and every head counted: they are exact on a machine that others use too, where seconds are
not. First each arm is timed for some steps and the weights before training are scored, then short runs choose each
arm's learning rate among the same rates, by validation, and then it is trained with every seed. A run is one process
with one thread. Its weights are scored at its end, on test data that chose nothing, and at the last step of a shorter
run that it is compared with: equal FLOPs and equal steps are read from the same run.

Nothing that is done is done again: a slice ends after `--minutes`, by Ctrl-C or by SIGTERM, with a checkpoint of what
runs, and the same command goes on. Whenever it ends it writes `study.html`, `study.md` (the main scores' verdicts) and
`study.csv` (every number of every seed) from what is there.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from _study_grid import TIMING, Grid
from _study_page import write_study
from _study_prepare import Prepared
from _study_read import read_grid
from _study_runs import BEFORE_TRAINING, Costs
from _study_slice import Slice
from _study_state import Study
from jsonargparse.typing import NonNegativeFloat, PositiveInt

from indiclip.quiet import quiet_torchao
from indiclip.training.run_folder import lock, unlock


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
    first = partial(study.first, *([TIMING] if dry_run else [TIMING, BEFORE_TRAINING]))
    if first():
        show_cost(study)
        part.work(first)
    study.check_names()
    show_plan(study)
    if dry_run:
        return part.status(left=0)
    if any(name == BEFORE_TRAINING for _, name, _ in part.failed):
        print("the weights before training are not scored: nothing more is trained")
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
