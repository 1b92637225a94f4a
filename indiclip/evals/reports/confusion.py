"""Which class was taken for which: counts and the worst pairs."""

from typing import NamedTuple

import numpy as np

from indiclip.evals.results import Prediction

MOST_CLASSES = 60  # of a heat map in which names can be read


class Confusion(NamedTuple):
    """`count_CC[i, j]` images of class i, which has `of_C[i]`, were taken for class j."""

    classes: list[str]
    count_CC: np.ndarray
    of_C: np.ndarray

    def at(self, places: list[int]) -> "Confusion":
        """Of the classes at these places, in this order."""
        return Confusion([self.classes[i] for i in places], self.count_CC[np.ix_(places, places)], self.of_C[places])


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
    names, places = np.unique([(row.truth, row.predicted) for row in predictions], return_inverse=True)
    count_CC = np.zeros((len(names), len(names)), np.int64)
    np.add.at(count_CC, tuple(places.reshape(-1, 2).T), 1)
    return Confusion(names.tolist(), count_CC, count_CC.sum(1)).at(_order(count_CC))


def _order(count_CC: np.ndarray) -> list[int]:
    """By the Fiedler vector of the graph of confusions, which puts heavy edges close to the diagonal (Atkins et al.
    1998, A Spectral Algorithm for Seriation).
    """
    if len(count_CC) < 3:
        return list(range(len(count_CC)))
    share_CC = count_CC / np.maximum(count_CC.sum(1, keepdims=True), 1)
    weight_CC = share_CC + share_CC.T + 1e-3  # connected, or the vector would be of one part only
    np.fill_diagonal(weight_CC, 0)
    _, vectors_CC = np.linalg.eigh(np.diag(weight_CC.sum(1)) - weight_CC)
    fiedler_C = vectors_CC[:, 1]
    sign = np.sign(fiedler_C[np.abs(fiedler_C).argmax()])  # which is up to the machine
    order: list[int] = np.argsort(sign * fiedler_C, kind="stable").tolist()
    return order


def mistakes(found: Confusion) -> list[Mistake]:
    """Most images first, among these the larger share of the class."""
    rows = [
        Mistake(found.classes[i], found.classes[j], int(found.count_CC[i, j]), int(found.of_C[i]))
        for i, j in np.argwhere(found.count_CC)
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
    kept: set[str] = set()
    for pair in pairs(found):
        if len(kept.union(pair)) > most:
            break
        kept.update(pair)
    return found.at([i for i, name in enumerate(found.classes) if name in kept])


def readable(found: Confusion) -> Confusion:
    """The part that a heat map has room for."""
    return found if len(found.classes) <= MOST_CLASSES else most_confused(found, MOST_CLASSES // 2)
