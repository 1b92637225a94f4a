"""Once in each optimizer step all ranks tell each other what only one of them may know, in one small reduction."""

from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from indiclip.distributed import gathered, sum_over_ranks
from indiclip.lightning_internals import leave_out_sigterm_exchange, logs_after_step, replace_signal_handlers
from indiclip.module import Batches, MultiTask
from indiclip.training.fault_tolerance.later import Later
from indiclip.training.fault_tolerance.nonfinite import NonFinite, bad_losses
from indiclip.training.fault_tolerance.preemption import SIGNALS, Preemption
from indiclip.training.fault_tolerance.quarantine import Quarantine
from indiclip.training.fault_tolerance.ranks import AgreedStop, folder_of


class _Count(NamedTuple):
    """The ballots of a step, summed over the ranks, on their way to the host."""

    ballots: Later
    step: int
    losses: dict[str, Tensor]
    keys: dict[str, list[str]]


class StepSync(Callback):
    """Ranks agree on non-finite steps, signals and quarantined samples.

    A step with a loss or gradient that is not finite on any rank is skipped by all: weights, optimizer and batch norm
    stay as they were. A signal to any rank makes all save and leave. Unreadable samples of all ranks go to one list.
    On a GPU the host reads a step's result while the next one runs.

    Args:
        max_nonfinite: Non-finite steps in a row that are skipped; one more stops the run.
        max_requeues: How often a SLURM job may put itself into the queue again, on SIGUSR1.
    """

    def __init__(self, max_nonfinite: int = 10, max_requeues: int = 20) -> None:
        self.nonfinite, self.preemption = NonFinite(max_nonfinite), Preemption(max_requeues)
        self.quarantine = Quarantine()
        self._trains = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._losses: dict[str, Tensor] = {}
        self._keys: dict[str, list[str]] = {}
        self._on_the_way: list[_Count] = []
        self._voted, self._agreed = False, 0
        self._folder = folder_of(trainer)
        self._trains = self._trains or stage == "fit"  # which may end with a validation of its own
        if not self._trains:
            self._folder /= {"predict": "predictions", "test": "test"}.get(stage, "validate")  # of what is not in there
        if stage != "fit":
            self.quarantine.begin(trainer, self._folder, anew=not self._trains)
        # A run that only scores has none, so that the system ends it.
        replace_signal_handlers(trainer, self.preemption.install if stage == "fit" else lambda: None)
        leave_out_sigterm_exchange(trainer)

    def leave(self, number: int) -> None:
        """For other callbacks in which the ranks agreed on a signal: the run saves and ends as soon as it may."""
        self._agreed = number

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = gathered(trainer.global_step)  # before anything else that the ranks do together
        if len(set(steps)) > 1:
            raise AgreedStop(trainer, f"--ckpt_path: the ranks go on from different steps: {steps}", 2)
        # Not in `setup`, where it is not known yet whether the run goes on from a checkpoint.
        self.quarantine.begin(trainer, self._folder, anew=not trainer.ckpt_path)
        self.nonfinite.open(trainer, self._folder)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batches, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MultiTask)
        self._leave(trainer)
        self.quarantine.collect(batch)
        self.nonfinite.begin(pl_module)
        self._keys = {task: part["keys"] for task, part in batch.items()}

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MultiTask)
        self._losses = bad_losses(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, MultiTask)
        if not self._losses:  # StochasticWeightAveraging gathers the statistics of batch norm, without a backward pass
            return
        found = self.nonfinite.found(pl_module, self._losses, scaled=trainer.precision == "16-mixed")
        ballots = self._reduced(found)
        self.nonfinite.undo(pl_module, optimizer, ballots[0])
        self._on_the_way.append(_Count(Later(ballots), trainer.global_step + 1, self._losses, self._keys))
        self._losses, self._voted = {}, True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not self._voted:
            return
        self._voted = False
        while len(self._on_the_way) > (1 if pl_module.device.type == "cuda" else 0):
            self._count(trainer, self._on_the_way.pop(0))
        if self.nonfinite.count and logs_after_step(trainer):  # to bring it to the device is to wait for it
            pl_module.log("train/nonfinite_steps", float(self.nonfinite.count), batch_size=1)
        self._leave(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.preemption.restore()
        while self._on_the_way:
            self._count(trainer, self._on_the_way.pop(0))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batches, *_: Any, **__: Any
    ) -> None:
        self.quarantine.collect(batch)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            # At once: a scheduler waits a minute, a validation may take ten. The weights are those of the last step.
            nothing = torch.zeros((), device=pl_module.device)
            self._count(trainer, _Count(Later(self._reduced(nothing)), trainer.global_step, {}, {}))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.quarantine.act(trainer, self._folder)  # before any callback writes what was scored
        self._leave(trainer)

    def on_fit_end(self, *_: Any, **__: Any) -> None:
        self.preemption.restore()  # also where no step was left

    on_exception = on_fit_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        replace_signal_handlers(trainer, None)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def _leave(self, trainer: Trainer) -> None:
        if self._agreed:
            self.preemption.act(trainer, self._folder, self._agreed)

    def _reduced(self, found: Tensor) -> Tensor:
        """What the ranks `found` not to be finite, newly quarantined and got as signals, counted over all of them."""
        others = [float(self.quarantine.pending), *(float(self.preemption.received == number) for number in SIGNALS)]
        ballots = torch.cat([found.reshape(1), torch.tensor(others).to(found.device, non_blocking=True)])
        return sum_over_ranks(ballots)  # Lightning's own reduction has a barrier before it

    def _count(self, trainer: Trainer, count: _Count) -> None:
        """Do what the ranks agreed on; the same on all of them."""
        found, quarantined, *signals = count.ballots.read()
        if quarantined:
            self.quarantine.act(trainer, self._folder)
        if found:
            self.nonfinite.act(trainer, self._folder, count.step, count.losses, count.keys)
        elif count.losses:
            self.nonfinite.in_a_row = 0
        for number, ballots in zip(SIGNALS, signals, strict=True):
            if ballots:
                self.preemption.act(trainer, self._folder, number)
