"""An encoder as other libraries know one: without batch norm of embeddings, and with embeddings of one length.

Both are exact. They change a model's configuration and tensors, before the encoder is built.
"""

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from indiclip.pooling import Projection
from indiclip.pretrained.weights import Weights

_BATCH_NORM_EPS = 1e-5  # torch's, which `indiclip.pooling.Pool` keeps
_SIDES = ("image", "text")


def fold_batch_norm(weights: Weights) -> Weights:
    """The same model with the batch norm of its pooled vectors inside the projections behind it.

    It has no weights of its own, only running statistics: `W (x - mean) / std` is `(W / std) x - (W / std) mean`.
    """
    if not weights.config.get("batch_norm"):
        return weights
    config, tensors = weights.config | {"batch_norm": False}, dict(weights.tensors)
    for side in _SIDES:
        mean_D, var_D = (tensors.pop(f"{side}_pool.norm.running_{kind}").double() for kind in ("mean", "var"))
        tensors.pop(f"{side}_pool.norm.num_batches_tracked", None)
        kind = _projection(config, side)
        first = f"{side}_projection" + (".0" if kind.kind == "mlp" else "")
        weight_ED = tensors.get(f"{first}.weight", torch.eye(len(mean_D))).double() / (var_D + _BATCH_NORM_EPS).sqrt()
        bias_E = tensors.get(f"{first}.bias", torch.zeros(len(weight_ED))).double() - weight_ED @ mean_D
        tensors |= {f"{first}.weight": weight_ED.float(), f"{first}.bias": bias_E.float()}
        kind = replace(kind, hidden_bias=True) if kind.kind == "mlp" else Projection("linear", bias=True)
        config[f"{side}_projection"] = asdict(kind)
    return replace(weights, config=config, tensors=tensors)


def cut_length(weights: Weights, length: int | None) -> Weights:
    """The same model with embeddings of this length, one of those it was trained for.

    Raises:
        ValueError: Another length.
    """
    lengths = sorted({*weights.config["lengths"], weights.config["embed_dim"]})
    if length is None:
        return weights
    if length not in lengths:
        raise ValueError(
            f"--length: found {length}; expected one of {', '.join(map(str, lengths))}, which were trained"
        )
    config = weights.config | {"embed_dim": length, "lengths": [one for one in lengths if one <= length]}
    tensors = dict(weights.tensors)
    for side in _SIDES:
        kind = _projection(config, side)
        last = f"{side}_projection" + (".2" if kind.kind == "mlp" else "")
        full_DD = torch.eye(weights.config["embed_dim"])
        cut = {f"{last}.weight": tensors.get(f"{last}.weight", full_DD)[:length].contiguous()}
        if kind.kind == "none":
            kind = Projection("linear")
        if kind.bias:
            cut[f"{last}.bias"] = tensors[f"{last}.bias"][:length].contiguous()
        tensors |= cut
        config[f"{side}_projection"] = asdict(kind)
    return replace(weights, config=config, tensors=tensors)


def linear_projection(module: Any, width: int) -> tuple[Tensor, Tensor | None] | None:
    """Matrix and bias of an encoder's projection, an identity where it has none; None for an MLP."""
    if isinstance(module, torch.nn.Identity):
        return torch.eye(width), None
    if isinstance(module, torch.nn.Linear):
        return module.weight.detach(), None if module.bias is None else module.bias.detach()
    return None


def _projection(config: dict[str, Any], side: str) -> Projection:
    return Projection(**(config.get(f"{side}_projection") or {}))
