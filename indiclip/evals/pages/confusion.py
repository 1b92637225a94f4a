"""Which class was taken for which: counts, the worst pairs, a heat map."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from indiclip.evals.pages.page import Html, many, tag
from indiclip.evals.results import Prediction

MOST_CLASSES = 60  # of a heat map in which names can be read
_FEW = 12  # classes up to which cells are large enough for a number
_LARGE, _SMALL = 34, 16  # pixels


class Confusion(NamedTuple):
    """`count_CC[i, j]` images of class i were taken for class j."""

    classes: list[str]
    count_CC: np.ndarray


class Mistake(NamedTuple):
    """Images of a class that were taken for another."""

    truth: str
    predicted: str
    images: int
    of: int  # images of the class


def confusion(predictions: list[Prediction]) -> Confusion:
    """Over the classes that are right for any image or were answered for one; those that are confused lie side by
    side.
    """
    classes = sorted({row.truth for row in predictions} | {row.predicted for row in predictions})
    index = {name: i for i, name in enumerate(classes)}
    count_CC = np.zeros((len(classes), len(classes)), np.int64)
    for row in predictions:
        count_CC[index[row.truth], index[row.predicted]] += 1
    order = _order(count_CC)
    return Confusion([classes[i] for i in order], count_CC[np.ix_(order, order)])


def _order(count_CC: np.ndarray) -> list[int]:
    """By the Fiedler vector of the graph of confusions, which puts heavy edges close to the diagonal (Atkins et al.
    1998, A Spectral Algorithm for Seriation).
    """
    share_CC = count_CC / np.maximum(count_CC.sum(1, keepdims=True), 1)
    weight_CC = share_CC + share_CC.T + 1e-3  # connected, or the vector would be of one part only
    np.fill_diagonal(weight_CC, 0)
    if len(weight_CC) < 3:
        return list(range(len(weight_CC)))
    _, vectors_CC = np.linalg.eigh(np.diag(weight_CC.sum(1)) - weight_CC)
    fiedler_C = vectors_CC[:, 1]
    sign = np.sign(fiedler_C[np.abs(fiedler_C).argmax()])  # which is up to the machine
    return [int(i) for i in np.argsort(sign * fiedler_C, kind="stable")]


def mistakes(found: Confusion) -> list[Mistake]:
    """Most images first, among these the larger share of the class."""
    of_C = found.count_CC.sum(1)
    rows = [
        Mistake(found.classes[i], found.classes[j], int(found.count_CC[i, j]), int(of_C[i]))
        for i, j in zip(*np.nonzero(found.count_CC), strict=True)
        if i != j
    ]
    return sorted(rows, key=lambda row: (-row.images, row.of, row.truth, row.predicted))


def pairs(found: Confusion) -> list[tuple[str, str]]:
    """Classes that are taken for each other, most often first; the one that is mistaken more comes first."""
    both: dict[frozenset[str], list[Mistake]] = {}
    for row in mistakes(found):
        both.setdefault(frozenset((row.truth, row.predicted)), []).append(row)
    worst = sorted(both.values(), key=lambda rows: -sum(row.images for row in rows))
    return [(rows[0].truth, rows[0].predicted) for rows in worst]


def most_confused(found: Confusion, most: int) -> Confusion:
    """The part of a few classes only, those in the worst pairs."""
    kept: dict[str, None] = {}
    for pair in pairs(found):
        if len(kept | dict.fromkeys(pair)) > most:
            break
        kept |= dict.fromkeys(pair)
    chosen = [i for i, name in enumerate(found.classes) if name in kept]
    return Confusion([found.classes[i] for i in chosen], found.count_CC[np.ix_(chosen, chosen)])


def heat_map(part: Confusion, of: Confusion) -> Html:
    """Rows are the truth, columns the answers; a stronger colour is a larger share of the row.

    Args:
        part: The classes to draw.
        of: All of them, whose rows make up the shares.
    """
    of_class = dict(zip(of.classes, of.count_CC.sum(1), strict=True))
    names = [words(name) for name in part.classes]
    cell = _LARGE if len(names) <= _FEW else _SMALL
    left = 12 + 6 * min(max(map(len, names), default=0), 26)  # for names of 10.5 px
    side = len(names) * cell
    marks = [_cells(part, [int(of_class[name]) for name in part.classes], cell)]
    for i, name in enumerate(names):
        middle = i * cell + cell / 2
        marks.append(tag("text", _short(name), x="-6", y=f"{middle + 3.5}", text_anchor="end"))
        marks.append(tag("text", _short(name), transform=f"translate({middle + 3.5} -6) rotate(-60)"))
        marks.append(Html(f'<path class="grid" d="M0 {i * cell}H{side}M{i * cell} 0V{side}"/>'))
    width, top = side + left + left // 2, int(left * 0.87)  # a name at 60 degrees is sin(60) high and cos(60) wide
    shape = {"width": f"{width}", "height": f"{side + top + 2}", "viewBox": f"{-left} {-top} {width} {side + top + 2}"}
    label = "truth (rows) and answers (columns)"
    drawn = tag("svg", *marks, class_="matrix", role="img", aria_label=label, **shape)
    return tag("div", drawn, class_="scroll", tabindex="0")


def _cells(part: Confusion, of_C: list[int], cell: int) -> Html:
    marks = []
    for i, j in zip(*np.nonzero(part.count_CC), strict=True):
        count = int(part.count_CC[i, j])
        share = count / max(of_C[i], 1)
        label = f"{words(part.classes[i])} → {words(part.classes[j])}: {count} of {of_C[i]}"
        place = {"x": f"{j * cell}", "y": f"{i * cell}", "width": f"{cell}", "height": f"{cell}"}
        kind = "right" if i == j else "wrong"
        # The square root, so that a mistake in ten can be seen.
        marks.append(tag("rect", tag("title", label), class_=kind, fill_opacity=f"{0.9 * share**0.5:.2f}", **place))
        if cell == _LARGE:
            middle = {"x": f"{j * cell + cell / 2}", "y": f"{i * cell + cell / 2 + 4}"}
            marks.append(tag("text", f"{count}", text_anchor="middle", class_="count", **middle))
    return many(marks)


def words(name: str) -> str:
    """A class's id for people."""
    return name.replace("_", " ")


def _short(name: str) -> str:
    return name if len(name) <= 26 else f"{name[:25]}…"
