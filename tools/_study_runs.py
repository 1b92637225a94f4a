"""The trainings of a study: where each stands, what it costs, and the process that does it.

Everything is in files, so that a study goes on where it was stopped. In the folder of a study, for each arm:

    ARM/NAME.json     the run's digest, and whether it is done or has diverged
    ARM/NAME.yaml     callbacks of the run: the weights at its marks, CPU-seconds
    ARM/NAME.log      what it printed
    ARM/NAME/         the run's folder; `snapshots/STEP.ckpt`, `scores.json`
    spent.jsonl       CPU-seconds of every process
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import torch
import yaml
from _study_flops import Counted
from _study_grid import PREPARED, TIMED_STEPS, TIMING, Grid, Run, digest
from bench_transfer import cpu_seconds

from indiclip import json_lines
from indiclip.training.ema import scored_weights
from indiclip.training.fault_tolerance.ranks import folder_of

BEFORE_TRAINING = "before_training"
NEARLY = 0.02  # two numbers of steps that differ by less are taken for equal
_DIVERGED = "was not finite in"


class Snapshots(L.Callback):
    """Keeps the encoder after some steps, for `indiclip.load`: the averages where the run has an `EMA`.

    Args:
        steps: After which; a run that goes on writes the rest.
    """

    def __init__(self, steps: list[int]) -> None:
        self.steps = {*steps}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step
        file = folder_of(trainer) / "snapshots" / f"{step}.ckpt"
        if step not in self.steps or file.exists():
            return
        file.parent.mkdir(exist_ok=True)
        with scored_weights(trainer, pl_module):
            weights = {f"encoder.{name}": tensor.clone() for name, tensor in pl_module.encoder.state_dict().items()}
        content = {"encoder": pl_module.encoder.to_config(), "state_dict": weights, "global_step": step}
        with json_lines.open_whole(file) as opened:
            torch.save(content, opened)


@dataclass(frozen=True)
class Place:
    """A run's files in the folder of a study."""

    root: Path
    run: Run

    @property
    def folder(self) -> Path:
        return self.root / self.run.arm / self.run.name

    def file(self, suffix: str) -> Path:
        return self.folder.with_name(f"{self.run.name}.{suffix}")

    def words(self, grid: Grid) -> list[str]:
        """The command of the run, as anyone can type it."""
        return ["fit", *grid.words(self.run.arm, self.root / PREPARED), *self.run.flags()]

    def state(self) -> dict[str, Any]:
        """`digest`, and `done` or `diverged`; nothing where it has not begun."""
        return json.loads(self.file("json").read_text()) if self.file("json").exists() else {}

    def is_done(self, grid: Grid) -> bool:
        """Whether nothing is left to train.

        Raises:
            ValueError: Something else was trained here.
        """
        state = self.state()
        if state and state["digest"] != digest(grid, self.run, self.root / PREPARED):
            raise ValueError(
                f"{self.folder}: was trained by other configs, budget or flags than the grid has now; remove "
                f"{self.folder.parent}, or give another --runs"
            )
        return bool(state.get("done") or state.get("diverged"))

    def snapshot(self, step: int) -> Path:
        """The weights after a step."""
        return self.folder / "snapshots" / f"{step}.ckpt"

    def check_snapshots(self, steps: Iterable[int]) -> None:
        """Raise ValueError where a run that is done kept no weights of one of these steps."""
        for step in steps:
            if not self.snapshot(step).is_file():
                raise ValueError(
                    f"{self.folder}: kept no weights of step {step}, at which it is compared with an arm that came "
                    f"later or has other FLOPs now; remove {self.folder} and {self.file('json')} to train it again"
                )

    def begin(self, grid: Grid) -> None:
        """Write what the process reads."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        clock = {"every_n_steps": 1} if self.run.name == TIMING else {}
        callbacks = [
            {"class_path": "bench_transfer.CPUClock", "init_args": clock},
            {"class_path": "_study_runs.Snapshots", "init_args": {"steps": list(self.run.marks)}},
        ]
        self.file("yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": callbacks}}))
        log = self.file("log")
        state = {"digest": digest(grid, self.run, self.root / PREPARED)}
        state |= {"log_bytes": log.stat().st_size if log.exists() else 0}
        json_lines.write_whole(self.file("json"), json.dumps(state).encode())

    def end(self, status: int) -> str:
        """Note how the process ended; what went wrong, or nothing."""
        if status == 0:
            json_lines.write_whole(self.file("json"), json.dumps(self.state() | {"done": True}).encode())
            return ""
        last = last_line(self.file("log"), "indiclip:", "error", behind=self.state().get("log_bytes", 0))
        if _DIVERGED in last:  # a result
            json_lines.write_whole(self.file("json"), json.dumps(self.state() | {"diverged": last}).encode())
            return ""
        return f"{self.folder}: {how_ended(status)}: {last[:300] or 'it printed nothing'}"


def how_ended(status: int) -> str:
    """A process that failed."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"


def last_line(log: Path, *starts: str, behind: int = 0) -> str:
    """Of what a process printed, the last that begins so, else the last.

    Args:
        log: What all processes of a run have printed.
        starts: Of lines.
        behind: The size of the log when the process was begun.
    """
    lines = log.read_bytes()[behind:].decode(errors="replace").strip().splitlines() if log.exists() else []
    return next((line for line in reversed(lines) if line.startswith(starts)), lines[-1] if lines else "")


def train(place: Place, grid: Grid) -> None:
    """Do a run, or go on with it; in a process of its own, which it ends with the command's status."""
    place.begin(grid)
    words = place.words(grid)
    own = ["--config", str(place.file("yaml"))]
    last_config = max((i for i, word in enumerate(words) if word == "--config"), default=-1) + 2
    words[last_config:last_config] = own
    words += ["--runs", str(place.folder.parent), "--name", place.run.name, "--ckpt_path", "last"]
    words += ["--trainer.enable_progress_bar=false"]
    begin_process(place.file("log"), grid.environment(place.run.seed))
    from indiclip.training.cli import run

    status = run(words)
    spent(place.root, place.run.arm, place.run.name, "train")
    sys.exit(status)


def begin_process(log: Path, environment: dict[str, str]) -> None:
    """Of a forked process: one thread, output to a file, and no life beyond the one that started it."""
    from indiclip.loading.workers import end_with_the_parent

    end_with_the_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until training handles it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment | {"OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for number in {1, 2, sys.stdout.fileno(), sys.stderr.fileno()}:
        os.dup2(file, number)


def spent(root: Path, arm: str, run: str, kind: str, states: int = 0) -> None:
    """Note what this process and its children have cost, and the weights of how many steps it has scored."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    row = {"arm": arm, "run": run, "kind": kind, "states": states, "cpu_seconds": round(seconds, 2)}
    json_lines.append(root / "spent.jsonl", [row | {"date": time.strftime("%Y-%m-%d %H:%M"), "code": code()}])


def code() -> str:
    """Which commit is running, `+` where it was changed; nothing where this is no checkout of git."""
    try:
        ask = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(ask, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def metrics(place: Place) -> dict[str, float]:
    """What validation gave at the end of a run; nothing of one that has diverged or is not done."""
    if not place.state().get("done"):
        return {}
    found: dict[str, float] = json.loads((place.folder / "metrics.json").read_text())["metrics"]
    return found


def curve(place: Place, metric: str) -> list[tuple[int, float]]:
    """(step, value) of each validation."""
    rows = json_lines.read(place.folder / "history.jsonl")
    return [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]


class Costs:
    """CPU-seconds, of finished runs and else of the short ones that were made to time the arms.

    Args:
        root: Of the study.
    """

    def __init__(self, root: Path) -> None:
        self.rows = json_lines.read(root / "spent.jsonl")
        self.root = root

    def step(self, arm: str) -> float:
        """Seconds of a step of an arm; 0 where none was timed."""
        folder = self.root / arm
        done = [run for run in folder.glob("seed-*") if run.with_name(f"{run.name}.json").exists()]
        pairs = [(cpu_seconds(run), sum(row["steps"] for row in _clock(run))) for run in done]
        whole = [seconds / steps for seconds, steps in pairs if steps >= 100]
        if whole:
            return mean(whole)
        rows = _clock(folder / TIMING)[TIMED_STEPS // 3 :]  # the first ones find caches empty
        return mean(row["cpu_seconds"] / row["steps"] for row in rows) if rows else 0.0

    def overhead(self, arm: str) -> float:
        """Seconds of a run beside its steps: start, validations, report."""
        own = [row["cpu_seconds"] for row in self.rows if (row["arm"], row["run"]) == (arm, TIMING)]
        return max(own[-1] - cpu_seconds(self.root / arm / TIMING), 0.0) if own else 20.0

    def scoring(self) -> float:
        """Seconds of scoring the weights of one step."""
        rows = [row for row in self.rows if row["kind"] == "score"]
        return sum(row["cpu_seconds"] for row in rows) / max(sum(row["states"] for row in rows), 1) if rows else 40.0

    def total(self) -> dict[str, float]:
        """Kind of process -> seconds so far."""
        kinds = {row["kind"] for row in self.rows}
        return {kind: sum(row["cpu_seconds"] for row in self.rows if row["kind"] == kind) for kind in sorted(kinds)}


def _clock(run: Path) -> list[dict[str, Any]]:
    return json_lines.read(run / "cpu_seconds.jsonl")


def planned_runs(grid: Grid, counted: dict[str, Counted]) -> dict[str, list[Run]]:
    """Of each kind: `timing`, `reference`, `rates` (a short one for each arm and learning rate), `seeds` without one.

    The reference is the control after a step of no size: what the scores are before training.

    The weights of a run are kept at its last step, and at the last step of a shorter run with which it is compared.
    """
    longest = {arm: of.steps for arm, of in counted.items()}
    first, points = grid.seeds[0], grid.points
    before = Run(grid.control, BEFORE_TRAINING, first, 1e-12, 1, points, (1,))
    runs: dict[str, list[Run]] = {"timing": [], "reference": [before], "rates": [], "seeds": []}
    for arm, steps in longest.items():
        rate = grid.learning_rates[0] if grid.learning_rates else None
        # No warm-up: a schedule may need the steps for itself.
        runs["timing"].append(Run(arm, TIMING, grid.screening.seed, rate, TIMED_STEPS, points, warmup_steps=0))
        check_points(grid, arm, "points", points, steps)
        if len(grid.learning_rates) > 1:
            runs["rates"] += [_trial(grid, arm, lr, steps) for lr in grid.learning_rates]
        marks = marks_of(grid, longest, arm)
        runs["seeds"] += [Run(arm, f"seed-{of}", of, rate, steps, points, marks) for of in grid.arm_seeds(arm)]
    return runs


def _trial(grid: Grid, arm: str, lr: float, steps: int) -> Run:
    """The short run in which a rate is tried, of an arm that has so many steps."""
    short = max(1, round(grid.screening.share * steps))
    warmup = grid.screening.warmup and max(1, round(grid.screening.warmup * short))
    name = f"rate-{lr:g}"
    check_points(grid, arm, "screening.points", grid.screening.points, short)
    return Run(arm, name, grid.screening.seed, lr, short, grid.screening.points, warmup_steps=warmup)


def check_points(grid: Grid, arm: str, key: str, points: int, steps: int) -> None:
    """Raise ValueError where a run is to have more validations than steps."""
    if points > steps:
        raise ValueError(f"{grid.file}: {key}: found {points}; expected at most the {steps} steps of a run of {arm}")


def common_step(one: int, other: int) -> tuple[int, int]:
    """At which steps two runs are compared at equal steps: where the shorter one ends, both at their ends if nearly."""
    if abs(one - other) <= NEARLY * max(one, other):
        return one, other
    return min(one, other), min(one, other)


def marks_of(grid: Grid, longest: dict[str, int], arm: str) -> tuple[int, ...]:
    """Steps at which the weights of an arm are scored."""
    others = [name for name in longest if grid.control in (arm, name) and not {arm, name} & {*grid.not_at_equal_steps}]
    return tuple(sorted({longest[arm], *(common_step(longest[arm], longest[name])[0] for name in others)}))
