"""Silhouettes of the sixteen things of the fair: each a stack of polygons with the name of its paint.

The plane has x to the right and y down, about -1 to 1; only proportions count, the painter scales to pixels. Paints
are `main` (the thing's own colour), `dark` and `light` (shades of it), fixed ones, and `hole`, which erases.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Shapes = list[tuple[str, Points]]  # (paint, polygon), painted in this order


def _poly(*xy: float) -> Points:
    return np.array(xy, dtype=np.float64).reshape(-1, 2)


def _oval(x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360, count: int = 20) -> Points:
    """An ellipse, or its arc from `start` to `stop` degrees (0 is right, 90 is down) closed by the chord."""
    angle = np.radians(np.linspace(start, stop, count))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def _wavy(radius: float, waves: int, depth: float, count: int = 48) -> Points:
    """A round flower outline with `waves` lobes."""
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    r = radius * (1 - depth * np.abs(np.sin(angle * waves / 2)))
    return np.stack([r * np.cos(angle), r * np.sin(angle)], axis=1)


def _petal(x: float, y: float, length: float, width: float, degrees: float) -> Points:
    """A pointed petal that starts at (x, y) and leans `degrees` from straight up."""
    t = np.array([0, 0.2, 0.4, 0.6, 0.8, 1, 0.8, 0.6, 0.4, 0.2])
    side = np.array([0, 0.7, 1, 0.9, 0.5, 0, -0.5, -0.9, -1, -0.7]) * width
    a = np.radians(degrees)
    up, across = np.array([np.sin(a), -np.cos(a)]), np.array([np.cos(a), np.sin(a)])
    petal: Points = np.array([x, y]) + length * t[:, None] * up + side[:, None] * across
    return petal


def _strokes(paint: str, width: float, *xy: float) -> Shapes:
    """A polyline of the given width, as one quadrilateral per segment."""
    points = _poly(*xy)
    shapes = []
    for a, b in pairwise(points):
        along = (b - a) / np.linalg.norm(b - a)
        side = np.array([-along[1], along[0]]) * width / 2
        shapes.append((paint, np.stack([a + side, b + side, b - side, a - side])))
    return shapes


def _arc_strokes(paint: str, width: float, x: float, y: float, r: float, start: float, stop: float) -> Shapes:
    return _strokes(paint, width, *_oval(x, y, r, r, start, stop, 9).ravel())


def _diya() -> Shapes:
    flame = np.concatenate([_oval(0.55, -0.28, 0.3, 0.3, -20, 200, 12), _poly(0.55, -1.1)])
    core = np.concatenate([_oval(0.55, -0.22, 0.16, 0.18, -20, 200, 10), _poly(0.55, -0.7)])
    bowl = np.concatenate([_oval(-0.1, 0.1, 0.9, 0.8, 20, 180, 14), _poly(0.5, -0.05, 1.05, -0.02)])
    shapes: Shapes = [
        ("main", bowl),
        ("dark", _oval(-0.1, 0.1, 0.84, 0.17)),
        ("gold", _oval(-0.1, 0.12, 0.62, 0.1)),
    ]
    dots: Shapes = [("white", _oval(x, 0.5, 0.09, 0.09, count=9)) for x in (-0.5, -0.1, 0.3)]
    return [*shapes, ("flame", flame), ("glow", core), *dots]


def _kite() -> Shapes:
    top, right, bottom, left = (0.0, -1.0), (0.85, -0.2), (0.0, 0.68), (-0.85, -0.2)
    return [
        ("dark", _poly(0, 0.55, 0.36, 1.08, -0.36, 1.08)),
        ("main", _poly(*top, *right, *bottom, *left)),
        ("light", _poly(*top, *right, 0, -0.2)),
        ("light", _poly(*left, *bottom, 0, -0.2)),
        *_strokes("ink", 0.07, *top, *bottom),
        *_strokes("ink", 0.07, *left, -0.45, -0.33, 0, -0.38, 0.45, -0.33, *right),
    ]


def _marigold() -> Shapes:
    leaves: Shapes = [("leaf", _petal(0, 0.5, 0.95, 0.2, lean)) for lean in (125, -125, 180)]
    rings = ((1.0, "main", 13), (0.7, "dark", 11), (0.62, "main", 11), (0.4, "dark", 9), (0.32, "main", 7))
    return leaves + [(paint, _wavy(radius * 0.9, waves, 0.2)) for radius, paint, waves in rings]


def _matka() -> Shapes:
    zigzag = [v for i, x in enumerate(np.linspace(-0.78, 0.78, 9)) for v in (float(x), 0.1 if i % 2 else 0.34)]
    return [
        ("main", _oval(0, 0.27, 0.95, 0.76, count=28)),
        ("dark", _poly(-0.38, -0.72, 0.38, -0.72, 0.3, -0.3, -0.3, -0.3)),
        ("main", _oval(0, -0.74, 0.6, 0.18)),
        ("ink", _oval(0, -0.77, 0.44, 0.09)),
        *_strokes("white", 0.1, *zigzag),
        ("light", _oval(-0.5, -0.1, 0.14, 0.2, count=12)),
    ]


def _dhol() -> Shapes:
    bulge = np.concatenate([_oval(0, -0.36, 0.78, 0.3, 180, 360, 12), _oval(0, 0.36, 0.78, 0.3, 0, 180, 12)])
    lace = [v for i, x in enumerate(np.linspace(-0.66, 0.62, 8)) for v in (float(x), -0.5 if i % 2 else 0.5)]
    return [
        ("main", bulge),
        *_strokes("white", 0.08, *lace),
        ("wood", _oval(0.8, 0, 0.2, 0.5)),
        ("wood", _oval(-0.8, 0, 0.28, 0.52)),
        ("white", _oval(-0.82, 0, 0.22, 0.43)),
        ("ink", _oval(-0.82, 0, 0.11, 0.22, count=12)),
        *_arc_strokes("wood", 0.1, 0, -0.2, 0.78, 215, 325),
    ]


def _rangoli() -> Shapes:
    petals: Shapes = [("main", _petal(0, 0, 1.0, 0.24, a)) for a in range(0, 360, 45)]
    inner: Shapes = [("white", _petal(0, 0, 0.72, 0.12, a)) for a in range(0, 360, 45)]
    dots: Shapes = []
    for angle in np.radians(np.arange(22.5, 360, 45)):
        dots.append(("dark", _oval(0.9 * np.cos(angle), 0.9 * np.sin(angle), 0.12, 0.12, count=9)))
    return [
        *dots,
        *petals,
        *inner,
        ("dark", _oval(0, 0, 0.3, 0.3)),
        ("gold", _oval(0, 0, 0.16, 0.16, count=12)),
    ]


def _balloon() -> Shapes:
    return [
        *_strokes("ink", 0.06, 0, 0.5, 0.1, 0.75, -0.08, 0.95, 0.06, 1.25),
        ("dark", _poly(0, 0.4, 0.17, 0.66, -0.17, 0.66)),
        (
            "main",
            np.concatenate([_oval(0, -0.3, 0.74, 0.72, 160, 380, 18), _poly(0.3, 0.34, 0, 0.5, -0.3, 0.34)]),
        ),
        ("white", _petal(-0.48, -0.2, 0.52, 0.11, 20)),
    ]


def _umbrella() -> Shapes:
    ribs: Shapes = [
        ("light", np.concatenate([_poly(0, -0.8), _oval(x, 0.05, 0.23, 0.12, 180, 360, 6)])) for x in (-0.46, 0.46)
    ]
    scallops: Shapes = [("hole", _oval(x, 0.09, 0.24, 0.14, count=14)) for x in (-0.69, -0.23, 0.23, 0.69)]
    return [
        ("main", _oval(0, 0.05, 0.93, 0.88, 180, 360)),
        *ribs,
        *scallops,
        *_strokes("ink", 0.1, 0, -1.0, 0, -0.8),
        *_strokes("ink", 0.1, 0, -0.05, 0, 0.85),
        *_arc_strokes("ink", 0.1, -0.18, 0.82, 0.18, 0, 170),
    ]


def _rickshaw() -> Shapes:
    wheels: Shapes = []
    for x in (-0.58, 0.62):
        wheels += [("ink", _oval(x, 0.55, 0.27, 0.27)), ("glass", _oval(x, 0.55, 0.1, 0.1, count=9))]
    return [
        ("ink", _poly(-1, -0.02, -0.92, -0.62, -0.75, -0.75, 0.42, -0.78, 0.6, -0.66, 0.85, 0.02)),
        ("glass", _poly(-0.1, -0.02, -0.1, -0.55, 0.42, -0.58, 0.68, 0.0)),
        ("white", _poly(-0.75, -0.15, -0.75, -0.5, -0.35, -0.5, -0.35, -0.15)),
        (
            "main",
            _poly(-1, 0.58, -1, -0.05, -0.2, -0.05, -0.1, 0.3, 0.25, 0.3, 0.4, -0.02, 0.85, 0, 1, 0.25, 1, 0.58),
        ),
        ("gold", _oval(0.93, 0.22, 0.1, 0.1, count=9)),
        ("dark", _poly(-1, 0.42, -1, 0.58, 1, 0.58, 1, 0.42)),
        *wheels,
    ]


def _mango() -> Shapes:
    outline = _poly(
        *(
            0.1,
            -0.62,
            0.45,
            -0.6,
            0.75,
            -0.38,
            0.86,
            -0.02,
            0.78,
            0.38,
            0.5,
            0.72,
            0.1,
            0.9,
            -0.3,
            0.9,
            -0.62,
            0.74,
        ),
        *(
            -0.86,
            0.5,
            -0.92,
            0.28,
            -0.8,
            0.24,
            -0.66,
            0.3,
            -0.52,
            0.2,
            -0.42,
            -0.06,
            -0.3,
            -0.36,
            -0.12,
            -0.56,
        ),
    )
    return [
        ("main", outline),
        ("light", _petal(0.55, 0.35, 0.75, 0.16, -18)),
        *_strokes("wood", 0.14, 0.16, -0.52, 0.1, -0.95),
        ("leaf", _petal(0.12, -0.8, 0.95, 0.2, 68)),
        ("leaf", _petal(0.12, -0.8, 0.7, 0.17, -70)),
    ]


def _elephant() -> Shapes:
    legs: Shapes = []
    for x, paint in ((-0.5, "dark"), (0.1, "dark"), (-0.72, "main"), (0.3, "main")):
        legs.append((paint, _poly(x - 0.13, 0.2, x + 0.15, 0.2, x + 0.15, 0.85, x - 0.13, 0.85)))
    trunk = (0.9, -0.25, 1.02, 0.1, 1.0, 0.42, 0.98, 0.62, 1.12, 0.7)
    return [
        *_strokes("dark", 0.09, -0.85, -0.1, -1.02, 0.2, -0.98, 0.45),
        *legs[:2],
        ("main", _oval(-0.2, -0.02, 0.74, 0.52)),
        *legs[2:],
        *_strokes("main", 0.24, *trunk),
        ("main", _oval(0.64, -0.32, 0.4, 0.38)),
        ("white", _petal(0.72, -0.02, 0.36, 0.08, 110)),
        ("dark", _oval(0.38, -0.24, 0.24, 0.36)),
        ("ink", _oval(0.78, -0.4, 0.07, 0.07, count=9)),
        ("gold", _poly(-0.55, -0.5, 0.0, -0.55, 0.05, 0.15, -0.6, 0.15)),
        ("white", _poly(-0.58, -0.02, 0.03, -0.02, 0.04, 0.06, -0.59, 0.06)),
    ]


def _feather() -> Shapes:
    barbs: Shapes = [("main", _petal(0, y, 0.62, 0.07, lean)) for y in (0.85, 0.6, 0.35, 0.1) for lean in (-48, 48)]
    plume = np.concatenate([_oval(0, -0.42, 0.62, 0.58, 150, 390, 18), _poly(0, 0.42)])
    return [
        *barbs,
        *_strokes("wood", 0.09, 0, -0.1, 0.02, 0.6, 0.1, 1.2),
        ("main", plume),
        ("gold", _oval(0, -0.4, 0.42, 0.42)),
        ("light", _oval(0, -0.36, 0.3, 0.32)),
        ("ink", np.concatenate([_oval(0, -0.34, 0.19, 0.21, 200, 340, 8), _poly(0, -0.04)])),
        ("ink", _oval(0, -0.33, 0.18, 0.17, count=12)),
    ]


def _lotus() -> Shapes:
    petals = [
        (-75, 0.95, "main"),
        (75, 0.95, "main"),
        (-48, 1.08, "dark"),
        (48, 1.08, "dark"),
        (-24, 1.2, "light"),
        (24, 1.2, "light"),
        (0, 1.3, "main"),
    ]
    fan: Shapes = [(paint, _petal(0, 0.5, length, 0.27, lean)) for lean, length, paint in petals]
    return [("leaf", _oval(0, 0.55, 1.0, 0.2)), *fan, ("gold", _oval(0, 0.42, 0.2, 0.12, count=12))]


def _bell() -> Shapes:
    dome = np.concatenate(
        [_oval(0, -0.2, 0.5, 0.52, 180, 360, 12), _poly(0.6, 0.3, 0.95, 0.62, -0.95, 0.62, -0.6, 0.3)]
    )
    return [
        *_arc_strokes("dark", 0.13, 0, -0.82, 0.2, 0, 360),
        ("ink", _oval(0, 0.72, 0.22, 0.22, count=14)),
        ("main", dome),
        ("dark", _oval(0, 0.6, 0.95, 0.14)),
        ("gold", _poly(-0.56, 0.14, 0.56, 0.14, 0.6, 0.28, -0.6, 0.28)),
        ("white", _petal(-0.28, 0.05, 0.55, 0.08, 10)),
    ]


def _bangle() -> Shapes:
    dots: Shapes = []
    for i, angle in enumerate(np.radians(np.arange(0, 360, 30))):
        x, y = 0.83 * np.cos(angle), 0.83 * np.sin(angle)
        dots.append(("white" if i % 2 else "gold", _oval(x, y, 0.1, 0.1, count=8)))
    return [("main", _oval(0, 0, 1, 1, count=32)), *dots, ("hole", _oval(0, 0, 0.64, 0.64, count=28))]


def _lantern() -> Shapes:
    flame = np.concatenate([_oval(0, 0.2, 0.14, 0.14, -20, 200, 9), _poly(0, -0.22)])
    glass = _poly(-0.26, -0.38, 0.26, -0.38, 0.46, 0.05, 0.3, 0.44, -0.3, 0.44, -0.46, 0.05)
    return [
        *_arc_strokes("ink", 0.08, 0, -0.6, 0.5, 180, 360),
        *_strokes("ink", 0.1, -0.62, 0.6, -0.58, -0.55, -0.4, -0.55),
        *_strokes("ink", 0.1, 0.62, 0.6, 0.58, -0.55, 0.4, -0.55),
        ("glow", glass),
        ("flame", flame),
        ("main", _poly(-0.5, -0.38, -0.28, -0.72, 0.28, -0.72, 0.5, -0.38)),
        ("dark", _poly(-0.16, -0.88, 0.16, -0.88, 0.22, -0.7, -0.22, -0.7)),
        ("main", _poly(-0.5, 0.42, 0.5, 0.42, 0.76, 0.72, 0.76, 0.98, -0.76, 0.98, -0.76, 0.72)),
        ("dark", _poly(-0.76, 0.7, 0.76, 0.7, 0.76, 0.8, -0.76, 0.8)),
    ]


DRAWINGS: dict[str, Shapes] = {
    "diya": _diya(),
    "kite": _kite(),
    "marigold": _marigold(),
    "matka": _matka(),
    "dhol": _dhol(),
    "rangoli": _rangoli(),
    "balloon": _balloon(),
    "umbrella": _umbrella(),
    "rickshaw": _rickshaw(),
    "mango": _mango(),
    "elephant": _elephant(),
    "peacock_feather": _feather(),
    "lotus": _lotus(),
    "bell": _bell(),
    "bangle": _bangle(),
    "lantern": _lantern(),
}
