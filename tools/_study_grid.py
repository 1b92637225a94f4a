"""A study's page: which arms are trained, on which budget, with which seeds, and what is scored.

A grid is a YAML file:

    title: What the study asks.
    base: [base/cifar10.yaml]            # configs of all arms, beside the grid or shipped
    arms:                                # name -> configs and flags (`--key=value`) behind those of the base
      contrastive: []
      captioning: [methods/captioning.yaml]
    control: contrastive                 # the arm that the others are compared with, seed by seed
    budget: {steps: 2000}                # of the control, whose FLOPs all arms get; or {flops: 1.5e14}
    seeds: [0, 1, 2]
    learning_rates: [1.0e-3, 2.0e-3]     # tried for every arm in runs of `screening.share` of the budget
    screening: {share: 0.2, seed: 100, warmup: 0.2, points: 1}   # as where it is left out; see `Screening`
    select: {metric: val/contrastive/zero_shot, better: higher}   # chooses the rate, and is the curve
    points: 10                           # validations of a run
    folds: 5                             # ${oc.env:INDICLIP_STUDY_FOLD} is the seed modulo this, in configs and scores
    scores: {...}                        # see `_study_specs`; or a file of them beside the grid: scores/scenes.yaml
    main: [cifar10/zero_shot@64]         # those whose intervals are drawn
    not_at_equal_steps: [cosine]         # arms whose schedule ends with the run: their curves are no ends of runs
    prepare: {...}                       # commands that run once before, see `_study_prepare`
    reversed: {without_ema: ema}         # arms that leave something out: the verdict on what they leave out
    seeds_of: {captioning: [0, 1]}       # arms that are only screened, with some of the seeds

In arms and commands `{folder}` is the folder of what was prepared.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from _study_specs import Direction, Spec, read_specs

from indiclip.strict_yaml import UniqueKeys

FOLD = "INDICLIP_STUDY_FOLD"
TIMING, TIMED_STEPS = "timing", 12  # the run in which an arm's step is timed
PREPARED = "prepared"  # beside the folders of arms


@dataclass(frozen=True)
class Budget:
    """Steps of the control, whose FLOPs all arms get, or the FLOPs."""

    steps: int | None = None
    flops: float | None = None


@dataclass(frozen=True)
class Screening:
    """The runs in which learning rates are tried.

    Attributes:
        share: Of the budget that such a run gets.
        warmup: Share of such a run in which its rate rises; None has the config's own number of steps.
        points: Validations.
    """

    share: float = 0.2
    seed: int = 100
    warmup: float | None = 0.2
    points: int = 1


@dataclass(frozen=True)
class Select:
    """The metric of validation that chooses the learning rate, and is the curve."""

    metric: str = "val/contrastive/zero_shot"
    better: Direction = "higher"


@dataclass(frozen=True)
class Preparation:
    """See `_study_prepare`."""

    command: str
    cpu_seconds: float = 0.0
    scored: bool = False


@dataclass(frozen=True)
class Grid:
    """See the module.

    Attributes:
        file: Where it stands.
        base: Words of `indiclip fit`, likewise those of each arm.
        scores: As the file has them; see `specs`.
    """

    file: Path
    title: str
    base: tuple[str, ...]
    arms: dict[str, tuple[str, ...]]
    control: str
    budget: Budget
    scores: dict[str, dict[str, Any]]
    main: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rates: tuple[float, ...] = ()
    screening: Screening = Screening()
    select: Select = Select()
    points: int = 10
    folds: int = 0
    not_at_equal_steps: tuple[str, ...] = ()
    prepare: dict[str, Preparation] = field(default_factory=dict)
    reversed: dict[str, str] = field(default_factory=dict)
    seeds_of: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.file.stem

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """What is scored, by the name of the data."""
        return read_specs(self.scores)

    def arm_seeds(self, arm: str) -> tuple[int, ...]:
        """Those with which an arm is trained."""
        return self.seeds_of.get(arm, self.seeds)

    def shown_arm(self, arm: str) -> str:
        """Its name; of one that leaves something out, what that gives, as its verdict says."""
        left_out = self.reversed.get(arm)
        return f"{left_out} ({self.control} less {arm})" if left_out else arm

    def words(self, arm: str, folder: Path) -> list[str]:
        """Words of `indiclip fit` of an arm, without those of a run; `folder` holds what was prepared."""
        return [word.replace("{folder}", str(folder)) for word in (*self.base, *self.arms[arm])]

    def environment(self, seed: int) -> dict[str, str]:
        """Variables of a run and of its scoring."""
        return {FOLD: str(seed % self.folds)} if self.folds else {}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: Of its folder within the arm's.
        lr: None is the config's own.
        points: Validations.
        marks: Steps after which the weights are kept, ascending; the last step is one.
        warmup_steps: None is the config's own.
    """

    arm: str
    name: str
    seed: int
    lr: float | None
    steps: int
    points: int
    marks: tuple[int, ...] = ()
    warmup_steps: int | None = None

    def flags(self) -> list[str]:
        """What it adds to its arm's words."""
        flags = [f"--seed_everything={self.seed}", f"--trainer.max_steps={self.steps}"]
        flags += [] if self.lr is None else [f"--model.lr={self.lr:g}"]
        flags += [] if self.warmup_steps is None else [f"--model.warmup_steps={self.warmup_steps}"]
        return [*flags, f"--data.steps_per_epoch={-(-self.steps // self.points)}", "--data.num_workers=0"]


def arm_content(grid: Grid, arm: str, folder: Path) -> list[Any]:
    """All that says what an arm computes: its words, what its config files say, their comments aside, and how that was
    prepared which it needs.
    """
    words = grid.words(arm, folder)
    files = [Path(word) for word in words if not word.startswith("--")]
    own = [*grid.base, *grid.arms[arm]]
    flags = [word.replace("{folder}", "") for word in own if word.startswith("--")]
    needed = grid.prepare if any("{folder}" in word for word in own) else ()
    return [flags, _said(files), *(prepared_content(grid, name) for name in needed)]


def prepared_content(grid: Grid, name: str) -> list[Any]:
    """All that says what a command of `prepare` makes."""
    command = grid.prepare[name].command
    words = [word.rpartition("=")[2] for word in shlex.split(command)]
    return [command, _said(Path(word) for word in words if word.endswith(".yaml"))]


def _said(files: Iterable[Path]) -> list[Any]:
    """What files of YAML say, of those that are there before the study begins."""
    return [yaml.load(file.read_text(encoding="utf-8"), UniqueKeys) for file in files if file.is_file()]


def digest(grid: Grid, run: Run, folder: Path) -> str:
    """Of all that decides what a run computes; not of `marks`, which another arm may change."""
    return digest_of([arm_content(grid, run.arm, folder), run.flags(), grid.environment(run.seed)])


def digest_of(value: Any) -> str:
    """Of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def command(words: list[str], environment: dict[str, str]) -> str:
    """As it is typed."""
    return " ".join([*(f"{name}={value}" for name, value in environment.items()), shlex.join(["indiclip", *words])])
