"""Towers on inputs with hidden patches or tokens, and what was hidden: the targets of masked modelling.

Shape letters: see `indiclip.types`; K hidden patches or tokens of all samples; those of the codebook: see
`indiclip.patch_codebook`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indiclip.backbone import Backbone
from indiclip.masked_images import masked
from indiclip.masked_positions import hidden_patches, hidden_tokens
from indiclip.masked_texts import embedding_of, hidden_behind, hide
from indiclip.multimodal_encoder import Tokens
from indiclip.patch_codebook import CANDIDATES, PatchCodebook
from indiclip.teacher import Teacher
from indiclip.text import TextTower
from indiclip.types import Features, Images, Texts, in_float32, moved

if TYPE_CHECKING:
    from indiclip.encoder import Encoder


class Masked(NamedTuple):
    """What a tower makes of inputs with hidden patches or tokens.

    Attributes:
        tokens: With padding.
        places_K: Which of the B * N tokens were hidden.
        targets: What was there: numbers (K,), or vectors (K, D).
        hidden: The number of each hidden patch or token, of each sample.
        statistics: Of the patches, for the codebook: `sums_RCQ` and `candidates_BJP`.
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
    """Hides patches behind a learned one.

    Args:
        backbone: Which reads the images; not kept.
        ratio: Share of an image's patches that are hidden.
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
        backbone, device = encoder.backbone, images["patches_BNP"].device
        hidden_BN = hidden_patches(images, backbone.patch_size, self.ratio, seeds)
        features: Features = backbone(masked(images, moved(hidden_BN, device), self.hidden_patch_P, backbone))
        places_K = moved(_token_places(hidden_BN, images, backbone), device)
        targets, statistics = places_K, {}  # numbers that nobody reads, where there are no targets
        if self.teacher is not None:
            tokens_BND = self.teacher.features(images, encoder).tokens_BND
            tokens_KD = tokens_BND.flatten(0, 1).index_select(0, places_K)
            targets = F.layer_norm(in_float32(tokens_KD), tokens_KD.shape[-1:])
        if self.codebook is not None:
            patches_MP = images["patches_BNP"].flatten(0, 1)
            hidden_KP, drawn_KP = (
                self.codebook.normalise(patches_MP.index_select(0, moved(of, device)))
                for of in (np.flatnonzero(hidden_BN), _candidates(hidden_BN, seeds))
            )
            targets = self.codebook(hidden_KP)
            statistics["sums_RCQ"] = self.codebook.sums(hidden_KP, targets)[None]
            statistics["candidates_BJP"] = drawn_KP.reshape(-1, CANDIDATES, drawn_KP.shape[1])
        hidden = [np.flatnonzero(hidden_N) for hidden_N in hidden_BN]
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


def _token_places(hidden_BN: np.ndarray, images: Images, backbone: Backbone) -> np.ndarray:
    """Which of the backbone's tokens, in all B * N places, are of hidden patches."""
    image_K, patch_K = np.nonzero(hidden_BN)
    if backbone.canvas_hw is None:  # a token for each patch
        return np.flatnonzero(hidden_BN)
    rows, columns = (side // backbone.patch_size for side in backbone.canvas_hw)
    columns_B = np.array([width // backbone.patch_size for _, width in images["sizes_hw"]])
    row_K, column_K = np.divmod(patch_K, columns_B[image_K])
    return np.asarray(image_K * rows * columns + row_K * columns + column_K)


def _candidates(hidden_BN: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
    """`CANDIDATES` of the hidden patches of each image, in all B * N places, one image after the other."""
    found = []
    for image, (hidden_N, seed) in enumerate(zip(hidden_BN, seeds, strict=True)):
        places = np.flatnonzero(hidden_N) if hidden_N.any() else np.zeros(1, np.int64)
        drawn = np.resize(np.random.default_rng([seed, 3]).permutation(places), CANDIDATES)
        found.append(image * hidden_BN.shape[1] + drawn)
    return np.concatenate(found)
