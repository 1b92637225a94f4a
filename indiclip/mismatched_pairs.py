"""Which text an image is told apart from in image-text matching: the same on any number of ranks and micro-batches.

Shape letters: see `indiclip.types`; G texts of all ranks, in the order in which samples are dealt to them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from indiclip.distributed import dealt_rows, rank_and_world
from indiclip.multimodal_encoder import Tokens

_TEMPERATURE = 0.07  # of similarities, with which ALBEF (arXiv:2107.07651) begins


class Keys(NamedTuple):
    """What says whether a text belongs to an image.

    Attributes:
        ids_B: Of captions, see `indiclip.losses.caption_ids`.
        labels_B: Classes, negative for none.
    """

    ids_B: Tensor
    labels_B: Tensor

    def apart(self, others: "Keys") -> Tensor:
        """Whether captions and classes differ."""
        same_class = (self.labels_B == others.labels_B) & (self.labels_B >= 0)
        return (self.ids_B != others.ids_B) & ~same_class


def half_a_batch_on(rows: Tensor) -> Tensor:
    """Row i + B / 2 in the place of row i, counted round.

    Samples are dealt to ranks in turn, so where each rank has an even number of them, it is half of the whole step, and
    no rank needs rows of another.
    """
    return rows.roll(-(len(rows) // 2), 0)


@torch.no_grad()
def hard_texts(image_BE: Tensor, text_BE: Tensor, keys: Keys, draws_B: Tensor) -> tuple[Tensor, Tensor]:
    """A text for each image, drawn from those that are not its own (ALBEF, arXiv:2107.07651, section 3.2).

    Args:
        image_BE: Unit-length embeddings of this rank's images.
        text_BE: Of their texts.
        keys: Of the pairs.
        draws_B: A uniform number in [0, 1) for each image.

    Returns:
        `(index_B, found_B)`: among the texts of all ranks, and whether there is any that is not its own. A collective.
    """
    text_GE = dealt_rows(text_BE)
    others = Keys(*(dealt_rows(key)[None] for key in keys))
    apart_BG = Keys(*(key[:, None] for key in keys)).apart(others)
    with torch.autocast(image_BE.device.type, enabled=False):
        logits_BG = (image_BE.double() @ text_GE.double().T / _TEMPERATURE).masked_fill(~apart_BG, -torch.inf)
    found_B = apart_BG.any(1)
    shares_BG = torch.where(found_B[:, None], logits_BG, 0).softmax(1)
    # The first text up to which the shares exceed the draw; of those without a share none.
    below_BG = shares_BG.cumsum(1) <= draws_B[:, None]
    index_B = below_BG.sum(1).clamp(max=shares_BG.shape[1] - 1)
    return index_B, found_B


def tokens_of_all_ranks(tokens: Tokens, longest: int) -> Tokens:
    """Those of all ranks, in the order in which samples are dealt to them. A collective.

    Args:
        tokens: Of this rank's texts.
        longest: To which all are filled up, as those of all ranks must have one shape.
    """
    if rank_and_world()[1] == 1:
        return tokens
    missing = longest - tokens.valid_BN.shape[1]
    tokens_BNW = dealt_rows(F.pad(tokens.tokens_BNW, (0, 0, 0, missing)))
    return Tokens(tokens_BNW, dealt_rows(F.pad(tokens.valid_BN.to(torch.uint8), (0, missing))).bool())
