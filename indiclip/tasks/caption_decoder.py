"""A transformer that writes texts about images: causal attention to what is written, cross attention to image tokens.

The layers are the usual ones, normalised before each part. torch's `TransformerDecoderLayer` and timm's blocks keep no
keys and values from one written token to the next, without which a text costs the square of its length; so attention
is our own here, with torch's fused kernel inside.

Shape letters: see `indiclip.types`; T tokens of a sequence, S keys, H heads, W width of the decoder.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indiclip.types import on_device


class KeysValues(NamedTuple):
    """What attention looks at, (B, H, S, W / H) each."""

    keys: Tensor
    values: Tensor


class Attention(nn.Module):
    """Of queries of the decoder's width to tokens of any."""

    def __init__(self, width: int, num_heads: int, memory_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.out_proj = nn.Linear(width, width), _nothing_at_first(width, width)
        self.k_proj, self.v_proj = nn.Linear(memory_width, width), nn.Linear(memory_width, width)

    def read(self, memory_BSD: Tensor) -> KeysValues:
        """Keys and values of tokens."""
        return KeysValues(self._of_heads(self.k_proj(memory_BSD)), self._of_heads(self.v_proj(memory_BSD)))

    def forward(self, x_BTW: Tensor, memory: KeysValues, mask: Tensor | None, causal: bool = False) -> Tensor:
        """(B, T, W). `mask`, which spreads to (B, H, T, S), is True where a query may look."""
        query_BHTC = self._of_heads(self.q_proj(x_BTW))
        out_BHTC = F.scaled_dot_product_attention(query_BHTC, *memory, attn_mask=mask, is_causal=causal)
        return cast(Tensor, self.out_proj(out_BHTC.transpose(1, 2).flatten(2)))

    def _of_heads(self, x_BTW: Tensor) -> Tensor:
        B, T, _ = x_BTW.shape
        return x_BTW.view(B, T, self.num_heads, -1).transpose(1, 2)


class DecoderLayer(nn.Module):
    """Self attention, cross attention (none, where `memory_width` is None) and an MLP."""

    def __init__(self, width: int, num_heads: int, memory_width: int | None) -> None:
        super().__init__()
        self.self_norm, self.self_attention = nn.LayerNorm(width), Attention(width, num_heads, width)
        self.cross_attention: Attention | None = None
        if memory_width is not None:
            self.cross_norm, self.cross_attention = nn.LayerNorm(width), Attention(width, num_heads, memory_width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), _nothing_at_first(4 * width, width))

    def forward(
        self,
        x_BTW: Tensor,
        memory: KeysValues | None,
        memory_mask: Tensor | None,
        mask: Tensor | None,
        written: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """`(x_BTW, written)`: with what was written before, each token looks at all of it and at itself."""
        normed_BTW = self.self_norm(x_BTW)
        own = self.self_attention.read(normed_BTW)
        if written is not None:
            own = KeysValues(*(torch.cat(pair, 2) for pair in zip(written, own, strict=True)))
        x_BTW = x_BTW + self.self_attention(normed_BTW, own, mask, causal=mask is None and written is None)
        if self.cross_attention is not None:
            assert memory is not None
            x_BTW = x_BTW + self.cross_attention(self.cross_norm(x_BTW), memory, memory_mask)
        return x_BTW + self.mlp(self.mlp_norm(x_BTW)), own


def _nothing_at_first(in_features: int, out_features: int) -> nn.Linear:
    """The last matrix of a part: zeros, so that a new decoder passes its embeddings on, and learns several times faster
    (Zhang, Dauphin, Ma, ICLR 2019, arXiv:1901.09321).
    """
    linear = nn.Linear(in_features, out_features)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


class Memory(NamedTuple):
    """What the layers know of a batch's images.

    Attributes:
        of_layers: None for a layer without cross attention.
        mask_B11N: False on padding; None where there is none.
    """

    of_layers: list[KeysValues | None]
    mask_B11N: Tensor | None


class CaptionDecoder(nn.Module):
    """Ids and image tokens -> a vector per id, whose product with `table` are the logits of the next id.

    Args:
        num_ids: Of the vocabulary.
        width: Of its layers.
        depth: Number of its layers.
        num_heads: Of each attention.
        memory_width: Of the image tokens.
        num_positions: Longest sequence.
        text_layers: The lowest layers that have no cross attention (CoCa has half of them so).
    """

    def __init__(
        self,
        num_ids: int,
        width: int,
        depth: int,
        num_heads: int,
        memory_width: int,
        num_positions: int,
        text_layers: int = 0,
    ) -> None:
        super().__init__()
        self.embedding, self.position_table = nn.Embedding(num_ids, width), nn.Embedding(num_positions, width)
        for table in (self.embedding, self.position_table):  # so that the first logits have a variance of 1
            nn.init.normal_(table.weight, std=width**-0.5)
        memory_widths = [None] * text_layers + [memory_width] * (depth - text_layers)
        self.layers = nn.ModuleList(DecoderLayer(width, num_heads, of_memory) for of_memory in memory_widths)
        self.norm = nn.LayerNorm(width)

    @property
    def table(self) -> Tensor:
        """(ids, W): the embeddings, which are the output's matrix too (Press and Wolf, EACL 2017)."""
        return self.embedding.weight

    def read(self, tokens_BND: Tensor, valid_BN: Tensor | None) -> Memory:
        """The keys and values of images, once for all that is written about them."""
        attentions = [cast(DecoderLayer, layer).cross_attention for layer in self.layers]
        of_layers = [None if attention is None else attention.read(tokens_BND) for attention in attentions]
        return Memory(of_layers, None if valid_BN is None else valid_BN[:, None, None])

    def forward(self, ids_BT: Tensor, memory: Memory, mask_BTT: Tensor | None = None) -> Tensor:
        """(B, T, W), of whole sequences. Without a mask no token sees a later one, so padding behind is never seen."""
        x_BTW = self._embed(ids_BT, 0)
        mask_B1TT = None if mask_BTT is None else mask_BTT[:, None]
        for layer, of_layer in zip(self.layers, memory.of_layers, strict=True):
            x_BTW, _ = layer(x_BTW, of_layer, memory.mask_B11N, mask_B1TT)
        return cast(Tensor, self.norm(x_BTW))

    @torch.no_grad()
    def write(
        self, prompts: list[list[int]], memory: Memory, choices: slice, most: int, end: int | None = None
    ) -> list[list[int]]:
        """What follows each prompt, always taking the most probable id; waits for the device.

        Args:
            prompts: One for each image, of any lengths.
            memory: Of the images.
            choices: The ids that may be written.
            most: At most so many are.
            end: The id that ends a text, and is not part of what is returned.
        """
        device, table_KW = self.table.device, self.table[choices]
        texts: list[list[int]] = [[] for _ in prompts]
        written: list[KeysValues | None] = [None] * len(self.layers)
        ids, is_open = [prompt[0] for prompt in prompts], [True] * len(prompts)
        for place in range(max(map(len, prompts)) + most - 1):
            x_B1W = self._embed(on_device(ids, device)[:, None], place)
            for number, (layer, of_layer) in enumerate(zip(self.layers, memory.of_layers, strict=True)):
                x_B1W, written[number] = layer(x_B1W, of_layer, memory.mask_B11N, None, written[number])
            best = (F.linear(self.norm(x_B1W)[:, 0], table_KW).argmax(1) + (choices.start or 0)).tolist()
            for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
                if place + 1 < len(prompt):
                    ids[row] = prompt[place + 1]
                elif is_open[row]:
                    ids[row] = best[row]
                    is_open[row] = best[row] != end and len(text) + 1 < most
                    text += [best[row]] * (best[row] != end)
            if not any(is_open):
                break
        return texts

    def _embed(self, ids_BT: Tensor, first: int) -> Tensor:
        positions_TW = self.position_table.weight[first : first + ids_BT.shape[1]]
        return cast(Tensor, self.embedding(ids_BT) + positions_TW)
