"""Distances on the Earth: how far the place that a model names is from where a picture was taken.

Shape letters: N pairs of places.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from indiclip.evals.protocols.metrics import hit_rate, median
from indiclip.evals.protocols.protocol import Protocol
from indiclip.evals.protocols.zero_shot import predicted
from indiclip.evals.results import Score

if TYPE_CHECKING:
    from indiclip.evals.card_scorer import CardScorer

EARTH_RADIUS_KM = 6371.0088  # mean radius (2a + b) / 3 of WGS 84 (Moritz, Geodetic Reference System 1980)
# Street, city, region, country and continent: IM2GPS (Hays and Efros, CVPR 2008) as Vo et al. (ICCV 2017,
# arXiv 1705.04838) report it.
THRESHOLDS_KM = (1, 25, 200, 750, 2500)


def haversine_km(one_N2: np.ndarray, other_N2: np.ndarray) -> np.ndarray:
    """Great-circle distance of places by the haversine formula, which keeps its digits at small distances.

    Args:
        one_N2: (latitude, longitude) in degrees, north and east positive.
        other_N2: Likewise, or any shape that broadcasts.

    Returns:
        float64 (N,), kilometres on a sphere: within 0.6% of the ellipsoid.
    """
    one, other = np.radians(one_N2), np.radians(other_N2)
    half_lat, half_lon = (one[..., 0] - other[..., 0]) / 2, (one[..., 1] - other[..., 1]) / 2
    chord = np.sin(half_lat) ** 2 + np.cos(one[..., 0]) * np.cos(other[..., 0]) * np.sin(half_lon) ** 2
    return np.asarray(2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.clip(chord, 0, 1))))


def within_km(distance_N: np.ndarray) -> dict[int, np.ndarray]:
    """Which pictures were placed within each of `THRESHOLDS_KM`: hits for `metrics.hit_rate`.

    Args:
        distance_N: Kilometres; NaN is within none.
    """
    return {threshold: distance_N <= threshold for threshold in THRESHOLDS_KM}


class Places(Protocol):
    """How far the answers are from where the pictures were taken, on a card whose classes all have `lat` and `lon`; and
    how often the place is told, for the pictures of each `state` where classes have that.
    """

    name = "places"
    metrics = ("median_km",)
    is_plain = True

    def run(self, scorer: "CardScorer") -> Iterator[Score]:
        found = [(one.facts.get("lat"), one.facts.get("lon")) for one in scorer.card.classes]
        if any(None in place for place in found):
            return
        places_C2 = np.array(found, dtype=np.float64)
        state_C = np.array([str(one.facts.get("state", "")) for one in scorer.card.classes], dtype=object)
        for language, ranking in scorer.rankings():
            label_M = scorer.label_N[ranking.image_M]
            km_M = haversine_km(places_C2[label_M], places_C2[predicted(ranking, label_M)])
            values = {"median_km": median(km_M)}
            values |= {f"within_{limit}_km": hit_rate(hit_M) for limit, hit_M in within_km(km_M).items()}
            yield from scorer.rows(self.name, language.code, values, len(km_M), len(language.class_D))
            num_classes = len(language.class_D)
            for state in sorted(set(state_C[label_M]) - {""}):
                hit_S = ranking.rank_M[state_C[label_M] == state] == 0
                told = {"acc1": hit_rate(hit_S)}
                yield from scorer.rows(self.name, language.code, told, len(hit_S), num_classes, 1 / num_classes, state)
