"""Towers on inputs with hidden tokens, and what was hidden: the targets of masked modelling.

Shape letters: see `indiclip.types` and `indiclip.tasks.patch_codebook`; K hidden tokens of all samples, k patches along
the side of an image's token.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indiclip.backbone import Backbone
from indiclip.tasks.block_masks import masks_of
from indiclip.tasks.masked_images import patches_of_tokens, with_hidden_tokens
from indiclip.tasks.masked_texts import embedding_of, hidden_behind, hidden_tokens, hide
from indiclip.tasks.multimodal_encoder import Tokens
from indiclip.tasks.patch_codebook import CANDIDATES, PatchCodebook
from indiclip.teacher import Teacher
from indiclip.text import TextTower
from indiclip.types import Features, Images, Texts, in_float32, moved

if TYPE_CHECKING:
    from indiclip.encoder import Encoder


class Masked(NamedTuple):
    """What a tower makes of inputs with hidden tokens.

    Attributes:
        tokens: With padding.
        places_K: Which of the B * N tokens were hidden.
        targets: What was there: numbers (K,), or vectors (K, D).
        hidden: The number of each hidden token, of each sample.
        statistics: Of the images, for the codebook: `sums_RCQ` and `candidates_BJP`.
    """

    tokens: Tokens
    places_K: Tensor
    targets: Tensor
    hidden: list[np.ndarray]
    statistics: dict[str, Tensor]

    @property
    def counts(self) -> list[int]:
        """How many are hidden of each sample."""
        return [len(of) for of in self.hidden]


class MaskedImageTower(nn.Module):
    """Hides the patches of some tokens behind a learned one.

    Args:
        backbone: Which reads the images; not kept.
        ratio: Share of an image's tokens that are hidden.
        targets: A codebook, whose numbers of the hidden patches are the targets; or a teacher, for the vectors that it
            makes of them in the whole image, each with zero mean and unit variance (as Baevski et al., "data2vec", ICML
            2022, arXiv:2202.03555, of the last block alone); or None.
    """

    def __init__(self, backbone: Backbone, ratio: float, targets: PatchCodebook | Teacher | None) -> None:
        super().__init__()
        self.ratio = ratio
        self.hidden_patch_P = nn.Parameter(torch.zeros(len(backbone.mean_P)))
        self.codebook = targets if isinstance(targets, PatchCodebook) else None
        self.teacher = targets if isinstance(targets, Teacher) else None

    def forward(self, images: Images, seeds: Sequence[int], encoder: "Encoder") -> Masked:
        """Of images of any size, with a random seed for each."""
        backbone = encoder.backbone
        patches = patches_of_tokens(images, backbone)
        masks = masks_of(seeds, [of.shape[:2] for of in patches], 1.0, (self.ratio, self.ratio), "large_block")
        seen, places_K, _ = with_hidden_tokens(images, masks, patches, self.hidden_patch_P, backbone)
        features: Features = backbone(seen)
        hidden = [np.flatnonzero(mask_HW) for mask_HW in masks]
        targets, statistics = places_K, {}  # numbers that nobody reads, where there are no targets
        if self.teacher is not None:
            tokens_BND = self.teacher.features(images, encoder).tokens_BND
            tokens_KD = tokens_BND.flatten(0, 1).index_select(0, places_K)
            targets = F.layer_norm(in_float32(tokens_KD), tokens_KD.shape[-1:])
        if self.codebook is not None:
            hidden_KP, drawn_KP = (
                self.codebook.normalise(_pixels(images, patches, of))
                for of in (hidden, map(_candidates, hidden, seeds))
            )
            targets = self.codebook(hidden_KP)
            statistics["sums_RCQ"] = self.codebook.sums(hidden_KP, targets)[None]
            statistics["candidates_BJP"] = drawn_KP.reshape(-1, CANDIDATES, drawn_KP.shape[1])
        return Masked(tokens_of(features), places_K, targets, hidden, statistics)


class MaskedTextTower(nn.Module):
    """Hides tokens behind a learned embedding.

    Args:
        tower: Which reads the texts; not kept.
        ratio: Share of a text's tokens that are hidden; never those that every text has.
    """

    def __init__(self, tower: TextTower, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio
        # As spread as BERT's embeddings.
        self.hidden_token_D = nn.Parameter(0.02 * torch.randn(embedding_of(tower).embedding_dim))
        self.never = {*tower.tokenizer.frame_ids, tower.tokenizer.pad_id}

    def forward(self, texts: Texts | Sequence[str], seeds: Sequence[int], tower: TextTower) -> Masked:
        """Of texts with a random seed for each; the targets are token ids."""
        device = self.hidden_token_D.device
        rows = texts.token_ids if isinstance(texts, Texts) else tower.tokenizer.encode([*texts])
        hidden = hidden_tokens(rows, self.ratio, seeds, self.never)
        found = hide(tower, rows, hidden)
        ids_BT, valid_BT, places_K, tokens_K = (
            part.to(device, non_blocking=True)
            for part in (found.ids_BT, found.valid_BT, found.places_K, found.tokens_K)
        )
        with hidden_behind(tower, self.hidden_token_D):
            tokens_BTD = tower(ids_BT, valid_BT, found.lengths)
        return Masked(Tokens(tokens_BTD, valid_BT), places_K, tokens_K, hidden, {})


def tokens_of(features: Features) -> Tokens:
    """With padding and a mask, whether there is any or not."""
    tokens_BND, valid_BN = features.tokens_BND, features.valid_BN
    if valid_BN is None:
        valid_BN = torch.ones(tokens_BND.shape[:2], dtype=torch.bool, device=tokens_BND.device)
    return Tokens(tokens_BND, valid_BN)


def _candidates(hidden: np.ndarray, seed: int) -> np.ndarray:
    """`CANDIDATES` of an image's hidden tokens; where none is, its first."""
    places = hidden if len(hidden) else np.zeros(1, np.int64)
    return np.resize(np.random.default_rng([seed, 3]).permutation(places), CANDIDATES)


def _pixels(images: Images, patches: Sequence[np.ndarray], tokens: Iterable[np.ndarray]) -> Tensor:
    """The pixels (K, P) of these tokens of each image, each as one patch; `patches` as of `patches_of_tokens`."""
    chosen = [of.reshape(-1, *of.shape[2:])[places] for of, places in zip(patches, tokens, strict=True)]
    places_Kkk, patches_BNP = np.concatenate(chosen), images["patches_BNP"]
    side = round((patches_BNP.shape[2] / 3) ** 0.5)
    found = patches_BNP.flatten(0, 1).index_select(0, moved(places_Kkk.ravel(), patches_BNP.device))
    return found.reshape(*places_Kkk.shape, side, 3 * side).transpose(2, 3).flatten(1)
