"""Hard pairs: whether an image is nearer to its class than to those that its class is confused with."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from indiclip.evals.protocols.metrics import hit_rate
from indiclip.evals.protocols.protocol import Protocol
from indiclip.evals.results import Score

if TYPE_CHECKING:
    from indiclip.evals.card_scorer import CardScorer


class HardPairs(Protocol):
    """Accuracy among an image's class and those that the card calls confusable with it, in every language.

    Chance is the mean of 1 / (1 + k) over the images, k being the candidates that an image's class is confusable with.
    """

    name = "hard_pairs"
    metrics = ("acc1",)

    def run(self, scorer: "CardScorer") -> Iterator[Score]:
        for language, ranking in scorer.rankings():
            asked_M = ranking.rivals_M > 0
            if asked_M.any():
                values = {"acc1": hit_rate(ranking.hard_hit_M[asked_M])}
                chance = float((1 / (1 + ranking.rivals_M[asked_M])).mean())
                yield from scorer.rows(
                    self.name, language.code, values, int(asked_M.sum()), len(language.class_D), chance
                )
