"""A shallow encoder over the tokens of an image and of a text together, as FLAVA's.

Singh et al., "FLAVA: A Foundational Language And Vision Alignment Model", CVPR 2022, arXiv:2112.04482, section 3.1.

Shape letters: see `indiclip.types`; W its width.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from indiclip.chunked_cross_entropy import chunked_cross_entropy


class Tokens(NamedTuple):
    """Tokens of one kind with padding.

    Attributes:
        tokens_BNW: Anything on padding.
        valid_BN: False on padding.
    """

    tokens_BNW: Tensor
    valid_BN: Tensor


class MultimodalEncoder(nn.Module):
    """A transformer on a learned class token, an image's tokens and a text's.

    Args:
        image_width: Of the image tower's tokens.
        text_width: Of the text tower's.
        width: Its own, W.
        depth: Layers (pre-norm, four times as wide inside).
        num_heads: Of attention.
    """

    def __init__(self, image_width: int, text_width: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.from_image, self.from_text = nn.Linear(image_width, width), nn.Linear(text_width, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        # One by one: nn.TransformerEncoder copies the first layer with its weights.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def projected(self, image: Tokens, text: Tokens) -> tuple[Tokens, Tokens]:
        """The towers' tokens in its width, as `forward` takes them."""
        image_BNW, text_BTW = self.from_image(image.tokens_BNW), self.from_text(text.tokens_BNW)
        return Tokens(image_BNW, image.valid_BN), Tokens(text_BTW, text.valid_BN)

    def forward(self, image: Tokens, text: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """`(class_BW, image_BNW, text_BTW)` of projected tokens."""
        class_B1W = self.class_token.to(image.tokens_BNW.dtype).expand(len(image.tokens_BNW), -1, -1)
        x_BLW = torch.cat([class_B1W, image.tokens_BNW, text.tokens_BNW], 1)
        valid_BL = torch.cat([torch.ones_like(image.valid_BN[:, :1]), image.valid_BN, text.valid_BN], 1)
        for layer in self.layers:
            x_BLW = layer(x_BLW, src_key_padding_mask=~valid_BL)
        x_BLW = self.norm(x_BLW)
        first, image_BNW, text_BTW = x_BLW.split([1, image.valid_BN.shape[1], text.valid_BN.shape[1]], 1)
        return cast(Tensor, first[:, 0]), image_BNW, text_BTW


class PredictionHead(nn.Sequential):
    """From a hidden token's vector to `number` logits, or to the numbers of a vector, as BERT's and FLAVA's."""

    def __init__(self, width: int, number: int) -> None:
        super().__init__(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, number))

    def cross_entropy(self, tokens_KD: Tensor, targets_K: Tensor) -> Tensor:
        """The sum of the tokens' cross entropies; the logits of a few of them are held at a time."""
        *transform, last = self
        for layer in transform:
            tokens_KD = layer(tokens_KD)
        answers = cast(nn.Linear, last)
        weights_K = torch.ones(targets_K.shape, device=targets_K.device)
        return chunked_cross_entropy(tokens_KD, answers.weight, targets_K, weights_K, answers.bias)[0]
