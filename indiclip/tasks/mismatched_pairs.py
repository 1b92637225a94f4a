"""Image-text matching: telling pairs from what is no pair, the same on any number of ranks and micro-batches.

Shape letters: see `indiclip.types`; W width of the multimodal encoder; G texts of all ranks, as `dealt_rows` puts them
together.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from indiclip.distributed import alone, dealt_rows, rank_and_world
from indiclip.losses import caption_ids
from indiclip.tasks.masked_towers import tokens_of
from indiclip.tasks.multimodal_encoder import MultimodalEncoder, Tokens
from indiclip.types import Batch, Features, Texts, in_float32, moved, on_device, random_seeds

if TYPE_CHECKING:
    from indiclip.encoder import Encoder

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


class Matching(nn.Sequential):
    """From the multimodal encoder's class token to two logits: image and text do not belong together, or they do.

    Each image has its own text, and one that is not its own: that half a step further on; or, with hard negatives, any
    of the step, the more often the more similar it is. ALBEF draws a similar image for each text too, and has two pairs
    that are none for one that is; its ranks draw from their own samples alone. Here ranks would exchange the tokens of
    all images for that, of lengths that none knows of another without waiting for it. FLAVA has one, as here.

    Args:
        width: W.
        hard_negatives: See above.
    """

    def __init__(self, width: int, hard_negatives: bool = False) -> None:
        super().__init__(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))
        self.hard_negatives = hard_negatives

    def losses(self, class_BW: Tensor, is_pair: bool) -> Tensor:
        """The cross entropy of each answer, where this is the right one."""
        answer_B = torch.full((len(class_BW),), int(is_pair), device=class_BW.device)
        return F.cross_entropy(in_float32(self(class_BW)), answer_B, reduction="none")

    def probabilities(
        self, multimodal: MultimodalEncoder, features: Features, captions: Sequence[str], encoder: "Encoder"
    ) -> list[float]:
        """That each image and its caption, with nothing hidden, are a pair."""
        ids_BT, valid_BT = encoder.tokenize([*captions])
        text = Tokens(encoder.text(ids_BT, valid_BT), valid_BT)
        class_BW, _, _ = multimodal(*multimodal.projected(tokens_of(features), text))
        return in_float32(self(class_BW)).softmax(1)[:, 1].tolist()

    def rows(
        self,
        image: Tokens,
        text: Tokens,
        features: Features,
        batch: Batch,
        captions: Texts | list[str],
        encoder: "Encoder",
    ) -> dict[str, Tensor]:
        """What `mismatches` needs of a micro-batch, a row for each pair.

        Args:
            image: As the multimodal encoder takes it.
            text: Likewise.
            features: Of the whole images.
            batch: Theirs.
            captions: Its captions.
            encoder: Which made them.
        """
        device, seeds = features.tokens.device, random_seeds(batch)
        rows = dict(zip(("image_BNW", "image_valid_BN", "text_BTW", "text_valid_BT"), (*image, *text), strict=True))
        rows["ids_B"] = caption_ids([*captions]).to(device, non_blocking=True)
        rows["labels_B"] = batch["targets"].get("label", torch.full((len(seeds),), -1, device=device))
        rows["seeds_B"] = on_device(seeds, device)
        if self.hard_negatives:
            rows["image_BD"] = encoder.pool_features(features).detach()
            rows["text_BD"] = encoder.pool_text(captions).detach()
            rows["draws_B"] = moved(np.array([np.random.default_rng([seed, 4]).random() for seed in seeds]), device)
        return rows

    def mismatches(
        self,
        rows: dict[str, Tensor],
        multimodal: MultimodalEncoder,
        encoder: "Encoder",
        in_turn: bool = True,
        num_parts: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """The sum of the losses of images with texts that are not theirs, and their number. A collective.

        Of all pairs it holds the rows and their gradients; what it computes of them, of one part at a time, for which
        each part is computed again in the backward pass. Ranks exchange the tokens of all texts, but for those that are
        half a step on where that is on the same rank.

        Args:
            rows: Of all micro-batches, see `rows`.
            multimodal: On which this stands.
            encoder: Of the run.
            in_turn: See `indiclip.types.Origin`.
            num_parts: Parts of this rank's pairs.
        """
        image, text = Tokens(rows["image_BNW"], rows["image_valid_BN"]), Tokens(rows["text_BTW"], rows["text_valid_BT"])
        keys = Keys(rows["ids_B"], rows["labels_B"])
        stays = in_turn and not self.hard_negatives and len(keys.ids_B) % 2 == 0
        with alone() if stays else nullcontext():
            order_G = order_of_step(keys.ids_B, rows["seeds_B"], in_turn)
            if self.hard_negatives:
                # By running statistics: what is trained changes those of batch norm once in a step.
                image_BE = encoder.project_image(rows["image_BD"], batch_statistics=False)
                text_BE = encoder.project_text(rows["text_BD"], batch_statistics=False)
                index_B, apart_B = hard_texts(image_BE, text_BE, keys, rows["draws_B"], order_G)
            else:
                index_B, apart_B = half_a_step_on(keys, order_G)
            everyone = tokens_of_all_ranks(text, encoder.text.tokenizer.context_length)
        other = Tokens(*(of.index_select(0, index_B) for of in everyone))
        losses_B = self._mismatch_losses(image, other, multimodal, num_parts)
        return torch.where(apart_B, losses_B, 0).sum(), apart_B.sum()

    def _mismatch_losses(self, image: Tokens, text: Tokens, multimodal: MultimodalEncoder, num_parts: int) -> Tensor:
        def losses(*part: Tensor) -> Tensor:
            class_BW, _, _ = multimodal(Tokens(*part[:2]), Tokens(*part[2:]))
            return self.losses(class_BW, is_pair=False)

        function: Callable[..., Tensor] = losses
        if num_parts > 1:  # nothing in it is random
            function = partial(checkpoint, losses, use_reentrant=False, preserve_rng_state=False)
        size = -(-len(image.valid_BN) // num_parts)
        parts = zip(*(torch.split(of, size) for of in (*image, *text)), strict=True)
        return torch.cat([function(*part) for part in parts])


@torch.no_grad()
def order_of_step(ids_B: Tensor, seeds_B: Tensor, in_turn: bool) -> Tensor:
    """Which of the texts of all ranks is the first of the step, the second and so on: (G,). A collective.

    Of samples that are dealt to the ranks in turn it is the order that one process has them in; else that of their
    seeds, which are functions of their places in the run. Of two with one seed, captions decide.
    """
    if in_turn:
        return torch.arange(len(ids_B) * rank_and_world()[1], device=ids_B.device)
    by_caption_G = dealt_rows(ids_B).argsort(stable=True)
    return by_caption_G[dealt_rows(seeds_B)[by_caption_G].argsort(stable=True)]


@torch.no_grad()
def half_a_step_on(keys: Keys, order_G: Tensor) -> tuple[Tensor, Tensor]:
    """The text half a step behind that of each image, counted round.

    Args:
        keys: Of the pairs.
        order_G: See `order_of_step`.

    Returns:
        `(index_B, apart_B)`: among the texts of all ranks, and whether it is not the image's own. A collective.
    """
    rank, world = rank_and_world()
    own_B = torch.arange(len(keys.ids_B), device=order_G.device) * world + rank
    places_B = order_G.argsort()[own_B]
    index_B = order_G[(places_B + len(order_G) // 2) % len(order_G)]
    return index_B, keys.apart(Keys(*(dealt_rows(key)[index_B] for key in keys)))


@torch.no_grad()
def hard_texts(
    image_BE: Tensor, text_BE: Tensor, keys: Keys, draws_B: Tensor, order_G: Tensor
) -> tuple[Tensor, Tensor]:
    """A text for each image, drawn from those that are not its own (ALBEF, arXiv:2107.07651, section 3.2).

    Args:
        image_BE: Unit-length embeddings of this rank's images.
        text_BE: Of their texts.
        keys: Of the pairs.
        draws_B: A uniform number in [0, 1) for each image.
        order_G: In which the texts have their shares of that, see `order_of_step`.

    Returns:
        `(index_B, found_B)`: among the texts of all ranks, and whether there is any that is not its own. A collective.
    """
    text_GE = dealt_rows(text_BE)[order_G]
    others = Keys(*(dealt_rows(key)[None, order_G] for key in keys))
    apart_BG = Keys(*(key[:, None] for key in keys)).apart(others)
    with torch.autocast(image_BE.device.type, enabled=False):
        logits_BG = (image_BE.double() @ text_GE.double().T / _TEMPERATURE).masked_fill(~apart_BG, -torch.inf)
    found_B = apart_BG.any(1)
    shares_BG = torch.where(found_B[:, None], logits_BG, 0).softmax(1)
    # The first text up to which the shares exceed the draw; of those without a share none.
    below_BG = shares_BG.cumsum(1) <= draws_B[:, None]
    places_B = below_BG.sum(1).clamp(max=shares_BG.shape[1] - 1)
    return order_G[places_B], found_B


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
