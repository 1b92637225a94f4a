"""A card's numbers as they come: what every protocol shares, from prompts to intervals.

Shape letters: N images, M those of them that are scored, C classes, D of them candidates, P prompts, E embedding
length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from indiclip.evals.cards.card import Card
from indiclip.evals.images.items import Items
from indiclip.evals.protocols import metrics
from indiclip.evals.protocols.metrics import Interval
from indiclip.evals.protocols.zero_shot import class_embeddings
from indiclip.evals.results import CLEAN, Prediction, Score, part_of

TOP = 5  # nearest answers that are kept of each image
_FEWEST_CLASSES = 5  # named in a language: fewer say nothing, unless the card has no more
_CHANCES = {"acc1": 1, "acc5": TOP, "mean_per_class_recall": 1}  # guesses of which one has to be right


@dataclass
class Options:
    """What is scored.

    Attributes:
        languages: Of prompts and captions; None takes all that a card has. English is always among them.
        views: Sizes and aspects of the images; the first is the main one.
        probes: Score kNN and linear probes.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """

    languages: Sequence[str] | None = None
    views: Sequence[str] = ("native",)
    probes: bool = True
    resamples: int = metrics.RESAMPLES
    seed: int = metrics.SEED

    def __post_init__(self) -> None:
        if not self.views:
            raise ValueError("views: found none; expected at least one, such as native")

    def wants(self, language: str) -> bool:
        """Whether a language is scored."""
        return self.languages is None or language in self.languages or language == "en"


class Setting(NamedTuple):
    """One way to look at the same embeddings."""

    view: str
    length: int
    main: bool  # the first view at the full length, whose predictions are kept


class Language(NamedTuple):
    """The classes that have a name in a language, and their prompts."""

    code: str
    class_D: np.ndarray  # int64, ascending
    prompts: list[str]
    row_P: np.ndarray  # int64, for which of `class_D` a prompt is


class CardScorer:
    """Scores and predictions of a card.

    Args:
        items: The card, its images, and what is right about them.
        images: `{view: image_NE}`; the first is the main view.
        texts: Text -> embedding.
        lengths: Ascending; the last is the main one.
        options: What is scored.
    """

    def __init__(
        self,
        items: Items,
        images: dict[str, Tensor],
        texts: dict[str, Tensor],
        lengths: Sequence[int],
        options: Options,
    ) -> None:
        self.items, self.card, self.images, self.texts = items, items.card, images, texts
        self.lengths, self.options = lengths, options
        self.part = part_of(items.procedural)
        self.scores: list[Score] = []
        self.predictions: list[Prediction] = []
        self.label_N = np.where(items.tested_N, items.labels, -1)
        self.draws = options.resamples, options.seed  # of the bootstrap

    @property
    def settings(self) -> list[Setting]:
        """Views and lengths, the main one first."""
        main, full = next(iter(self.images)), self.lengths[-1]
        return [
            Setting(view, length, view == main and length == full)
            for view in self.images
            for length in reversed(self.lengths)
        ]

    @cached_property
    def languages(self) -> list[Language]:
        """What the classes are told apart in, see `languages_of`."""
        return languages_of(self.card, self.options)

    @cached_property
    def confusable(self) -> list[list[int]]:
        """For each class those that look like it."""
        place = {id_: i for i, id_ in enumerate(self.card.ids)}
        return [[place[other] for other in one.confusable_with] for one in self.card.classes]

    @cached_property
    def places_C2(self) -> np.ndarray | None:
        """(latitude, longitude) of each class; None where any has none."""
        found = [(one.facts.get("lat"), one.facts.get("lon")) for one in self.card.classes]
        return None if any(None in place for place in found) else np.array(found, dtype=np.float64)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), E)."""
        return torch.stack([self.texts[text] for text in texts])

    def class_embeddings(self, language: Language, length: int) -> Tensor:
        """A row for each class of a language, (D, length)."""
        return class_embeddings(self.embed(language.prompts), language.row_P, len(language.class_D), length)

    def rate(self, hit_M: np.ndarray) -> Interval:
        """Share of hits."""
        return metrics.hit_rate(hit_M, *self.draws)

    def accuracies(self, rank_M: np.ndarray, label_M: np.ndarray, num_classes: int) -> dict[str, Interval]:
        """Of ranks among classes: acc1, acc5 where there are more classes, mean per-class recall, acc1 less chance."""
        values = {"acc1": self.rate(rank_M == 0)}
        if num_classes > TOP:
            values["acc5"] = self.rate(rank_M < TOP)
        values["mean_per_class_recall"] = metrics.mean_per_class_recall(rank_M == 0, label_M, *self.draws)
        values["acc1_corrected"] = metrics.chance_corrected(values["acc1"], 1 / num_classes)
        return values

    def gap_to_english(self, english_M: np.ndarray, hit_M: np.ndarray, label_M: np.ndarray) -> dict[str, Interval]:
        """What English hits more of the same images, in images and in classes."""
        return {
            "parity_acc1": metrics.parity_gap(english_M, hit_M, label_M, "images", *self.draws),
            "parity_mean_per_class_recall": metrics.parity_gap(english_M, hit_M, label_M, "classes", *self.draws),
        }

    def subsets(self, image_M: np.ndarray) -> dict[str, np.ndarray]:
        """Name -> which of these images, bool (M,): "" for all, those of a group, and those not seen in training."""
        found = {"": np.ones(len(image_M), bool)}
        groups = np.array(self.items.groups or [""] * len(self.items), dtype=object)[image_M]
        if len(names := sorted(set(groups))) > 1:
            found |= {str(name): groups == name for name in names}
        if self.items.is_flagged is not None:
            found[CLEAN] = ~self.items.is_flagged[image_M]
        return {name: members for name, members in found.items() if members.any()}

    def add(
        self,
        setting: Setting,
        protocol: str,
        language: str,
        values: dict[str, Interval],
        num_items: int,
        num_classes: int = 0,
        chance: float | dict[str, float] | None = None,
        subset: str = "",
    ) -> None:
        """Numbers of a protocol; `chance` is that of the first guess, or one for each metric."""
        if isinstance(chance, float):
            chance = {metric: min(times * chance, 1.0) for metric, times in _CHANCES.items()}
        chances, sizes = chance or {}, (num_items, num_classes, subset)
        where = (self.card.suite, self.card.id, self.part, protocol, language)
        for metric, interval in values.items():
            found = Score(*where, metric, setting.length, setting.view, *interval, chances.get(metric), *sizes)
            self.scores.append(found)

    def keep(
        self,
        protocol: str,
        language: str,
        image: int,
        truth: str,
        predicted: str,
        rank: int,
        top: list[str],
        cosines: list[float],
        hard_hit: bool | None = None,
    ) -> None:
        """An image's answer."""
        where, key = (self.card.id, self.part, protocol, language), self.items.keys[image]
        flagged = self.items.is_flagged is not None and bool(self.items.is_flagged[image])
        self.predictions.append(Prediction(*where, key, truth, predicted, rank, top, cosines, hard_hit, flagged))


def languages_of(card: Card, options: Options) -> list[Language]:
    """The languages in which a card's classes are told apart, English first."""
    codes = [code for code, named in card.languages.items() if named >= _fewest(card) and options.wants(code)]
    return [language_of(card, code, sorted(card.names(code))) for code in codes]


def languages_left_out(items: Items, options: Options) -> list[str]:
    """A line about the languages of the card, or asked for, in which it is not scored."""
    if items.card.classes:
        wanted = dict.fromkeys([*items.card.languages, *(options.languages or [])])
        named = items.card.languages
        left_out = [code for code in wanted if options.wants(code) and named.get(code, 0) < _fewest(items.card)]
        why = f"fewer than {_fewest(items.card)} classes have a name there"
    else:
        captions = items.captions or {}
        left_out = [code for code in options.languages or [] if not any(captions.get(code, []))]
        why = "no captions"
    return [f"not scored in {', '.join(left_out)}: {why}"] if left_out else []


def _fewest(card: Card) -> int:
    return min(_FEWEST_CLASSES, len(card.classes))


def language_of(card: Card, code: str, classes: Sequence[int]) -> Language:
    """Some classes, in a language in which all of them have a name."""
    templates, names = card.templates(code), card.names(code)
    prompts = [template.replace("{c}", names[i]) for i in classes for template in templates]
    return Language(code, np.array(classes), prompts, np.repeat(np.arange(len(classes)), len(templates)))
