"""Reads a study's grid, and refuses what cannot be meant before anything is trained."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from _study_grid import PREPARED, Grid
from _study_specs import check_score_names, read_specs
from _typed_yaml import typed

from indiclip.config_files import anchored, find_config
from indiclip.names import check_choice, check_range, check_whole
from indiclip.strict_yaml import UniqueKeys

_SEEDS = 2**32 - 1  # the largest that NumPy takes
# What a run's length, place and seed are: the study says them.
_OF_THE_STUDY = (
    *("--config", "--ckpt_path", "--name", "--runs", "--seed_everything"),
    *("--trainer.max_steps", "--trainer.max_epochs", "--trainer.max_time", "--trainer.fast_dev_run"),
    *("--trainer.callbacks", "--trainer.enable_progress_bar", "--data.steps_per_epoch", "--data.num_workers"),
)


def read_grid(file: Path, build: bool = False) -> Grid:
    """Read and check a grid.

    Args:
        file: Where it stands.
        build: Whether the datasets and heads of its scores are built too, for which the data have to be there.

    Raises:
        ValueError: What is wrong, in one line, naming the key.
        FileNotFoundError: There is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such grid")
    tree = _read(file)
    try:
        return _checked(file, tree, build)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _read(file: Path) -> Any:
    try:
        return yaml.load(file.read_text(encoding="utf-8"), UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error


def _checked(file: Path, tree: Any, build: bool) -> Grid:
    if isinstance(tree, dict) and isinstance(tree.get("scores"), str):
        beside = file.parent / tree["scores"]
        if not beside.is_file():
            raise ValueError(f"scores: no file {beside}")
        tree |= {"scores": _read(beside)}
    grid: Grid = typed("", anchored(tree, file.resolve().parent), Grid, file=file)
    own = (*_OF_THE_STUDY, *(["--model.lr"] if grid.learning_rates else []))
    arms = {name: words_of(file, f"arms.{name}", items, own) for name, items in grid.arms.items()}
    grid = replace(grid, base=words_of(file, "base", grid.base, own), arms=arms)
    _check_arms(grid)
    _check_numbers(grid)
    check_score_names("main", grid.main, read_specs(grid.scores, build))
    return grid


def _check_arms(grid: Grid) -> None:
    """Raise ValueError for a name that is none of an arm, or cannot be one of a folder."""
    for key, names in {"arms": grid.arms, "prepare": grid.prepare}.items():
        for name in names:
            if not re.fullmatch(r"\w[\w.-]*", name) or name == PREPARED:
                raise ValueError(f"{key}.{name}: expected letters, digits, _, . and -, and not {PREPARED!r}")
    for key, names in {
        "control": [grid.control],
        "not_at_equal_steps": grid.not_at_equal_steps,
        "reversed": grid.reversed,
        "seeds_of": grid.seeds_of,
    }.items():
        for name in names:
            check_choice(key, name, grid.arms)


def _check_numbers(grid: Grid) -> None:
    """Raise ValueError for one that is out of its range, or does not go with another."""
    budget, screening = grid.budget, grid.screening
    if (budget.steps is None) == (budget.flops is None):
        raise ValueError("budget: expected one of {steps: N} of the control and {flops: N}")
    check_range({"budget.steps": budget.steps, "budget.flops": budget.flops}, 1)
    check_range({f"learning_rates[{place}]": rate for place, rate in enumerate(grid.learning_rates)}, without=0)
    check_whole({f"seeds[{place}]": seed for place, seed in enumerate(grid.seeds)}, 0, _SEEDS)
    check_whole({"screening.seed": screening.seed}, 0, _SEEDS)
    check_range({"screening.share": screening.share}, 0, 1, without=0)
    check_range({"screening.warmup": screening.warmup}, 0, 1, without=1)
    check_whole({"points": grid.points, "screening.points": screening.points}, 1)
    check_whole({"folds": grid.folds}, 0)
    check_range({f"prepare.{name}.cpu_seconds": item.cpu_seconds for name, item in grid.prepare.items()})
    for name, item in grid.prepare.items():
        try:
            shlex.split(item.command)
        except ValueError as error:
            raise ValueError(f"prepare.{name}.command: {error}") from error
    if not grid.seeds:
        raise ValueError("seeds: found []; expected one or more")
    if screening.seed in grid.seeds:
        raise ValueError(f"screening.seed: found {screening.seed}; expected one that is none of seeds")
    for name, seeds in grid.seeds_of.items():
        if not seeds or not {*seeds} <= {*grid.seeds}:
            raise ValueError(f"seeds_of.{name}: found {[*seeds]}; expected some of seeds, {[*grid.seeds]}")


def words_of(file: Path, key: str, items: tuple[str, ...], own: Collection[str]) -> tuple[str, ...]:
    """Words of `indiclip fit` for a list of configs and flags of a grid.

    Args:
        own: Flags that the study gives itself.

    Raises:
        ValueError: A config that is not there, a flag without a value, or one of the study's own.
    """
    words: list[str] = []
    for place, item in enumerate(items):
        if item.startswith("--"):
            flag, equals, _ = item.partition("=")
            if not equals:
                raise ValueError(f"{key}[{place}]: found the flag {item!r}; expected --KEY=VALUE")
            if flag in own:
                raise ValueError(
                    f"{key}[{place}]: found {item!r}; expected no {flag}: files are named alone, and the study itself "
                    "says the seeds, rates, lengths and folders of runs"
                )
            words.append(item)
            continue
        beside = file.parent / item
        try:
            config = beside if beside.is_file() else find_config(item)
        except FileNotFoundError as error:
            raise ValueError(f"{key}[{place}]: {str(error).removeprefix('--config: ')}") from error
        words += ["--config", os.path.relpath(config)]
    return tuple(words)
