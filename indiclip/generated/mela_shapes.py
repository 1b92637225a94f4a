"""Silhouettes of the things of the fair and of clothes, as polygons; shapes.yaml holds them and says how to read it."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from indiclip.generated.base import Floats as Points
from indiclip.generated.base import load_table

Shapes = list[tuple[str, Points]]  # (paint, polygon), painted in this order


def _poly(*xy: float) -> Points:
    return np.array(xy, dtype=np.float64).reshape(-1, 2)


def _mirrored(*xy: float) -> Points:
    half = _poly(*xy)
    return np.concatenate([half, half[::-1] * [-1, 1]])


def _around(x: float, y: float, rx: float, ry: float, angle: Points) -> Points:
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def _oval(x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360, count: float = 20) -> Points:
    return _around(x, y, rx, ry, np.radians(np.linspace(start, stop, int(count))))


def _ellipse(x: float, y: float, rx: float, ry: float) -> Points:
    return _around(x, y, rx, ry, np.linspace(0, 2 * np.pi, 28))  # differs from `_oval` in the last bit


def _dot(radius: float, degrees: float, size: float, count: float) -> Points:
    angle = np.radians(degrees)
    return _oval(radius * np.cos(angle), radius * np.sin(angle), size, size, count=count)


def _flower(radius: float, lobes: float, depth: float) -> Points:
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    r = radius * (1 - depth * np.abs(np.sin(angle * lobes / 2)))
    return np.stack([r * np.cos(angle), r * np.sin(angle)], axis=1)


def _petal(x: float, y: float, length: float, width: float, degrees: float) -> Points:
    t = np.array([0, 0.2, 0.4, 0.6, 0.8, 1, 0.8, 0.6, 0.4, 0.2])
    side = np.array([0, 0.7, 1, 0.9, 0.5, 0, -0.5, -0.9, -1, -0.7]) * width
    a = np.radians(degrees)
    up, across = np.array([np.sin(a), -np.cos(a)]), np.array([np.cos(a), np.sin(a)])
    petal: Points = np.array([x, y]) + length * t[:, None] * up + side[:, None] * across
    return petal


def _stroke(width: float, *xy: float) -> list[Points]:
    points = _poly(*xy)
    quadrilaterals = []
    for a, b in pairwise(points):
        along = (b - a) / np.linalg.norm(b - a)
        side = np.array([-along[1], along[0]]) * width / 2
        quadrilaterals.append(np.stack([a + side, b + side, b - side, a - side]))
    return quadrilaterals


def _arc(width: float, x: float, y: float, radius: float, start: float, stop: float) -> list[Points]:
    return _stroke(width, *_oval(x, y, radius, radius, start, stop, 9).ravel())


_OUTLINES: dict[str, Callable[..., Points]] = {
    "poly": _poly,
    "mirrored": _mirrored,
    "oval": _oval,
    "ellipse": _ellipse,
    "dot": _dot,
    "flower": _flower,
    "petal": _petal,
}
_LINES: dict[str, Callable[..., list[Points]]] = {"stroke": _stroke, "arc": _arc}


def _polygons(drawing: str) -> list[Points]:
    """The polygons of one line of shapes.yaml: "oval 0 0 1 1 180 360 + poly 0 -1"."""
    outlines = []
    for part in drawing.split("+"):
        name, *words = part.split()
        numbers = [float(word) for word in words]
        if name in _LINES:
            return _LINES[name](*numbers)
        outlines.append(_OUTLINES[name](*numbers))
    return [np.concatenate(outlines)]


def _load(section: str) -> dict[str, Shapes]:
    return {
        kind: [(paint, polygon) for line in lines for paint, text in line.items() for polygon in _polygons(text)]
        for kind, lines in _FILE[section].items()
    }


_FILE: dict[str, dict[str, list[dict[str, str]]]] = load_table("shapes.yaml")
THINGS: dict[str, Shapes] = _load("things")
CLOTHES: dict[str, Shapes] = _load("clothes")
