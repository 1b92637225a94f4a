"""Retrieval: the captions nearest to an image, and the images nearest to a caption.

Shape letters: N images, M those of them that have captions, T texts, Q queries, E embedding length.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from indiclip.evals.protocols.answers import among_all
from indiclip.evals.protocols.cosines import Floats, Integers, labels_of, pair_ranks, truncate_normalize
from indiclip.evals.protocols.metrics import Interval, clustered_rate, hit_rate, parity_gap
from indiclip.evals.protocols.protocol import Protocol
from indiclip.evals.results import CLEAN, Score

if TYPE_CHECKING:
    from indiclip.evals.card_scorer import CardScorer

RECALL_AT = (1, 5, 10)


class CaptionRanks(NamedTuple):
    """How many wrong candidates are at least as near as the right one; a hit@k is a rank below k.

    Attributes:
        rank_N: int64, for each image, of the nearest of its own captions among those of other images.
        rank_T: int64, for each caption, of its image among the other images.
    """

    rank_N: np.ndarray
    rank_T: np.ndarray


def caption_ranks(image_NE: Floats, text_TE: Floats, image_T: Integers, length: int | None = None) -> CaptionRanks:
    """Ranks the texts for every image and the images for every text.

    The candidates are those of clip-benchmark 1.6.2 (`zeroshot_retrieval`, its recall@k being the share of ranks below
    k): every caption is one, equal captions too, and an image has found its text when any of its captions is within
    the k nearest. Unlike there, ties (to rounding, 1e-6) and NaN count against the right one: a caption that two
    images share is found for neither at k=1.

    Args:
        image_NE: Images, of any norm.
        text_TE: Captions, of any norm.
        image_T: The image of each caption, 0 to N - 1.
        length: Cut all to this length; None is the whole.

    Raises:
        ValueError: An image without a caption.
    """
    images, texts = truncate_normalize(image_NE, length), truncate_normalize(text_TE, length)
    owner_T = labels_of(image_T)
    missing = np.setdiff1d(np.arange(len(images)), owner_T.numpy())
    if len(missing):
        raise ValueError(f"{len(missing)} of {len(images)} images have no caption, first number {missing[0]}")
    rank_N, rank_T = pair_ranks(images, texts, owner_T, torch.arange(len(texts)))
    return CaptionRanks(rank_N.numpy(), rank_T.numpy())


def chance_recall(right_Q: np.ndarray, num_candidates: int, k: int) -> float:
    """Recall@k of candidates in random order: the share of queries of which any right one is among the first k.

    Args:
        right_Q: int, how many candidates are right for each query.
        num_candidates: Of every query.
        k: At least 1.
    """
    missed_Q = np.ones(len(right_Q))
    for drawn in range(min(k, num_candidates)):
        missed_Q *= np.maximum(num_candidates - right_Q - drawn, 0) / (num_candidates - drawn)
    return float(1 - missed_Q.mean())


def recalls_at(way: str, rank_Q: np.ndarray, at: Sequence[int] = RECALL_AT) -> dict[str, Interval]:
    """The share of queries whose right answer is among the first k."""
    return {f"{way}_r{k}": hit_rate(rank_Q < k) for k in at}


def chances_at(way: str, right_Q: np.ndarray, num_candidates: int, at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """The same of candidates in random order, see `chance_recall`."""
    return {f"{way}_r{k}": chance_recall(right_Q, num_candidates, k) for k in at}


class Retrieval(Protocol):
    """Captions and images find each other, in every language; and what English does better on the same images."""

    name = "retrieval"
    required_fields = frozenset({"captions"})
    metrics = tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (5, 1, 10))
    is_plain = True
    candidates = "images"

    def run(self, scorer: "CardScorer") -> Iterator[Score]:
        captions = scorer.items.captions
        for code, texts_N, image_M in scorer.captions():
            whole = _Found(scorer, code, image_M)
            yield from whole.recalls()
            for subset, of_M in scorer.subsets(image_M).items():
                # What was seen in training is no candidate either; of a group the images look among all captions.
                if subset == CLEAN:
                    yield from _Found(scorer, code, image_M[of_M]).recalls(subset)
                elif subset:
                    values = recalls_at("image_to_text", whole.rank_M[of_M])
                    yield from scorer.rows(self.name, code, values, int(of_M.sum()), len(whole.texts), subset=subset)
            both_M = np.array([i for i in image_M.tolist() if captions.get("en", texts_N)[i]], dtype=np.int64)
            if code != "en" and "en" in captions and len(both_M):
                yield from _gaps(scorer, code, both_M)
            if scorer.setting.main:
                whole.keep()


class _Found:
    """The ranks of some images and of their captions in a language.

    Attributes:
        rank_M: Of the images, `rank_T` of the captions.
        texts: The captions, `image_T` whose each is: a place in `image_M`.
    """

    def __init__(self, scorer: "CardScorer", code: str, image_M: np.ndarray) -> None:
        self.scorer, self.code, self.image_M = scorer, code, image_M
        texts_M = [scorer.items.captions[code][i] for i in image_M.tolist()]
        self.texts = [text for texts in texts_M for text in texts]
        self.image_T = np.repeat(np.arange(len(texts_M)), list(map(len, texts_M)))
        self.image_ME = scorer.image_NE[image_M]
        self.text_TE = scorer.embed(self.texts)
        self.rank_M, self.rank_T = caption_ranks(self.image_ME, self.text_TE, self.image_T)

    def recalls(self, subset: str = "") -> Iterator[Score]:
        images, texts, rows = len(self.rank_M), len(self.rank_T), self.scorer.rows
        values = recalls_at("image_to_text", self.rank_M)
        chances = chances_at("image_to_text", np.bincount(self.image_T), texts)
        yield from rows(Retrieval.name, self.code, values, images, texts, chances, subset)
        values = {f"text_to_image_r{k}": clustered_rate(self.rank_T < k, self.image_T) for k in RECALL_AT}
        chances = chances_at("text_to_image", np.ones(texts, np.int64), images)
        yield from rows(Retrieval.name, self.code, values, texts, images, chances, subset)

    def keep(self) -> None:
        """For each image the nearest captions, and as its answer its first own or the nearest of the others'."""
        own = (torch.from_numpy(self.image_T), torch.arange(len(self.texts)))
        answered = among_all(self.image_ME, self.text_TE, self.texts, own, self.rank_M)
        self.scorer.keep(Retrieval.name, self.code, self.image_M, answered)


def _gaps(scorer: "CardScorer", code: str, image_M: np.ndarray) -> Iterator[Score]:
    """English less a language, over the images that have captions in both, as candidates too."""
    english_M, other_M = (_Found(scorer, language, image_M).rank_M for language in ("en", code))
    gaps = {f"parity_image_to_text_r{k}": parity_gap(english_M < k, other_M < k) for k in RECALL_AT}
    yield from scorer.rows(Retrieval.name, code, gaps, len(image_M), len(image_M))
