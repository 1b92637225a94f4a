"""Which folder a run writes to, and which checkpoint it goes on from."""

import fcntl
import itertools
import os
import platform
import re
import shutil
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from indiclip.names import nearest_beside
from indiclip.training.fault_tolerance.manifest import NAME, last_saved, newest_good, saved_at, unlisted, what_is_wrong

_locks: list[IO[str]] = []  # open while a run goes on
_SAVED = re.compile(r"config(-\d+)?\.yaml")  # of a run, see `config_history`
_CHECKPOINT_WORDS = ("best", "hpc", "registry")  # which Lightning looks up itself


def config_files(argv: list[str]) -> list[str]:
    """The files that `--config` names."""
    following = [value for flag, value in itertools.pairwise(argv) if flag in ("--config", "-c")]
    return following + [flag.removeprefix("--config=") for flag in argv if flag.startswith("--config=")]


def run_folder(config: Any, subcommand: str, trial: bool = False) -> Path:
    """The folder of this run: that of the checkpoint it goes on from or scores, or a new `runs/<name>`.

    Args:
        config: Of the subcommand; a `ckpt_path` of `last`, or that is a run's folder, is replaced by the file. Without
            one, what only reads a run takes the newest of the run whose folder the first config lies in, if any.
        subcommand: `fit` makes another run of a checkpoint where `name` is another.
        trial: A `fast_dev_run`, which leaves nothing: its folder is a temporary one.

    Raises:
        ValueError: There is nothing that `predict` could read, or the checkpoint is not whole.
    """
    if subcommand != "fit" and not config.get("ckpt_path"):
        own = _run_of_config()
        if own is None and subcommand == "predict" and not trial:
            raise ValueError(
                "--ckpt_path: found none, and the config is not that of a run; expected a checkpoint or a run's "
                "folder, such as --ckpt_path RUN/checkpoints/last.ckpt"
            )
        config["ckpt_path"] = own and str(own)
    starts_or_goes_on = config.get("ckpt_path") == "last"
    folder = _newest_run(config, subcommand) if starts_or_goes_on else _folder_of_checkpoint(config, subcommand)
    if trial:
        return Path(tempfile.mkdtemp(prefix="indiclip-"))
    if folder is not None:
        return folder
    root, name = _root_and_name(config, subcommand)
    if starts_or_goes_on:
        return _begin(root, name)
    return _new_folder(root, name)


def _run_of_config() -> Path | None:
    """The folder of the run whose own config the first one is, if it is one."""
    files = [Path(file) for file in config_files(sys.argv[1:])]
    is_of_run = files and _SAVED.fullmatch(files[0].name) and (files[0].parent / "checkpoints").is_dir()
    return files[0].parent if is_of_run else None


def is_first_process() -> bool:
    """Whether this one of the run's processes writes to its folder."""
    # torchrun numbers the nodes by itself, whatever SLURM calls them. Lightning's own start gives no RANK.
    ranks = ("RANK",) if "RANK" in os.environ else ("SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")
    return all(os.environ.get(rank, "0") == "0" for rank in ranks)


def lock(folder: Path) -> None:
    """Keep a folder for this process until `unlock`, or until it ends, however it ends.

    Raises:
        ValueError: Another process writes there.
    """
    if not is_first_process():
        return
    file = (folder / ".lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: loader workers would inherit it
    except BlockingIOError as error:
        file.seek(0)
        raise ValueError(f"{folder}: another process ({file.read().strip()}) writes there") from error
    except OSError as error:  # a network file system without locks
        warnings.warn(
            f"{folder}: cannot be locked ({error.strerror}); make sure that only one run writes there", stacklevel=2
        )
        file.close()
        return
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {platform.node()}\n")
    file.flush()
    _locks.append(file)


def unlock() -> None:
    """Give back what `lock` took."""
    while _locks:
        _locks.pop().close()


def remove_unused(folder: Path, trial: bool, is_new: bool) -> None:
    """Remove the folder of a run that ended before its first step, so that the next try gets the same name.

    Args:
        folder: Of the run.
        trial: A `fast_dev_run`.
        is_new: It held nothing when this process came.
    """
    used = any(file for name in ("config.yaml", "metrics.json", "checkpoints/*.ckpt") for file in folder.glob(name))
    if trial or (is_new and _locks and not used):  # locked: no other process has begun there
        shutil.rmtree(folder, ignore_errors=True)
    elif is_first_process():
        with suppress(OSError):
            folder.rmdir()  # if it is empty


def _root_and_name(config: Any, subcommand: str) -> tuple[Path, str]:
    """The folder of all runs, and the run's name: those of the run whose folder the first config lies in, if any."""
    files = [Path(file).resolve() for file in config_files(sys.argv[1:])]
    root, name = Path(config["runs"]), str(config.get("name") or (files[0].stem if files else subcommand))
    own = _run_of_config()
    if own is not None and not config.get("name"):
        name = own.resolve().name
        if config.get("ckpt_path") == "last" and config["runs"] == "runs":
            root = own.resolve().parent
    if "/" in name or name in ("", ".", ".."):
        raise ValueError(f"--name: {name!r} must be a plain folder name")
    return root, name


def _folder_of_checkpoint(config: Any, subcommand: str) -> Path | None:
    checkpoint = config.get("ckpt_path")
    if not checkpoint or checkpoint in _CHECKPOINT_WORDS or "://" in checkpoint:
        return None
    file = Path(checkpoint)
    if (file / "checkpoints").is_dir():
        file = newest_good(file / "checkpoints")[0] or file / "checkpoints" / "*.ckpt"
        config["ckpt_path"] = checkpoint = str(file)
        if subcommand != "fit" and file.exists() and is_first_process():
            print(f"checkpoint {file}")
    if not file.exists():
        raise FileNotFoundError(f"--ckpt_path: no checkpoint {checkpoint}{nearest_beside(file, '*.ckpt')}")
    if reason := what_is_wrong(file):
        good = newest_good(file.resolve().parent)[0]
        instead = f"the newest good one there is {good}" if good else "there is no good one beside it"
        raise ValueError(f"--ckpt_path: {checkpoint}: {reason}; {instead}")
    folder = file.parent.parent
    name = config.get("name")
    of_run = subcommand != "fit" or not name or _of_name(name).fullmatch(folder.resolve().name)
    return folder if file.parent.name == "checkpoints" and of_run else None


def _new_folder(root: Path, name: str) -> Path:
    if not is_first_process():
        return root / name  # only the first process writes there
    for number in range(1, 10_000):
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)  # atomic: two runs started together get two folders
        except FileExistsError:
            continue
        return folder
    raise ValueError(f"--name: {root} holds 10,000 runs named {name}")


def _newest_run(config: Any, subcommand: str) -> Path | None:
    """`--ckpt_path last`: the folder of the newest run of this name that has a good checkpoint.

    Raises:
        ValueError: There are checkpoints, but none is provably whole.
    """
    root, name = _root_and_name(config, subcommand)
    torn: list[str] = []
    for folder in _runs(root, name):
        file, step, passed_over = newest_good(folder / "checkpoints")
        torn += [f"{folder / 'checkpoints'}/{line}" for line in passed_over]
        if file is None and (names := unlisted(folder / "checkpoints")):
            raise ValueError(
                f"--ckpt_path last: {folder / 'checkpoints'} has {', '.join(names)}, which no {NAME} lists as whole; "
                "name one by --ckpt_path"
            )
        if file is not None:
            config["ckpt_path"] = str(file)
            if is_first_process():
                for line in torn:
                    print(f"indiclip: passed over {line}", file=sys.stderr)
                print(f"going on from {file}: step {step}, saved {saved_at(file)}, the newest whole one of {name}")
            return folder
    if torn:  # not to start silently again what has taken days
        raise ValueError(
            f"--ckpt_path last: no checkpoint is whole: {'; '.join(torn)}; to start again take another --name"
        )
    if subcommand != "fit":
        raise FileNotFoundError(f"--ckpt_path last: no checkpoint of {name} in {root}")
    config["ckpt_path"] = None
    return None


def _runs(root: Path, name: str) -> list[Path]:
    """The folders of the runs of a name: that in which a checkpoint was saved last first, then by number."""
    folders = root.iterdir() if root.is_dir() else []
    matches = [match for folder in folders if (match := _of_name(name).fullmatch(folder.name))]
    age = {root / match[0]: (last_saved(root / match[0] / "checkpoints"), int(match[2] or 1)) for match in matches}
    return sorted(age, key=age.__getitem__, reverse=True)


def _of_name(name: str) -> re.Pattern[str]:
    return re.compile(rf"{re.escape(name)}(-(\d+))?")


def _begin(root: Path, name: str) -> Path:
    """The folder of a run that begins where others of its name have no checkpoints.

    Two that are started together meet in it, and `lock` lets one train; killed runs do not leave one each.
    """
    folders = _runs(root, name)
    if folders and (folders[0] / "metrics.json").exists():  # it ended, without checkpoints
        folder = _new_folder(root, name)
    else:
        folder = folders[0] if folders else root / name
        folder.mkdir(parents=True, exist_ok=True)
    if is_first_process():
        print(f"no checkpoint of {name} in {root}: starting from the beginning in {folder}")
    return folder
