"""A validation that was due when a run stopped is made up for when it goes on."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from indiclip.lightning_internals import validate_now, validation_due


class ResumeValidation(Callback):
    """Goes through the held-out data at the start of a run whose checkpoint was taken before or during a validation.

    Lightning would go on with the next step. Where there is none, see `RunRecord.after_fit`. Nothing can be saved
    meanwhile: Lightning has already counted the epoch, and would count it again from that checkpoint. The last metrics
    come back too, for callbacks such as EarlyStopping that look at them at the epoch's end.
    """

    def __init__(self) -> None:
        self._validated = -1  # the last step after which the held-out data were gone through
        self._due = False
        self._scores: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        due = self._validated != trainer.global_step and validation_due(trainer)
        return {"due": due, "scores": {name: float(value) for name, value in trainer.callback_metrics.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._due, self._scores = bool(state_dict["due"]), state_dict.get("scores", {})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path:
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self._scores.items()})
        if self._due and trainer.ckpt_path:
            validate_now(trainer)
        self._due = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = trainer.global_step
