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
    screening: {share: 0.2, seed: 100, warmup: 0.2, points: 1}   # warmup: share of such a run; points: as below
    select: {metric: val/contrastive/zero_shot, better: higher}   # chooses the rate, and is the curve
    points: 10                           # validations of a run
    folds: 5                             # ${oc.env:INDICLIP_STUDY_FOLD} is the seed modulo this, in configs and scores
    scores: {...}                        # see `_study_scores`; or a file of them beside the grid: scores/scenes.yaml
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
import os
import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from indiclip.config_files import anchored, find_config
from indiclip.names import check_choice, check_range, check_whole, did_you_mean
from indiclip.strict_yaml import UniqueKeys

FOLD = "INDICLIP_STUDY_FOLD"
TIMING, TIMED_STEPS = "timing", 12  # the run in which an arm's step is timed
_REQUIRED = ("title", "base", "arms", "control", "budget", "scores")


@dataclass(frozen=True)
class Grid:
    """See the module.

    Attributes:
        file: Where it stands.
        base: Words of `indiclip fit`, likewise those of each arm.
        budget: `steps` or `flops` -> how many.
    """

    file: Path
    title: str
    base: tuple[str, ...]
    arms: dict[str, tuple[str, ...]]
    control: str
    budget: dict[str, float]
    scores: dict[str, dict[str, Any]]
    main: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rates: tuple[float, ...] = ()
    screening: dict[str, Any] | None = None
    select: dict[str, str] | None = None
    points: int = 10
    folds: int = 0
    not_at_equal_steps: tuple[str, ...] = ()
    prepare: dict[str, dict[str, Any]] | None = None
    reversed: dict[str, str] | None = None
    seeds_of: dict[str, list[int]] | None = None

    @property
    def name(self) -> str:
        return self.file.stem

    @property
    def metric(self) -> str:
        """Of validation: it chooses the learning rate, and is the curve."""
        return (self.select or {}).get("metric", "val/contrastive/zero_shot")

    @property
    def better(self) -> str:
        """Which direction of `metric` is."""
        return (self.select or {}).get("better", "higher")

    @property
    def share(self) -> float:
        """Of the budget that a run gets in which a learning rate is tried."""
        return float((self.screening or {}).get("share", 0.2))

    @property
    def screening_seed(self) -> int:
        return int((self.screening or {}).get("seed", 100))

    @property
    def screening_warmup(self) -> float | None:
        """Share of such a run in which its rate rises; None has the config's own number of steps."""
        return (self.screening or {}).get("warmup")

    @property
    def screening_points(self) -> int:
        """Validations of such a run."""
        return int((self.screening or {}).get("points", self.points))

    def arm_seeds(self, arm: str) -> tuple[int, ...]:
        """Those with which an arm is trained."""
        return tuple((self.seeds_of or {}).get(arm, self.seeds))

    def shown_arm(self, arm: str) -> str:
        """Its name; of one that leaves something out, what that gives, as its verdict says."""
        left_out = (self.reversed or {}).get(arm)
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


def read_grid(file: Path) -> Grid:
    """Read and check a grid.

    Raises:
        ValueError: What is wrong, in one line, naming the key.
        FileNotFoundError: There is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such grid")
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error
    try:
        return _checked(file, tree)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{file}: {error}") from error


def _checked(file: Path, tree: Any) -> Grid:
    known = [field.name for field in fields(Grid) if field.name != "file"]
    if not isinstance(tree, dict):
        raise ValueError(f"found {type(tree).__name__}; expected the keys {', '.join(_REQUIRED)}")
    for key in tree:
        if key not in known:
            raise ValueError(f"{key}: no such key{did_you_mean(str(key), known)}; expected some of {', '.join(known)}")
    for key in _REQUIRED:
        if not tree.get(key):
            raise ValueError(f"{key}: found nothing; expected it in a grid")
    if isinstance(tree["scores"], str):
        beside = file.parent / tree["scores"]
        if not beside.is_file():
            raise ValueError(f"scores: no file {beside}")
        tree |= {"scores": yaml.load(beside.read_text(encoding="utf-8"), UniqueKeys)}
    tree = anchored(tree, file.resolve().parent)
    arms = {str(name): words_of(file, f"arms.{name}", items or []) for name, items in tree["arms"].items()}
    for name in arms:
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"arms.{name}: expected letters, digits, _, . and -")
    listed = ("main", "seeds", "learning_rates", "not_at_equal_steps")
    values = tree | {key: tuple(tree[key]) for key in listed if key in tree}
    grid = Grid(**values | {"file": file, "base": words_of(file, "base", tree["base"]), "arms": arms})
    _check(grid)
    return grid


def _check(grid: Grid) -> None:
    check_choice("control", grid.control, grid.arms)
    for key, names in {"not_at_equal_steps": grid.not_at_equal_steps, "reversed": grid.reversed or {}}.items():
        for name in names:
            check_choice(key, name, grid.arms)
    if len(grid.budget) != 1 or not grid.budget.keys() <= {"steps", "flops"}:
        raise ValueError(f"budget: found {grid.budget}; expected {{steps: N}} of the control, or {{flops: N}}")
    rates = {f"learning_rates[{place}]": rate for place, rate in enumerate(grid.learning_rates)}
    budget = {f"budget.{kind}": number for kind, number in grid.budget.items()}
    for key, number in {**rates, **budget}.items():
        if isinstance(number, str):  # YAML 1.1 reads 1e14 as text
            raise ValueError(f"{key}: found the text {number!r}; expected a number such as 1.5e+14")
    check_range(budget, 1)
    check_range(rates, without=0)
    for place, seed in enumerate(grid.seeds):
        check_whole({f"seeds[{place}]": seed}, 0)
    if len({*grid.seeds}) < len(grid.seeds) or not grid.seeds:
        raise ValueError(f"seeds: found {list(grid.seeds)}; expected one or more, each once")
    for key in grid.screening or {}:
        check_choice("screening", key, ("share", "seed", "warmup", "points"))
    check_range({"screening.share": grid.share}, 0, 1, without=0)
    check_range({"screening.warmup": grid.screening_warmup or 0}, 0, 1, without=1)
    check_whole({"screening.points": grid.screening_points}, 1)
    for name, seeds in (grid.seeds_of or {}).items():
        check_choice("seeds_of", name, grid.arms)
        if not seeds or not {*seeds} <= {*grid.seeds}:
            raise ValueError(f"seeds_of.{name}: found {seeds}; expected some of seeds, {list(grid.seeds)}")
    if grid.screening_seed in grid.seeds:
        raise ValueError(f"screening.seed: found {grid.screening_seed}; expected one that is none of seeds")
    for name, item in (grid.prepare or {}).items():
        for key in item:
            check_choice(f"prepare.{name}", key, ("command", "cpu_seconds", "scored"))
        if not item.get("command"):
            raise ValueError(f"prepare.{name}.command: found nothing; expected what is to be run")
    check_choice("select.better", grid.better, ("higher", "lower"))
    check_whole({"points": grid.points}, 1)
    check_whole({"folds": grid.folds}, 0)


def words_of(file: Path, key: str, items: Any) -> tuple[str, ...]:
    """Words of `indiclip fit` for a list of configs and flags of a grid.

    Raises:
        ValueError: A config that is not there, or a flag without a value.
    """
    if not isinstance(items, list):
        raise ValueError(f"{key}: found {items!r}; expected a list of configs and of flags such as --model.lr=1e-3")
    words: list[str] = []
    for place, item in enumerate(map(str, items)):
        if item.startswith("--"):
            if "=" not in item:
                raise ValueError(f"{key}[{place}]: found the flag {item!r}; expected --KEY=VALUE")
            words.append(item)
            continue
        beside = file.parent / item
        try:
            config = beside if beside.is_file() else find_config(item)
        except FileNotFoundError as error:
            raise ValueError(f"{key}[{place}]: {str(error).removeprefix('--config: ')}") from error
        words += ["--config", os.path.relpath(config)]
    return tuple(words)


def arm_content(grid: Grid, arm: str, folder: Path) -> list[Any]:
    """All that says what an arm computes: its words, and what its config files say."""
    words = grid.words(arm, folder)
    files = [Path(word) for word in words if not word.startswith("--")]
    flags = [word.replace("{folder}", "") for word in (*grid.base, *grid.arms[arm]) if word.startswith("--")]
    return [flags, [file.read_text(encoding="utf-8") for file in files]]


def digest(grid: Grid, run: Run, folder: Path) -> str:
    """Of all that decides what a run computes."""
    content = arm_content(grid, run.arm, folder)
    return digest_of([content, run.flags(), run.marks, grid.environment(run.seed)])


def digest_of(value: Any) -> str:
    """Of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def command(words: list[str], environment: dict[str, str]) -> str:
    """As it is typed."""
    return " ".join([*(f"{name}={value}" for name, value in environment.items()), shlex.join(["indiclip", *words])])
