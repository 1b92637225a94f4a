"""What weights of equal shapes do not show: activations, epsilons, numbers of heads, normalisation of pixels."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from indiclip.backbone import Backbone
from indiclip.pretrained.build import build

# What differs by design, shows in a tensor's shape (and is converted), or matters in training only.
_IGNORED = {"patch_size", "stride", "max_tokens", "in_features"}
_IGNORED |= {
    "training",
    "p",
    "drop_prob",
    "scale_by_keep",
    "fused_attn",
    "grad_checkpointing",
    "gradient_checkpointing",
}
_MODULES = {"image": "backbone", "text": "text"}
_SHOWN = 4


def differing_traits(encoder: nn.Module, config: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    """Where the encoder's towers compute something else than those of a source with the same tensors.

    Args:
        encoder: With the attributes `backbone` and `text`.
        config: The source's, see `Weights`.
        parts: Those that were taken.

    Returns:
        A few words for each difference.
    """
    found = []
    for part in parts:
        if (name := _MODULES.get(part)) and name in config:
            with torch.device("meta"):
                theirs = build({name: config[name]}, part)[name]
            if isinstance(theirs, Backbone) and cast(Any, encoder).image_pool.kind != "tower":
                theirs.remove_pool()
            own = dict(_traits(getattr(encoder, name)))
            for where, trait in _traits(theirs):
                if own.get(where, trait) != trait:
                    found.append(f"{name}.{where}: found {own[where]}, the source has {trait}")
    return found[:_SHOWN] + ([f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else [])


def _traits(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if not list(module.children()):
            yield f"{path} (kind)", type(module).__name__
        for key, value in vars(module).items():
            if not key.startswith("_") and key not in _IGNORED and isinstance(value, bool | int | float | str | tuple):
                yield f"{path}.{key}".lstrip("."), value
