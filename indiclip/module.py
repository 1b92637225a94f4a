"""The training loop: every step sums every head's losses. Nothing here knows a task."""

import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, Self, cast

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from indiclip import module_checks as checks
from indiclip import optim, sharding
from indiclip.distributed import rank_and_world, sum_over_ranks
from indiclip.encoder import Encoder
from indiclip.float8 import Recipe, convert_to_float8, share_scales
from indiclip.freezing import freeze as freeze_paths
from indiclip.freezing import frozen_paths, keep_frozen
from indiclip.head import Head, Losses, Prediction, computed
from indiclip.head_schedule import idle_names, idle_parameters, start_steps, unused_parts
from indiclip.held_out_scores import HeldOutScores
from indiclip.lightning_internals import batches_done, estimated_steps, gradient_scale, logs_after_step
from indiclip.micro_batches import CachedGradients, Outputs, split
from indiclip.names import check_range
from indiclip.parameter_groups import parameter_groups
from indiclip.ratios import Values, as_ratios, means_over_ranks, over_all_ranks
from indiclip.task_weights import Fixed, TaskWeights, gradients_of
from indiclip.temperature import check_scales, logits_of
from indiclip.types import Batch, Features, Origin

Batches = dict[str, Batch]
_DEFAULT_OPTIMIZER = partial(AdamW, betas=(0.9, 0.98), fused=True)


class MultiTask(L.LightningModule):
    """One encoder, several heads, one optimizer step for all of them.

    Args:
        encoder: What is trained and kept.
        heads: The tasks.
        head_overrides: In a config, arguments in place of those that `heads` has, for a page that stacks on another:
            `head_overrides+: [{head: contrastive, loss: sigmoid}]`. They are applied when the config is read; two that
            want an argument of a head differently are refused.
        lr: Peak learning rate; None is the optimizer's own.
        weight_decay: Of matrices and kernels, see `indiclip.parameter_groups`; None is the optimizer's own.
        warmup_steps: Linear warm-up, then what `lr_schedule` says.
        optimizer: Any of torch's and timm's, e.g. `{class_path: timm.optim.Muon, init_args: {momentum: 0.95}}`. None is
            fused AdamW with lr 1e-3, betas (0.9, 0.98) and weight_decay 0.05.
        lr_schedule: One of `indiclip.optim`: Cosine, Linear, WarmupStableDecay, Constant, Staged. None is Cosine, to
            zero at the run's last step.
        lr_scale: Factor of the learning rate by module path, e.g. `{encoder.backbone: 0.1}`.
        layer_decay: Factor of the learning rate from each block of a tower to the block below.
        task_weights: How the heads' losses become one, see `indiclip.task_weights`: `Uncertainty`, `GradNorm`,
            `PCGrad`; None is `Fixed`. A head's `weight` stays a factor.
        micro_batches: Parts of a rank's batch that go through the model one after the other, where memory does not hold
            all of it; gradients are those of the whole batch, see `indiclip.micro_batches`.
        freeze: What is not trained: `image` or `text` (a tower and its pooling; LiT is `[image]`), `projections`,
            `logit_scale` (with its bias), or paths such as `encoder.backbone.vit.blocks.0`. It stays in evaluation
            mode, gets no gradients, and the optimizer does not know it.
        activation_checkpointing: Keep of each block of the towers its inputs alone, and compute the rest again in the
            backward pass: less memory for about a third more time.
        float8: `rowwise` or `tensorwise`: the matrix products of the towers' blocks run in 8-bit floating point while
            they train, see `indiclip.float8`; with `trainer.precision: bf16-mixed`, on GPUs from Ada or Hopper on.
        compile: Compile the blocks of the towers (torch.compile). Needs a C++ compiler on a CPU, Triton on a GPU; the
            first steps take a minute or more.

    Attributes:
        frozen: Paths of what is not trained, of `freeze` and of what no head uses.
        starts: Head -> the step in which it begins, once the run's length is known.

    Raises:
        ValueError: No head, the same head twice, a rate below 0, or a part that is not there.
    """

    def __init__(
        self,
        encoder: Encoder,
        heads: list[Head],
        head_overrides: list[dict[str, Any]] | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
        warmup_steps: int = 100,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        lr_schedule: optim.Schedule | None = None,
        lr_scale: dict[str, float] | None = None,
        layer_decay: float = 1.0,
        task_weights: TaskWeights | None = None,
        micro_batches: int = 1,
        freeze: list[str] | None = None,
        activation_checkpointing: bool = False,
        float8: Recipe | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if head_overrides:
            raise ValueError("model.head_overrides: is for configs; expected heads that are made with these arguments")
        checks.check_heads(heads)
        checks.check_blocks(heads, encoder)
        if float8 and encoder.lora:
            raise ValueError(
                f"model.float8: found {float8}; expected null with model.encoder.lora, whose adapters are thin"
            )
        check_range({f"model.lr_scale.{path}": scale for path, scale in (lr_scale or {}).items()})
        check_range({"model.lr": lr, "model.weight_decay": weight_decay, "model.warmup_steps": warmup_steps})
        check_range({"model.layer_decay": layer_decay}, 0, 1, without=0)
        check_range({"model.micro_batches": micro_batches}, 1)
        self.encoder = encoder
        for head in heads:
            head.bind(encoder)
        self.heads = nn.ModuleDict({head.name: head for head in heads})
        self._scores = HeldOutScores(heads)
        self.lr, self.warmup_steps = lr, warmup_steps
        self.weight_decay = 0.05 if optimizer is None and weight_decay is None else weight_decay
        self.optimizer, self.lr_schedule = optimizer or _DEFAULT_OPTIMIZER, lr_schedule or optim.Cosine()
        self.lr_scale, self.layer_decay, self.micro_batches = lr_scale, layer_decay, micro_batches
        self.activation_checkpointing, self.float8, self.compiles = activation_checkpointing, float8, compile
        self.task_weights = task_weights or Fixed()
        self.task_weights.bind({head.name: head.weight for head in heads})
        # Of this step, for callbacks: each head's part of the total, and its losses as they are logged.
        self.head_losses: dict[str, Tensor] = {}
        self.head_terms: dict[str, list[Tensor]] = {}
        self.starts: dict[str, int] = {}
        self._idle_tasks: frozenset[str] = frozenset()  # which have no batch in this step
        self._begun: set[str] = set()  # not by their steps alone, which are others in a longer or shorter run
        # Of this step, by callbacks: 1 where the optimizer is made to do nothing, else 0; a scalar on the device.
        self.skipped: Tensor | None = None
        self._stepped = False  # whether the optimizer was called, which a GradScaler does not do after an overflow
        self._freeze(freeze or [])
        encoder.check_adapters()  # here, as a model that is only loaded need not run
        checks.check_adapters_train(encoder, self.unused)
        self.train(self.training)

    def _freeze(self, freeze: list[str]) -> None:
        """Freeze what is asked for, and what no head uses."""
        self.unused = unused_parts(self.each_head())
        self.frozen = frozen_paths(self, [*self.unused, *freeze])
        freeze_paths(self, self.frozen)
        check_scales(self.each_head())
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(f"model.freeze: {', '.join(freeze)} leaves nothing to train")

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.check_trainer(self.trainer)
            self._begun.clear()

    def check_trainer(self, trainer: L.Trainer) -> None:
        """Raise ValueError where a trainer would silently train for something else."""
        checks.check_accumulation(trainer)
        checks.check_precision(trainer)
        checks.check_task_weights(self.task_weights, self, trainer, self.compiles)
        if self.micro_batches > 1:
            checks.check_micro_batches(self.encoder)

    def train(self, mode: bool = True) -> Self:
        """As of every module, but what is frozen stays in evaluation mode."""
        super().train(mode)
        if mode:
            keep_frozen(self, self.frozen)
        return self

    def configure_model(self) -> None:
        towers = [self.encoder.backbone, self.encoder.text]
        copies = [tower for head in self.each_head() for tower in head.tower_copies()]
        if self.float8 and self.trainer.state.fn == "fit":  # else as it will be used
            device, gather_in_float8 = self.trainer.strategy.root_device, self.device_mesh is not None
            convert_to_float8(towers, self.float8, self.trainer.precision, device, gather_in_float8)
        if self.compiles:
            sharding.compile_blocks([*towers, *copies])
        if self.activation_checkpointing:
            sharding.checkpoint_activations(towers)
        if self.device_mesh is not None and not sharding.is_sharded(self):
            parts = [self.encoder, *self.heads.values()]
            sharding.shard(self, [*towers, *copies], parts, self.device_mesh, self.trainer.precision)

    def each_head(self) -> list[Head]:
        """The heads, typed."""
        return cast(list[Head], list(self.heads.values()))

    def active_heads(self) -> list[Head]:
        """Those that take part in this step: which have begun, see `Head.start`, and whose task has a batch."""
        heads = [head for head in self.each_head() if head.task not in self._idle_tasks]
        if not any(self.starts.values()):
            return heads
        step = batches_done(self.trainer)
        return [head for head in heads if step >= self.starts.get(head.name, 0)]

    def on_train_batch_start(self, batches: Batches, *_: Any) -> None:
        self._idle_tasks = getattr(batches, "idle_tasks", frozenset())  # here, as DDP makes a plain copy on its way
        self._seed()
        if self.micro_batches > 1:  # here, as `training_step` sees gathered weights, whose gradients are others
            self.zero_grad()
        for head in self.active_heads():
            if head.name not in self._begun:
                sharding.reshard(self)
                head.begin(self.encoder)
                self._begun.add(head.name)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for parameter in self._idle_parameters():  # else weights would decay that nothing trains yet
            parameter.grad = None

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        self.skipped, self._stepped = None, False
        super().optimizer_step(*args, **options)
        progress = (batches_done(self.trainer) + 1) / self._num_steps
        made = torch.ones((), device=self.device) if self.skipped is None else 1 - self.skipped
        sharding.reshard(self)
        for head in self.active_heads() if self._stepped else ():
            head.after_step(self.encoder, progress, made)
        if self.float8 == "tensorwise" and sharding.is_sharded(self):  # also for a validation before the next step
            share_scales(self)

    def _seed(self, *part: int) -> None:
        """Dropout and the like: a function of the step, so that a resumed run draws what the uninterrupted one did."""
        place = (os.environ.get("PL_GLOBAL_SEED", "0"), batches_done(self.trainer), self.trainer.global_rank, *part)
        seed = zlib.crc32(repr(place).encode())
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.3 ms and seeds every GPU
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(seed)

    def _idle_parameters(self) -> list[nn.Parameter]:
        return idle_parameters(self, self.each_head(), self.active_heads(), self.task_weights)

    def idle_names(self) -> set[str]:
        """Of the weights and running statistics that this step leaves as they are, and other steps do not."""
        return idle_names(self, self.each_head(), self.active_heads(), self.task_weights)

    def training_step(self, batches: Batches, batch_idx: int) -> Tensor:
        _count_in_float32()
        for head in self.active_heads():
            if head.task not in batches:
                raise ValueError(f"model.heads: {head.name} reads the task {head.task!r}; the step has no batch of it")
        with sharding.gathered_through_gradients(self) if self.task_weights.compares_heads else nullcontext():
            return self._loss(batches) + self._nothing_of_idle_parameters()

    def _loss(self, batches: Batches) -> Tensor:
        """What the backward pass of a step begins with."""
        watched = self.task_weights.watched(self)
        if self.micro_batches == 1:
            loss = self._total(self._outputs(batches))
            gradients = gradients_of(self.head_losses, watched) if watched else {}
        else:
            parts, scale = split(batches, self.micro_batches), gradient_scale(self.trainer)
            cached = CachedGradients(parts, self._outputs_of_part, self._total, self, scale)
            loss, gradients = cached.run(lambda: self.head_losses, watched, not self.task_weights.makes_gradients)
        if watched:
            # Of the step alone: ranks draw alike.
            place = (os.environ.get("PL_GLOBAL_SEED", "0"), batches_done(self.trainer), "task weights")
            loss = self.task_weights.total(loss, gradients, watched, zlib.crc32(repr(place).encode()))
        return loss

    def on_after_backward(self) -> None:
        self.head_losses = {name: loss.detach() for name, loss in self.head_losses.items()}  # frees what made them

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        if self.micro_batches == 1:  # else `training_step` has left gradients already, which are not to be lost
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def _outputs(self, batches: Batches) -> Outputs:
        """What each head makes of its batch."""
        features: dict[str, Features] = {}
        outputs: Outputs = {}
        active = self.active_heads()
        with self.encoder.remembering():
            for head in active:
                if (batch := batches.get(head.task)) is None:
                    continue
                if head.name not in features:  # heads of one task share its features
                    blocks = {other.name: other.block for other in active if other.task == head.task}
                    features |= self.encoder.features_behind(batch["images"], blocks)
                outputs[head.name] = head.loss(features[head.name], batch, self.encoder)
        return outputs

    def _outputs_of_part(self, number: int, batches: Batches) -> Outputs:
        """As `_outputs`, of a part of the batch: means over images are sums over them, for there are more."""
        self._seed(number)
        outputs = self._outputs(batches)
        for head in self.each_head():
            if isinstance(losses := outputs.get(head.name), Losses):
                images = len(batches[head.task]["keys"])
                outputs[head.name] = Losses(*(as_ratios(values, images) for values in losses))
        return outputs

    def _total(self, outputs: Outputs) -> Tensor:
        """The step's loss, and what is logged of it."""
        with self.encoder.remembering():
            losses = {name: computed(output) for name, output in outputs.items()}
        terms = over_all_ranks({f"{name}/{term}": v for name, of in losses.items() for term, v in of.terms.items()})
        zero = torch.zeros((), device=self.device)
        self.head_losses = {}
        for head in self.active_heads():
            loss = sum((terms[f"{head.name}/{term}"] for term in losses[head.name].terms), zero)
            self.head_losses[head.name] = self.task_weights.part(head.name, loss)
        total = sum(self.head_losses.values(), zero)
        means = self._log_means(
            {name: term.detach() for name, term in terms.items()} | {"loss": total.detach()},
            {f"{name}/{number}": value for name, of in losses.items() for number, value in of.logged.items()},
        )
        self.log_dict({f"train/{name}": value for name, value in self.task_weights.logged.items()}, batch_size=1)
        self.head_terms = {name: [means[f"{name}/{term}"] for term in of.terms] for name, of in losses.items()}
        return total

    def _nothing_of_idle_parameters(self) -> Tensor | int:
        """Zero, with a gradient for each of them, for which DDP waits."""
        if not (dist.is_available() and dist.is_initialized()) or sharding.is_sharded(self):
            return 0
        return sum(parameter.sum() * 0 for parameter in self._idle_parameters())

    def _log_means(self, terms: dict[str, Tensor], logged: Values) -> dict[str, Tensor]:
        """Log `train/...`, means over the ranks: of the terms, which all have, and of what only some may have.

        Returns:
            What is logged.
        """
        if (world := rank_and_world()[1]) > 1:
            terms = dict(zip(terms, sum_over_ranks(torch.stack([*terms.values()])) / world, strict=True))
        if world == 1 or logs_after_step(self.trainer):  # among ranks the host waits for them
            terms |= means_over_ranks(logged, self.device)
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, batch_size=1)
        return terms

    def predict_step(self, batches: Batches, batch_idx: int) -> dict[str, list[Prediction]]:
        """Each head's predictions, `{head: one dict per image}`; `head/source` where its task has several sources."""
        return {name: predictions for name, _, predictions, _, _ in self.predictions(batches)}

    def predictions(self, batches: Batches) -> Iterator[tuple[str, Head, list[Prediction], Features, Batch]]:
        """`(name, head, predictions, features, batch)` of every head and source."""
        _count_in_float32()
        for key, batch in batches.items():  # held-out sources end at different steps
            if not batch["keys"]:  # none of its samples is readable
                continue
            origin = batch.get("origin", Origin(key))
            heads = [head for head in self.each_head() if head.task == origin.task]
            of_heads = self.encoder.features_behind(batch["images"], {head.name: head.block for head in heads})
            for head in heads:
                name, features = f"{head.name}/{origin.source}" if origin.source else head.name, of_heads[head.name]
                yield name, head, head.predict(features, batch, self.encoder), features, batch

    def on_validation_epoch_start(self) -> None:
        self._scores.begin()

    def validation_step(self, batches: Batches, batch_idx: int) -> None:
        for name, head, predictions, features, batch in self.predictions(batches):
            self._scores.add(name, head, predictions, features, batch, self.device)

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{name}": value for name, value in self._scores.compute(self.device).items()})

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self) -> Any:
        steps = estimated_steps(self.trainer)
        if steps == float("inf"):
            raise ValueError("trainer.max_steps: the learning rate's schedule needs it (or trainer.max_epochs)")
        self._num_steps = int(steps)
        self.starts = start_steps(self.each_head(), self._num_steps)
        if self.warmup_steps >= steps:
            warnings.warn(f"model.warmup_steps: found {self.warmup_steps} of {int(steps)} steps in all", stacklevel=2)
        groups = parameter_groups(self, self.lr_scale, self.layer_decay)
        try:
            optimizer = self.optimizer(groups)
        except Exception as error:  # whatever an optimizer says of its options
            raise ValueError(f"model.optimizer: {error}") from error
        optim.set_rates(optimizer, self.lr, self.weight_decay)
        optimizer.register_load_state_dict_pre_hook(optim.restore_by_name)
        optimizer.register_step_post_hook(self._note_step)
        # Fused AdamW can undo the loss scale itself, and Lightning then refuses to clip gradients in mixed precision.
        # This makes the GradScaler, where there is one, undo it before the clipping.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        scheduler = self.lr_schedule.scheduler(optimizer, self.warmup_steps, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _note_step(self, *_: Any) -> None:
        self._stepped = True

    def on_train_start(self) -> None:
        if self.trainer.ckpt_path:
            for config in self.trainer.lr_scheduler_configs:  # none, where StochasticWeightAveraging has taken over
                optim.restart_schedule(cast(Any, config.scheduler))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checks.check_weights(checkpoint.get("state_dict", {}), self.state_dict())
        if self.trainer.state.fn != "fit":
            return
        if "optimizer_states" not in checkpoint:
            raise ValueError("--ckpt_path: found weights only (save_weights_only), with which no training can go on")
        self._begun = {*checkpoint.get("begun_heads", self.heads)}  # a run without the entry began all with itself
        for schedule in checkpoint["lr_schedulers"]:
            schedule["lr_lambdas"] = []  # of its own groups, of which the config may have fewer; it has its factors
        for state in checkpoint["optimizer_states"]:
            optim.name_old_groups(self, state["param_groups"], self.lr_scale)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["encoder"] = self.encoder.to_config()  # plain types: enough for `indiclip.load`
        checkpoint["logits"] = logits_of(self.each_head())
        checkpoint["begun_heads"] = sorted(self._begun)


def _count_in_float32() -> None:
    """Undo, for this step, what Lightning does where the weights are of another type: new tensors would be of theirs,
    and positions in bfloat16 are off by pixels.
    """
    torch.set_default_dtype(torch.float32)
