"""Two runs of the benchmark: what differs by more than chance, and which images changed."""

import re
from itertools import compress
from typing import NamedTuple

import numpy as np

from indiclip.evals.formatting import interval, language_name, metric_name, number, protocol_name, signed, title
from indiclip.evals.protocols.metrics import Interval, parity_gap
from indiclip.evals.results import IMAGES, CardResult, Prediction, Result, Score, name_of
from indiclip.names import plain

_PER_CLASS = "mean_per_class_recall"
_Answers = dict[tuple[str, str], Prediction]  # by the image's content and, as there may be copies, its key


class Compared(NamedTuple):
    """A card in a language, in both runs."""

    card: CardResult
    language: str
    a: Score | None
    b: Score | None
    shared: int = 0  # images that both runs answered for
    of: tuple[int, int] = (0, 0)  # images of each run
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


def compare(a: Result, b: Result) -> list[Compared]:
    """Every card and language that either run scored; a difference on the images that both answered for.

    Images are the same where their keys and bytes are. The difference is that of the main metric, with the interval of
    a paired difference: what one run makes of an image stands beside what the other does.
    """
    in_a, in_b = ({card.key: card for card in run.cards if card.status == "scored"} for run in (a, b))
    languages = dict.fromkeys((*a.languages(), *b.languages()))
    mains = {language: (a.main(language), b.main(language)) for language in languages}
    rows = []
    for key, card in (in_a | in_b).items():
        pairs = [(language, of_a.get(key), of_b.get(key)) for language, (of_a, of_b) in mains.items()]
        pairs = [pair for pair in pairs if pair[1:] != (None, None)]
        for language, score_a, score_b in pairs:
            if score_a is None or score_b is None:
                why_not = f"only in {'B' if score_a is None else 'A'}"
                rows.append(Compared(card, language, score_a, score_b, why_not=why_not))
            else:
                rows.append(_compared(card, (a, b), (score_a, score_b)))
        if not pairs:
            only = f"only in {'B' if key not in in_a else 'A'}, by probes"
            why_not = "only probes in both" if key in in_a and key in in_b else only
            rows.append(Compared(card, IMAGES, None, None, why_not=why_not))
    return rows


def _compared(card: CardResult, runs: tuple[Result, Result], scores: tuple[Score, Score]) -> Compared:
    """A card and language that both runs scored."""
    of_a, of_b = (_answers(run, score) for run, score in zip(runs, scores, strict=True))
    shared = [image for image in of_a if image in of_b]
    metric, language = scores[0].metric, scores[0].language
    row = Compared(card, language, *scores, shared=len(shared), of=(len(of_a), len(of_b)))
    if why_not := _why_not(card, runs, scores, of_a, of_b):
        return row._replace(why_not=why_not)
    hits_a_N, hits_b_N = (np.array([of[image].rank < _nearest(metric) for image in shared]) for of in (of_a, of_b))
    images = [(key, of_a[content, key].truth) for content, key in shared]
    gained, lost = tuple(compress(images, hits_b_N & ~hits_a_N)), tuple(compress(images, hits_a_N & ~hits_b_N))

    # Each image, or each class, weighs the same.
    labels_N = np.unique([truth for _, truth in images], return_inverse=True)[1]
    weight_N = 1 / np.bincount(labels_N)[labels_N] if metric == _PER_CLASS else np.ones(len(shared))
    on_a, on_b = (float(np.average(hits_N, weights=weight_N)) for hits_N in (hits_a_N, hits_b_N))
    gap = parity_gap(hits_b_N, hits_a_N, labels_N, "classes" if metric == _PER_CLASS else "images")
    return row._replace(gap=gap, on_shared=(on_a, on_b), gained=gained, lost=lost)


def _answers(run: Result, score: Score) -> _Answers:
    """The answers behind a score."""
    rows = run.answers.get((score.card, score.part, score.protocol, score.language), [])
    return {(row.content, row.key): row for row in rows}


def _why_not(
    card: CardResult, runs: tuple[Result, Result], scores: tuple[Score, Score], of_a: _Answers, of_b: _Answers
) -> str:
    """What stands against a comparison."""
    a, b = scores
    if (a.metric, a.protocol) != (b.metric, b.protocol):
        return f"different metrics: {metric_name(a.metric)} and {metric_name(b.metric)}"
    protocol = protocol_name(a.protocol)
    if not of_a and not of_b:
        return f"the protocol {protocol} keeps no answers per image"
    if not of_a or not of_b:
        return f"{'B' if of_a else 'A'} has no answers per image of the protocol {protocol}"
    knows_content = [all(content for content, _ in of) for of in (of_a, of_b)]
    if any(knows_content) and not all(knows_content):
        earlier = "B" if knows_content[0] else "A"
        return f"{earlier} is of an earlier version, which kept nothing of its images' bytes; score it again"
    shared = of_a.keys() & of_b.keys()
    if not shared:
        same_names = len({key for _, key in of_a} & {key for _, key in of_b})
        return "different images" + (f", {same_names:,} of them under the same names" if same_names else "")
    if a.num_classes != b.num_classes:
        return f"different classes: {a.num_classes} and {b.num_classes}"
    if card.candidates == "images" and of_a.keys() != of_b.keys():
        return f"different images, which are each other's candidates: {len(shared):,} of {len(of_a):,} are shared"
    if other := sum(of_a[image].truth != of_b[image].truth for image in shared):
        return f"different classes: {other} of {len(shared)} images have another truth"
    if not _nearest(a.metric):
        return f"{metric_name(a.metric)} has no hits to compare"
    if _differ(*(run.about.get("asked", {}).get(name_of(*card.key), {}).get(a.language) for run in runs)):
        return "different classes, names or prompts"
    # Runs of before, which know the content of no image, have a digest of the keys and labels.
    if not any(knows_content) and _differ(*(run.about.get("data", {}).get(name_of(*card.key)) for run in runs)):
        return "different images, or labels, under the same names"
    return ""


def _differ(a: str | None, b: str | None) -> bool:
    """Whether digests that both runs know differ."""
    return bool(a and b and a != b)


def _nearest(metric: str) -> int:
    """Among how many of the nearest the right one is a hit: 5 of `acc5`, `image_to_text_r5`; 0 where none are."""
    found = re.fullmatch(rf"(?:acc|(?:image_to_text_)?r|recall)(\d*)|{_PER_CLASS}", metric)
    return int(found[1] or 1) if found else 0


def common(row: Compared) -> str:
    """How many images a difference is over, of how many, and the numbers on them where these are not all."""
    if row.is_on_all:
        return f"{row.shared:,} images"
    said = f"the common {row.shared:,} images of A's {row.of[0]:,} and B's {row.of[1]:,}"
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
