"""fit, validate, test and predict: LightningCLI with our model and data, checked before the first step."""

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, cast

import torch
import yaml
from jsonargparse import get_loader, set_loader
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from indiclip.config_files import anchored, find_configs, strings_of
from indiclip.loading import workers
from indiclip.loading.data_module import MultiTaskData
from indiclip.masking import mask, remember_variables
from indiclip.module import MultiTask
from indiclip.old_names import translate_config
from indiclip.optim import check_optimizer
from indiclip.quiet import leave_warnings_to_first_process
from indiclip.training import launch
from indiclip.training.checks import check, check_length
from indiclip.training.config_errors import ConfigError, OneLineParser, check_unmasked, check_yaml, one_line
from indiclip.training.config_history import ConfigHistory, check_changes, plain
from indiclip.training.config_lists import mend_lists
from indiclip.training.fault_tolerance import local_ranks
from indiclip.training.fault_tolerance.ranks import AgreedStop, callbacks_of
from indiclip.training.initial_weights import leave_out_initial_weights, warn_of_random_towers
from indiclip.training.launch import SameOnAllRanks, check_launch, speaks
from indiclip.training.portable_config import PortableConfig
from indiclip.training.record import RunRecord
from indiclip.training.run_folder import config_files, is_first_process, lock, remove_unused, run_folder, unlock
from indiclip.training.stacked_pages import disagreements, origins
from indiclip.training.teachers import place_caches
from indiclip.training.trainer_setup import check_trainer, place_outputs, trainer_options

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
    "The `srun` command is available on your system",  # nor is every machine that has it to be asked for a job
    "It is recommended to use `self.log",  # with sync_dist: torchmetrics has already put the ranks together
    "your dataloader is not resumable",  # it is: the position is the step number
    r"Found .* module\(s\) in eval mode at the start of training",  # the start-up table says what is frozen
    "The dirpath has changed from",  # a run's folder works wherever it is moved
    "FSDP2-wrapped module .* returned a view tensor",  # nobody changes it in place
    "Grad strides do not match bucket view strides",  # of 1x1 convolutions, which have but one layout
    "Checkpoint directory .*/checkpoints exists and is not empty",  # a run goes on in its folder, a new one has its own
)


class IndiCLI(LightningCLI):
    """LightningCLI with a run folder, links between model and data, and checks before training."""

    folder: Path | None = None
    trial = False  # a `fast_dev_run`
    is_new = False  # the folder held nothing

    def __init__(self) -> None:
        _quieten()
        sys.argv[1:] = find_configs(sys.argv[1:])  # also for the other processes, which Lightning starts with it
        check_yaml(files := config_files(sys.argv[1:]))
        for line in disagreements(files):
            warnings.warn(line, stacklevel=2)
        # Lightning's Timer has an enum for a default.
        yaml.SafeDumper.add_multi_representer(str, yaml.SafeDumper.represent_str)
        set_loader("omegaconf+", _load, (yaml.YAMLError,))
        mend_lists()
        failed = True
        try:
            super().__init__(
                MultiTask,
                MultiTaskData,
                save_config_callback=ConfigHistory,
                seed_everything_default=0,
                trainer_defaults=_TRAINER_DEFAULTS,
                parser_kwargs={"parser_mode": "omegaconf+", "allow_abbrev": False},
                parser_class=OneLineParser,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,  # a checkpoint holds no arguments; to write them out takes a second
            )
            failed = False
        finally:
            if self.folder is not None:
                remove_unused(self.folder, self.trial, self.is_new and (failed or self.subcommand == "fit"))

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The command that was given: the parsers of all four take a second longer to make."""
        every = LightningCLI.subcommands()
        return {word: every[word] for word in sys.argv[1:2] if word in every} or every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str, default="", help="Name of the run's folder (default: the config's).")
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument(
            "--override", type=bool, default=False, help="Go on from --ckpt_path with other data, seed or losses."
        )
        if sys.argv[1:2] == ["predict"]:
            help_text = "Write pictures of so many images beside the predictions, for each head."
            parser.add_argument("--pictures", type=int, default=0, help=help_text)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_seed)
        parser.link_arguments("model.encoder", "data.patch_size", lambda e: e.backbone.patch_size, "instantiate")
        parser.link_arguments("model.encoder", "data.canvas_hw", lambda e: e.backbone.canvas_hw, "instantiate")
        parser.link_arguments("model.encoder", "data.interpolation", lambda e: e.backbone.interpolation, "instantiate")
        parser.link_arguments("model.encoder", "data.encode", lambda e: e.text.tokenizer.encode, "instantiate")

    def _parse_ckpt_path(self) -> None:
        """Nothing: the experiment is the config's, and a checkpoint is read after it has been checked, once."""

    def before_instantiate_classes(self) -> None:
        assert self.subcommand is not None
        config = self.config[self.subcommand]
        check_trainer(config.trainer, self.subcommand)
        config["weights_only"] = True  # never unpickle a checkpoint
        self.trial = bool(config.trainer.fast_dev_run)
        self.folder = run_folder(config, self.subcommand, self.trial)
        self.is_new = self.folder.is_dir() and not any(self.folder.iterdir())
        tree, written = plain(self._parser(self.subcommand), config), self._written()
        check_unmasked(tree)
        self._tree = tree
        if self.subcommand == "predict":
            config["return_predictions"] = False  # PredictionWriter has them
        elif self.subcommand != "fit":
            config["verbose"] = self.trial  # else RunRecord prints the scores
        if self.subcommand != "fit":
            self.save_config_callback = None  # the folder keeps the configuration that it was trained with
            if not config.get("ckpt_path"):
                warnings.warn("no --ckpt_path: the weights are the config's own, before any training", stacklevel=2)
        else:
            self.save_config_kwargs = {"portable": PortableConfig(tree, written, self.folder)}
        checkpoint = Path(config.get("ckpt_path") or "none")
        if self.subcommand == "fit" and checkpoint.exists():
            changes = check_changes(self._parser("fit"), config)
            if changes and is_first_process():
                print("changed since the checkpoint:", *changes, sep="\n  ")
        place_outputs(config.trainer, self.folder)
        if checkpoint.exists():
            leave_out_initial_weights(config.model, checkpoint)
        elif self.subcommand == "fit":
            warn_of_random_towers(config.model)

    def _written(self) -> Any:
        """The subcommand's config with references as the user wrote them."""
        assert isinstance(self.parser, OneLineParser)
        written = self.parser.written[self.subcommand].as_dict()
        remember_variables(strings_of(written))
        return written

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        assert self.folder is not None
        config = self._get(self.config_init, "trainer", default={})
        pictures = self._get(self.config_init, "pictures", default=0)
        options = trainer_options(config, self.folder, str(self.subcommand), self.trial, pictures)
        options["callbacks"] = [SameOnAllRanks(self._tree), *options["callbacks"]]
        if str(config.get("devices")).isdigit():  # else Lightning decides what there are
            check_launch(config.get("num_nodes") or 1, int(config["devices"]))
        try:
            trainer = super().instantiate_trainer(**options, **kwargs)
        except (TypeError, RuntimeError) as error:  # as for `devices: x`, or what Lightning misses in SLURM's variables
            raise ConfigError(f"trainer: {error}") from error
        check_launch(trainer.num_nodes, trainer.num_devices)
        return trainer

    def before_validate(self) -> None:
        check(self.model, self.datamodule, str(self.subcommand))
        self._before_meeting()

    before_test = before_predict = before_validate

    def before_fit(self) -> None:
        self.model.check_trainer(self.trainer)
        check_optimizer(self.model.optimizer, self.trainer.strategy.root_device)
        if self.trainer.max_steps > 0:
            check_length(self.model, self.datamodule, self.trainer.max_steps)
        assert self.folder is not None
        lock(self.folder)
        checkpoint = self._get(self.config_init, "ckpt_path")
        begun = Path(checkpoint).resolve().parent.parent if checkpoint and Path(checkpoint).exists() else None
        place_caches(self.datamodule, self.folder, begun)
        check(self.model, self.datamodule, str(self.subcommand))
        self._before_meeting()

    def _before_meeting(self) -> None:
        for callback in callbacks_of(self.trainer, SameOnAllRanks):
            callback.before_meeting(self.trainer)

    def after_fit(self) -> None:
        for record in callbacks_of(self.trainer, RunRecord):
            record.after_fit(self.trainer, self.model, self.datamodule)


def run(argv: list[str], then: Callable[[Path], None] | None = None) -> int:
    """Run one of LightningCLI's commands. Returns the exit status.

    Args:
        argv: Its words.
        then: Called with the run's folder where it ended, not after a `fast_dev_run`. Its errors are told as a run's.
    """
    sys.argv[1:] = argv  # the first stays: Lightning starts the other processes of this machine with it
    stdout, sys.stdout = sys.stdout, cast(TextIO, _Pipe(sys.stdout))
    # A CPU takes a hundred times longer over numbers below 1e-38, which the gradients of a saturated GELU are. Threads
    # take the setting over from the one that starts them, so it must come before any of torch's.
    torch.set_flush_denormal(True)
    try:
        cli = IndiCLI()
        if then is not None and cli.folder is not None and not cli.trial:
            then(cli.folder)
    except KeyboardInterrupt as interrupt:
        return _say_left(interrupt)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's way to end after Ctrl-C
            return _say_left(stop.__context__)
        raise
    except AgreedStop as stop:
        if stop.first:
            print(mask(f"indiclip: {stop}"), file=sys.stderr)
        return stop.status
    except Exception as error:
        if os.environ.get("INDICLIP_TRACEBACK"):
            raise
        return _say(error)
    finally:
        sys.stdout = stdout
        unlock()
    return 0


def _load(text: str) -> Any:
    """YAML of a config file, or a value on the command line; jsonargparse has gone to the file's folder meanwhile."""
    return anchored(translate_config(get_loader("yaml")(text)), Path.cwd())


def _quieten() -> None:
    """A line for each warning, and none for what the libraries say in every run."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {mask(' '.join(str(message).split()))}\n"
    sys.excepthook = lambda *error: print(mask("".join(traceback.format_exception(*error))), end="", file=sys.stderr)
    if not is_first_process():
        leave_warnings_to_first_process()
    for message in _NOISE:
        warnings.filterwarnings("ignore", f".*{message}")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # which print their tables so


class _Pipe:
    """Standard output that may fail early, as with `| head -1` or on a full disk: the run goes on without it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError:  # the reader is gone, or the disk of a log is full
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def _say_left(interrupt: KeyboardInterrupt) -> int:
    """Print where Ctrl-C has ended the run. Returns the exit status."""
    if is_first_process():
        notes = getattr(interrupt, "__notes__", [])  # see RunRecord
        print(mask(" ".join(["indiclip: Ctrl-C: left at once", *notes])), file=sys.stderr)
    return 128 + signal.SIGINT


def _raised_first(error: Exception) -> Exception:
    """The error, or what Lightning was leaving for when its teardown failed too, as before any loader is read."""
    is_of_teardown = any(frame.name == "_teardown" for frame in traceback.extract_tb(error.__traceback__))
    return error.__context__ if is_of_teardown and isinstance(error.__context__, Exception) else error


def _say(error: Exception) -> int:
    """Print what a user can act on as one line. Returns the exit status; raises what is the program's own fault."""
    error = _raised_first(error)
    notes = getattr(error, "__notes__", [])  # where it broke off in training, see RunRecord
    apart = launch.explain(error)
    lost = None if apart else local_ranks.explain(error)
    broken = workers.explain(error) or apart or lost
    of_users = isinstance(error, OSError | ImportError | MisconfigurationException)
    if not (broken or of_users or (isinstance(error, ValueError) and not notes)):
        raise error
    said = broken or one_line(error)
    if of_files := origins(sys.argv[1:], said):
        said = f"{said} ({of_files})"
    line = mask(f"indiclip: {' '.join([said, *notes])}")
    if speaks(lost or line, is_consequence=lost is not None):
        print(line, file=sys.stderr)
    launch.wait_for_others()
    return 1 if broken or notes else 2


def _seed(seed: bool | int) -> int:
    if isinstance(seed, bool) or not 0 <= seed < 2**32:
        expected = "a number from 0 to 4294967295, by which the run can be done again"
        raise ValueError(f"found {str(seed).lower()}; expected {expected}")
    return seed
