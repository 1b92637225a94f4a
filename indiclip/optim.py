"""Parameter groups and the learning-rate schedule."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

_NO_DECAY = re.compile(r"(^|\.)(\w*pos_embed|position_\w+|cls_token|reg_token|latent|embeddings|\w*logit_\w+)(\.|$)")


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    weight_decay: float,
    lr_scale: dict[str, float] | None = None,
) -> list[dict[str, Any]]:
    """AdamW groups by learning rate and by whether weights decay.

    Biases, norms and other vectors, tables of positions and words, queries and temperatures do not decay.

    Args:
        parameters: Named, as `module.named_parameters()` gives them; frozen ones are left out.
        lr: Learning rate.
        weight_decay: Of matrices and kernels.
        lr_scale: Factor of the learning rate by module path, the longest match counts, e.g.
            `{encoder.backbone: 0.1}`.

    Raises:
        ValueError: A path that no parameter has.
    """
    lr_scale = lr_scale or {}
    unused = set(lr_scale)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        matches = [prefix for prefix in lr_scale if f"{name}.".startswith(f"{prefix}.")]
        unused -= set(matches)
        scale = lr_scale[max(matches, key=len)] if matches else 1.0
        decays = parameter.ndim > 1 and not _NO_DECAY.search(name)
        decay = weight_decay if decays else 0.0
        group = groups.setdefault((scale, decay), {"params": [], "lr": lr * scale, "weight_decay": decay})
        group["params"].append(parameter)
    if unused:
        raise ValueError(f"model.lr_scale: no parameter lies under {', '.join(sorted(unused))}")
    return list(groups.values())
