"""What the command adds to the config's Trainer: callbacks, a logger, durable checkpoints; all in the run's folder."""

import os
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning import Callback
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    ProgressBar,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from indiclip.names import check_range
from indiclip.training.callbacks import StartupTable, TaskGradients, TaskProgress
from indiclip.training.fault_tolerance.checkpoints import Checkpoints, DurableCheckpointIO
from indiclip.training.fault_tolerance.local_ranks import LocalRanks
from indiclip.training.fault_tolerance.resume_validation import ResumeValidation
from indiclip.training.fault_tolerance.step_sync import StepSync
from indiclip.training.fault_tolerance.watchdog import Watchdog
from indiclip.training.monitors import CheckMonitors
from indiclip.training.predictions import PredictionWriter
from indiclip.training.record import RunRecord
from indiclip.training.sharding import ShardedStrategy
from indiclip.training.throughput import Throughput

_SHARDED = ("fsdp", "modelparallel", "deepspeed", "sharded")  # strategies that write folders of shards by themselves
_LEAST = {"check_val_every_n_epoch": 1, "log_every_n_steps": 0, "gradient_clip_val": 0}


def check_trainer(config: Namespace, subcommand: str) -> None:
    """Refuse values of the trainer that cannot do what they say.

    Raises:
        ValueError: The first of them, naming its key.
    """
    if subcommand == "fit":
        _check_numbers(config)
    accelerator = str(config.get("accelerator"))
    kinds = {"gpu": (CUDAAccelerator, MPSAccelerator), "cuda": (CUDAAccelerator,), "mps": (MPSAccelerator,)}
    if accelerator in kinds and not any(kind.is_available() for kind in kinds[accelerator]):
        raise ValueError(
            f"trainer.accelerator: found {accelerator}, and torch finds no such device here; expected one, or to try "
            "it --trainer.accelerator cpu --trainer.devices 1 --trainer.num_nodes 1"
        )
    strategy = str(config.get("strategy"))
    if strategy.endswith(("spawn", "fork", "notebook")):
        raise ValueError(f"trainer.strategy: found {strategy}; a run's processes start by this command; expected ddp")
    precision = str(config.get("precision"))
    if precision == "16-true" or "engine" in precision:
        raise ValueError(f"trainer.precision: no training in {precision}; expected 32-true, bf16-mixed or 16-mixed")
    averages = any("StochasticWeightAveraging" in str(callback) for callback in listed(config.get("callbacks")))
    if averages and config.get("max_epochs") is None:
        raise ValueError("trainer.callbacks: StochasticWeightAveraging begins by epochs; expected trainer.max_epochs")
    if config.get("default_root_dir") is not None:
        raise ValueError(
            "trainer.default_root_dir: the run's folder is --runs and --name, and everything is written there; leave "
            "it out"
        )
    if config.get("barebones"):
        raise ValueError("trainer.barebones: turns off what makes a run survive and its record; leave it out")


def _check_numbers(config: Namespace) -> None:
    for key in ("max_steps", "max_epochs", "limit_train_batches"):
        if config.get(key) == 0:
            raise ValueError(f"trainer.{key}: found 0, with which nothing is trained (`indiclip validate` scores)")
    if config.get("val_check_interval") == 0:
        raise ValueError("trainer.val_check_interval: found 0; trainer.limit_val_batches 0 leaves validation out")
    for key, least in _LEAST.items():
        check_range({f"trainer.{key}": config.get(key)}, least)


def place_outputs(config: Namespace, folder: Path) -> None:
    """Loggers and profilers write to the run's folder, unless they name another one by its whole path."""
    for key, option in (("logger", "save_dir"), ("profiler", "dirpath")):
        for part in listed(config.get(key)):
            arguments = getattr(part, "init_args", {})
            if option in arguments:
                arguments[option] = str(folder / (arguments[option] or ""))


def trainer_options(
    config: dict[str, Any], folder: Path, subcommand: str, trial: bool, pictures: int = 0
) -> dict[str, Any]:
    """Arguments of the Trainer in place of the config's own.

    Args:
        config: The trainer's, with its objects.
        folder: The run's.
        subcommand: Only `fit` has a logger of its own: the others may read a run that nobody can write to.
        trial: A `fast_dev_run`, which leaves no record.
        pictures: How many of them `predict` leaves of each head.
    """
    options: dict[str, Any] = {"default_root_dir": str(folder)}
    is_fit = subcommand == "fit"
    if config.get("logger") in (None, True):
        options["logger"] = is_fit and TensorBoardLogger(str(folder.parent), name=folder.name, version="")
    plugins = listed(config.get("plugins"))
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins) and _saves_one_file(config.get("strategy")):
        options["plugins"] = [*plugins, DurableCheckpointIO()]
    given = listed(config.get("callbacks"))
    _check_callbacks(given, config.get("strategy"))
    _place_checkpoints(given, folder / "checkpoints")
    # CheckMonitors before the callbacks that look for their monitor. Throughput before RunRecord, which records what it
    # logs, and that before StepSync, which may end the run after a step that is to be recorded.
    ours: list[Callback] = [StartupTable(), StepSync(), ResumeValidation(), Watchdog(), LocalRanks()]
    if not trial:
        ours[1:1] = [Throughput(), RunRecord()]
        ours.append(PredictionWriter(pictures))
    if config.get("enable_progress_bar") is not False:
        ours.append(TaskProgress())
    if config.get("enable_checkpointing") is not False:
        ours.append(Checkpoints(str(folder / "checkpoints")))
    if is_fit and config.get("logger") not in (False, []):
        ours.append(LearningRateMonitor("step"))
    options["callbacks"] = [CheckMonitors(), *given]
    for callback in ours:  # the config's own settings of one of ours count
        kind = next((kind for kind in (ProgressBar, ModelCheckpoint) if isinstance(callback, kind)), type(callback))
        if not any(isinstance(other, kind) for other in given):
            options["callbacks"].append(callback)
    return options


def _check_callbacks(callbacks: list[Callback], strategy: Any) -> None:
    """Refuse those of Lightning that know nothing of the optimizer's groups here, or of shards."""
    is_sharded = isinstance(strategy, ModelParallelStrategy)
    if is_sharded and not isinstance(strategy, ShardedStrategy):
        raise ValueError(
            "trainer.strategy: ModelParallelStrategy writes checkpoints that a kill can tear; expected "
            "indiclip.training.sharding.ShardedStrategy"
        )
    for callback in callbacks:
        if is_sharded and isinstance(callback, TaskGradients):
            raise ValueError("trainer.callbacks: TaskGradients needs whole gradients on each rank; expected ddp")
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging) and not _saves_one_file(strategy):
            raise ValueError(
                f"trainer.callbacks: {type(callback).__name__} copies whole models, and this trainer.strategy shares "
                "out the weights; expected indiclip.training.ema.EMA"
            )
        if isinstance(callback, BaseFinetuning):
            raise ValueError(
                f"trainer.callbacks: {type(callback).__name__} adds groups to the optimizer, which schedule and resume "
                "do not know; expected model.freeze, and for what is trained later another run from the weights"
            )


def listed(value: Any) -> list[Any]:
    """A trainer's argument that may be one object, a list of them or nothing, as a list."""
    return [*value] if isinstance(value, list) else [value] if value not in (None, True, False) else []


def _place_checkpoints(callbacks: list[Callback], folder: Path) -> None:
    for callback in callbacks:
        if not isinstance(callback, ModelCheckpoint | OnExceptionCheckpoint):
            continue
        # That of ModelCheckpoint is absolute when it is given; OnExceptionCheckpoint must be given one.
        if callback.dirpath and Path(callback.dirpath).is_absolute():
            raise ValueError(
                f"trainer.callbacks: the dirpath of {type(callback).__name__} is {callback.dirpath}, where "
                "--ckpt_path last would not look; leave it out, and move all of the run with --runs FOLDER"
            )
        callback.dirpath = os.path.realpath(folder)  # whatever logger there is


def _saves_one_file(strategy: Any) -> bool:
    """Whether a strategy saves through Lightning's plug-in."""
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    return not any(word in name.lower() for word in _SHARDED)
