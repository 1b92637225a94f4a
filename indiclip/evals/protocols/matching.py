"""Matching: which of a few texts stands in the image.

Shape letters: M images that are scored, T texts of an image, K nearest of these, E embedding length.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from indiclip.evals.protocols.cosines import as_near, truncate_normalize
from indiclip.evals.protocols.protocol import TOP, Options, Protocol
from indiclip.evals.results import Score, column_of

if TYPE_CHECKING:
    from indiclip.evals.card_scorer import CardScorer
    from indiclip.evals.images.items import Items


class Matching(Protocol):
    """Accuracy among the texts of `Items.candidates`, as the card's first English prompt asks for them."""

    name = "matching"
    required_fields = frozenset({"class", "text"})
    metrics = ("acc1",)
    candidates = "texts"
    is_plain = True

    def texts(self, items: "Items", options: Options) -> Iterator[str]:
        for image in np.flatnonzero(items.tested_N).tolist() if items.candidates else ():
            yield from items.card.asked((items.candidates or [])[image])

    def run(self, scorer: "CardScorer") -> Iterator[Score]:
        assert scorer.items.candidates is not None
        candidates_M = [scorer.items.candidates[image] for image in scorer.tested.tolist()]
        found = match(scorer, scorer.tested, candidates_M, list(map(scorer.card.asked, candidates_M)))
        chance_M = np.array([1 / len(texts) for texts in candidates_M])
        subsets = scorer.subsets(scorer.tested)
        yield from scorer.among_texts(self.name, "en", found.rank_M == 0, chance_M, subsets)
        scorer.keep(self.name, "en", scorer.tested, *found)


class Matched(NamedTuple):
    """Columns of `Prediction` from the right text on, see there."""

    truth_M: np.ndarray
    predicted_M: np.ndarray
    rank_M: np.ndarray
    top_MK: np.ndarray
    cosine_MK: np.ndarray


def match(
    scorer: "CardScorer", image_M: np.ndarray, texts_M: Sequence[Sequence[str]], asked_M: Sequence[Sequence[str]]
) -> Matched:
    """The texts of each image by how near they are, the first of them being right.

    Args:
        scorer: Knows the embeddings.
        image_M: int64, places of the images.
        texts_M: Of each image, as answers name them.
        asked_M: The same as they are embedded.
    """
    count_M = list(map(len, texts_M))
    owner_T = torch.arange(len(count_M)).repeat_interleave(torch.tensor(count_M))
    text_TE = truncate_normalize(scorer.embed([text for texts in asked_M for text in texts]), scorer.setting.length)
    cosines_M = torch.linalg.vecdot(scorer.image_NE[image_M][owner_T], text_TE).split(count_M)
    rank_M, predicted, tops, cosines = np.zeros(len(count_M), np.int64), list[str](), list[list[str]](), []
    for place, (texts, cosine_T) in enumerate(zip(texts_M, cosines_M, strict=True)):
        rank_M[place] = int(as_near(cosine_T[1:], cosine_T[0]).sum())
        nearest_K = cosine_T.nan_to_num(nan=-2).argsort(descending=True, stable=True)[:TOP]
        tops.append([texts[i] for i in nearest_K.tolist()])
        cosines.append(cosine_T[nearest_K].tolist())
        # A tie counts against the right text, wherever it came among equals.
        predicted.append(tops[-1][int(rank_M[place] > 0 and tops[-1][0] == texts[0])])
    truths = column_of([texts[0] for texts in texts_M])
    return Matched(truths, column_of(predicted), rank_M, column_of(tops), column_of(cosines))
