"""Metrics against scikit-learn and hand-computed numbers; intervals against published ones and by how often they hold.

How often is counted on outcomes that are drawn from known rates: of 2,000 draws 95% has a standard deviation of 0.5%.
"""

import math

import numpy as np
import pytest

from indiclip.evals.protocols.metrics import (
    Interval,
    bootstrap_weights,
    chance_corrected,
    clustered_rate,
    hit_rate,
    mean_per_class_recall,
    median,
    parity_gap,
    resampled,
    wilson,
)

DRAWS = 2_000


def _outcomes(images=120, classes=7, seed=0):
    """Classes of 1 to some 40 images, hits that depend on the class, and another model's that depend on the hits."""
    generator = np.random.default_rng(seed)
    label_N = np.concatenate([np.arange(classes), generator.geometric(0.4, images - classes).clip(max=classes) - 1])
    hit_N = generator.random(images) < np.linspace(0.9, 0.2, classes)[label_N]
    return hit_N, np.where(generator.random(images) < 0.7, hit_N, generator.random(images) < 0.4), label_N


def _covered(truth, draw):
    """How often an interval holds the truth."""
    generator = np.random.default_rng(99)
    intervals = [draw(generator) for _ in range(DRAWS)]
    return np.mean([interval.low <= truth <= interval.high for interval in intervals])


@pytest.mark.parametrize(
    ("hits", "of", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_a_rate_has_wilsons_interval(hits, of, low, high):
    """Table I, method 3 of Newcombe, Statistics in Medicine 17, 1998, p. 857."""
    for found in (wilson(hits / of, of), hit_rate(np.arange(of) < hits)):
        assert found == pytest.approx((hits / of, low, high), abs=6e-5)


def test_all_hits_are_not_sure_and_no_hit_is_not_hopeless():
    assert hit_rate(np.ones(20, bool)) == pytest.approx((1, 0.8389, 1), abs=1e-4)
    label_N = np.arange(20) // 2
    assert mean_per_class_recall(np.ones(20, bool), label_N) == pytest.approx((1, 0.8389, 1), abs=1e-4)
    assert mean_per_class_recall(np.zeros(20, bool), label_N).high == pytest.approx(0.1611, abs=1e-4)
    image_T = np.repeat(np.arange(20), 5)  # 100 captions of 20 images say no more than 20
    assert clustered_rate(np.ones(100, bool), image_T).low == pytest.approx(0.8389, abs=1e-4)
    alike = np.ones(20, bool)
    assert parity_gap(alike, alike).low < -0.1


def test_the_gap_of_two_rates_has_newcombes_interval():
    """Newcombe, Statistics in Medicine 17, 1998, p. 2635, Table II: 36 right in both, 12 in one, 2 in the other."""
    reference_N = np.arange(50) < 48
    other_N = (np.arange(50) < 36) | (np.arange(50) >= 48)
    found = parity_gap(reference_N, other_N)
    assert found == pytest.approx((0.2, 0.0569, 0.3404), abs=1e-4)


def test_recall_of_equally_many_images_of_each_class_is_as_sure_as_a_rate():
    """Where all classes have the same rate and number, it is the rate of all images."""
    label_N = np.arange(400) // 100
    hit_N = np.arange(400) % 100 < 60
    assert mean_per_class_recall(hit_N, label_N) == pytest.approx(hit_rate(hit_N), abs=2e-3)


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(3)
    label_N = np.repeat(np.arange(40), generator.integers(1, 9, 40))  # 1 to 8 images of a class
    rate_C = np.linspace(0.95, 0.3, 40)
    image_T = np.repeat(np.arange(100), 5)

    def recall(draw):
        return mean_per_class_recall(draw.random(len(label_N)) < rate_C[label_N], label_N)

    def gap(draw):
        hit_N = draw.random(len(label_N)) < rate_C[label_N]
        other_N = np.where(draw.random(len(label_N)) < 0.7, hit_N, draw.random(len(label_N)) < 0.4)
        return parity_gap(hit_N, other_N, label_N)

    def questions(draw):
        """Five about each image, one of which both models answer alike more often than not."""
        right_T, other_T = (draw.random(500) < draw.beta(2, 2, 100)[image_T] for _ in range(2))
        return parity_gap(right_T, np.where(draw.random(500) < 0.5, right_T, other_T), cluster_N=image_T)

    def captions(draw):
        return clustered_rate(draw.random(500) < draw.beta(2, 2, 100)[image_T], image_T)

    covered = {
        "rate": _covered(0.7, lambda draw: hit_rate(draw.random(200) < 0.7)),
        "recall": _covered(rate_C.mean(), recall),
        "gap": _covered((0.3 * rate_C - 0.3 * 0.4).mean(), gap),
        "gap of questions": _covered(0.0, questions),
        "captions": _covered(0.5, captions),
        "median": _covered(0.0, lambda draw: median(draw.normal(size=101))),
    }
    assert all(0.91 <= share <= 0.98 for share in covered.values()), covered


def test_what_has_no_formula_is_resampled():
    """Of a rate the percentile bootstrap and the normal interval agree for many images."""
    hit_N = np.arange(2_000) % 10 < 3

    def found_with(seed: int) -> Interval:
        drawn_RN = bootstrap_weights(len(hit_N), seed=seed)
        return resampled(hit_N.mean(), drawn_RN @ hit_N / len(hit_N))

    found = found_with(0)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 2_000)
    assert found == pytest.approx((0.3, 0.3 - half, 0.3 + half), abs=3e-3)
    assert found == found_with(0)
    assert found != found_with(1)


def test_the_paired_interval_is_narrower_than_two_separate_ones_would_make_it():
    english_N, other_N, _ = _outcomes(images=400)
    gap, english, other = parity_gap(english_N, other_N), hit_rate(english_N), hit_rate(other_N)
    separate = math.hypot(english.high - english.low, other.high - other.low)
    assert gap.high - gap.low < 0.8 * separate
    assert parity_gap(english_N, english_N).value == 0


def test_median_by_hand():
    """Of 101 numbers 0 to 100: Wilson's interval of 1/2 is 0.4043 to 0.5957."""
    assert median(np.random.default_rng(0).permutation(101)) == pytest.approx((50, 40.43, 59.57), abs=0.02)
    assert median(np.array([7.0])).value == 7


def test_recall_is_that_of_scikit_learn():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(4)
    label_N, predicted_N = generator.integers(0, 6, 200), generator.integers(0, 7, 200)
    recall = mean_per_class_recall(label_N == predicted_N, label_N).value
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert recall == pytest.approx(sklearn_metrics.balanced_accuracy_score(label_N, predicted_N), abs=1e-12)


def test_chance_is_taken_out():
    corrected = chance_corrected(Interval(0.55, 0.1, 1.0), 0.1)
    np.testing.assert_allclose(corrected, (0.5, 0, 1), atol=1e-12)
    assert np.isnan(chance_corrected(Interval(1, 1, 1), 1.0)).all()  # one class: nothing to be right about


def test_nothing_has_no_number():
    none = np.zeros(0, dtype=bool)
    labels = np.zeros(0, dtype=int)
    for interval in (
        hit_rate(none),
        clustered_rate(none, labels),
        mean_per_class_recall(none, labels),
        parity_gap(none, none),
        parity_gap(none, none, labels),
        median(none),
        resampled(np.nan, np.full(5, np.nan)),
    ):
        assert np.isnan(interval).all()
