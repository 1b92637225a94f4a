"""Attention within each of several sequences that lie one after the other, without padding between them.

A tower's own code runs on one long sequence (1, T, D): its linear layers and norms see every token once, and nothing
else. Only its attention is replaced: on CUDA by torch's varlen attention in half precision and by flex attention in
float32, else by attention in a few groups of sequences of nearly one length.

Shape letters: see `indiclip.types`; T tokens of all sequences, S sequences of a group, L tokens of its longest, H
heads, C channels of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cached_property, partial
from inspect import signature
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.overrides import TorchFunctionMode

from indiclip import flex, grouped_attention
from indiclip.grouped_attention import padding
from indiclip.types import moved, spread

WORTH_IT = 0.05  # share of padding from which on packing is faster than a mask
_CAUSAL = {"window_size": (-1, 0)}
# Of keys with fewer heads than queries; the kernel of torch 2.11 takes them unasked.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def worth_packing(lengths: Sequence[int], compiled: bool) -> bool:
    """Whether to pack a batch of these lengths. Blocks that are compiled see one kind of batch alone."""
    return compiled or padding(lengths) > WORTH_IT


class Packing:
    """Where the tokens of padded sequences go in a packed one, and back.

    Args:
        lengths: Tokens of each sequence, on the host.
        width: Tokens of each row of the padded tensors.
        device: Of the tensors.
    """

    def __init__(self, lengths: Sequence[int], width: int, device: torch.device) -> None:
        # All of this on the host, whose numbers the device need not be asked for. In tensors or their shapes: any other
        # number would be a constant of a compiled block.
        lengths_B = np.array(lengths)
        if lengths_B.min() < 1:  # the kernels would end the process
            raise ValueError("packing: found a sequence without tokens; expected at least one in each")
        valid_BN = np.arange(width) < lengths_B[:, None]
        self.valid_BN = moved(valid_BN, device)
        self.starts = (0, *lengths_B.cumsum().tolist())
        self.starts_on_host = torch.tensor(self.starts)
        self.starts_on_device = self.starts_on_host.to(device, torch.int32, non_blocking=True)
        self._rows_on_host = np.flatnonzero(valid_BN)
        self.rows_T = moved(self._rows_on_host, device)
        # For what will not be cast to half precision.
        flex_takes_it = device.type == "cuda" and not torch.is_autocast_enabled("cuda")
        self.tables = flex.block_tables(self.starts, device) if flex_takes_it else None

    @cached_property
    def _groups(self) -> grouped_attention.Groups:
        return grouped_attention.groups_of(self.starts, self.rows_T.device)

    def pack(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) -> (1, T, D)."""
        # No view of another tensor: a block would be compiled once for such, and once for what is none.
        return x_BND.flatten(0, 1)[None].index_select(1, self.rows_T)

    def unpack(self, x_1TD: Tensor) -> Tensor:
        """(1, T, D) -> (B, N, D), zeros on padding."""
        return spread(x_1TD[0], self.rows_T, self.valid_BN.numel()).reshape(*self.valid_BN.shape, -1)

    def split(self, x_1TD: Tensor, number: int) -> tuple[Tensor | None, Tensor, Tensor]:
        """The first `number` tokens of each sequence, and the others.

        Returns:
            `(first_BKD, others_TD, rows_T)`: None for no first ones; the rows are those of (B * (N - K), D).
        """
        if not number:
            return None, x_1TD[0], self.rows_T
        sequence_T, place_T = np.divmod(self._rows_on_host, self.valid_BN.shape[1])
        other_T = place_T >= number
        first_TD, others_TD = (
            x_1TD[0].index_select(0, moved(np.flatnonzero(part), x_1TD.device)) for part in (~other_T, other_T)
        )
        rows_T = (sequence_T * (self.valid_BN.shape[1] - number) + place_T - number)[other_T]
        return first_TD.reshape(-1, number, x_1TD.shape[-1]), others_TD, moved(rows_T, x_1TD.device)

    def attend(
        self,
        query_1HTC: Tensor,
        key_1HTC: Tensor,
        value_1HTC: Tensor,
        is_causal: bool = False,
        dropout_p: float = 0.0,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As `scaled_dot_product_attention` within each sequence, with its options: (1, H, T, C)."""
        q_1HTC, k_1HTC, v_1HTC = (_as_attention_casts(x) for x in (query_1HTC, key_1HTC, value_1HTC))
        q_THC, k_THC, v_THC = (x.squeeze(0).transpose(0, 1) for x in (q_1HTC, k_1HTC, v_1HTC))
        has_kernels, half = q_THC.is_cuda and not dropout_p, q_THC.dtype in (torch.float16, torch.bfloat16)
        options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
        if has_kernels and half:
            out_THC = self._varlen(q_THC, k_THC, v_THC, is_causal, scale, enable_gqa)
        elif has_kernels and self.tables is not None and q_THC.shape[-1] >= flex.MIN_CHANNELS:
            return flex.attend(q_1HTC, k_1HTC, v_1HTC, self.tables, is_causal, scale, enable_gqa)
        elif not torch.compiler.is_compiling():
            out_THC = grouped_attention.attend(q_THC, k_THC, v_THC, self._groups, is_causal, **options)
        elif q_THC.device.type == "cpu" and not dropout_p:
            heads, starts = q_THC.shape[1], self.starts_on_host
            k_THC, v_THC = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k_THC, v_THC))
            out_THC, _ = grouped_attention.attend_as_operator(q_THC, k_THC, v_THC, starts, is_causal, scale)
        else:
            out_THC = self._padded(q_THC, k_THC, v_THC, is_causal, **options)
        return out_THC.transpose(0, 1)[None]

    def _varlen(
        self, q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, is_causal: bool, scale: float | None, enable_gqa: bool
    ) -> Tensor:
        starts, longest = self.starts_on_device, self.valid_BN.shape[1]
        named: dict[str, Any] = (_CAUSAL if is_causal else {}) | (_GROUPED if enable_gqa else {})
        return cast(Tensor, varlen_attn(q_THC, k_THC, v_THC, starts, starts, longest, longest, scale=scale, **named))

    def _padded(self, q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, is_causal: bool, **options: Any) -> Tensor:
        """In compiled blocks, which cannot have another number of groups in each batch."""
        q_BHNC, k_BHNC, v_BHNC = (
            self.unpack(x.flatten(1)[None]).reshape(*self.valid_BN.shape, *x.shape[1:]).transpose(1, 2)
            for x in (q_THC, k_THC, v_THC)
        )
        mask = None if is_causal else self.valid_BN[:, None, None]  # causal: as in groups
        out_BHNC = F.scaled_dot_product_attention(
            q_BHNC, k_BHNC, v_BHNC, attn_mask=mask, is_causal=is_causal, **options
        )
        return self.pack(out_BHNC.transpose(1, 2).flatten(2)).reshape(*q_THC.shape[:2], -1)


def _as_attention_casts(x: Tensor) -> Tensor:
    """Autocast knows torch's attention, and not these."""
    kind = x.device.type
    casts = x.dtype == torch.float32 and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if casts else x


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
