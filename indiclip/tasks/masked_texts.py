"""Texts of which some tokens are hidden behind a learned vector, for masked language modelling with any tokenizer.

Many tokenizers have no [MASK]. A hidden token travels as the first id beyond the tower's vocabulary, and where the
tower looks up its embedding, it gets the learned vector instead. Positions and all that follows are the tower's own.

Shape letters: see `indiclip.types`; K hidden tokens of all texts.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from indiclip.text import TextTower


class MaskedTexts(NamedTuple):
    """Texts with hidden tokens, on the host.

    Attributes:
        ids_BT: Padded; hidden ones are `hidden_id`.
        valid_BT: False on padding.
        lengths: Tokens of each text.
        places_K: int64, which of the B * T places are hidden.
        tokens_K: int64, what stands there.
    """

    ids_BT: Tensor
    valid_BT: Tensor
    lengths: list[int]
    places_K: Tensor
    tokens_K: Tensor


def hidden_tokens(
    rows: Sequence[Sequence[int]], ratio: float, seeds: Sequence[int], never: Collection[int]
) -> list[np.ndarray]:
    """The places of the hidden tokens of each text, ascending: a share of them, but at least one.

    Args:
        rows: Token ids of each text.
        ratio: The share.
        seeds: Of each text.
        never: Ids that stay, such as those of the start and the end.
    """
    found = []
    for row, seed in zip(rows, seeds, strict=True):
        places = np.array([place for place, token in enumerate(row) if token not in never], np.int64)
        number = max(round(ratio * len(places)), 1)
        found.append(np.sort(np.random.default_rng([seed, 2]).permutation(places)[:number]))
    return found


def hide(tower: TextTower, rows: Sequence[list[int]], places: Sequence[np.ndarray]) -> MaskedTexts:
    """Hide the tokens at these places of each text.

    Args:
        tower: Which will read them.
        rows: Token ids of each text, as the tokenizer's `encode` gives them.
        places: Of each text.
    """
    ids_BT, valid_BT = tower.padded([*rows])
    width = ids_BT.shape[1]
    places_K = torch.from_numpy(np.concatenate([width * text + of for text, of in enumerate(places)]))
    tokens_K = ids_BT.flatten()[places_K]
    ids_BT = ids_BT.flatten().index_fill(0, places_K, hidden_id(tower)).reshape(ids_BT.shape)
    return MaskedTexts(ids_BT, valid_BT, [max(len(row), 1) for row in rows], places_K, tokens_K)


def embedding_of(tower: TextTower) -> nn.Embedding:
    """The table in which the tower looks up its tokens.

    Raises:
        ValueError: It has none.
    """
    table = tower.model.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        kind = tower.model.config.model_type
        raise ValueError(f"model.encoder.text: {kind} has no table of token embeddings, in which one could be hidden")
    return table


def hidden_id(tower: TextTower) -> int:
    """The id that stands for a hidden token."""
    return embedding_of(tower).num_embeddings


@contextmanager
def hidden_behind(tower: TextTower, vector_D: Tensor) -> Iterator[None]:
    """While it lasts, the tower reads `hidden_id` as this vector, of the width of its token embeddings."""
    table, hidden = embedding_of(tower), hidden_id(tower)
    masks: list[Tensor] = []

    def before(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        masks.append(arguments[0] == hidden)
        return (arguments[0].masked_fill(masks[-1], 0),)

    def after(_: nn.Module, __: Any, vectors: Tensor) -> Tensor:
        return torch.where(masks.pop()[..., None], vector_D.to(vectors.dtype), vectors)

    hooks = [table.register_forward_pre_hook(before), table.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
