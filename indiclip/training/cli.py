"""fit, validate, test and predict: LightningCLI with our model and data, checked before the first step."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import get_loader, set_loader
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from indiclip.loading import workers
from indiclip.loading.data_module import MultiTaskData
from indiclip.module import MultiTask
from indiclip.old_names import translate_config
from indiclip.training.callbacks import StartupTable, TaskGradients, TaskProgress
from indiclip.training.checks import check
from indiclip.training.config_errors import ConfigError, OneLineParser, check_yaml, explain
from indiclip.training.fault_tolerance import local_ranks
from indiclip.training.fault_tolerance.checkpoints import Checkpoints, DurableCheckpointIO
from indiclip.training.fault_tolerance.local_ranks import LocalRanks
from indiclip.training.fault_tolerance.ranks import AgreedStop
from indiclip.training.fault_tolerance.resume_validation import ResumeValidation
from indiclip.training.fault_tolerance.step_sync import StepSync
from indiclip.training.fault_tolerance.watchdog import Watchdog
from indiclip.training.record import PredictionWriter, RunRecord
from indiclip.training.run_folder import config_files, lock, run_folder, unlock

_TRAINER_DEFAULTS = {
    "use_distributed_sampler": False,  # the plan already divides each step over the ranks
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "enable_model_summary": False,  # StartupTable has it
}
# Said by the libraries in every run; nothing that a user could act on.
_NOISE = (
    r"isinstance\(treespec, LeafSpec\)",
    "The number of training batches .* is smaller",
    "does not have many workers",
    "It is recommended to use `self.log",  # with sync_dist: torchmetrics has already put the ranks together
    "Couldn't infer the batch indices",  # the samples' keys say which they are
    "your dataloader is not resumable",  # it is: the position is the step number
    "Checkpoint directory .*/checkpoints exists and is not empty",  # a run goes on in its folder, a new one has its own
)


class IndiCLI(LightningCLI):
    """LightningCLI with a run folder, links between model and data, and checks before training."""

    folder: Path | None = None

    def __init__(self) -> None:
        try:
            super().__init__(
                MultiTask,
                MultiTaskData,
                seed_everything_default=0,
                trainer_defaults=_TRAINER_DEFAULTS,
                parser_kwargs={"parser_mode": "omegaconf+", "allow_abbrev": False},
                parser_class=OneLineParser,
                save_config_kwargs={"overwrite": True},
                auto_configure_optimizers=False,
            )
        except BaseException:
            if self.folder is not None:
                with contextlib.suppress(OSError):
                    self.folder.rmdir()  # if it is empty: nothing came of this run
            raise

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str, default="", help="Name of the run's folder (default: the config's).")
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("model.encoder", "data.patch_size", lambda e: e.backbone.patch_size, "instantiate")
        parser.link_arguments("model.encoder", "data.canvas_hw", lambda e: e.backbone.canvas_hw, "instantiate")

    def _parse_ckpt_path(self) -> None:
        """Nothing: the experiment is the config's, and a checkpoint is read after it has been checked, once."""

    def before_instantiate_classes(self) -> None:
        assert self.subcommand is not None
        config = self.config[self.subcommand]
        config["weights_only"] = True  # never unpickle a checkpoint
        self.folder = run_folder(config, self.subcommand)
        if self.subcommand == "predict":
            config["return_predictions"] = False  # PredictionWriter has them
        if self.subcommand != "fit":
            self.save_config_callback = None  # the folder keeps the configuration that it was trained with
            if not config.get("ckpt_path"):
                warnings.warn("no --ckpt_path: the weights are the config's own, before any training", stacklevel=2)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        assert self.folder is not None
        config = self._get(self.config_init, "trainer", default={})
        checkpoints = self.folder / "checkpoints"
        # RunRecord before StepSync, which may end the run after a step that is to be recorded.
        ours: list[L.Callback] = [StartupTable(), RunRecord(), StepSync(), TaskGradients(), ResumeValidation()]
        ours += [PredictionWriter(), Watchdog(), LocalRanks()]
        if config.get("enable_progress_bar") is not False:
            ours.append(TaskProgress())
        if config.get("enable_checkpointing") is not False:
            ours.append(Checkpoints(str(checkpoints)))
        if config.get("logger") in (None, True):
            kwargs["logger"] = TensorBoardLogger(str(self.folder.parent), name=self.folder.name, version="")
        if config.get("logger") is not False:
            ours.append(LearningRateMonitor("step"))
        if config.get("default_root_dir") is None:
            kwargs["default_root_dir"] = str(self.folder)
        given = config.get("callbacks") or []
        given = [*given] if isinstance(given, list) else [given]
        for callback in given:
            if not isinstance(callback, ModelCheckpoint):
                continue
            if callback.dirpath:
                raise ValueError(
                    f"trainer.callbacks: the dirpath of {type(callback).__name__} is {callback.dirpath}, where "
                    "--ckpt_path last would not look; leave it out, and move all of the run with --runs FOLDER"
                )
            callback.dirpath = os.path.realpath(checkpoints)  # whatever logger there is
        for callback in ours:  # the config's own settings of one of them count
            kind = ProgressBar if isinstance(callback, ProgressBar) else type(callback)
            kind = ModelCheckpoint if isinstance(callback, Checkpoints) else kind
            if not any(isinstance(other, kind) for other in given):
                given.append(callback)
        plugins = config.get("plugins") or []
        plugins = [*plugins] if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins) and _saves_one_file(config.get("strategy")):
            kwargs["plugins"] = [*plugins, DurableCheckpointIO()]
        return super().instantiate_trainer(callbacks=given, **kwargs)

    def before_fit(self) -> None:
        check(self.model, self.datamodule, training=True)
        assert self.folder is not None
        lock(self.folder)

    def after_fit(self) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunRecord):
                callback.after_fit(self.trainer, self.model, self.datamodule)

    def before_validate(self) -> None:
        check(self.model, self.datamodule, training=False)

    before_test = before_predict = before_validate


def run(argv: list[str]) -> int:
    """Run one of LightningCLI's commands. Returns the exit status."""
    sys.argv[1:] = argv  # the first stays: Lightning starts the other processes of this machine with it
    for message in _NOISE:
        warnings.filterwarnings("ignore", f".*{message}")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # A CPU takes a hundred times longer over numbers below 1e-38, which the gradients of a saturated GELU are. Threads
    # take the setting over from the one that starts them, so it must come before any of torch's.
    torch.set_flush_denormal(True)
    try:
        check_yaml(config_files(argv))
        set_loader("omegaconf+", lambda text: translate_config(get_loader("yaml")(text)), (yaml.YAMLError,))
        IndiCLI()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's way to end after Ctrl-C
            return 128 + signal.SIGINT
        raise
    except AgreedStop as stop:
        if stop.first:
            print(f"indiclip: {stop}", file=sys.stderr)
        return stop.status
    except Exception as error:
        if os.environ.get("INDICLIP_TRACEBACK"):
            raise
        notes = getattr(error, "__notes__", [])  # where it broke off in training, see RunRecord
        if broken := workers.explain(error) or local_ranks.explain(error):
            print(f"indiclip: {' '.join([broken, *notes])}", file=sys.stderr)
            return 1
        if not isinstance(error, (ValueError, OSError, ImportError, MisconfigurationException)):
            raise
        if notes and not isinstance(error, OSError):
            raise
        message = explain(str(error)) if isinstance(error, ConfigError) else str(error)
        print(f"indiclip: {' '.join([*message.split(), *notes])}", file=sys.stderr)
        return 1 if notes else 2
    finally:
        unlock()
    return 0


def _saves_one_file(strategy: Any) -> bool:
    """Whether a strategy saves through Lightning's plug-in; others write folders of shards by themselves."""
    name = str(getattr(strategy, "class_path", strategy) if isinstance(strategy, str) else type(strategy).__name__)
    return not any(word in name.lower() for word in ("fsdp", "modelparallel", "deepspeed"))
