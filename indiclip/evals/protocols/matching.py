"""Matching: which of a few texts stands in the image.

Shape letters: M images that are scored, T texts of all of them, E embedding length.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from indiclip.evals.protocols.answers import among_own
from indiclip.evals.protocols.protocol import Options, Protocol
from indiclip.evals.results import Score

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
        text_TE = scorer.embed([text for texts in candidates_M for text in scorer.card.asked(texts)])
        answered = among_own(scorer.image_NE[scorer.tested], text_TE, candidates_M)
        chance_M = np.array([1 / len(texts) for texts in candidates_M])
        subsets = scorer.subsets(scorer.tested)
        yield from scorer.among_texts(self.name, "en", answered.rank_Q == 0, chance_M, subsets)
        scorer.keep(self.name, "en", scorer.tested, answered)
