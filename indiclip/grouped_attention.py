"""Attention within each of several sequences that lie one after the other, in groups of nearly one length.

Shape letters: as in `indiclip.packing`.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from indiclip.types import moved

_MOST_PADDING = 0.1  # of a group; a new one begins where the next sequence would bring it above


def padding(lengths: Sequence[int]) -> float:
    """Share of padding in a batch of these lengths."""
    return 1 - sum(lengths) / (len(lengths) * max(lengths)) if lengths else 0.0


class Group(NamedTuple):
    """Sequences that attend together.

    Attributes:
        places_SL: Where each of their tokens lies in the packed sequence; anywhere on padding.
        mask_S11L: False on padding; None where there is none.
    """

    places_SL: Tensor
    mask_S11L: Tensor | None


class Groups(NamedTuple):
    """All sequences.

    Attributes:
        groups: The sequences in groups.
        back_T: For each place in the packed sequence, its token's among those of all groups.
    """

    groups: list[Group]
    back_T: Tensor


def groups_of(starts: tuple[int, ...], device: torch.device) -> Groups:
    """Sequences in groups.

    Args:
        starts: The first token of each sequence, and behind them the number of all.
        device: Of the tensors.
    """
    starts_B, lengths_B = np.array(starts[:-1]), np.diff(starts)
    groups: list[Group] = []
    back_T, rows_before = np.empty(starts[-1], np.int64), 0
    for members in _by_length(lengths_B.tolist()):
        valid_SL = np.arange(lengths_B[members].max()) < lengths_B[members, None]
        places_SL = (starts_B[members, None] + np.arange(valid_SL.shape[1])) * valid_SL
        back_T[places_SL[valid_SL]] = np.flatnonzero(valid_SL) + rows_before
        rows_before += valid_SL.size
        mask = None if valid_SL.all() else moved(valid_SL[:, None, None], device)
        groups.append(Group(moved(places_SL, device), mask))
    return Groups(groups, moved(back_T, device))


def _by_length(lengths: list[int]) -> list[list[int]]:
    """Sequences in groups of little padding."""
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and padding([lengths[i] for i in [*groups[-1], number]]) <= _MOST_PADDING:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


# For the operator below alone, where no tensor is fake, and none is kept for a backward pass.
_groups_of = lru_cache(maxsize=32)(groups_of)  # those of a step: all blocks of a tower read the same


def attend(q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, of: Groups, is_causal: bool, **options: Any) -> Tensor:
    """As `scaled_dot_product_attention` within each sequence, with its options: (T, H, C)."""
    outputs = []
    for places_SL, mask_S11L in of.groups:
        q_SHLC, k_SHLC, v_SHLC = (x[places_SL].transpose(1, 2) for x in (q_THC, k_THC, v_THC))
        # Where texts are causal, none sees the padding behind it, and what padding sees nobody reads.
        mask = None if is_causal else mask_S11L
        out_SHLC = F.scaled_dot_product_attention(
            q_SHLC, k_SHLC, v_SHLC, attn_mask=mask, is_causal=is_causal, **options
        )
        outputs.append(out_SHLC.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, of.back_T)


# The same for compiled blocks, on a CPU and without dropout. There the groups, of which every batch has other ones, are
# behind one operator, of whose results the shapes are known. It runs the kernels that torch's function chooses itself.
_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@torch.library.custom_op("indiclip::attend_in_groups", mutates_args=(), device_types="cpu")
def attend_as_operator(
    q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, starts: Tensor, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """As `attend`, and what its gradient needs: (T, H, C) and (T, H)."""
    outputs, sums = [], []
    groups, back_T = _groups_of(tuple(starts.tolist()), q_THC.device)
    for group in groups:
        rows_SHLC = (x[group.places_SL].transpose(1, 2) for x in (q_THC, k_THC, v_THC))
        mask = _added(group.mask_S11L, q_THC.dtype)
        out_SHLC, sum_SHL = _forward_kernel(*rows_SHLC, 0.0, is_causal, attn_mask=mask, scale=scale)
        outputs.append(out_SHLC.transpose(1, 2).flatten(0, 1))
        sums.append(sum_SHL.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, back_T), torch.cat(sums).index_select(0, back_T)


@torch.library.custom_op("indiclip::attend_in_groups_backward", mutates_args=(), device_types="cpu")
def _backward_operator(
    gradient_THC: Tensor, tensors: Sequence[Tensor], starts: Tensor, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values; `tensors` are these and the results."""
    parts = []
    groups, back_T = _groups_of(tuple(starts.tolist()), gradient_THC.device)
    for group in groups:
        gradient_SLHC = gradient_THC[group.places_SL]
        if group.mask_S11L is not None:  # what padding sees nobody reads
            gradient_SLHC *= group.mask_S11L[:, 0, 0, :, None, None]
        rows = [gradient_SLHC, *(x[group.places_SL] for x in tensors)]
        mask = _added(group.mask_S11L, gradient_THC.dtype)
        gradients = _backward_kernel(*(x.transpose(1, 2) for x in rows), 0.0, is_causal, attn_mask=mask, scale=scale)
        parts.append([x_SHLC.transpose(1, 2).flatten(0, 1) for x_SHLC in gradients])
    q, k, v = (torch.cat(of_groups).index_select(0, back_T) for of_groups in zip(*parts, strict=True))
    return q, k, v


def _added(mask_S11L: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as a number that is added to scores."""
    return None if mask_S11L is None else torch.zeros((), dtype=dtype).where(mask_S11L, -torch.inf)


@attend_as_operator.register_fake
def _(q_THC: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    sums = torch.promote_types(q_THC.dtype, torch.float32)
    return q_THC.new_empty(q_THC.shape), q_THC.new_empty(q_THC.shape[:2], dtype=sums)


@_backward_operator.register_fake
def _(gradient_THC: Tensor, tensors: Sequence[Tensor], *_: Any) -> tuple[Tensor, ...]:
    return tuple(x_THC.new_empty(x_THC.shape) for x_THC in tensors[:3])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, is_causal, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = is_causal, scale


def _backward(ctx: Any, gradient_THC: Tensor, _: Any) -> tuple[Any, ...]:
    q_THC, k_THC, v_THC, starts, *results = ctx.saved_tensors
    tensors = [q_THC, k_THC, v_THC, *results]
    return *_backward_operator(gradient_THC, tensors, starts, *ctx.options), None, None, None


attend_as_operator.register_autograd(_backward, setup_context=_keep)
