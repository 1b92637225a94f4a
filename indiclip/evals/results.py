"""What a benchmark run found: scores, predictions and what was skipped. `result_files` keeps them."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from indiclip.evals.suites import SUITES, packaged

if TYPE_CHECKING:
    from indiclip.evals.samples import Sample

PHOTOGRAPHS, PROCEDURAL = "photographs", "procedural"
IMAGES = "images"  # stands for a language where no text is involved
PROBES = {"knn": "kNN", "linear_probe": "probe"}  # protocol -> what it is called at the head of a column
CLEAN = "clean"  # the subset of the images that are not among the training data
_SUMMARY = ("corrected", "acc1", "mean_per_class_recall", "image_to_text_r5")


class Score(NamedTuple):
    """One number, with its 95% interval."""

    suite: str  # india, world, own
    card: str
    part: str  # photographs or procedural
    protocol: str  # zero_shot, hard_pairs, retrieval, matching, places, knn, linear_probe, ...
    language: str  # of the texts; `images` where there are none
    metric: str  # acc1, acc5, mean_per_class_recall, image_to_text_r5, parity_acc1, median_km, ...
    length: int  # of the embeddings
    view: str  # at which size and aspect the images were encoded
    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    num_items: int = 0  # images, or texts, that the number is over
    num_classes: int = 0  # candidates
    subset: str = ""  # a group of the images, such as a script; `clean`: without those seen in training

    @property
    def key(self) -> tuple[str, str]:
        """The part of a card that it is of."""
        return self.card, self.part

    @property
    def measured(self) -> tuple[str | int, ...]:
        """What it is a number of, over whichever images: the fields from `suite` to `view`."""
        return self[:8]


class Prediction(NamedTuple):
    """What a protocol answered for one image, at the full length and the first view."""

    card: str
    part: str
    protocol: str
    language: str
    key: str  # of the image
    truth: str  # class id, or the right text
    predicted: str
    rank: int  # how many wrong ones are at least as near as the right one
    top: list[str]  # the nearest, best first
    cosines: list[float]  # of these
    hard_hit: bool | None  # right among the confusable classes only; None where the class has none
    flagged: bool  # found among the training images
    content: str = ""  # a digest of the image's bytes; the text where there is no image
    question: str = ""  # what was asked of the image, where there are several questions


Where = tuple[str, str, str, str]  # card, part, protocol and language


@dataclass
class CardResult:
    """What became of a card."""

    suite: str
    card: str
    title: str
    part: str
    metric: str  # the main one
    status: str  # `scored`, `skipped`, or `absent`: no photographs of a category of India whose generated part is
    num_images: int = 0
    num_classes: int = 0  # with images
    of_classes: int = 0  # on the card
    source: str = ""
    licence: str = ""
    notes: list[str] = field(default_factory=list)  # why it was skipped; what is not as the card says
    protocol: str = "zero_shot"  # the main one
    # Protocols whose metrics are logged without their name.
    plain: list[str] = field(default_factory=lambda: ["zero_shot"])
    candidates: str = "classes"  # what the main protocol ranks: classes, an image's own texts, or all images
    places: dict[str, list[Any]] = field(default_factory=dict)  # class -> latitude, longitude, state, where it has any
    names: dict[str, dict[str, str]] = field(default_factory=dict)  # class id -> language -> name, two at most
    is_texts: bool = False  # `num_images` counts texts: no image is looked at

    @property
    def key(self) -> tuple[str, str]:
        """What tells it apart in a run."""
        return self.card, self.part


@dataclass
class Result:
    """A benchmark run."""

    model: str
    lengths: list[int]
    views: list[str]
    cards: list[CardResult] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    answers: dict[Where, list[Prediction]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)  # options, versions, seconds, contamination
    samples: list["Sample"] = field(default_factory=list, repr=False, compare=False)  # for the report, saved nowhere

    @property
    def predictions(self) -> list[Prediction]:
        """All answers, image by image."""
        return [row for rows in self.answers.values() for row in rows]

    @predictions.setter
    def predictions(self, rows: Iterable[Prediction]) -> None:
        self.answers = grouped(rows)

    def answers_of(self, card: CardResult) -> dict[tuple[str, str], list[Prediction]]:
        """(protocol, language) -> what was answered for the images of a card."""
        return {where[2:]: rows for where, rows in self.answers.items() if where[:2] == card.key}

    def is_main_setting(self, score: Score) -> bool:
        """Whether a score is of the full length and the first view."""
        return (score.length, score.view) == (self.lengths[-1], self.views[0])

    def main(self, language: str = "en") -> dict[tuple[str, str], Score]:
        """(card, part) -> its main metric at the full length and the first view."""
        mains = {card.key: (card.protocol, card.metric) for card in self.cards}
        return {
            score.key: score
            for score in self._over_all_images()
            if score.language == language and (score.protocol, score.metric) == mains.get(score.key)
        }

    def mains(self) -> dict[str, dict[tuple[str, str], Score]]:
        """Language -> its `main`, in the order of `languages`."""
        return {language: self.main(language) for language in self.languages()}

    def probes(self, protocol: str) -> dict[tuple[str, str], Score]:
        """(card, part) -> accuracy of kNN or the linear probe at the full length and the first view."""
        return {
            score.key: score
            for score in self._over_all_images()
            if (score.protocol, score.metric) == (protocol, "acc1")
        }

    def gaps(self) -> dict[tuple[str | int, ...], Score]:
        """`Score.measured` of a language's metric -> how far it is from English on the same images and classes."""
        parity = [score for score in self._over_all_images() if score.metric.startswith("parity_")]
        return {
            score._replace(metric=score.metric.removeprefix("parity_")).measured: less_english(score)
            for score in parity
        }

    def _over_all_images(self) -> Iterator[Score]:
        """Scores at the full length and the first view that are of no subset."""
        return (score for score in self.scores if self.is_main_setting(score) and not score.subset)

    def logged(self) -> dict[str, float]:
        """`eval/<suite>/<card>/<language>/<metric>` -> value: all metrics in the main setting, the main ones in others.

        The generated part of a card is `<card>_procedural`; a metric begins with its protocol's name but for those of
        the protocols that `CardResult.plain` names; `_64` at its end is a length other than the full one, `@256-square`
        a view other than the first.
        """
        cards = {card.key: card for card in self.cards}
        values = {}
        for score in self.scores:
            elsewhere = f"_{score.length}" * (score.length != self.lengths[-1])
            elsewhere += f"@{score.view}" * (score.view != self.views[0])
            card = cards[score.key]
            if score.subset or (elsewhere and score.metric not in ("acc1", card.metric)):
                continue
            metric = score.metric if score.protocol in card.plain else f"{score.protocol}_{score.metric}"
            values[f"eval/{score.suite}/{name_of(*score.key)}/{score.language}/{metric}{elsewhere}"] = score.value
        for language, mean in self.headline()["mean"].items():
            values[f"eval/india/mean/{language}/corrected"] = mean["value"]
        return values

    def photographs(self, suite: str = "india") -> list[CardResult]:
        """Cards of a suite whose photographs were scored."""
        return [c for c in self.cards if (c.suite, c.part, c.status) == (suite, PHOTOGRAPHS, "scored")]

    def languages(self) -> list[str]:
        """Languages with any score, `en` first; `images` is one of them where it has the main number of a card."""
        found = {score.language for score in self.scores}
        if not self.main(IMAGES):
            found.discard(IMAGES)
        return sorted(found, key=lambda language: (language != "en", language))

    def headline(self, suite: str = "india") -> dict[str, Any]:
        """The mean of the photographs' main metrics, corrected for chance, per language, and how many of the suite's
        categories it covers, whether the run asked for all of them or not.

        A card counts in the mean of each language in which it has a score that is a number; generated parts count in
        none.
        """
        photographs = [card for card in self.cards if (card.suite, card.part) == (suite, PHOTOGRAPHS)]
        scored = {card.key for card in self.photographs(suite)}
        means: dict[str, dict[str, Any]] = {}
        for language, main in self.mains().items():
            values = [corrected(score.value, score.chance) for key, score in main.items() if key in scored]
            values = [value for value in values if math.isfinite(value)]
            if values:
                means[language] = {"value": sum(values) / len(values), "cards": len(values)}
        of = len(packaged(suite)) if photographs and suite in SUITES else len(photographs)
        return {"suite": suite, "covered": len(scored), "of": of, "mean": means}


def part_of(is_procedural: bool) -> str:
    """What a card's images are called."""
    return PROCEDURAL if is_procedural else PHOTOGRAPHS


def name_of(card: str, part: str) -> str:
    """What a part of a card is called: the photographs by the card's id, what is generated `<id>_procedural`."""
    return card if part == PHOTOGRAPHS else f"{card}_{part}"


def is_summary(name: str) -> bool:
    """Whether a benchmark's logged name is one that a summary has room for: in English, or a mean over the cards."""
    _, _, card, language, metric = name.split("/")
    return metric in _SUMMARY and (language == "en" or card == "mean")


def corrected(value: float, chance: float | None) -> float:
    """0 at chance, 1 where all is right; NaN where guessing is always right."""
    if chance is None:
        return value
    return (value - chance) / (1 - chance) if chance < 1 else math.nan


def less_english(score: Score) -> Score:
    """A gap, by which English is better, as how far the language is from English; other scores as they are."""
    if not score.metric.startswith("parity_"):
        return score
    low, high = (None if end is None else -end for end in (score.high, score.low))
    return score._replace(value=-score.value, low=low, high=high)


def finite(value: Any) -> Any:
    """A value for JSON, which has no number for NaN: None instead."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def grouped(predictions: Iterable[Prediction]) -> dict[Where, list[Prediction]]:
    """Predictions by card, part, protocol and language."""
    groups = defaultdict(list)
    for row in predictions:
        groups[row.card, row.part, row.protocol, row.language].append(row)
    return dict(groups)


def column_of(values: Sequence[Any]) -> np.ndarray:
    """Values of any kind, lists of different lengths too, one of each image."""
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column
