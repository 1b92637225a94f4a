"""Attention within each of several sequences that lie one after the other, without padding between them.

A tower's own code runs on one long sequence (1, T, D): its linear layers and norms see every token once, and nothing
else. Only its attention is replaced, by torch's varlen attention on CUDA in half precision, else by attention in a few
groups of sequences of nearly one length.

Shape letters: see `indiclip.types`; T tokens of all sequences, S sequences of a group, L tokens of its longest, H
heads, C channels of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from inspect import signature
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.overrides import TorchFunctionMode

from indiclip.types import on_device

WORTH_IT = 0.05  # share of padding from which on packing is faster than a mask
_MOST_PADDING = 0.1  # of a group; a new one begins where the next sequence would bring it above
# Of a causal mask; torch 2.11 calls it by its name.
_CAUSAL = {"window_size": (-1, 0)} if "window_size" in signature(varlen_attn).parameters else {"is_causal": True}


def padding(lengths: Sequence[int]) -> float:
    """Share of padding in a batch of these lengths."""
    return 1 - sum(lengths) / (len(lengths) * max(lengths)) if lengths else 0.0


class _Group(NamedTuple):
    """Sequences that attend together.

    Attributes:
        places_SL: Where each of their tokens lies in the packed sequence; anywhere on padding.
        mask_S11L: False on padding; None where there is none.
    """

    places_SL: Tensor
    mask_S11L: Tensor | None


class Packing:
    """Where the tokens of padded sequences go in a packed one, and back.

    Args:
        lengths: Tokens of each sequence, on the host.
        width: Tokens of each row of the padded tensors.
        device: Of the tensors.
    """

    def __init__(self, lengths: Sequence[int], width: int, device: torch.device) -> None:
        self.lengths, self.width = list(lengths), width
        # All of this on the host, whose numbers the device need not be asked for.
        lengths_B = np.array(self.lengths)
        starts_B = lengths_B.cumsum() - lengths_B
        self.starts = on_device([*starts_B.tolist(), int(lengths_B.sum())], device).int()
        self.rows_T = _moved(np.flatnonzero(np.arange(width) < lengths_B[:, None]), device)
        self.groups: list[_Group] = []
        back_T, rows_before = np.empty(lengths_B.sum(), np.int64), 0
        for members in _grouped(self.lengths):
            valid_SL = np.arange(lengths_B[members].max()) < lengths_B[members, None]
            places_SL = (starts_B[members, None] + np.arange(valid_SL.shape[1])) * valid_SL
            back_T[places_SL[valid_SL]] = np.flatnonzero(valid_SL) + rows_before
            rows_before += valid_SL.size
            mask = None if valid_SL.all() else _moved(valid_SL[:, None, None], device)
            self.groups.append(_Group(_moved(places_SL, device), mask))
        self.back_T = _moved(back_T, device)

    def pack(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) -> (1, T, D)."""
        return x_BND.flatten(0, 1).index_select(0, self.rows_T)[None]

    def unpack(self, x_1TD: Tensor) -> Tensor:
        """(1, T, D) -> (B, N, D), zeros on padding."""
        rows = x_1TD.new_zeros(len(self.lengths) * self.width, x_1TD.shape[-1])
        return rows.index_copy(0, self.rows_T, x_1TD[0]).reshape(len(self.lengths), self.width, -1)

    def attend(
        self, query_1HTC: Tensor, key_1HTC: Tensor, value_1HTC: Tensor, is_causal: bool = False, **options: Any
    ) -> Tensor:
        """As `scaled_dot_product_attention` within each sequence, with its options: (1, H, T, C)."""
        q_THC, k_THC, v_THC = (x.squeeze(0).transpose(0, 1) for x in (query_1HTC, key_1HTC, value_1HTC))
        if q_THC.is_cuda and q_THC.dtype in (torch.float16, torch.bfloat16) and not options.get("dropout_p"):
            starts, longest = self.starts, max(self.lengths)
            options = {name: value for name, value in options.items() if name != "dropout_p"}
            options |= _CAUSAL if is_causal else {}
            out_THC = varlen_attn(q_THC, k_THC, v_THC, starts, starts, longest, longest, **options)
            return cast(Tensor, out_THC).transpose(0, 1)[None]
        outputs = []
        for places_SL, mask_S11L in self.groups:
            q_SHLC, k_SHLC, v_SHLC = (x[places_SL].transpose(1, 2) for x in (q_THC, k_THC, v_THC))
            # Where texts are causal, none sees the padding behind it, and what padding sees nobody reads.
            mask = None if is_causal else mask_S11L
            out_SHLC = F.scaled_dot_product_attention(
                q_SHLC, k_SHLC, v_SHLC, attn_mask=mask, is_causal=is_causal, **options
            )
            outputs.append(out_SHLC.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.back_T).transpose(0, 1)[None]


def _moved(numbers: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(numbers).to(device, non_blocking=True)


def _grouped(lengths: list[int]) -> list[list[int]]:
    """Sequences by length, in groups of little padding."""
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and padding([lengths[i] for i in [*groups[-1], number]]) <= _MOST_PADDING:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


_reopen: ContextVar[Callable[[], AbstractContextManager[Any]]] = ContextVar("_reopen", default=nullcontext)


@contextmanager
def reopened_by(open_again: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Within this, what is to be run again in the backward pass will be run in the context that `open_again` gives."""
    token = _reopen.set(open_again)
    try:
        yield
    finally:
        _reopen.reset(token)


def while_recomputing() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For `torch.utils.checkpoint.checkpoint`: the contexts of a block's first pass and of its second."""
    return nullcontext(), _reopen.get()()


@contextmanager
def packed_attention(packing: Packing) -> Iterator[None]:
    """Within this, `scaled_dot_product_attention` of a packed sequence is that of its parts, each by itself."""
    with reopened_by(partial(packed_attention, packing)), _PackedAttention(packing):
        yield


class _PackedAttention(TorchFunctionMode):
    def __init__(self, packing: Packing) -> None:
        super().__init__()
        self.packing = packing

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        assert kwargs.pop("attn_mask", None) is None
        return self.packing.attend(*args, **kwargs)
