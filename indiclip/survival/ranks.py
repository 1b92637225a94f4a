"""What all ranks of a run do together."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher


class AgreedStop(Exception):
    """All ranks end the run here, each by raising this.

    Args:
        trainer: The run.
        message: One line for the user.
        status: Exit status of the command.

    Attributes:
        status: 0 in a process that Lightning started: it kills the first one when another ends with an error.
        first: Whether this is the process that speaks for all.
    """

    def __init__(self, trainer: L.Trainer, message: str, status: int = 1) -> None:
        super().__init__(message)
        started_by_lightning = isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher)
        self.status = 0 if started_by_lightning and trainer.local_rank > 0 else status
        self.first = trainer.is_global_zero


def gathered(trainer: L.Trainer, value: Any) -> list[Any]:
    """The `value` of each rank, on every rank. A collective: for rare things."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values
