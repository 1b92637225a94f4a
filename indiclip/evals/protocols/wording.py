"""Wording: how much the accuracy hangs on how the classes are asked for.

Shape letters: see `zero_shot`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from indiclip.evals.protocols.languages import languages_of
from indiclip.evals.protocols.metrics import Interval, hit_rate
from indiclip.evals.protocols.protocol import Options, Protocol
from indiclip.evals.protocols.zero_shot import rank_classes
from indiclip.evals.results import Score

if TYPE_CHECKING:
    from indiclip.evals.card_scorer import CardScorer
    from indiclip.evals.images.items import Items

BARE = "{c}"


class Wording(Protocol):
    """Top-1 accuracy with the bare names and with each of the card's prompts alone, in every language, at the full
    length and the first view.

    The card's own number, over all its prompts together, is zero-shot's. `spread` is what the best of these wordings
    has above the worst.
    """

    name = "wording"
    metrics = ("bare_name", "spread")

    def texts(self, items: "Items", options: Options) -> Iterator[str]:
        for language in languages_of(items.card, options):
            yield from options.names(items.card, language.code).values()

    def run(self, scorer: "CardScorer") -> Iterator[Score]:
        for language, ranking in scorer.rankings() if scorer.setting.main else ():
            names, label_M = scorer.options.names(scorer.card, language.code), scorer.label_N[ranking.image_M]
            image_ME = scorer.image_NE[ranking.image_M]
            found: dict[str, Interval] = {}
            for template in dict.fromkeys((BARE, *scorer.card.templates(language.code))):
                prompts = [template.replace("{c}", names[i]) for i in language.class_D.tolist()]
                class_DE = scorer.embed(prompts)
                rank_M = rank_classes(image_ME, class_DE, label_M, language.class_D, 1).rank_M
                found[template] = hit_rate(rank_M == 0)
            sizes, chance = (len(label_M), len(language.class_D)), 1 / len(language.class_D)
            for template, value in found.items():
                yield from scorer.rows(
                    self.name,
                    language.code,
                    {"acc1": value},
                    *sizes,
                    chance,
                    "bare name" if template == BARE else template,
                )
            rates = [value.value for value in found.values()]
            values = {"bare_name": found[BARE], "spread": Interval(max(rates) - min(rates), float("nan"), float("nan"))}
            yield from scorer.rows(self.name, language.code, values, *sizes, {"bare_name": chance})
