"""Text models of transformers on packed texts: their own code, with an attention and a mask that are registered there.

Shape letters: see `indiclip.packing`; R rows in which packed texts travel.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from indiclip.packing import Packing, reopened_by

_NAME = "indiclip_packed"


def packed_states(model: Any, ids_BT: Tensor, packing: Packing, first_position: int) -> Tensor:
    """The model's last hidden states (B, T, D), zeros on padding; it sees no padding.

    Args:
        model: A text model that takes `position_ids`.
        ids_BT: Padded token ids.
        packing: Of the texts.
        first_position: Number of a text's first position, which some models count from the padding's id.
    """
    width = ids_BT.shape[1]
    positions_BT = torch.arange(first_position, first_position + width, device=ids_BT.device).expand_as(ids_BT)
    packed = packing.pack(torch.stack([ids_BT, positions_BT], -1))[0]
    total = len(packed)
    # In rows no longer than a text may be, which models like CLIP insist on; what fills the last row nobody reads.
    # There is always something that does: without, compiled blocks would be compiled once more.
    filler = width - total % width
    ids_RT, positions_RT = F.pad(packed, (0, 0, 0, filler)).reshape(-1, width, 2).unbind(-1)
    with _attending(model.config, packing):
        out = model(input_ids=ids_RT, position_ids=positions_RT, attention_mask=None)
    return packing.unpack(out.last_hidden_state.flatten(0, 1)[None, :total])


@contextmanager
def _attending(config: Any, packing: Packing) -> Iterator[None]:
    _register()
    before, outer = config._attn_implementation, getattr(config, "indiclip_packing", None)
    config._attn_implementation, config.indiclip_packing = _NAME, packing
    try:
        with reopened_by(partial(_attending, config, packing)):
            yield
    finally:
        config._attn_implementation, config.indiclip_packing = before, outer
        if outer is None:
            del config.indiclip_packing


@cache
def _register() -> None:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, lambda *_, **__: None)


def _attention(
    module: Any,
    query_RHTC: Tensor,
    key_RHTC: Tensor,
    value_RHTC: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As transformers asks for it: (R, T, H, C), and no weights."""
    packing = module.config.indiclip_packing  # where torch 2.11 can trace it too, unlike a ContextVar
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    grouped: dict[str, Any] = {"enable_gqa": True} if key_RHTC.shape[1] != query_RHTC.shape[1] else {}
    total, rows, width = len(packing.rows_T), query_RHTC.shape[0], query_RHTC.shape[2]
    q, k, v = (x.transpose(0, 1).flatten(1, 2)[None, :, :total] for x in (query_RHTC, key_RHTC, value_RHTC))
    out_1HTC = packing.attend(q, k, v, causal, dropout_p=dropout, scale=scaling, **grouped)
    out_THC = F.pad(out_1HTC[0].transpose(0, 1), (0, 0, 0, 0, 0, rows * width - total))
    return out_THC.reshape(rows, width, *out_THC.shape[1:]), None
