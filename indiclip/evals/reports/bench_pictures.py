"""The errors of a card in pictures: classes that are taken for each other, other mistakes, and hits beside them."""

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from indiclip.evals.formatting import language_name
from indiclip.evals.reports.confusion import Mistake, confusion, mistakes, pairs
from indiclip.evals.reports.page import thumbnail
from indiclip.evals.results import Prediction

PictureOf = Callable[[str, str, str], np.ndarray | None]  # (card, part, key) -> uint8 (height, width, 3)
_LONGEST = 160  # pixels of a picture on the page


class Figure(NamedTuple):
    """An image and what was answered for it."""

    row: Prediction
    picture: str | None  # a data URI
    nearest: list[tuple[str, float]]  # answers and their cosines
    languages: str  # in which it was right, where there are several


class Pair(NamedTuple):
    """Two classes that are taken for each other: how often, and an image of each."""

    counts: list[Mistake]  # one way or both ways
    figures: list[Figure]  # one that was mistaken, and one of the class that it was taken for


class Gallery(NamedTuple):
    """No image is in it twice."""

    pairs: list[Pair]  # the worst first
    mistakes: list[Figure]  # others, the surest first
    hits: list[Figure]


def gallery(by_language: dict[str, list[Prediction]], picture: PictureOf, most: int, are_classes: bool) -> Gallery:
    """The errors of a card and protocol.

    Args:
        by_language: Predictions; the first language's are shown, the others named.
        picture: Gives the pixels; None shows a blank.
        most: Pictures.
        are_classes: Answers are classes, not texts: there are pairs of them.
    """
    rows = sorted(next(iter(by_language.values())), key=_margin, reverse=True)
    right_in: dict[str, dict[str, bool]] = defaultdict(dict)  # key -> language -> whether it was right
    for language, of_language in by_language.items():
        for row in of_language:
            right_in[row.key][language] = row.rank == 0

    def figure(row: Prediction) -> Figure:
        pixels_HW3 = picture(row.card, row.part, row.key)
        nearest = list(zip(row.top, row.cosines, strict=False))
        nearest = nearest[:3] + [answer for answer in nearest[3:] if answer[0] == row.truth]
        shown = None if pixels_HW3 is None else thumbnail(pixels_HW3, _LONGEST)
        return Figure(row, shown, nearest, _languages(right_in[row.key]))

    worst = _pairs(rows, max(most // 3, 1)) if are_classes else []
    used = {row.key for _, chosen in worst for row in chosen}
    left = max(most - len(used), 0)
    others = _varied([row for row in rows if row.rank > 0 and row.key not in used])[: -(-left // 2)]
    hits = _varied([row for row in rows if row.rank == 0 and row.key not in used])[: left - len(others)]
    return Gallery(
        [Pair(counts, list(map(figure, chosen))) for counts, chosen in worst],
        list(map(figure, others)),
        list(map(figure, hits[: max(most // 3, 1)])),
    )


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
    """The classes that are taken for each other most often, with an image that was mistaken and one of the class that
    it was taken for: one that was taken for the other in its turn, or else a hit.
    """
    found = confusion(rows)
    counted = {(one.truth, one.predicted): one for one in mistakes(found)}
    used: set[str] = set()
    worst = []
    for pair in pairs(found)[:most]:
        ways = pair, pair[::-1]
        chosen: list[Prediction] = []
        for truth, answer in ways:
            of_class = [row for row in rows if row.truth == truth and row.key not in used]
            # False comes first: the mistaken ones, of these those that are wrong among the confusable classes too.
            of_class.sort(key=lambda row: (row.predicted != answer, row.rank > 0, row.hard_hit is not False))
            chosen += of_class[:1]
        used.update(row.key for row in chosen)
        worst.append(([counted[way] for way in ways if way in counted], chosen))
    return worst


def _languages(right_in: dict[str, bool]) -> str:
    right = [language_name(language) for language, hit in right_in.items() if hit]
    wrong = [language_name(language) for language, hit in right_in.items() if not hit]
    if len(right_in) < 2:
        return ""
    if not right or not wrong:
        return (
            f"{'right' if right else 'wrong'} in {'both' if len(right_in) == 2 else f'all {len(right_in)}'} languages"
        )
    if min(len(right), len(wrong)) > 3:
        return f"right in {len(right)} of {len(right_in)} languages"
    return f"wrong in {', '.join(wrong)}" if len(wrong) <= len(right) else f"right in {', '.join(right)}"
