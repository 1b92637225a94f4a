"""The learning rate over a run, and what the optimizer of a resumed run takes from its checkpoint."""

import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from indiclip.names import check_range, reason_of
from indiclip.parameter_groups import parameter_groups, rate_factor
from indiclip.steps import check_ends, check_starts, first_step, start_within

_OLD_TABLES = re.compile(r"(^|\.)(\w*pos_embed|position_\w+|cls_token|reg_token|latent|embeddings|\w*logit_\w+)(\.|$)")


class Schedule:
    """The learning rate after its linear warm-up.

    Attributes:
        kind: What `transformers.get_scheduler` calls it.
        options: Of this kind.
    """

    kind: str
    options: Mapping[str, Any] = {}

    def scheduler(self, optimizer: Optimizer, warmup_steps: int, num_steps: int) -> LambdaLR:
        """torch's scheduler for a run of `num_steps`, to be stepped after each of them."""
        # Imports peft: half a second, which only training needs.
        from transformers.optimization import get_scheduler

        made = get_scheduler(self.kind, optimizer, warmup_steps, num_steps, dict(self.options))  # type: ignore[no-untyped-call]
        return cast(LambdaLR, made)


class Cosine(Schedule):
    """Half a cosine down to the last step (Loshchilov, Hutter, ICLR 2017, arXiv:1608.03983).

    Args:
        min_lr_ratio: Of the last step's rate to the peak.
    """

    kind = "cosine_with_min_lr"

    def __init__(self, min_lr_ratio: float = 0.0) -> None:
        check_range({"model.lr_schedule.min_lr_ratio": min_lr_ratio}, 0, 1)
        self.options = {"min_lr_rate": min_lr_ratio}


class Linear(Schedule):
    """A straight line to zero at the last step."""

    kind = "linear"


class Constant(Schedule):
    """The peak rate up to the last step."""

    kind = "constant_with_warmup"


class WarmupStableDecay(Schedule):
    """The peak rate, then a decay over the last steps (Hu et al., MiniCPM, 2024, arXiv:2404.06395).

    A run that goes on from before its decay may be given more steps without a trace of the first plan.

    Args:
        decay_steps: Steps of the decay, or below 1 their share of the run's.
        decay: Its form.
        min_lr_ratio: Of the last step's rate to the peak.
    """

    kind = "warmup_stable_decay"

    def __init__(
        self, decay_steps: float, decay: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt", min_lr_ratio: float = 0.0
    ) -> None:
        check_starts({"model.lr_schedule.decay_steps": decay_steps})
        check_range({"model.lr_schedule.min_lr_ratio": min_lr_ratio}, 0, 1)
        self.decay_steps = decay_steps
        self.options = {"decay_type": decay, "min_lr_ratio": min_lr_ratio}

    def scheduler(self, optimizer: Optimizer, warmup_steps: int, num_steps: int) -> LambdaLR:
        decay_steps = first_step(self.decay_steps, num_steps)
        if decay_steps and warmup_steps + decay_steps > num_steps:
            raise ValueError(
                f"model.lr_schedule.decay_steps: {decay_steps} and model.warmup_steps {warmup_steps} are more "
                f"than the run's {num_steps} steps"
            )
        self.options = {**self.options, "num_decay_steps": decay_steps}
        return super().scheduler(optimizer, warmup_steps, num_steps)


@dataclass
class RateStage:
    """The beginning of a run, up to a step, with rates of its own.

    Args:
        until: As of `indiclip.loading.stages.Stage`: a share of the run's steps, or the first step behind it.
        factor: Of the schedule's rates.
    """

    until: float
    factor: float = 1.0


class Staged(Schedule):
    """Another schedule, with a factor for each stage of the run, as for those of images with fewer tokens.

    From one factor to the next the rates go in a straight line, over `warmup_steps` from where a stage begins; the
    run's own warm-up comes before all of them.

    Args:
        stages: Those that end before the run does.
        factor: Of the rates after the last of them.
        warmup_steps: See above; 0 jumps.
        schedule: Whose rates these are; None is Cosine.
    """

    def __init__(
        self, stages: list[RateStage], factor: float = 1.0, warmup_steps: int = 0, schedule: Schedule | None = None
    ) -> None:
        key = "model.lr_schedule"
        check_range({f"{key}.factor": factor, f"{key}.warmup_steps": warmup_steps})
        check_range({f"{key}.stages[{i}].factor": stage.factor for i, stage in enumerate(stages)})
        check_ends([stage.until for stage in stages], f"{key}.stages")
        self.ends, self.factors = [stage.until for stage in stages], [*(stage.factor for stage in stages), factor]
        self.warmup_steps, self.schedule = warmup_steps, schedule or Cosine()

    def scheduler(self, optimizer: Optimizer, warmup_steps: int, num_steps: int) -> LambdaLR:
        key = "model.lr_schedule.stages"
        ends = [start_within(f"{key}[{i}].until", end, num_steps) for i, end in enumerate(self.ends)]
        # A scheduler by itself sets rates; this one is asked for its factors alone.
        inner = self.schedule.scheduler(SGD([torch.zeros(1)], 1.0), warmup_steps, num_steps)
        (of_schedule,) = inner.lr_lambdas

        def factor(step: int) -> float:
            return float(of_schedule(step)) * self._factor(step, ends)

        return LambdaLR(optimizer, factor)

    def _factor(self, step: int, ends: list[int]) -> float:
        stage = bisect_right(ends, step)
        own = self.factors[stage]
        done = step - ends[stage - 1] + 1 if stage else self.warmup_steps
        if done >= self.warmup_steps:
            return own
        before = self._factor(ends[stage - 1] - 1, ends)
        return before + (own - before) * done / self.warmup_steps


def check_optimizer(make: Callable[[Iterable[Any]], Optimizer], device: torch.device) -> None:
    """Make an optimizer for a matrix and a vector and let it step once: many options are read no sooner.

    Args:
        make: Makes it of parameter groups.
        device: Where the run trains, as some optimizers and options are of GPUs alone.

    Raises:
        ValueError: It cannot be made, or cannot step.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        stand_in = nn.Linear(8, 8).to(device)

        def closure() -> float:
            for parameter in stand_in.parameters():
                parameter.grad = torch.ones_like(parameter)
            return 1.0

        try:
            closure()
            make(parameter_groups(stand_in)).step(closure)
        except Exception as error:  # whatever an optimizer says of its options
            raise ValueError(f"model.optimizer: {reason_of(error) or type(error).__name__}") from error


def set_rates(optimizer: Optimizer, lr: float | None, weight_decay: float | None) -> None:
    """Give the groups of `parameter_groups` their rates; None is the optimizer's own.

    Raises:
        ValueError: One is given here and to the optimizer too.
    """
    for name, value in {"lr": lr, "weight_decay": weight_decay}.items():
        own, parameter = optimizer.defaults.get(name), signature(type(optimizer)).parameters.get(name)
        if parameter and value is not None and own not in (value, parameter.default):
            raise ValueError(f"model.{name} is {value}, and {name} of model.optimizer {own}; give one of them")
    lr = optimizer.defaults["lr"] if lr is None else lr
    weight_decay = optimizer.defaults.get("weight_decay", 0.0) if weight_decay is None else weight_decay
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if "use_fallback" not in group:
            group["weight_decay"] = weight_decay


def name_old_groups(module: nn.Module, saved: list[dict[str, Any]], lr_scale: dict[str, float] | None) -> None:
    """Add the names of the parameters to the optimizer's groups of a checkpoint of commit 67a1ab8 or before.

    Raises:
        ValueError: It is of other parameters.
    """
    if any("param_names" in group for group in saved):
        return
    decay = any(group["weight_decay"] for group in saved)
    names: dict[tuple[float, bool], list[str]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = decay and parameter.ndim > 1 and not _OLD_TABLES.search(name)
            names.setdefault((rate_factor(name, lr_scale or {}), decays), []).append(name)
    if [len(group["params"]) for group in saved] != [len(group) for group in names.values()]:
        raise ValueError("--ckpt_path: the checkpoint's optimizer has other parameters than the config's model")
    for group, of_group in zip(saved, names.values(), strict=True):
        group["param_names"] = of_group


def restore_by_name(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Hook before `load_state_dict`: the checkpoint's moments, by the parameters' names, and the config's options.

    So rates, decay, betas and groups of the config take effect in a run that goes on.
    """
    own = optimizer.state_dict()
    pairs = [
        pair for group in saved["param_groups"] for pair in zip(group["param_names"], group["params"], strict=True)
    ]
    states = {name: saved["state"][key] for name, key in pairs if key in saved["state"]}
    for group in own["param_groups"]:
        known = zip(group["param_names"], group["params"], strict=True)
        own["state"] |= {key: states[name] for name, key in known if name in states}
    return own


def restart_schedule(scheduler: LambdaLR) -> None:
    """After a checkpoint was read, which has the rates of its own run: the config's rates at this step.

    Warns of a rate that rises, as of a longer run that begins inside the decay of a shorter one.
    """
    groups = scheduler.optimizer.param_groups
    now = scheduler.lr_lambdas[0](scheduler.last_epoch)
    shares = [rate / peak for rate, peak in zip(scheduler.get_last_lr(), scheduler.base_lrs, strict=True) if peak]
    if shares and now > 1.01 * shares[0]:
        warnings.warn(
            f"model.lr_schedule: after step {scheduler.last_epoch} the learning rate rises from {shares[0]:.3g} to "
            f"{now:.3g} of its peak: the checkpoint's run was decaying it, or still warming up; a checkpoint from "
            "before the decay would avoid it",
            stacklevel=2,
        )
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    for group, base_lr, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base_lr * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]  # for a checkpoint that is saved before the first step
