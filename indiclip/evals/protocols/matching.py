"""Matching: which of a few texts stands in the image.

Shape letters: M images that are scored, T texts of an image, K nearest of these, E embedding length.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from indiclip.evals.protocols.cosines import as_near, truncate_normalize
from indiclip.evals.protocols.metrics import chance_corrected, hit_rate
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
            yield from _asked(items, (items.candidates or [])[image])

    def run(self, scorer: "CardScorer") -> Iterator[Score]:
        assert scorer.items.candidates is not None
        candidates_M = [scorer.items.candidates[image] for image in scorer.tested.tolist()]
        rank_M, tops, cosines = np.zeros(len(candidates_M), np.int64), [], []
        for place, (image, texts) in enumerate(zip(scorer.tested.tolist(), candidates_M, strict=True)):
            text_TE = truncate_normalize(scorer.embed(_asked(scorer.items, texts)), scorer.setting.length)
            cosine_T = text_TE @ scorer.image_NE[image]
            rank_M[place] = int(as_near(cosine_T[1:], cosine_T[0]).sum())
            nearest_K = cosine_T.nan_to_num(nan=-2).argsort(descending=True, stable=True)[:TOP]
            tops.append([texts[i] for i in nearest_K.tolist()])
            cosines.append(cosine_T[nearest_K].tolist())

        chance_M = np.array([1 / len(texts) for texts in candidates_M])
        for subset, of_M in scorer.subsets(scorer.tested).items():
            chance = float(chance_M[of_M].mean())
            values = {"acc1": hit_rate(rank_M[of_M] == 0)}
            if not subset:
                values["acc1_corrected"] = chance_corrected(values["acc1"], chance)
            yield from scorer.rows(self.name, "en", values, int(of_M.sum()), round(1 / chance), chance, subset)

        truths = [texts[0] for texts in candidates_M]
        found = zip(tops, truths, rank_M.tolist(), strict=True)
        predicted = [top[0] if rank == 0 or top[0] != truth else top[1] for top, truth, rank in found]
        answers = (column_of(truths), column_of(predicted), rank_M, column_of(tops), column_of(cosines))
        scorer.keep(self.name, "en", scorer.tested, *answers)


def _asked(items: "Items", texts: Sequence[str]) -> list[str]:
    template = items.card.templates("en")[0]
    return [template.replace("{c}", text) for text in texts]
