"""What the protocols of a card share: its embeddings, languages and subsets, what is asked once, and its numbers.

Shape letters: N images, M of those that are scored, Q questions about them, D candidate classes, E embedding length.
"""

import math
from collections.abc import Container, Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from indiclip.evals.cards.classes import Card
from indiclip.evals.images.items import Items
from indiclip.evals.protocols import metrics
from indiclip.evals.protocols.answers import TOP, Answered
from indiclip.evals.protocols.cosines import truncate_normalize
from indiclip.evals.protocols.languages import Language, fewest, languages_of
from indiclip.evals.protocols.metrics import Interval
from indiclip.evals.protocols.protocol import Options, Setting
from indiclip.evals.protocols.zero_shot import Ranking, class_embeddings, rank_classes
from indiclip.evals.results import CLEAN, Prediction, Score, Where, part_of

_CHANCES = {"acc1": 1, "acc5": TOP, "mean_per_class_recall": 1}  # guesses of which one has to be right


class CardScorer:
    """Scores and answers of a card.

    Args:
        items: The card, its images, and what is right about them.
        images: `{view: image_NE}`, of unit length; the first is the main view.
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
        self._answers: dict[Where, tuple[np.ndarray, ...]] = {}  # columns: 100,000 rows take as long as the scores
        self.tested = np.flatnonzero(items.tested_N)
        self.label_N = np.where(items.tested_N, items.labels, -1)
        self.setting = Setting(next(iter(images)), lengths[-1], True)
        self._rankings: dict[str, Ranking] = {}

    def run(self) -> "CardScorer":
        """Adds the numbers of every protocol that the model and the options allow, in every view and length."""
        protocols = [
            protocol
            for protocol in self.card.protocols
            if (self.texts or not protocol.embeds_text) and (self.options.probes or not protocol.is_probe)
        ]
        main, full = self.setting[:2]
        for view in self.images if len(self.tested) else ():
            for length in reversed(self.lengths):
                self.setting = Setting(view, length, (view, length) == (main, full))
                self.image_NE = truncate_normalize(self.images[view], length)
                self._rankings.clear()
                for protocol in protocols:
                    self.scores += protocol.run(self)
        return self

    @cached_property
    def languages(self) -> list[Language]:
        """What the classes are told apart in, see `languages_of`."""
        return languages_of(self.card, self.options)

    @cached_property
    def confusable(self) -> list[list[int]]:
        """For each class those that look like it."""
        place = {id_: i for i, id_ in enumerate(self.card.ids)}
        return [[place[other] for other in one.confusable_with] for one in self.card.classes]

    def embed(self, texts: Sequence[str]) -> Tensor:
        """At the setting's length, of unit length, (len(texts), length)."""
        return truncate_normalize(torch.stack([self.texts[text] for text in texts]), self.setting.length)

    def class_embeddings(self, language: Language) -> Tensor:
        """A row for each class of a language, (D, length)."""
        return class_embeddings(self.embed(language.prompts), language.row_P, len(language.class_D))

    def rankings(self) -> Iterator[tuple[Language, Ranking]]:
        """The classes of every language that has an image to score: what all protocols of classes ask for, computed
        once.

        English's `subset_rank_UM` are its ranks among the classes of each of `languages`.
        """
        for language in self.languages:
            if language.code not in self._rankings:
                others = [other.class_D for other in self.languages] if language.code == "en" else []
                class_DE = self.class_embeddings(language)
                self._rankings[language.code] = rank_classes(
                    self.image_NE, class_DE, self.label_N, language.class_D, TOP, self.confusable, others
                )
            if len(self._rankings[language.code].image_M):
                yield language, self._rankings[language.code]

    def accuracies(self, rank_M: np.ndarray, label_M: np.ndarray, num_classes: int) -> dict[str, Interval]:
        """Of ranks among classes: acc1, acc5 where there are more classes, mean per-class recall, acc1 less chance."""
        values = {"acc1": metrics.hit_rate(rank_M == 0)}
        if num_classes > TOP:
            values["acc5"] = metrics.hit_rate(rank_M < TOP)
        values["mean_per_class_recall"] = metrics.mean_per_class_recall(rank_M == 0, label_M)
        values["acc1_corrected"] = metrics.chance_corrected(values["acc1"], 1 / num_classes)
        return values

    def captions(self) -> Iterator[tuple[str, list[list[str]], np.ndarray]]:
        """Languages that are scored, English first, each with the captions of all images, and with those of the images
        to score that have any, int64 (M,).
        """
        captions = self.items.captions
        for code in sorted(filter(self.options.wants, captions), key=lambda code: code != "en"):
            image_M = np.array([i for i in self.tested.tolist() if captions[code][i]], dtype=np.int64)
            if len(image_M):
                yield code, captions[code], image_M

    def subsets(self, image_M: np.ndarray, groups_M: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Name -> which of these images, bool (M,): "" for all, those of a group, and those not seen in training.

        `groups_M` are other groups than the card's.
        """
        found = {"": np.ones(len(image_M), bool)}
        if groups_M is None:
            groups_M = [self.items.groups[i] for i in image_M.tolist()] if self.items.groups else []
        if len(names := sorted(set(groups_M))) > 1:
            found |= {name: np.array(groups_M) == name for name in names}
        if self.items.is_flagged is not None:
            found[CLEAN] = ~self.items.is_flagged[image_M]
        return {name: members for name, members in found.items() if members.any()}

    def among_texts(
        self,
        protocol: str,
        language: str,
        hit_T: np.ndarray,
        chance_T: np.ndarray,
        subsets: dict[str, np.ndarray],
        image_T: np.ndarray | None = None,
    ) -> Iterator[Score]:
        """Accuracy of questions of which each has texts of its own to choose from, over all and over each subset.

        `image_T` is the image of each question, where one may have several.
        """
        for subset, of_T in subsets.items():
            hits, chance = hit_T[of_T], float(chance_T[of_T].mean())
            rate = metrics.hit_rate(hits) if image_T is None else metrics.clustered_rate(hits, image_T[of_T])
            values = {"acc1": rate}
            if not subset:
                values["acc1_corrected"] = metrics.chance_corrected(rate, chance)
            yield from self.rows(protocol, language, values, len(hits), round(1 / chance), chance, subset)

    def rows(
        self,
        protocol: str,
        language: str,
        values: dict[str, Interval],
        num_items: int,
        num_classes: int = 0,
        chance: float | dict[str, float] | None = None,
        subset: str = "",
    ) -> Iterator[Score]:
        """Numbers of a protocol in the setting; `chance` is that of the first guess, or one for each metric."""
        if isinstance(chance, float):
            chance = {metric: min(times * chance, 1.0) for metric, times in _CHANCES.items()}
        for metric, (value, *ends) in values.items():
            low, high = (None if math.isnan(end) else end for end in ends)
            yield Score(
                self.card.suite,
                self.card.id,
                self.part,
                protocol,
                language,
                metric,
                self.setting.length,
                self.setting.view,
                value,
                low,
                high,
                (chance or {}).get(metric),
                num_items,
                num_classes,
                subset,
            )

    def keep(
        self,
        protocol: str,
        language: str,
        image_Q: np.ndarray,
        answered: Answered,
        hard_hit_Q: np.ndarray | None = None,
        questions: Sequence[str] = (),
    ) -> None:
        """The answers for some images, if this is the main setting, see `Prediction`.

        `questions` tell the answers for an image apart, where there are several.
        """
        if not self.setting.main:
            return
        items = self.items
        flagged_N = np.zeros(len(items), bool) if items.is_flagged is None else items.is_flagged
        hard_hit_Q = np.full(len(image_Q), None) if hard_hit_Q is None else hard_hit_Q
        keys_Q, content_Q = (np.array(column, dtype=object)[image_Q] for column in (items.keys, items.contents))
        question_Q = np.array(questions or [""] * len(image_Q), dtype=object)
        content_Q = content_Q if items.num_images else question_Q  # of texts alone
        where = (self.card.id, self.part, protocol, language)
        assert where not in self._answers, where
        self._answers[where] = (keys_Q, *answered, hard_hit_Q, flagged_N[image_Q], content_Q, question_Q)

    @property
    def answers(self) -> dict[Where, list[Prediction]]:
        """What was kept."""
        return {
            where: [Prediction(*where, *row) for row in zip(*(column.tolist() for column in columns), strict=True)]
            for where, columns in self._answers.items()
        }


def texts_of(items: Items, options: Options) -> Iterator[str]:
    """Every text that the protocols of a card ask for."""
    for language in languages_of(items.card, options):
        yield from language.prompts
    for protocol in items.card.protocols:
        if protocol.embeds_text:
            yield from protocol.texts(items, options)


def languages_left_out(items: Items, options: Options, scored: Container[str] = ()) -> list[str]:
    """Lines about the languages of the card, or asked for, in which it has no score, or not by all of its names."""
    card, lines = items.card, list[str]()
    if not card.classes:
        captions = items.captions
        left_out = [code for code in options.languages or [] if not any(captions.get(code, []))]
        return [f"not scored in {', '.join(left_out)}: no captions"] if left_out else []
    wanted = dict.fromkeys([*card.languages, *(options.languages or [])])
    used = {code: len(options.names(card, code)) for code in wanted if options.wants(code)}
    # What is romanised by rule is nobody's spelling: nothing is missing without it.
    left_out = [code for code, count in used.items() if count < fewest(card) and not _is_by_rule(card, code)]
    left_out = [code for code in left_out if code not in scored]
    if left_out:
        lines.append(f"not scored in {', '.join(left_out)}: fewer than {fewest(card)} classes have a name there")
    unsure = {code: card.languages[code] - count for code, count in used.items() if code in card.languages}
    unsure = {code: count for code, count in unsure.items() if count and code not in left_out}
    if counts := ", ".join(f"{code} {count}" for code, count in unsure.items() if not _is_by_rule(card, code)):
        lines.append(f"classes that are not asked for, as only one writer has their name: {counts} (--all_names)")
    return lines


def _is_by_rule(card: Card, code: str) -> bool:
    """Whether all names in a language were romanised by rule and have votes, of which none is enough."""
    named = [one for one in card.classes if code in one.names]
    return bool(named) and all(code in one.derived and not one.is_sure(code) for one in named)
