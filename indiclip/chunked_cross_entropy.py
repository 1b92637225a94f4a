"""Cross entropy of tokens under a large vocabulary, a few rows of logits at a time.

The gradients are made where the loss is, chunk by chunk, and kept instead of the logits: what is held beside the inputs
and their gradients is one chunk. The method is that of Liger (Hsu et al., arXiv:2410.10989). From torch 2.15 on
its own `linear_cross_entropy` with `options` does the same, as one operator whose FLOPs no plan can count.

Shape letters: T tokens, D width, V vocabulary, R rows of a chunk.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from indiclip.autograd import with_gradients
from indiclip.types import in_float32

# Of a chunk: on a CPU 4 MiB in float32, near its caches; elsewhere 256 MiB, so that kernels are not too short.
_ELEMENTS = {"cpu": 2**20}
_ELEMENTS_ELSEWHERE = 2**26
_AS_ON: ContextVar[str | None] = ContextVar("chunks_as_on", default=None)


@contextmanager
def chunks_as_on(device_type: str) -> Iterator[None]:
    """While it lasts, chunks are as large as on another kind of device: for what is counted on the CPU in its place."""
    before = _AS_ON.set(device_type)
    try:
        yield
    finally:
        _AS_ON.reset(before)


def rows_of_chunk(columns: int, device_type: str, elements: int | None = None) -> int:
    """How many rows of so many numbers are a chunk: one at least.

    Args:
        columns: Numbers in a row.
        device_type: Where they are.
        elements: Numbers in a chunk; None is what suits the device.
    """
    elements = elements or _ELEMENTS.get(_AS_ON.get() or device_type, _ELEMENTS_ELSEWHERE)
    return max(1, elements // columns)


def chunked_cross_entropy(
    hidden_TD: Tensor,
    table_VD: Tensor,
    targets: Tensor | Callable[[slice], Tensor],
    weights_T: Tensor,
    bias_V: Tensor | None = None,
    elements: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the tokens' cross entropies, in float32 (or float64).

    Args:
        hidden_TD: What the logits are made of: `hidden_TD @ table_VD.T + bias_V`, in autocast's type where that is on.
        table_VD: A row per id.
        targets: int64 (T,), the right ids; or what gives probabilities (R, V) of some rows, which sum to 1.
        weights_T: Of each token in the sum.
        bias_V: Of each id; None is 0.
        elements: As of `rows_of_chunk`.

    Returns:
        `(total, losses_T)`: the sum, and the cross entropy of each token without weight and gradient.
    """
    device = hidden_TD.device.type
    step = rows_of_chunk(len(table_VD), device, elements)
    hidden_TD = in_float32(hidden_TD)
    inputs = [hidden_TD, table_VD] if bias_V is None else [hidden_TD, table_VD, bias_V]
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    # Gradients of float16 are scaled later, and until then it would lose those of improbable ids.
    lower = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != torch.float16
    with torch.no_grad():
        gradients = [torch.zeros_like(x) for x in inputs] if wanted else []
        losses: list[Tensor] = []
        for first in range(0, len(hidden_TD), step):
            rows = slice(first, first + step)
            logits_RV = in_float32(F.linear(hidden_TD[rows], table_VD, bias_V))
            norm_R1 = logits_RV.logsumexp(1, keepdim=True)
            if isinstance(targets, Tensor):
                target_R1 = targets[rows, None]
                losses.append((norm_R1 - logits_RV.gather(1, target_R1))[:, 0])
            else:
                target_RV = targets(rows)
                losses.append(norm_R1[:, 0] - torch.linalg.vecdot(logits_RV, target_RV))
            if wanted:
                gradient_RV = logits_RV.sub_(norm_R1).exp_()
                if isinstance(targets, Tensor):
                    gradient_RV.scatter_add_(1, target_R1, -torch.ones_like(norm_R1))
                else:
                    gradient_RV.sub_(target_RV)
                gradient_RV.mul_(weights_T[rows, None])
                with torch.autocast(device, enabled=lower):
                    gradients[0][rows] = (gradient_RV @ table_VD).to(hidden_TD.dtype)
                    gradients[1] += gradient_RV.T @ hidden_TD[rows]
                if bias_V is not None:
                    gradients[2] += gradient_RV.sum(0)
        losses_T = torch.cat(losses) if losses else weights_T[:0]
        total = (losses_T * weights_T).sum()
    if wanted:
        total = with_gradients(total, gradients, inputs)
    return total, losses_T
