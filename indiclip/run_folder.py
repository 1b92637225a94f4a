"""Which folder a run writes to, and which checkpoint it goes on from."""

from __future__ import annotations

import itertools
import os
import re
import sys
from pathlib import Path
from typing import Any

from indiclip.names import nearest
from indiclip.survival.manifest import newest_good, saved_at, what_is_wrong

_CHECKPOINT_WORDS = ("best", "hpc", "registry")  # which Lightning looks up itself


def run_folder(config: Any, subcommand: str) -> Path:
    """The folder of this run: that of the checkpoint it goes on from, or a new one, `runs/<name>`.

    Args:
        config: Of the subcommand. A `ckpt_path` of `last` is replaced by the file that it stands for, or by None.
        subcommand: `fit` and so on.

    Raises:
        FileNotFoundError: No such checkpoint.
        ValueError: The checkpoint is torn, or the name is no plain folder name.
    """
    checkpoint = config.get("ckpt_path")
    if checkpoint == "last":
        file = _newest_checkpoint(Path(config["runs"]), _run_name(config, subcommand))
        config["ckpt_path"] = str(file) if file else None
        if file:
            return file.parent.parent
        if subcommand != "fit":
            raise FileNotFoundError(f"--ckpt_path last: no whole checkpoint of {_run_name(config, subcommand)}")
    elif checkpoint:
        _check(checkpoint)
        if not config.get("name") and Path(checkpoint).parent.name == "checkpoints":
            return Path(checkpoint).parent.parent
    return _new_folder(Path(config["runs"]), _run_name(config, subcommand))


def config_files(argv: list[str]) -> list[str]:
    """The files that `--config` names on a command line."""
    following = [value for flag, value in itertools.pairwise(argv) if flag in ("--config", "-c")]
    return following + [flag.removeprefix("--config=") for flag in argv if flag.startswith("--config=")]


def _run_name(config: Any, subcommand: str) -> str:
    files = config_files(sys.argv)
    name = config.get("name") or (Path(files[0]).stem if files else subcommand)
    if "/" in name or name in ("", ".", ".."):
        raise ValueError(f"--name: {name!r} must be a plain folder name")
    return str(name)


def _new_folder(root: Path, name: str) -> Path:
    if not _is_first_process():
        return root / name  # only the first process writes there
    for number in range(1, 10_000):
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)  # atomic: two runs started together get two folders
        except FileExistsError:
            continue
        return folder
    raise ValueError(f"--name: {root} holds 10,000 runs named {name}")


def _is_first_process() -> bool:
    return all(os.environ.get(rank, "0") == "0" for rank in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _check(checkpoint: str) -> None:
    """That a checkpoint which was named is there, and not torn."""
    file = Path(checkpoint)
    if checkpoint in _CHECKPOINT_WORDS or "://" in checkpoint or file.is_dir():
        return
    if not file.exists():
        near = [str(other) for other in file.parent.glob("*.ckpt")]
        raise FileNotFoundError(f"--ckpt_path: no file {checkpoint}{nearest(checkpoint, near)}")
    if reason := what_is_wrong(file):
        good = newest_good(file.resolve().parent)[0]
        raise ValueError(f"--ckpt_path: {checkpoint}: {reason}; the newest good one there is {good or 'none'}")


def _newest_checkpoint(root: Path, name: str) -> Path | None:
    """What `last` stands for: the newest good checkpoint of the newest run of that name which has one.

    Each rank looks for itself. They find the same: none saves before all have come together to train.
    """
    say = print if _is_first_process() else lambda line: None
    of_name = re.compile(rf"{re.escape(name)}(-(\d+))?")
    runs = [match for folder in root.glob("*") if (match := of_name.fullmatch(folder.name))]
    for run in sorted(runs, key=lambda run: int(run[2] or 1), reverse=True):
        folder = root / run[0] / "checkpoints"
        file, step, passed_over = newest_good(folder)
        for reason in passed_over:
            say(f"passed over {folder}/{reason}")
        if file is not None:
            say(f"going on from {file}: step {step}, saved {saved_at(file)}, the newest whole one of {name}")
            return file
        say(f"no whole checkpoint in {folder}")
    say(f"no whole checkpoint of {name} in {root}: starting from the beginning")
    return None
