"""The training loop: every step sums every head's losses. Nothing here knows a task."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from transformers.optimization import get_cosine_schedule_with_warmup

from indiclip.encoder import Encoder
from indiclip.head import Head
from indiclip.optim import parameter_groups
from indiclip.types import Batch, Features, Origin

Batches = dict[str, Batch]


class MultiTask(L.LightningModule):
    """One encoder, several heads, one optimizer step for all of them.

    Args:
        encoder: What is trained and kept.
        heads: The tasks.
        lr: Peak learning rate.
        weight_decay: Of matrices and kernels; biases, norms and tables do not decay.
        betas: AdamW's.
        warmup_steps: Linear warm-up, then cosine to zero at the run's last step.
        lr_scale: Factor of the learning rate by module path, e.g. `{encoder.backbone: 0.1}`.
        uncertainty_weighting: Learn each head's weight (Kendall, Gal, Cipolla, CVPR 2018, arXiv:1705.07115, eq. 10
            with s = log sigma^2): exp(-s) * loss + s instead of the loss. The head's `weight` stays a factor.

    Raises:
        ValueError: No head, or the same head twice.
    """

    def __init__(
        self,
        encoder: Encoder,
        heads: list[Head],
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.98),
        warmup_steps: int = 100,
        lr_scale: dict[str, float] | None = None,
        uncertainty_weighting: bool = False,
    ) -> None:
        super().__init__()
        _check_heads(heads)
        self.encoder = encoder
        if not any(head.embeds_images for head in heads):
            nn.ModuleList([encoder.image_pool, encoder.image_projection]).requires_grad_(False)
        if not any(head.embeds_text for head in heads):
            nn.ModuleList([encoder.text, encoder.text_pool, encoder.text_projection]).requires_grad_(False)
        for head in heads:
            head.bind(encoder)
        self.heads = nn.ModuleDict({head.name: head for head in heads})
        self.lr, self.weight_decay, self.betas, self.warmup_steps = lr, weight_decay, betas, warmup_steps
        self.lr_scale = lr_scale
        self.log_variances = nn.ParameterDict(
            {head.name: nn.Parameter(torch.zeros(())) for head in heads} if uncertainty_weighting else {}
        )
        self.head_losses: dict[str, Tensor] = {}  # each head's part of this step's total, for callbacks

    def each_head(self) -> list[Head]:
        """The heads, typed."""
        return cast(list[Head], list(self.heads.values()))

    def on_train_batch_start(self, batch: Batches, batch_idx: int) -> None:
        # Dropout and the like: a function of the step, so that a resumed run draws what the uninterrupted one did.
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        place = (os.environ.get("PL_GLOBAL_SEED", "0"), done, self.trainer.global_rank)
        seed = zlib.crc32(repr(place).encode())
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.3 ms and seeds every GPU
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(seed)

    def training_step(self, batches: Batches, batch_idx: int) -> Tensor:
        features: dict[str, Features] = {}
        self.head_losses = {}
        for head in self.each_head():
            if head.task not in batches:
                raise ValueError(f"model.heads: {head.name} reads the task {head.task!r}; the step has no batch of it")
            batch = batches[head.task]
            if head.task not in features:  # heads of one task share its features
                features[head.task] = self.encoder.features(batch["images"])
            terms, logged = head.loss(features[head.task], batch, self.encoder)
            self.head_losses[head.name] = self._weighted(head, sum(terms.values(), torch.zeros((), device=self.device)))
            values = {name: loss.detach() for name, loss in terms.items()} | dict(logged)
            self.log_dict({f"train/{head.name}/{name}": value for name, value in values.items()}, batch_size=1)
        total = sum(self.head_losses.values(), torch.zeros((), device=self.device))
        self.log("train/loss", total.detach(), batch_size=1)
        return total

    def _weighted(self, head: Head, loss: Tensor) -> Tensor:
        if head.name not in self.log_variances:
            return head.weight * loss
        s = self.log_variances[head.name]
        self.log(f"train/{head.name}/log_variance", s.detach(), batch_size=1)
        return cast(Tensor, head.weight * (torch.exp(-s) * loss + s))

    def predict_step(self, batches: Batches, batch_idx: int) -> dict[str, list[dict[str, Any]]]:
        """Each head's predictions, `{head: one dict per image}`; `head/source` where its task has several sources."""
        return {name: predictions for name, _, predictions, _, _ in self.predictions(batches)}

    def predictions(self, batches: Batches) -> Iterator[tuple[str, Head, list[dict[str, Any]], Features, Batch]]:
        """`(name, head, predictions, features, batch)` of every head and source."""
        for key, batch in batches.items():  # held-out sources end at different steps
            origin = batch.get("origin", Origin(key))
            features = self.encoder.features(batch["images"])
            for head in self.each_head():
                if head.task == origin.task:
                    name = f"{head.name}/{origin.source}" if origin.source else head.name
                    yield name, head, head.predict(features, batch, self.encoder), features, batch

    def on_validation_epoch_start(self) -> None:
        self._scored: dict[str, Metric] = {}

    def validation_step(self, batches: Batches, batch_idx: int) -> None:
        for name, head, predictions, features, batch in self.predictions(batches):
            if name not in self._scored:
                self._scored[name] = head.metric.clone()
            head.metric, empty = self._scored[name], head.metric
            head.update_metric(predictions, features, batch)
            head.metric = empty

    def on_validation_epoch_end(self) -> None:
        heads = {head.name: head for head in self.each_head()}
        for name in self._names_of_all_ranks():
            # Ranks may have got different numbers of samples, but all must take part in a metric's exchange.
            metric = self._scored.get(name) or heads[name.partition("/")[0]].metric.clone()
            self.log_dict({f"val/{name}/{number}": value for number, value in metric.compute().items()})
        self._scored.clear()

    def _names_of_all_ranks(self) -> list[str]:
        """What any rank has scored, in the same order on all of them."""
        names = [name for name, metric in self._scored.items() if metric.update_called]
        if self.trainer.world_size == 1:
            return sorted(names)
        of_ranks: list[list[str]] = [[] for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather_object(of_ranks, names)
        return sorted(set().union(*of_ranks))

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.named_parameters(), self.lr, self.weight_decay, self.lr_scale)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)
        # Fused AdamW can undo the loss scale itself, and Lightning then refuses to clip gradients in mixed precision.
        # This makes the GradScaler, where there is one, undo it before the clipping.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        steps = self._estimated_steps()
        if steps == float("inf"):
            raise ValueError("trainer.max_steps: the cosine schedule needs it (or trainer.max_epochs)")
        schedule = get_cosine_schedule_with_warmup(optimizer, self.warmup_steps, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _estimated_steps(self) -> float:
        steps = self.trainer.estimated_stepping_batches
        loop = self.trainer.fit_loop
        if loop._combined_loader is not None:
            # `max_epochs` made Lightning begin to load, before it is known where a run that goes on stands: begin anew.
            loop._combined_loader.reset()
            loop._combined_loader = None
        return steps

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["encoder"] = self.encoder.to_config()  # plain types: enough for `indiclip.load`


def _check_heads(heads: list[Head]) -> None:
    if not heads:
        raise ValueError("model.heads: the list is empty; name at least one head")
    names = [head.name for head in heads]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"model.heads: {', '.join(repeated)} stands there more than once (two --config files?); two heads of one "
            "class need a `name`"
        )
