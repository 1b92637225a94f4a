"""Curves as SVG that stands in a page's own text: sharp at any size, a few kB, drawn in a millisecond."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

Point = tuple[float, float]
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 460, 56, 448, 26, 256  # pixels: of the page's picture, and where its axes lie
_COLOURS, _DASHES = [*map(str, TABLEAU_COLORS.values())], ("none", "6 3", "1 3")
_MARGIN = 0.05  # beside the first and the last number, of what lies between them
_MOST_DOTS = 20  # a curve of so many points shows them
_MOST_NAMED = 24


class Line(NamedTuple):
    """A curve as `macros.html` draws it; `points` are pixels."""

    label: str
    colour: str
    dashes: str
    points: list[Point]
    dotted: bool


class Plot(NamedTuple):
    """What `macros.html` draws. Ticks are pixels and the words there."""

    title: str
    height: int
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    columns: int  # of the names below; 0 where none are shown


def plot(title: str, curves: Mapping[str, Sequence[Point]], from_zero: bool = False) -> Plot:
    """Scale curves to a picture.

    Args:
        title: Above it. A single curve of that name has no legend, nor have more than 24 curves.
        curves: Name -> (step, value) in the order of steps; values are finite.
        from_zero: The axis of values, none of which is below it, begins at 0.
    """
    steps, values = ([point[i] for points in curves.values() for point in points] for i in (0, 1))
    x = _Axis(steps, LEFT, RIGHT, integer=True)
    y = _Axis([0.0, *values] if from_zero else values, BOTTOM, TOP, from_zero=from_zero)
    lines = []
    for i, (name, points) in enumerate(curves.items()):
        pixels = _thinned(np.array([(x.pixel(step), y.pixel(value)) for step, value in points]).reshape(-1, 2))
        dashes = _DASHES[i // len(_COLOURS) % len(_DASHES)]
        drawn = [(round(across, 1), round(down, 1)) for across, down in pixels.tolist()]
        lines.append(Line(name, _COLOURS[i % len(_COLOURS)], dashes, drawn, len(points) < _MOST_DOTS))
    columns = _columns([*curves]) if len(curves) <= _MOST_NAMED and [*curves] != [title] else 0
    rows = math.ceil(len(curves) / columns) if columns else 0
    return Plot(title, 300 + 16 * rows, lines, x.ticks(), y.ticks(), columns)


def _columns(names: list[str]) -> int:
    """Up to three that are wide enough for each name, of six pixels a letter."""
    widest = 30 + 6 * max(map(len, names), default=0)
    return min(max((WIDTH - 16) // widest, 1), 3)


class _Axis:
    """Numbers to pixels, between those of the axis's ends."""

    def __init__(
        self, numbers: Sequence[float], begin: float, end: float, integer: bool = False, from_zero: bool = False
    ) -> None:
        low, high = min(numbers, default=0.0), max(numbers, default=1.0)
        margin = _MARGIN * ((high - low) or abs(low) or 1.0)
        self._low, self._high = low - margin * (not from_zero), high + margin
        self._begin, self._end = begin, end
        self._locator = MaxNLocator(nbins=6, integer=integer)  # type: ignore[no-untyped-call]

    def pixel(self, number: float) -> float:
        return self._begin + (self._end - self._begin) * (number - self._low) / (self._high - self._low)

    def ticks(self) -> list[tuple[float, str]]:
        found = np.round(self._locator.tick_values(self._low, self._high), 12).tolist()
        return [(round(self.pixel(tick), 1), f"{tick:.6g}") for tick in found if self._low <= tick <= self._high]


def _thinned(points_N2: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of so many that several share a column of pixels, each column's highest and lowest."""
    if len(points_N2) <= 2 * (RIGHT - LEFT):
        return points_N2
    column_N = points_N2[:, 0].astype(int)
    order_N = np.lexsort((points_N2[:, 1], column_N))
    first = np.flatnonzero(np.diff(column_N[order_N], prepend=-1))
    last = np.append(first[1:], len(order_N)) - 1
    kept: NDArray[np.float64] = points_N2[np.unique(np.concatenate([order_N[first], order_N[last]]))]
    return kept
