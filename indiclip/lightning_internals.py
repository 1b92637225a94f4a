"""What touches Lightning's private parts, and nothing else does (but `Checkpoints`, a subclass of ModelCheckpoint).

Tried with Lightning 2.6.6. Each function says which hook or property is missing there.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from subprocess import Popen
from typing import Any

from lightning import Trainer
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import Tensor


def batches_done(trainer: Trainer) -> int:
    """Micro-batches that this run has trained on, those before its checkpoint too; exact in mid-epoch."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]


def logs_after_step(trainer: Trainer) -> bool:
    """Whether the numbers of this training step go to the loggers, or it is the last one."""
    return trainer._logger_connector.should_update_logs or trainer.global_step + 1 == trainer.max_steps


def gradient_scale(trainer: Trainer) -> Callable[[Tensor], Tensor]:
    """What the precision plug-in will do to the loss before its backward pass: of float16, scale it."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler.scale if scaler is not None else lambda gradient: gradient


def run_steps(trainer: Trainer, steps_per_epoch: int) -> int | None:
    """Steps of the whole run, as `estimated_steps` finds them once there is a loader; None of one without an end."""
    limit = trainer.limit_train_batches  # type: ignore[attr-defined]
    length = min(steps_per_epoch, limit) if isinstance(limit, int) else int(steps_per_epoch * limit)
    ends = [trainer.max_steps] if trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        ends.append(trainer.max_epochs * length)
    return min(ends, default=None)


def estimated_steps(trainer: Trainer) -> float:
    """`trainer.estimated_stepping_batches`, without its side effect.

    `max_epochs` makes Lightning begin to load before it is known where a resumed run stands, so the loader is reset.
    """
    steps = trainer.estimated_stepping_batches
    loop = trainer.fit_loop
    if loop._combined_loader is not None:
        loop._combined_loader.reset()
        loop._combined_loader = None
    return steps


def epoch_ends(trainer: Trainer) -> bool:
    """Whether this batch is the last one of its epoch."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def validation_due(trainer: Trainer) -> bool:
    """Whether a validation comes after this batch, or goes on."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and (trainer.validating or trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher))


def validate_now(trainer: Trainer) -> None:
    """A whole validation before the first step of a run that goes on."""
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    val_loop.restarting = False  # from its first batch
    trainer.validating = True
    val_loop.run()
    val_loop._has_run = False  # else the epoch that ends here would end without a step, again and again
    trainer.training = True


def time_fetches(trainer: Trainer, begins: Callable[[], None], ends: Callable[[], None]) -> None:
    """Have `begins` and `ends` called before and after the training loop waits for its next batch.

    Until `forget_fetches`. No hook comes before it; Lightning tells its profiler by these two, which an epoch's start
    hands to the fetcher.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    kind = type(loop)

    def before() -> None:
        kind._on_before_fetch(loop)
        begins()

    def after() -> None:
        ends()
        kind._on_after_fetch(loop)

    loop._on_before_fetch, loop._on_after_fetch = before, after


def forget_fetches(trainer: Trainer) -> None:
    """Undo `time_fetches`."""
    own = trainer.fit_loop.epoch_loop.__dict__
    own.pop("_on_before_fetch", None)
    own.pop("_on_after_fetch", None)


def profiled_module(profiler: Profiler) -> Any:
    """The LightningModule of the run whose profiler it is, which no hook of a profiler gets."""
    return profiler._lightning_module  # type: ignore[attr-defined]


def around_saves(trainer: Trainer, around: Callable[[], AbstractContextManager[Any]]) -> None:
    """Have every save of a checkpoint run within what `around` gives, until `forget_saves`; no hook follows a save."""
    save = trainer.save_checkpoint

    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        with around():
            save(*args, **kwargs)

    trainer.save_checkpoint = save_checkpoint  # type: ignore[method-assign]


def forget_saves(trainer: Trainer) -> None:
    """Undo all of `around_saves`."""
    vars(trainer).pop("save_checkpoint", None)


def leave_out_sigterm_exchange(trainer: Trainer) -> None:
    """Have the ranks not tell each other in every step whether Lightning's own handler has got a signal.

    They would wait for each other and for the device; there is no such handler, see `replace_signal_handlers`.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def replace_signal_handlers(trainer: Trainer, register: Callable[[], None] | None) -> None:
    """Let `register` set handlers in place of Lightning's; None gives Lightning its own again.

    Its handler broadcasts wherever it interrupts a rank, and a run that it ends has status 0.
    """
    if register is None:
        vars(trainer._signal_connector).pop("register_signal_handlers", None)
    else:
        trainer._signal_connector.register_signal_handlers = register  # type: ignore[method-assign]


def take_processes(trainer: Trainer) -> list[Popen[Any]]:
    """The ranks that this process has started, which Lightning's observer is made to watch no more."""
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return []
    observed = launcher.procs
    launcher.procs = [*observed]
    observed.clear()  # which Lightning's observer takes for a good end
    return launcher.procs
