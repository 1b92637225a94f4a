"""The errors of a card in pictures: classes that are taken for each other, other mistakes, and hits beside them."""

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from indiclip.evals.formatting import language_name
from indiclip.evals.reports.confusion import Confusion, Mistake, mistakes, pairs
from indiclip.evals.reports.page import webp
from indiclip.evals.results import Prediction

PictureOf = Callable[[str, str, str], np.ndarray | None]  # (card, part, key) -> uint8 (height, width, 3)


class Figure(NamedTuple):
    """An image and what was answered for it."""

    row: Prediction
    picture: str | None  # a data URI
    languages: str  # in which it was right, where there are several


class Gallery(NamedTuple):
    """No image is in it twice, but for other questions about it.

    Attributes:
        pairs: Classes that are taken for each other, the worst first: how often, one way or both ways; then an image
            that was mistaken, and one of the class that it was taken for.
        mistakes: Others, the surest first.
        hits: The surest first.
    """

    pairs: list[tuple[list[Mistake], list[Figure]]]
    mistakes: list[Figure]
    hits: list[Figure]


def gallery(
    by_language: dict[str, list[Prediction]], found: Confusion | None, picture: PictureOf, most: int
) -> Gallery:
    """The errors of a card and protocol.

    Args:
        by_language: Predictions; the first language's are shown, the others named.
        found: The confusions in the first language; None where answers are texts, not classes: there are no pairs.
        picture: Gives the pixels; None shows a blank.
        most: Pictures.
    """
    rows = sorted(next(iter(by_language.values())), key=_margin, reverse=True)
    right_in: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)  # by language: whether it was right
    for language, of_language in by_language.items():
        for row in of_language:
            right_in[row.key, row.question][language] = row.rank == 0

    def figure(row: Prediction) -> Figure:
        pixels_HW3 = picture(row.card, row.part, row.key)
        shown = None if pixels_HW3 is None else webp(Image.fromarray(pixels_HW3))
        return Figure(row, shown, _languages(right_in[row.key, row.question]))

    third = max(most // 3, 1)
    worst = _pairs(rows, found, third) if found else []
    used = {row.key for _, chosen in worst for row in chosen}
    left = max(most - len(used), 0)
    others = _varied([row for row in rows if row.rank > 0 and row.key not in used])[: -(-left // 2)]
    hits = _varied([row for row in rows if row.rank == 0 and row.key not in used])[: left - len(others)]
    return Gallery(
        [(counts, list(map(figure, chosen))) for counts, chosen in worst],
        list(map(figure, others)),
        list(map(figure, hits[:third])),
    )


def _margin(row: Prediction) -> float:
    """How much nearer the answer is than the next one; in a mistake, than the truth, or the last where that is not
    among the nearest.
    """
    if len(row.cosines) < 2:
        return 0.0
    if row.rank == 0:
        return row.cosines[0] - row.cosines[1]
    nearest = dict(zip(row.top, row.cosines, strict=False))
    return row.cosines[0] - nearest.get(row.truth, row.cosines[-1])


def _varied(rows: list[Prediction]) -> list[Prediction]:
    """One of every class before the second of any, else in their order."""
    seen = Counter[str]()
    turns = []
    for row in rows:
        turns.append(seen[row.truth])
        seen[row.truth] += 1
    return [rows[i] for i in np.argsort(turns, kind="stable")]


def _pairs(rows: list[Prediction], found: Confusion, most: int) -> list[tuple[list[Mistake], list[Prediction]]]:
    """The classes that are taken for each other most often, with an image that was mistaken and one of the class that
    it was taken for: one that was taken for the other in its turn, or else a hit.
    """
    counts = mistakes(found)
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
        worst.append(([one for one in counts if (one.truth, one.predicted) in ways], chosen))
    return worst


def _languages(right_in: dict[str, bool]) -> str:
    """In which languages an image was right, in few words."""
    right = [language_name(language) for language, hit in right_in.items() if hit]
    wrong = [language_name(language) for language, hit in right_in.items() if not hit]
    if len(right_in) < 2:
        return ""
    if not right or not wrong:
        every = "both" if len(right_in) == 2 else f"all {len(right_in)}"
        return f"{'right' if right else 'wrong'} in {every} languages"
    if min(len(right), len(wrong)) > 3:
        return f"right in {len(right)} of {len(right_in)} languages"
    return f"wrong in {', '.join(wrong)}" if len(wrong) <= len(right) else f"right in {', '.join(right)}"
