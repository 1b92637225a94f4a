"""Two runs of the benchmark: what differs by more than chance, and which images changed."""

import re
from typing import NamedTuple

import numpy as np

from indiclip.evals.formatting import interval, language_name, metric_name, number, signed, title
from indiclip.evals.protocols.metrics import Interval, parity_gap
from indiclip.evals.results import IMAGES, CardResult, Prediction, Result, Score, name_of
from indiclip.names import plain

_PER_CLASS = "mean_per_class_recall"


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


def compare(a: Result, b: Result) -> list[Compared]:
    """Every card and language that either run scored; a difference on the images that both answered for.

    Images are the same where their keys and bytes are. The difference is that of the main metric, with the interval of
    a paired difference: what one run makes of an image stands beside what the other does.
    """
    cards = {card.key: card for card in (*a.cards, *b.cards) if card.status == "scored"}
    languages = list(dict.fromkeys((*a.languages(), *b.languages())))
    mains = {language: (a.main(language), b.main(language)) for language in languages}
    rows = []
    in_a, in_b = ({card.key for card in run.cards if card.status == "scored"} for run in (a, b))
    for key, card in cards.items():
        if not any(key in main for pair in mains.values() for main in pair):
            why_not = (
                "only probes in both" if key in in_a & in_b else f"only in {'A' if key in in_a else 'B'}, by probes"
            )
            rows.append(Compared(card, IMAGES, None, None, why_not=why_not))
        for language in languages:
            score_a, score_b = (main.get(key) for main in mains[language])
            row = Compared(card, language, score_a, score_b)
            if score_a is None or score_b is None:
                if score_a is not None or score_b is not None:
                    rows.append(row._replace(why_not=f"only in {'B' if score_a is None else 'A'}"))
                continue
            of_a, of_b = (_answers(run, score) for run, score in ((a, score_a), (b, score_b)))
            shared = [name for name in of_a if name in of_b]
            row = row._replace(shared=len(shared), of=(len(of_a), len(of_b)))
            why_not = _why_not(row, of_a, of_b) or _asked_otherwise(a, b, row)
            if not why_not and not all(content for content, _ in shared):
                why_not = _other_data(a, b, card)
            rows.append(row._replace(why_not=why_not) if why_not else _compared(row, shared, of_a, of_b))
    return rows


def _answers(run: Result, score: Score) -> dict[tuple[str, str], Prediction]:
    """The answers behind a score by the image's content and, as there may be copies, its key."""
    where = (score.card, score.part, score.protocol, score.language)
    rows = [row for of in run.answers if (of.card, of.part, of.protocol, of.language) == where for row in of.rows()]
    return {(row.content, row.key): row for row in rows}


def _why_not(row: Compared, of_a: dict[tuple[str, str], Prediction], of_b: dict[tuple[str, str], Prediction]) -> str:
    """What stands against a comparison."""
    a, b = row.a, row.b
    assert a is not None
    assert b is not None
    if a.metric != b.metric or a.protocol != b.protocol:
        return f"different metrics: {metric_name(a.metric)} and {metric_name(b.metric)}"
    if not of_a or not of_b:
        return "no predictions"
    without = [name for name, of in (("A", of_a), ("B", of_b)) if not all(content for content, _ in of)]
    if len(without) == 1:
        return f"{without[0]} is of an earlier version, which kept nothing of its images' bytes; score it again"
    if not row.shared:
        same_names = len({key for _, key in of_a} & {key for _, key in of_b})
        return "different images" + (f", {same_names:,} of them under the same names" if same_names else "")
    if a.num_classes != b.num_classes:
        return f"different classes: {a.num_classes} and {b.num_classes}"
    if row.card.candidates == "images" and of_a.keys() != of_b.keys():
        return f"different images, which are each other's candidates: {row.shared:,} of {len(of_a):,} are shared"
    if other := sum(of_a[name].truth != of_b[name].truth for name in of_a.keys() & of_b.keys()):
        return f"different classes: {other} of {row.shared} images have another truth"
    if a.metric != _PER_CLASS and not _nearest(a.metric):
        return f"{metric_name(a.metric)} has no hits to compare"
    return ""


def _other_data(a: Result, b: Result, card: CardResult) -> str:
    """Runs of before, which know the content of no image, have a digest of the keys and labels."""
    of_a, of_b = (run.about.get("data", {}).get(name_of(*card.key)) for run in (a, b))
    return "different images, or labels, under the same names" if of_a and of_b and of_a != of_b else ""


def _asked_otherwise(a: Result, b: Result, row: Compared) -> str:
    """Runs that know a digest of the texts they asked with."""
    of_a, of_b = (run.about.get("asked", {}).get(name_of(*row.card.key), {}).get(row.language) for run in (a, b))
    return "different classes, names or prompts" if of_a and of_b and of_a != of_b else ""


def _nearest(metric: str) -> int:
    """Among how many of the nearest the right one is a hit: 5 of `acc5`, `image_to_text_r5`; 0 where none are."""
    found = re.fullmatch(r"(?:acc|(?:image_to_text_)?r|recall)(\d*)", metric)
    return int(found[1] or 1) if found else 0


def _compared(
    row: Compared,
    shared: list[tuple[str, str]],
    of_a: dict[tuple[str, str], Prediction],
    of_b: dict[tuple[str, str], Prediction],
) -> Compared:
    assert row.a is not None
    nearest = _nearest(row.a.metric) or 1
    hits_a_N, hits_b_N = (np.array([of[name].rank < nearest for name in shared]) for of in (of_a, of_b))
    labels_N = np.unique([of_a[name].truth for name in shared], return_inverse=True)[1]
    gap = parity_gap(hits_b_N, hits_a_N, labels_N if row.a.metric == _PER_CLASS else None)
    gained, lost = (
        tuple((name[1], of_a[name].truth) for name, changed in zip(shared, changed_N, strict=True) if changed)
        for changed_N in (hits_b_N & ~hits_a_N, hits_a_N & ~hits_b_N)
    )
    # Each image, or each class, weighs the same.
    weight_N = 1 / np.bincount(labels_N)[labels_N] if row.a.metric == _PER_CLASS else np.ones(len(shared))
    on_shared = (float(np.average(hits_a_N, weights=weight_N)), float(np.average(hits_b_N, weights=weight_N)))
    return row._replace(gap=gap, on_shared=on_shared, gained=gained, lost=lost)


def common(row: Compared) -> str:
    """How many images a difference is over, of how many, and the numbers on them where these are not all."""
    if row.of == (row.shared, row.shared):
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
