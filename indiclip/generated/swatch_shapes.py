"""Silhouettes of clothes, as stacks of polygons in the plane and paints of `indiclip.generated.mela_shapes`."""

from __future__ import annotations

import numpy as np

from indiclip.generated.mela_shapes import Points, Shapes


def _polygon(*xy: float) -> Points:
    return np.array(xy, dtype=np.float64).reshape(-1, 2)


def _mirrored(*xy: float) -> Points:
    """The polygon of a right half, from top to bottom, and of its mirror image."""
    half = _polygon(*xy)
    return np.concatenate([half, half[::-1] * [-1, 1]])


def _ellipse(x: float, y: float, rx: float, ry: float) -> Points:
    angle = np.linspace(0, 2 * np.pi, 28)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def _kurta() -> Shapes:
    body = _mirrored(0.16, -0.86, 0.42, -0.78, 0.46, -0.3, 0.42, 0.0, 0.56, 1.0)
    sleeve = _polygon(0.36, -0.8, 0.52, -0.7, 0.86, 0.1, 0.66, 0.2, 0.42, -0.3)
    return [
        ("main", sleeve),
        ("main", sleeve * [-1, 1]),
        ("main", body),
        ("gold", _polygon(0.68, 0.2, 0.87, 0.11, 0.84, 0.03, 0.64, 0.12)),
        ("gold", _polygon(-0.68, 0.2, -0.87, 0.11, -0.84, 0.03, -0.64, 0.12)),
        ("dark", _ellipse(0, -0.85, 0.15, 0.06)),
        ("gold", _mirrored(0.04, -0.84, 0.04, -0.25)),
        ("dark", _mirrored(0.555, 0.95, 0.56, 1.0)),
        ("dark", _polygon(0.42, 0.42, 0.47, 0.4, 0.55, 1.0, 0.5, 1.0)),
    ]


def _lehenga() -> Shapes:
    skirt = _mirrored(0.2, -0.5, 0.36, -0.1, 0.95, 0.92, 0.5, 1.0)
    return [
        ("main", skirt),
        ("gold", _mirrored(0.85, 0.74, 0.93, 0.88, 0.5, 0.96, 0.46, 0.82)),
        ("gold", _mirrored(0.2, -0.5, 0.23, -0.42)),
        *[
            ("dark", _polygon(x * 0.2, -0.35, x * 0.84 + 0.015, 0.8, x * 0.84 - 0.015, 0.8))
            for x in (-0.7, -0.3, 0.1, 0.5)
        ],
        ("main", _mirrored(0.12, -1.0, 0.3, -0.96, 0.34, -0.72, 0.2, -0.62)),
        ("gold", _mirrored(0.2, -0.66, 0.2, -0.62)),
    ]


def _saree() -> Shapes:
    """Worn: pleats below, the end of the cloth across the body and over the shoulder, a blouse in a darker shade."""
    arm = _polygon(0.2, -0.6, 0.3, -0.58, 0.4, -0.3, 0.36, 0.02, 0.28, 0.02, 0.3, -0.28)
    return [
        ("main", _polygon(-0.16, -0.66, -0.32, -0.56, -0.62, 0.52, -0.4, 0.6, -0.1, -0.3)),
        ("gold", _polygon(-0.62, 0.52, -0.4, 0.6, -0.38, 0.5, -0.6, 0.43)),
        ("ink", _ellipse(0, -0.86, 0.15, 0.15)),
        ("wood", arm),
        ("wood", arm * [-1, 1]),
        ("wood", _mirrored(0.06, -0.8, 0.06, -0.55)),
        ("wood", _ellipse(0, -0.82, 0.11, 0.14)),
        ("dark", _mirrored(0.08, -0.64, 0.28, -0.6, 0.32, -0.4, 0.2, -0.36, 0.19, -0.2)),
        ("main", _mirrored(0.2, -0.24, 0.3, 0.0, 0.48, 0.95)),
        *[("dark", _polygon(x, -0.05, x * 2 + 0.015, 0.9, x * 2 - 0.015, 0.9)) for x in (-0.06, 0.0, 0.06, 0.12)],
        ("gold", _mirrored(0.47, 0.88, 0.48, 0.95)),
        ("main", _polygon(0.24, -0.24, 0.28, 0.0, -0.24, 0.0, -0.32, -0.56, -0.14, -0.66, 0.04, -0.46)),
        ("gold", _polygon(0.24, -0.24, 0.22, -0.19, 0.0, -0.42, -0.17, -0.62, -0.14, -0.66, 0.04, -0.46)),
    ]


def _pagri() -> Shapes:
    """A turban with its end hanging down: bands wound above each other."""
    shapes: Shapes = [
        ("main", _polygon(0.5, 0.0, 0.8, 0.05, 0.74, 0.86, 0.54, 0.9)),
        ("gold", _polygon(0.745, 0.78, 0.74, 0.86, 0.54, 0.9, 0.535, 0.82)),
    ]
    for x, y, rx, ry in (
        (0.0, -0.02, 0.9, 0.46),
        (0.06, -0.2, 0.8, 0.42),
        (-0.04, -0.4, 0.66, 0.36),
        (0.08, -0.6, 0.44, 0.26),
    ):
        shapes += [("dark", _ellipse(x, y, rx, ry)), ("main", _ellipse(x, y - 0.02, rx * 0.98, ry * 0.94))]
    return [*shapes, ("gold", _ellipse(0, 0.05, 0.1, 0.15)), ("white", _ellipse(0, 0.05, 0.05, 0.08))]


CLOTHES: dict[str, Shapes] = {"kurta": _kurta(), "lehenga": _lehenga(), "saree": _saree(), "pagri": _pagri()}
