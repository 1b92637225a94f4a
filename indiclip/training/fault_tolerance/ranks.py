"""What all ranks of a run do together."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lightning import Trainer

from indiclip.distributed import gathered

_Kind = TypeVar("_Kind")


class AgreedStop(Exception):
    """All ranks end the run here, each by raising this.

    Args:
        trainer: The run.
        message: One line for the user.
        status: Exit status of the command.

    Attributes:
        status: 0 but for the first process of a machine, which torchrun and Lightning kill when another ends with an
            error, while it may still have things to do.
        first: Whether this is the process that speaks for all.
    """

    def __init__(self, trainer: Trainer, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = 0 if trainer.local_rank > 0 else status
        self.first = trainer.is_global_zero


def folder_of(trainer: Trainer) -> Path:
    """The run's folder: the trainer's `default_root_dir`, which the command sets; else the logger's. A collective."""
    given = trainer.default_root_dir != str(Path.cwd())
    return Path(trainer.strategy.broadcast(trainer.default_root_dir if given else trainer.log_dir or "."))


def callbacks_of(trainer: Trainer, kind: type[_Kind]) -> list[_Kind]:
    """The run's callbacks of a kind."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


class Interrupted(Exception):
    """A signal came during work that takes long.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def together(trainer: Trainer, what: str) -> Iterator[Callable[[Any], list[Any]]]:
    """Work that all ranks share and that ends on all of them where it ends early on one: none is left waiting.

    Gives the `exchange` by which they meet: a value -> the values of all ranks. All must call it equally often; a rank
    that fails in between tells the others in its last.

    Args:
        trainer: The run.
        what: The work, for messages.

    Raises:
        Interrupted: On all ranks, where any raised it.
        AgreedStop: On all ranks, where any raised another error. A single process raises its own.
    """
    told = False  # all ranks know of the end, or cannot be told

    def exchange(value: Any, failure: Interrupted | str | None = None) -> list[Any]:
        nonlocal told
        told = True
        found = gathered((failure, value))
        failures = [failure for failure, _ in found if failure is not None]
        if failures:
            first = failures[0]
            raise first if isinstance(first, Interrupted) else AgreedStop(trainer, f"{what}: {first}")
        told = False
        return [value for _, value in found]

    try:
        yield exchange
        exchange(None)
    except Exception as error:
        if told or trainer.world_size == 1:
            raise
        if isinstance(error, Interrupted):
            exchange(None, error)
        words = str(error)
        if not isinstance(error, ValueError | OSError):  # none that a user could act on
            traceback.print_exc()
            words = f"{type(error).__name__}: {words}"
        exchange(None, f"rank {trainer.global_rank}: {words}")
