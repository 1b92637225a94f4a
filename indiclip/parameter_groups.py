"""Parameter groups of the optimizer: what decays, and at which share of the learning rate each is trained."""

import re
import warnings
from collections.abc import Iterator
from typing import Any

from timm.models._manipulate import MATCH_PREV_GROUP, group_with_matcher
from torch import nn
from transformers import PreTrainedModel

from indiclip.names import did_you_mean

_TABLES = re.compile(r"(^|\.)(\w*pos_embed|\w*position_\w+|cls_token|reg_token|latent)(\.|$)")
_NUMBER = re.compile(r"\.(\d+)\.")


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
    for path in lr_scale:
        under = [parameter for name, parameter in module.named_parameters() if _under(name, path)]
        if not under:
            near = did_you_mean(path, [name for name, _ in (*module.named_modules(), *module.named_parameters())])
            raise ValueError(f"model.lr_scale: no parameter lies under {path}{near}")
        if not any(parameter.requires_grad for parameter in under):
            warnings.warn(f"model.lr_scale: has no effect on {path}, which is frozen", stacklevel=2)
    no_decay = set(_no_decay(module))
    depths = _depths(module) if layer_decay != 1.0 else {}
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = rate_factor(name, lr_scale) * layer_decay ** depths.get(name, 0)
        decays = parameter.ndim > 1 and name not in no_decay
        group = groups.setdefault((scale, decays), {"params": [], "param_names": [], "lr_scale": scale})
        if not decays:
            group |= {"weight_decay": 0.0, "use_fallback": True}
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


def _under(name: str, path: str) -> bool:
    return f"{name}.".startswith(f"{path}.")


def rate_factor(name: str, lr_scale: dict[str, float]) -> float:
    """Of the learning rate of a parameter: that of the longest path it lies under, 1 without any."""
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
