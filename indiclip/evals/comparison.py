"""Two runs of the benchmark: what differs by more than chance, and which images changed."""

import re
from collections import Counter
from itertools import compress
from typing import NamedTuple

import numpy as np

from indiclip.evals.formatting import interval, language_name, metric_name, number, protocol_name, signed, title
from indiclip.evals.protocols.metrics import Interval, mean_per_class_recall, parity_gap
from indiclip.evals.results import IMAGES, CardResult, Prediction, Result, Score, name_of
from indiclip.names import plain

_PER_CLASS = "mean_per_class_recall"


class Compared(NamedTuple):
    """A card in a language, in both runs."""

    card: CardResult
    language: str
    a: Score | None
    b: Score | None
    items: str = "images"  # what was answered for: `images`, `questions` about them, or `texts`
    shared: int = 0  # those that both runs answered for
    of: tuple[int, int] = (0, 0)  # those of each run
    gap: Interval | None = None  # b less a, on these
    on_shared: tuple[float, float] = (0.0, 0.0)  # both runs' numbers on these
    why_not: str = ""  # where there is none
    gained: tuple[tuple[str, str], ...] = ()  # (key, truth) of images wrong in a and right in b
    lost: tuple[tuple[str, str], ...] = ()

    @property
    def is_on_all(self) -> bool:
        """Whether no image of either run was left out."""
        return self.of == (self.shared, self.shared)

    @property
    def verdict(self) -> str:
        """What the interval of the paired difference shows of b: `better`, `worse` or nothing."""
        if self.gap is None:
            return ""
        return "better" if self.gap.low > 0 else "worse" if self.gap.high < 0 else ""


class _Side(NamedTuple):
    """A card in a language, as one run scored it."""

    run: Result
    score: Score
    answers: dict[tuple[str, str, int], Prediction]  # by image, question, and number of a copy


def compare(a: Result, b: Result) -> list[Compared]:
    """Every card and language that either run scored; a difference on the images that both answered for.

    Images are the same where their bytes are, whatever their names. The difference is that of the main metric, with the
    interval of a paired difference: what one run makes of an image stands beside what the other does. Of several
    questions about an image it is over the questions, and the images are drawn.
    """
    in_a, in_b = ({card.key: card for card in run.cards if card.status == "scored"} for run in (a, b))
    mains_a, mains_b = a.mains(), b.mains()
    rows = []
    for key, card in (in_a | in_b).items():
        for language in mains_a | mains_b:
            score_a, score_b = mains_a.get(language, {}).get(key), mains_b.get(language, {}).get(key)
            if score_a and score_b:
                rows.append(_compared(card, _side(a, score_a, card), _side(b, score_b, card)))
            elif score_a or score_b:
                rows.append(Compared(card, language, score_a, score_b, why_not=f"only in {'A' if score_a else 'B'}"))
        if not any(row.card is card for row in rows):
            only = f"only in {'A' if key in in_a else 'B'}, by probes"
            why_not = "only probes in both" if key in in_a and key in in_b else only
            rows.append(Compared(card, IMAGES, None, None, why_not=why_not))
    return rows


def _side(run: Result, score: Score, card: CardResult) -> _Side:
    rows = run.answers.get((score.card, score.part, score.protocol, score.language), [])
    copies, answers = Counter[tuple[str, str]](), dict[tuple[str, str, int], Prediction]()
    for row in sorted(rows, key=lambda row: row.key):
        # The name says which texts an image of a card of texts is asked about; earlier runs know nothing but names.
        image = f"{row.content} {row.key}" if card.candidates == "texts" else row.content or row.key
        answers[image, row.question, copies[image, row.question]] = row
        copies[image, row.question] += 1
    return _Side(run, score, answers)


def _compared(card: CardResult, a: _Side, b: _Side) -> Compared:
    shared = [image for image in a.answers if image in b.answers]
    of = len(a.answers), len(b.answers)
    are_questions = any(row.question for row in a.answers.values())
    items = "texts" if card.is_texts else "questions" if are_questions else "images"
    row = Compared(card, a.score.language, a.score, b.score, items, len(shared), of)
    row = row._replace(why_not=_why_not(card, items, a, b))
    if row.why_not:
        return row
    metric = a.score.metric
    hits_a_N, hits_b_N = (
        np.array([side.answers[image].rank < _nearest(metric) for image in shared]) for side in (a, b)
    )
    images = [(row.key, row.truth) for row in map(a.answers.__getitem__, shared)]
    # Each class weighs the same, or all images are of one.
    labels_N = np.unique([truth if metric == _PER_CLASS else "" for _, truth in images], return_inverse=True)[1]
    _, image_N, count_N = np.unique([key for key, _ in images], return_inverse=True, return_counts=True)
    by_image = {"cluster_N": image_N} if (count_N > 1).any() else {}
    drawn = {"label_N": labels_N} if metric == _PER_CLASS else by_image
    return row._replace(
        gap=parity_gap(hits_b_N, hits_a_N, **drawn),
        on_shared=(mean_per_class_recall(hits_a_N, labels_N).value, mean_per_class_recall(hits_b_N, labels_N).value),
        gained=tuple(compress(images, hits_b_N & ~hits_a_N)),
        lost=tuple(compress(images, hits_a_N & ~hits_b_N)),
    )


def _why_not(card: CardResult, items: str, a: _Side, b: _Side) -> str:
    """What stands against a comparison."""
    name, language, metric = name_of(*card.key), a.score.language, a.score.metric
    if (metric, a.score.protocol) != (b.score.metric, b.score.protocol):
        return f"different metrics: {metric_name(metric)} and {metric_name(b.score.metric)}"

    if not _nearest(metric):
        return f"no answers are kept for {metric_name(metric)}"
    if without := [name for name, side in (("A", a), ("B", b)) if not side.answers]:
        return f"no answers of the protocol {protocol_name(a.score.protocol)} in {' and '.join(without)}"

    a_knows, b_knows = (all(row.content for row in side.answers.values()) for side in (a, b))
    if a_knows != b_knows:
        earlier = "B" if a_knows else "A"
        return f"{earlier} is of an earlier version, which kept nothing of its images' bytes; score it again"
    shared = a.answers.keys() & b.answers.keys()
    if not shared:
        names_a, names_b = ({row.key for row in side.answers.values()} for side in (a, b))
        same_names = len(names_a & names_b)
        return f"different {items}" + (f", {same_names:,} of them under the same names" if same_names else "")

    if a.score.num_classes != b.score.num_classes:
        candidates = "classes" if card.candidates == "classes" else "candidates"
        return f"different {candidates}: {a.score.num_classes} and {b.score.num_classes}"
    if card.candidates == "images" and a.answers.keys() != b.answers.keys():
        return f"different {items}, which are each other's candidates: {len(shared):,} of {len(a.answers):,} are shared"
    if other := sum(a.answers[image].truth != b.answers[image].truth for image in shared):
        return f"different classes: {other} of {len(shared)} {items} have another truth"
    if _differ(*(side.run.about.get("asked", {}).get(name, {}).get(language) for side in (a, b))):
        return "different classes, names or prompts"
    # Earlier runs, which know the content of no image, have a digest of the keys and labels.
    if not a_knows and _differ(*(side.run.about.get("data", {}).get(name) for side in (a, b))):
        return f"different {items}, or labels, under the same names"
    return ""


def _differ(a: str | None, b: str | None) -> bool:
    """Whether digests that both runs know differ."""
    return bool(a and b and a != b)


def _nearest(metric: str) -> int:
    """Among how many of the nearest the right one is a hit: 5 of `acc5`, `image_to_text_r5`; 0 where none are."""
    found = re.fullmatch(rf"(?:acc|(?:image_to_text_|to_english_)?r|recall)(\d*)|{_PER_CLASS}|group_score", metric)
    return int(found[1] or 1) if found else 0


def common(row: Compared) -> str:
    """How many images a difference is over, of how many, and the numbers on them where these are not all."""
    if row.is_on_all:
        return f"{row.shared:,} {row.items}"
    said = f"the common {row.shared:,} {row.items} of A's {row.of[0]:,} and B's {row.of[1]:,}"
    return f"{said}, where A has {number(row.on_shared[0])} and B {number(row.on_shared[1])}"


def in_words(rows: list[Compared]) -> str:
    """A line per card and language."""
    lines = []
    for row in rows:
        metric = row.card.metric
        values = " | ".join(number(score.value, metric) if score else "–" for score in (row.a, row.b))
        found = f"not compared: {row.why_not}"
        if gap := row.gap:
            ends = interval(gap.low, gap.high)
            found = f"{signed(gap.value)}{ends and f' ({ends})'}, on {common(row)}"
        line = f"{title(row.card)}, {language_name(row.language)}, {metric_name(metric)}: {values} | {found}"
        lines.append(plain(line))
    return "\n".join(lines)
