"""What the model got right and wrong, in pictures."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from indiclip.evals.formatting import language_name
from indiclip.evals.reports.confusion import Mistake, confusion, mistakes, pairs
from indiclip.evals.reports.page import thumbnail
from indiclip.evals.results import Prediction

PictureOf = Callable[[str, str, str], np.ndarray | None]  # (card, part, key) -> uint8 (height, width, 3)


class Figure(NamedTuple):
    """An image and what was answered for it."""

    row: Prediction
    picture: str | None  # a data URI
    nearest: list[tuple[str, float]]  # answers and their cosines
    languages: str  # in which it was right, where there are several


def grids_of(
    by_language: dict[str, list[Prediction]], picture: PictureOf, most: int, are_classes: bool
) -> dict[str, Any]:
    """The surest hits and mistakes, and the hardest pairs.

    Args:
        by_language: Predictions of one card and protocol; the first language's are shown, the others named.
        picture: Gives the pixels; None shows a blank.
        most: Pictures.
        are_classes: Answers are classes, not texts: there are pairs of them.
    """
    rows = next(iter(by_language.values()))
    hits: dict[str, dict[str, bool]] = defaultdict(dict)  # key -> language -> whether it was right
    for language, of_language in by_language.items():
        for row in of_language:
            hits[row.key][language] = row.rank == 0

    def figure(row: Prediction) -> Figure:
        pixels_HW3 = picture(row.card, row.part, row.key)
        nearest = list(zip(row.top, row.cosines, strict=False))
        nearest = nearest[:3] + [answer for answer in nearest[3:] if answer[0] == row.truth]
        shown = None if pixels_HW3 is None else thumbnail(pixels_HW3)
        return Figure(row, shown, nearest, _languages(hits[row.key]))

    share = max(most // (3 if are_classes else 2), 1)
    surest = sorted(rows, key=_margin, reverse=True)
    right = _varied([row for row in surest if row.rank == 0])[:share]
    wrong = _varied([row for row in surest if row.rank > 0])[:share]
    hardest = _pairs(rows, max(share // 2, 1)) if are_classes and wrong else []
    return {
        "surest": {"Surest hits": list(map(figure, right)), "Surest mistakes": list(map(figure, wrong))},
        "pairs": [(said, list(map(figure, chosen))) for said, chosen in hardest],
    }


def _margin(row: Prediction) -> float:
    """How much nearer the answer is than the next one; in a mistake, than the truth."""
    nearest = dict(zip(row.top, row.cosines, strict=False))
    if row.rank == 0 or row.truth not in nearest:
        return row.cosines[0] - row.cosines[1 if row.rank == 0 else -1] if len(row.cosines) > 1 else 0.0
    return row.cosines[0] - nearest[row.truth]


def _varied(rows: list[Prediction]) -> list[Prediction]:
    """One of every class before the second of any, else in their order."""
    seen: dict[str, int] = defaultdict(int)
    turns = []
    for i, row in enumerate(rows):
        turns.append((seen[row.truth], i))
        seen[row.truth] += 1
    return [rows[i] for _, i in sorted(turns)]


def _pairs(rows: list[Prediction], most: int) -> list[tuple[list[Mistake], list[Prediction]]]:
    """Of classes that are taken for each other: how often, and an image of each, one that was taken for the other where
    there is any.
    """
    found = confusion(rows)
    counted = {(one.truth, one.predicted): one for one in mistakes(found)}
    hardest = []
    for pair in pairs(found)[:most]:
        ways = pair, pair[::-1]
        chosen = []
        for truth, answer in ways:
            # False before None and True: one that is wrong among the confusable classes too says more.
            of_class = sorted((row for row in rows if row.truth == truth), key=lambda row: row.hard_hit is not False)
            chosen += [row for row in of_class if row.predicted == answer][:1] or of_class[:1]
        hardest.append(([counted[way] for way in ways if way in counted], chosen))
    return hardest


def _languages(hits: dict[str, bool]) -> str:
    right = [language_name(language) for language, hit in hits.items() if hit]
    wrong = [language_name(language) for language, hit in hits.items() if not hit]
    if len(hits) < 2:
        return ""
    if not right or not wrong:
        return f"{'right' if right else 'wrong'} in all {len(hits)} languages"
    if min(len(right), len(wrong)) > 3:
        return f"right in {len(right)} of {len(hits)} languages"
    return f"wrong in {', '.join(wrong)}" if len(wrong) <= len(right) else f"right in {', '.join(right)}"
