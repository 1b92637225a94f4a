"""What the optimizer steps with: parameter groups, schedules, and what a resumed run takes from its checkpoint."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, cast

import torch
from timm.models._manipulate import MATCH_PREV_GROUP, group_with_matcher
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from indiclip.names import check_range
from indiclip.steps import first_step

_TABLES = re.compile(r"(^|\.)(\w*pos_embed|\w*position_\w+|cls_token|reg_token|latent)(\.|$)")
_OLD_TABLES = re.compile(r"(^|\.)(\w*pos_embed|position_\w+|cls_token|reg_token|latent|embeddings|\w*logit_\w+)(\.|$)")
_NUMBER = re.compile(r"\.(\d+)\.")


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
        check_range({"model.lr_schedule.decay_steps": decay_steps})
        check_range({"model.lr_schedule.min_lr_ratio": min_lr_ratio}, 0, 1)
        if decay_steps > 1 and decay_steps != int(decay_steps):
            raise ValueError(f"model.lr_schedule.decay_steps: found {decay_steps}; expected a share below 1, or steps")
        self.decay_steps = decay_steps
        self.options = {"decay_type": decay, "min_lr_ratio": min_lr_ratio}

    def scheduler(self, optimizer: Optimizer, warmup_steps: int, num_steps: int) -> LambdaLR:
        decay_steps = round(self.decay_steps * num_steps if self.decay_steps < 1 else self.decay_steps)
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
        for i, stage in enumerate(stages):
            before = stages[i - 1].until if i else 0
            if stage.until <= before or (before and (stage.until < 1) != (before < 1)):
                raise ValueError(
                    f"{key}.stages[{i}].until: found {stage.until:g} after {before:g}; expected stages that "
                    "ascend, all by shares of the run or all by steps"
                )
        self.ends, self.factors = [stage.until for stage in stages], [*(stage.factor for stage in stages), factor]
        self.warmup_steps, self.schedule = warmup_steps, schedule or Cosine()

    def scheduler(self, optimizer: Optimizer, warmup_steps: int, num_steps: int) -> LambdaLR:
        ends = [first_step(end, num_steps) for end in self.ends]
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


def parameter_groups(
    module: nn.Module, lr_scale: dict[str, float] | None = None, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups by the factor of the learning rate and by whether weights decay.

    Biases, norms and other vectors, embeddings, tables of positions, queries, and what a timm model's
    `no_weight_decay()` names do not decay; Muon leaves them to its AdamW fallback.

    Args:
        module: Its frozen parameters are left out.
        lr_scale: Factor of the learning rate by module path, the longest match counts, e.g.
            `{encoder.backbone: 0.1}`.
        layer_decay: Factor from each block of a tower to the block below (BEiT, arXiv:2106.08254). What lies behind the
            last block keeps 1: norms, pools, projections, heads. Stem and embeddings are one below the first block.

    Returns:
        For each group `params`, `param_names`, `lr_scale`, and where it does not decay `weight_decay: 0` and
        `use_fallback: True`.

    Raises:
        ValueError: A path that no parameter has; with `layer_decay`, a tower whose blocks nobody knows.
    """
    lr_scale = lr_scale or {}
    unused = [path for path in lr_scale if not any(_under(name, path) for name, _ in module.named_parameters())]
    if unused:
        raise ValueError(f"model.lr_scale: no parameter lies under {', '.join(sorted(unused))}")
    no_decay = set(_no_decay(module))
    depths = _depths(module) if layer_decay != 1.0 else {}
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = _scale(name, lr_scale) * layer_decay ** depths.get(name, 0)
        decays = parameter.ndim > 1 and name not in no_decay
        group = groups.setdefault((scale, decays), {"params": [], "param_names": [], "lr_scale": scale})
        if not decays:
            group |= {"weight_decay": 0.0, "use_fallback": True}
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


def _under(name: str, path: str) -> bool:
    return f"{name}.".startswith(f"{path}.")


def _scale(name: str, lr_scale: dict[str, float]) -> float:
    return lr_scale[max(paths, key=len)] if (paths := [path for path in lr_scale if _under(name, path)]) else 1.0


def _no_decay(module: nn.Module) -> Iterator[str]:
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(part, nn.Embedding):
            yield f"{prefix}weight"
        elif hasattr(part, "no_weight_decay"):  # timm's models
            yield from (prefix + name for name in part.no_weight_decay())
    yield from (name for name, _ in module.named_parameters() if _TABLES.search(name))


def _depths(module: nn.Module) -> dict[str, int]:
    """Parameter -> factors of `layer_decay`: 0 on top of its tower, 1 in the last block, most in the stem."""
    depths: dict[str, int] = {}
    towers: list[str] = []
    for path, tower in module.named_modules():
        if any(path.startswith(outer) for outer in towers):  # as the ResNet in a hybrid ViT, which is its stem
            continue
        if hasattr(tower, "group_matcher"):  # timm's models
            layers = _timm_layers(tower)
        elif isinstance(tower, PreTrainedModel):
            layers = _numbered_layers(tower)
        elif hasattr(tower, "pretrained_cfg") and any(p.requires_grad for p in tower.parameters()):
            raise ValueError(
                f"model.layer_decay: timm does not say which layers {type(tower).__name__} has; expected 1, and "
                "model.lr_scale for the rates of its modules"
            )
        else:
            continue
        prefix = f"{path}." if path else ""
        towers.append(prefix)
        depths |= {f"{prefix}{name}": depth for name, depth in _from_the_top(layers).items()}
    return depths


def _timm_layers(tower: Any) -> dict[str, int | None]:
    """Parameter -> 0 in the stem, the block's number from 1; None for others.

    Reads a private module of timm, and is the only one that does; tried with timm 1.0.31.
    """
    matcher = tower.group_matcher(coarse=False)
    if isinstance(matcher, dict):  # timm counts norms to the block before, and by mistake some of a stem to the last
        matcher = {
            kind: [spec for spec in specs if spec[1] != MATCH_PREV_GROUP] if isinstance(specs, list) else specs
            for kind, specs in matcher.items()
        }
    nobody = ""  # in the group of all that no pattern matches
    names = [nobody, *(name for name, _ in tower.named_parameters())]
    layers = group_with_matcher(((name, name) for name in names), matcher, reverse=True)
    return {name: None if layers[name] == layers[nobody] else layers[name] for name in names[1:]}


def _numbered_layers(tower: nn.Module) -> dict[str, int | None]:
    """As `_timm_layers`, by the first number in a name."""
    tables = {f"{path}.weight" for path, part in tower.named_modules() if isinstance(part, nn.Embedding)}
    layers: dict[str, int | None] = {}
    for name, _ in tower.named_parameters():
        number = _NUMBER.search(f".{name}")
        is_embedding = name in tables or "embed" in name
        layers[name] = int(number[1]) + 1 if number else 0 if is_embedding else None
    return layers


def _from_the_top(layers: dict[str, int | None]) -> dict[str, int]:
    """Parameter -> how far below the top of its tower, where also lies what is registered behind the last block."""
    blocks = [place for place, layer in enumerate(layers.values()) if layer]
    top = 1 + max((layer for layer in layers.values() if layer is not None), default=0)
    depths: dict[str, int] = {}
    current = 0
    for place, (name, layer) in enumerate(layers.items()):
        if layer is None:
            layer = top if not blocks or place > blocks[-1] else current
        elif layer:
            current = layer
        depths[name] = top - layer
    return depths


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
            names.setdefault((_scale(name, lr_scale or {}), decays), []).append(name)
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
    """After a checkpoint was read, which has the rates of its own run: the config's rates at this step."""
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    for group, base_lr, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base_lr * factor(scheduler.last_epoch)
