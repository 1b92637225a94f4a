"""Flex attention within each of several sequences that lie one after the other: for CUDA in float32.

Shape letters: as in `indiclip.packing`; Q blocks of neighbouring tokens.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from indiclip.types import moved

MIN_CHANNELS = 16  # of a head
_BLOCK = 128  # tokens, as torch has it


class Tables(NamedTuple):
    """Which tokens see each other: those of one sequence.

    Blocks of tokens see each other mutually, so that these are the tables of queries and of keys.

    Attributes:
        sequence_T: The number of each token's sequence.
        count_11Q: With how many blocks each block shares a sequence.
        index_11QQ: These blocks, and behind them the others.
    """

    sequence_T: Tensor
    count_11Q: Tensor
    index_11QQ: Tensor

    def mask(self, is_causal: bool) -> BlockMask:
        """For `flex_attention`. Made where it is used: in a compiled block its size is not a number of one batch."""
        sequence_T = self.sequence_T

        def whole(_: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return sequence_T[q] == sequence_T[k]

        def causal(_: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (sequence_T[q] == sequence_T[k]) & (q >= k)

        size, count, index = len(sequence_T), self.count_11Q, self.index_11QQ
        sees = causal if is_causal else whole
        return BlockMask((size, size), count, index, None, None, count, index, None, None, (_BLOCK, _BLOCK), sees)


def attend(
    q_1HTC: Tensor,
    k_1HTC: Tensor,
    v_1HTC: Tensor,
    tables: Tables,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """As `scaled_dot_product_attention` within each sequence: (1, H, T, C)."""
    # Without compilation there is no kernel: all scores would be kept.
    run = _attend if torch.compiler.is_compiling() else _compiled()
    return cast(Tensor, run(q_1HTC, k_1HTC, v_1HTC, tables, is_causal, scale, enable_gqa))


def _attend(
    q_1HTC: Tensor, k_1HTC: Tensor, v_1HTC: Tensor, tables: Tables, is_causal: bool, scale: float | None, gqa: bool
) -> Any:
    return flex_attention(q_1HTC, k_1HTC, v_1HTC, block_mask=tables.mask(is_causal), scale=scale, enable_gqa=gqa)


@cache
def _compiled() -> Any:
    return torch.compile(_attend, dynamic=True)


def block_tables(starts: Sequence[int], device: torch.device) -> Tables:
    """The tables of a batch.

    Made on the host: torch's own function compares all tokens with all, which takes T^2 bytes.

    Args:
        starts: The first token of each sequence, and behind them the number of all.
        device: Of the tables.
    """
    starts_B, total = np.array(starts), starts[-1]
    sequence_T = np.repeat(np.arange(len(starts) - 1), np.diff(starts_B))
    first_Q = np.arange(0, total, _BLOCK)
    last_Q = np.minimum(first_Q + _BLOCK, total) - 1
    # Of the first token's sequence the block in which it begins; of the last one's, the block behind its end.
    begin_Q = starts_B[np.searchsorted(starts_B, first_Q, "right") - 1] // _BLOCK
    end_Q = -(-starts_B[np.searchsorted(starts_B, last_Q, "right")] // _BLOCK)
    index_QQ = (begin_Q[:, None] + np.arange(len(first_Q))) % len(first_Q)
    tables = (sequence_T, (end_Q - begin_Q)[None, None], index_QQ[None, None])
    return Tables(*(moved(numbers.astype(np.int32), device) for numbers in tables))
