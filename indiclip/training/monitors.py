"""Whether the numbers that callbacks look at, their `monitor`, are logged, and are those of the weights they save."""

from collections.abc import Iterator

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from indiclip.module import MultiTask
from indiclip.names import did_you_mean
from indiclip.training.fault_tolerance.ranks import AgreedStop, callbacks_of

_SMALLER_IS_BETTER = ("median_km", "parity_")


class CheckMonitors(Callback):
    """Ends a run with one line where a callback's `monitor` names a number that is not logged.

    Stands before the others: EarlyStopping and ModelCheckpoint would end it with a traceback.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, MultiTask)
        heads = {head.name for head in pl_module.each_head()}
        for where, monitor in _monitors(trainer) if stage == "fit" else []:
            prefix, *parts = monitor.split("/", 2)
            if prefix != "val" or not parts:
                continue
            if parts[0] not in heads:
                near = did_you_mean(monitor, ["/".join([prefix, name, *parts[1:]]) for name in heads])
                raise ValueError(f"{where}: {monitor}: no head {parts[0]!r}{near}")
            if not trainer.enable_validation:
                raise ValueError(f"{where}: {monitor} is not logged, for this run has no validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            _check_logged(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:
            _check_logged(trainer)


def _check_logged(trainer: Trainer) -> None:
    logged = sorted([*trainer.callback_metrics, "epoch", "step"])
    for where, monitor in _monitors(trainer):
        if monitor not in logged:
            near = did_you_mean(monitor, logged) or f"; logged are {', '.join(logged)}"
            raise AgreedStop(trainer, f"{where}: {monitor} is not logged{near}", 2)


def _monitors(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Where each monitor stands, and its name; but of checkpoints by the benchmark, see `check_monitors`."""
    for callback in callbacks_of(trainer, Callback):
        monitor = getattr(callback, "monitor", None)
        by_benchmark = isinstance(callback, ModelCheckpoint) and str(monitor).startswith("eval/")
        if monitor and not by_benchmark and getattr(callback, "strict", True):
            yield f"trainer.callbacks: the monitor of {type(callback).__name__}", monitor


def check_monitors(trainer: Trainer, every_n_steps: int | None, every_n_epochs: int, names: list[str]) -> None:
    """Compare the `monitor` of each checkpoint callback with what will be logged, and when.

    Args:
        trainer: Of the run.
        every_n_steps: When the benchmark scores; None is after validations.
        every_n_epochs: After how many of them.
        names: Of all numbers that it logs.

    Raises:
        ValueError: No such number, the best of it is not what `mode` says, or it is of other weights.
    """
    for callback in callbacks_of(trainer, ModelCheckpoint):
        if not str(callback.monitor).startswith("eval/"):
            continue
        _check_schedule(callback, every_n_steps, every_n_epochs)
        where, monitor = f"trainer.callbacks: {type(callback).__name__}", str(callback.monitor)
        if monitor not in names:
            raise ValueError(
                f"{where}.monitor: the benchmark logs no {monitor}{did_you_mean(monitor, names)}; expected one of "
                f"{len(names)} names such as {names[0]}"
            )
        mode = "min" if any(word in monitor for word in _SMALLER_IS_BETTER) else "max"
        if callback.mode != mode:
            raise ValueError(f"{where}.mode: {callback.mode} would keep the worst by {monitor}; expected {mode}")


def _check_schedule(callback: ModelCheckpoint, every_n_steps: int | None, every_n_epochs: int) -> None:
    """A best checkpoint is of the weights that were scored: both come at the same steps."""
    steps, timed = callback._every_n_train_steps, callback._train_time_interval is not None
    if every_n_steps and steps > 0 and steps % every_n_steps == 0:
        return
    if not every_n_steps and every_n_epochs == 1 and not steps and not timed:
        return
    advice = f"set its every_n_train_steps to {every_n_steps or 'null'}"
    if not every_n_steps and every_n_epochs != 1:
        advice += ", and every_n_epochs of IndiaBench to 1"
    raise ValueError(
        f"trainer.callbacks: {type(callback).__name__} keeps the best by {callback.monitor} and saves with "
        f"every_n_train_steps {steps or 'null'}, but IndiaBench scores with every_n_steps {every_n_steps or 'null'}, "
        f"every_n_epochs {every_n_epochs}: a checkpoint would get the score of other weights; {advice}"
    )
