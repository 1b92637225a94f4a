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


class Masks(NamedTuple):
    """Which tokens see each other.

    Attributes:
        whole: Those of one sequence.
        causal: Of these, each itself and those before it.
    """

    whole: BlockMask
    causal: BlockMask


def attend(
    q_1HTC: Tensor, k_1HTC: Tensor, v_1HTC: Tensor, mask: BlockMask, scale: float | None, enable_gqa: bool
) -> Tensor:
    """As `scaled_dot_product_attention` with the mask: (1, H, T, C)."""
    kernel = flex_attention if torch.compiler.is_compiling() else _compiled()
    return cast(Tensor, kernel(q_1HTC, k_1HTC, v_1HTC, block_mask=mask, scale=scale, enable_gqa=enable_gqa))


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)  # without it there is no kernel: all scores would be kept


def block_masks(starts: Sequence[int], device: torch.device) -> Masks:
    """The masks of a batch.

    Made on the host: torch's own function compares all tokens with all, which takes T^2 bytes.

    Args:
        starts: The first token of each sequence, and behind them the number of all.
        device: Of the masks.
    """
    starts_B, total = np.array(starts), starts[-1]
    sequence_T = moved(np.repeat(np.arange(len(starts) - 1, dtype=np.int32), np.diff(starts_B)), device)
    first_Q = np.arange(0, total, _BLOCK)
    last_Q = np.minimum(first_Q + _BLOCK, total) - 1
    # Of the first token's sequence the block in which it begins; of the last one's, the block behind its end.
    begin_Q = starts_B[np.searchsorted(starts_B, first_Q, "right") - 1] // _BLOCK
    end_Q = -(-starts_B[np.searchsorted(starts_B, last_Q, "right")] // _BLOCK)
    indices_QQ = (begin_Q[:, None] + np.arange(len(first_Q))) % len(first_Q)
    tables = [moved(numbers.astype(np.int32)[None, None], device) for numbers in (end_Q - begin_Q, indices_QQ)]

    def whole(_: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sequence_T[q] == sequence_T[k]

    def causal(_: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (sequence_T[q] == sequence_T[k]) & (q >= k)

    def mask(sees: Any) -> BlockMask:
        return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(total, total))

    return Masks(mask(whole), mask(causal))
