"""The exponential moving average of tensors, for the EMA callback and for the teachers of heads."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from indiclip.pooling import running_statistics


@torch.no_grad()
def update_averages(
    averages: Sequence[Tensor], values: Sequence[Tensor], decay: float, made: Tensor | None = None
) -> None:
    """average = decay * average + (1 - decay) * value, in place.

    Args:
        averages: Of floating point.
        values: Of the same shapes and types, finite.
        decay: Share of the old average, 0 to 1.
        made: 1, or 0 for averages that are to stay; a scalar on the device. None is 1.
    """
    if not averages:
        return
    if made is None:
        torch._foreach_lerp_(list(averages), list(values), 1 - decay)
    else:
        weights = {dtype: (1 - decay) * made.to(dtype) for dtype in {average.dtype for average in averages}}
        torch._foreach_lerp_(list(averages), list(values), [weights[average.dtype] for average in averages])


def follow(teacher: nn.Module, student: nn.Module, decay: float, made: Tensor | None = None) -> None:
    """Move a module's weights and running statistics towards those of another of the same shape, in place.

    Args:
        teacher: Whose weights are an average; where they are shared out over the ranks, as the student's are.
        student: Whose weights are trained.
        decay: Share of the old average; 0 copies.
        made: As of `update_averages`.
    """
    update_averages(_tensors(teacher), _tensors(student), decay, made)


def _tensors(module: nn.Module) -> list[Tensor]:
    """This rank's part of all weights, and the running statistics."""
    weights = [p.to_local() if isinstance(p, DTensor) else p.data for p in module.parameters()]
    return [*weights, *(buffer for buffer in running_statistics(module) if buffer.is_floating_point())]
