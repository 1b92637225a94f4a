"""Distances on the Earth against known ones and the angle between vectors."""

import numpy as np
import pytest

from indiclip.evals.protocols.places import haversine_km, within_km

DELHI, MUMBAI = (28.6139, 77.2090), (19.0760, 72.8777)


@pytest.mark.parametrize(
    ("one", "other", "km"),
    [
        (DELHI, MUMBAI, 1148),
        ((0, 0), (1, 0), 111.195),  # a degree of the mean sphere
        ((90, 0), (-90, 50), 20015.11),  # pole to pole: half of its circumference
        ((10, 179.5), (10, -179.5), 109.505),  # across the date line
        ((20, 70), (20, 70), 0),
    ],
)
def test_known_distances(one, other, km):
    assert haversine_km(one, other) == pytest.approx(km, rel=1e-3, abs=1e-6)


def test_distances_are_those_of_the_angle_between_vectors():
    generator = np.random.default_rng(0)
    one_N2, other_N2 = generator.uniform([-90, -180], [90, 180], (2, 1000, 2))

    def vector(place):
        lat, lon = np.radians(place).T
        return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], -1)

    one, other = vector(one_N2), vector(other_N2)
    angle = np.arctan2(np.linalg.norm(np.cross(one, other), axis=-1), (one * other).sum(-1))
    np.testing.assert_allclose(haversine_km(one_N2, other_N2), 6371.0088 * angle, rtol=1e-6)
    np.testing.assert_allclose(haversine_km(one_N2[:5, None], other_N2[:3]).shape, (5, 3))


def test_shares_within_the_thresholds_of_im2gps():
    within = within_km(np.array([0.5, 1, 24, 300, 2501, np.nan]))
    assert {km: hits.sum() for km, hits in within.items()} == {1: 2, 25: 3, 200: 3, 750: 4, 2500: 4}
