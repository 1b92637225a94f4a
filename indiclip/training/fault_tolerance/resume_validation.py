"""A validation that was due when a run stopped is made up for when it goes on."""

from __future__ import annotations

from typing import Any

import lightning as L


class ResumeValidation(L.Callback):
    """Goes through the held-out data at the start of a run whose checkpoint was taken before or amid a validation.

    Lightning would go on with the next step. Where there is none, see `RunRecord.after_fit`. Nothing can be saved
    meanwhile: Lightning has already counted the epoch, and would count it again from that checkpoint.
    """

    def __init__(self) -> None:
        self._validated = -1  # the last step after which the held-out data were gone through
        self._owed = False

    def state_dict(self) -> dict[str, Any]:
        return {"owed": self._owes()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._owed = bool(state_dict["owed"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._trainer = trainer

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._owed and trainer.ckpt_path:
            val_loop = trainer.fit_loop.epoch_loop.val_loop
            val_loop.restarting = False  # from its first batch
            trainer.validating = True
            val_loop.run()
            val_loop._has_run = False  # else the epoch that ends here would end without a step, again and again
            trainer.training = True
        self._owed = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = trainer.global_step

    def _owes(self) -> bool:
        trainer = self._trainer
        loop = trainer.fit_loop
        if self._validated == trainer.global_step or loop._data_fetcher is None:
            return False
        return trainer.validating or loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
