"""Two runs of the benchmark: what differs by more than chance, and which images changed."""

import re
from typing import NamedTuple

import numpy as np

from indiclip.evals.protocols.metrics import Interval, parity_gap
from indiclip.evals.reports.formatting import interval, language_name, metric_name, number, signed, title
from indiclip.evals.results import CardResult, Prediction, Result, Score, by_card, name_of


class Compared(NamedTuple):
    """A card in a language, in both runs."""

    card: CardResult
    language: str
    a: Score | None
    b: Score | None
    shared: int = 0  # images that both runs answered for
    gap: Interval | None = None  # b less a, on these
    why_not: str = ""  # where there is none
    gained: tuple[tuple[str, str], ...] = ()  # (key, truth) of images wrong in a and right in b
    lost: tuple[tuple[str, str], ...] = ()


def compare(a: Result, b: Result) -> list[Compared]:
    """Every card and language that either run scored; a difference where both did so on the same images and classes.

    The difference is that of the main metric over the images, with the interval of a paired bootstrap: both runs'
    answers for an image are drawn together.
    """
    answers_a, answers_b = by_card(a.predictions), by_card(b.predictions)
    cards = {card.key: card for card in (*b.cards, *a.cards) if card.status == "scored"}
    languages = list(dict.fromkeys((*a.languages(), *b.languages())))
    mains = {language: (a.main(language), b.main(language)) for language in languages}
    rows = []
    for key, card in cards.items():
        for language in languages:
            score_a, score_b = (main.get(key) for main in mains[language])
            row = Compared(card, language, score_a, score_b)
            if score_a is None and score_b is None:
                continue
            if score_a is None or score_b is None:
                rows.append(row._replace(why_not=f"only in {'B' if score_a is None else 'A'}"))
                continue
            of_a, of_b = (
                {one.key: one for one in answers.get((*key, score.protocol, language), [])}
                for answers, score in ((answers_a, score_a), (answers_b, score_b))
            )
            why_not = _why_not(score_a, score_b, of_a, of_b) or _other_data(a, b, card)
            row = row._replace(shared=len(of_a.keys() & of_b.keys()), why_not=why_not)
            rows.append(row if why_not else _compared(row, of_a, of_b))
    return rows


def _why_not(a: Score, b: Score, of_a: dict[str, Prediction], of_b: dict[str, Prediction]) -> str:
    """What stands against a comparison."""
    if a.metric != b.metric or a.protocol != b.protocol:
        return f"different metrics: {metric_name(a.metric)} and {metric_name(b.metric)}"
    if not of_a or not of_b:
        return "no predictions"
    if a.num_classes != b.num_classes:
        return f"different classes: {a.num_classes} and {b.num_classes}"
    if of_a.keys() != of_b.keys():
        return f"different images: {len(of_a.keys() & of_b.keys())} of {len(of_a)} and {len(of_b)} are shared"
    if other := sum(of_a[key].truth != of_b[key].truth for key in of_a):
        return f"different classes: {other} of {len(of_a)} images have another truth"
    if not (_is_per_class(a.metric) or _nearest(a.metric)):
        return f"{metric_name(a.metric)} has no hits to compare"
    return ""


def _other_data(a: Result, b: Result, card: CardResult) -> str:
    """Runs that know a digest of their images know more than the keys."""
    of_a, of_b = (run.about.get("data", {}).get(name_of(*card.key)) for run in (a, b))
    return "different images, or labels, under the same names" if of_a and of_b and of_a != of_b else ""


def _is_per_class(metric: str) -> bool:
    return metric == "mean_per_class_recall"


def _nearest(metric: str) -> int:
    """Among how many of the nearest the right one is a hit: 5 of `acc5`, `image_to_text_r5`; 0 where none are."""
    found = re.fullmatch(r"(?:acc|(?:image_to_text_)?r|recall)(\d*)", metric)
    return int(found[1] or 1) if found else 0


def _compared(row: Compared, of_a: dict[str, Prediction], of_b: dict[str, Prediction]) -> Compared:
    assert row.a is not None
    keys = list(of_a)
    nearest = _nearest(row.a.metric) or 1
    hits_a_N, hits_b_N = (np.array([of[key].rank < nearest for key in keys]) for of in (of_a, of_b))
    labels_N = np.unique([of_a[key].truth for key in keys], return_inverse=True)[1]
    gap = parity_gap(hits_b_N, hits_a_N, labels_N, "classes" if _is_per_class(row.a.metric) else "images")
    gained, lost = (
        tuple((key, of_a[key].truth) for key, changed in zip(keys, changed_N, strict=True) if changed)
        for changed_N in (hits_b_N & ~hits_a_N, hits_a_N & ~hits_b_N)
    )
    return row._replace(gap=gap, gained=gained, lost=lost)


def in_words(rows: list[Compared]) -> str:
    """A line per card and language."""
    lines = []
    for row in rows:
        metric = row.card.metric
        values = " | ".join(number(score.value, metric) if score else "–" for score in (row.a, row.b))
        found = f"not compared: {row.why_not}"
        if gap := row.gap:
            ends = interval(gap.low, gap.high)
            found = f"{signed(gap.value)}{ends and f' ({ends})'}, {row.shared:,} images shared"
        lines.append(f"{title(row.card)}, {language_name(row.language)}, {metric_name(metric)}: {values} | {found}")
    return "\n".join(lines)
