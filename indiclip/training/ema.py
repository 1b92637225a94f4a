"""An exponential moving average of the weights, beside those that are trained.

Shape letters: none; every tensor is one rank's own shard of a weight.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from indiclip.float8 import forget_scales
from indiclip.lightning_internals import estimated_steps
from indiclip.moving_average import update_averages
from indiclip.names import check_range
from indiclip.pretrained.runs import AVERAGES
from indiclip.sharding import like
from indiclip.teacher import Teacher
from indiclip.training.fault_tolerance.ranks import callbacks_of


class EMA(Callback):
    """Keeps an average of every trained weight, and scores that instead of the weights.

    After an optimizer step, average = decay * average + (1 - decay) * weight, in float32, of each rank's own shard. The
    running statistics of batch norm are averaged likewise. The decay
    grows with the number of updates t, min(decay, (1 + t) / (10 + t)), so that a short run's average is not of its
    beginning (TensorFlow's `tf.train.ExponentialMovingAverage`, `num_updates`); t counts for each weight from its own
    first step, as a head that begins late would else keep much of its random start.

    Validation, test, predict and the benchmark see the averages. A checkpoint has the trained weights in
    `state_dict`, so that a resumed run is the uninterrupted one, and the averages apart; `indiclip.load` reads these,
    unless it is told to read the `last`. A step that was skipped because it was not finite changes no weight, and
    counts as an update.

    Args:
        decay: Share of the old average, 0 to below 1.
        every_n_steps: Optimizer steps from one update to the next; updates come after its multiples.
        start_step: The averages begin with the weights after the first such multiple that is not below this.
    """

    def __init__(self, decay: float = 0.9999, every_n_steps: int = 1, start_step: int = 0) -> None:
        check_range({"trainer.callbacks.EMA.decay": decay}, 0, 1, without=1)
        check_range({"trainer.callbacks.EMA.every_n_steps": every_n_steps}, 1)
        check_range({"trainer.callbacks.EMA.start_step": start_step})
        self.decay, self.every_n_steps, self.start_step = decay, every_n_steps, start_step
        self.num_updates = 0
        self._averages: dict[str, Tensor] = {}
        self._missed: dict[str, int] = {}  # weight -> updates before its first step, of those that begin late
        self._untouched: set[str] = set()  # which no step has trained since the averages began
        self._trained: dict[str, Tensor] | None = None  # while the averages are in the model
        self._loaded: dict[str, Tensor] = {}
        self._step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            kind = type(trainer.strategy).__name__
            raise ValueError(
                f"trainer.strategy: {kind} flattens the weights, which EMA averages one by one; expected ddp or "
                "indiclip.training.sharding.ShardedStrategy"
            )

        if len(callbacks_of(trainer, EMA)) > 1:
            raise ValueError("trainer.callbacks: found EMA more than once; expected one average of the weights")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        first, steps = max(1, -(-self.start_step // self.every_n_steps)) * self.every_n_steps, estimated_steps(trainer)
        if first > steps:
            raise ValueError(
                f"trainer.callbacks.EMA.start_step: {self.start_step}, with every_n_steps {self.every_n_steps}, has "
                f"the averages begin after step {first} of {steps:.0f}; expected less"
            )
        if trainer.is_global_zero:
            print(f"scored is an average of the weights: EMA, decay {self.decay:g}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_loaded(pl_module)
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._step:
            return
        self._step = step
        if step >= self.start_step and step % self.every_n_steps == 0:
            self.update(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        if not self._averages:
            self._untouched = pl_module.idle_names()
        elif self._untouched:
            self._untouched &= pl_module.idle_names()

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the averages towards the module's weights; the first time they begin there."""
        weights = {name: shard.float() for name, shard in _shards(module)}
        if not self._averages:
            self._averages = {name: weight.clone() for name, weight in weights.items()}
            return
        self._missed |= dict.fromkeys(self._untouched, self.num_updates + 1)
        counted = {name: self.num_updates - self._missed.get(name, 0) for name in self._averages}
        for number in set(counted.values()):  # -1 of what is untouched, which is copied
            names = [name for name, own in counted.items() if own == number]
            decay = min(self.decay, (1 + number) / (10 + number))
            update_averages([self._averages[name] for name in names], [weights[name] for name in names], decay)
        self.num_updates += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._take_loaded(pl_module)
            if self._averages and trainer.is_global_zero:
                print(f"scored are the averaged weights, of {self.num_updates:,} updates")
        self._swap_in(pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_out(pl_module)

    on_test_end = on_predict_end = on_validation_end

    @contextmanager
    def averaged(self, trainer: Trainer, module: LightningModule) -> Iterator[int | None]:
        """The averages, those of this step too, in place of the weights; gives their number of updates.

        None, and nothing is replaced, where there are no averages yet.
        """
        if trainer.training:
            self.on_train_batch_end(trainer, module)  # which may have been called already, or not
        mine = self._trained is None
        self._swap_in(module)
        try:
            yield self.num_updates if self._averages else None
        finally:
            if mine:
                self._swap_out(module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swap_out(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """On all ranks, each with its shards; with this step, whose end another callback may have been told before."""
        if trainer.training:
            self.on_train_batch_end(trainer, pl_module)
        weights = checkpoint["state_dict"]
        if self._trained is not None:  # a checkpoint in the middle of a validation
            for name, trained in self._trained.items():
                weights[name] = _as_saved(trained, weights[name])
        if self._averages:
            averages = {name: _as_saved(average, weights[name]) for name, average in self._averages.items()}
            late = {"missed": self._missed, "untouched": sorted(self._untouched)}
            checkpoint[AVERAGES] = {"num_updates": self.num_updates, "state_dict": averages, **late}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if AVERAGES in checkpoint:
            self._loaded = checkpoint[AVERAGES]["state_dict"]
            self.num_updates = checkpoint[AVERAGES]["num_updates"]
            self._missed = {**checkpoint[AVERAGES].get("missed", {})}
            self._untouched = {*checkpoint[AVERAGES].get("untouched", [])}

    def _take_loaded(self, module: nn.Module) -> None:
        """The averages of a checkpoint, of those weights that are averaged now."""
        if not self._loaded:
            return
        weights = module.state_dict()
        self._averages = {
            name: _local(like(self._loaded[name], weights[name])).to(shard.device, torch.float32).clone()
            for name, shard in _shards(module)
            if name in self._loaded
        }
        self._averages |= {n: s.float().clone() for n, s in _shards(module) if n not in self._averages}
        self._loaded = {}

    @torch.no_grad()
    def _swap_in(self, module: nn.Module) -> None:
        if not self._averages or self._trained is not None:
            return
        self._trained = {name: shard.clone() for name, shard in _shards(module)}
        for name, shard in _shards(module):
            shard.copy_(self._averages[name])
        forget_scales(module)

    @torch.no_grad()
    def _swap_out(self, module: nn.Module) -> None:
        if self._trained is None:
            return
        for name, shard in _shards(module):
            shard.copy_(self._trained[name])
        forget_scales(module)
        self._trained = None


@contextmanager
def scored_weights(trainer: Trainer, module: LightningModule) -> Iterator[str]:
    """The averages that an `EMA` keeps in place of the weights; gives in words which they are."""
    with ExitStack() as stack:
        updates = [stack.enter_context(ema.averaged(trainer, module)) for ema in callbacks_of(trainer, EMA)]
        averages = [f"the averaged weights of {number:,} updates" for number in updates if number is not None]
        yield next(iter(averages), "the trained weights")


def _shards(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of each trained weight and of batch norm's statistics; writing to it changes the module.

    Not of the averages that a head keeps itself.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # the outermost one has whole weights after an evaluation, until it is called again
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
    teachers = tuple(f"{path}." for path, part in module.named_modules() if isinstance(part, Teacher))
    for path, part in module.named_modules():
        if path.startswith(teachers):
            continue
        if isinstance(part, _BatchNorm) and part.track_running_stats and part.running_mean is not None:
            yield f"{path}.running_mean", part.running_mean
            assert part.running_var is not None
            yield f"{path}.running_var", part.running_var


def _as_saved(shard: Tensor, weight: Tensor) -> Tensor:
    """For a checkpoint, as it has the weight: whole, on the CPU, or shared out over the ranks."""
    if isinstance(weight, DTensor):
        mesh = weight.device_mesh
        return DTensor.from_local(shard, mesh, weight.placements, shape=weight.shape, stride=weight.stride())
    return shard.detach().cpu()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
