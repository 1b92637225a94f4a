"""Metrics against scikit-learn, and intervals against the plain bootstrap: items drawn one by one."""

import math

import numpy as np
import pytest

from indiclip.evals.protocols.metrics import (
    Interval,
    bootstrap_median,
    caption_hit_rate,
    chance_corrected,
    hit_rate,
    mean_per_class_recall,
    parity_gap,
)

# Each end of an interval from 20,000 resamples, of a statistic whose standard deviation is s, is itself off by about
# s * sqrt(0.025 * 0.975 / 20,000) / 0.058 = 0.02 s (0.058: the normal density there). Ours and the oracle's differ by
# less than 5 times sqrt(2) of that, plus one step of a statistic that moves in steps.
RESAMPLES, MARGIN = 20_000, 0.14


def _outcomes(images=120, classes=7, seed=0):
    """Classes of 1 to some 40 images, hits that depend on the class, and another model's that depend on the hits."""
    generator = np.random.default_rng(seed)
    label_N = np.concatenate([np.arange(classes), generator.geometric(0.4, images - classes).clip(max=classes) - 1])
    hit_N = generator.random(images) < np.linspace(0.9, 0.2, classes)[label_N]
    return hit_N, np.where(generator.random(images) < 0.7, hit_N, generator.random(images) < 0.4), label_N


def _check(interval, value, statistic, images, step):
    """Against resampling the images themselves."""
    generator = np.random.default_rng(99)
    draws = np.array([statistic(generator.integers(0, images, images)) for _ in range(RESAMPLES)])
    assert interval.value == pytest.approx(value, abs=1e-12)
    tolerance = MARGIN * draws.std() + step
    np.testing.assert_allclose(interval[1:], np.percentile(draws, [2.5, 97.5]), rtol=0, atol=tolerance)


def _recall(hit_N, label_N):
    return np.mean([hit_N[label_N == c].mean() for c in np.unique(label_N)])


def test_hit_rate_has_the_interval_of_the_plain_bootstrap():
    hit_N, _, _ = _outcomes()
    interval = hit_rate(hit_N, resamples=RESAMPLES)
    _check(interval, hit_N.mean(), lambda drawn: hit_N[drawn].mean(), len(hit_N), 1 / len(hit_N))


def test_captions_have_the_interval_of_the_bootstrap_over_their_images():
    generator = np.random.default_rng(5)
    image_T = generator.permutation(np.repeat(np.arange(150), generator.integers(1, 6, 150)))
    hit_T = generator.random(len(image_T)) < generator.random(150)[image_T]  # some images are easier than others
    hits, captions = np.bincount(image_T, hit_T), np.bincount(image_T)
    interval = caption_hit_rate(hit_T, image_T * 3, resamples=RESAMPLES)  # numbers need not be without gaps
    _check(interval, hit_T.mean(), lambda drawn: hits[drawn].sum() / captions[drawn].sum(), 150, 0)
    alone = hit_rate(hit_T)
    assert interval.high - interval.low > 1.2 * (alone.high - alone.low)


def test_mean_per_class_recall_has_the_interval_of_the_plain_bootstrap():
    hit_N, _, label_N = _outcomes()
    interval = mean_per_class_recall(hit_N, label_N, resamples=RESAMPLES)
    _check(interval, _recall(hit_N, label_N), lambda d: _recall(hit_N[d], label_N[d]), len(hit_N), 0)


@pytest.mark.parametrize("average", ["images", "classes"])
def test_parity_gap_has_the_interval_of_the_paired_bootstrap(average):
    english_N, other_N, label_N = _outcomes()
    of = {"images": lambda hit_N, label_N: hit_N.mean(), "classes": _recall}[average]
    interval = parity_gap(english_N, other_N, label_N, average, resamples=RESAMPLES)
    value = of(english_N, label_N) - of(other_N, label_N)
    step = 1 / len(label_N) if average == "images" else 0
    _check(interval, value, lambda d: of(english_N[d], label_N[d]) - of(other_N[d], label_N[d]), len(label_N), step)


def test_the_paired_interval_is_narrower_than_two_separate_ones_would_make_it():
    english_N, other_N, label_N = _outcomes(images=400)
    gap, english, other = parity_gap(english_N, other_N, label_N), hit_rate(english_N), hit_rate(other_N)
    separate = math.hypot(english.high - english.low, other.high - other.low)
    assert gap.high - gap.low < 0.8 * separate
    assert parity_gap(english_N, english_N, label_N) == Interval(0, 0, 0)


def test_parity_of_different_images_is_an_error():
    with pytest.raises(ValueError, match="3 hits, 2 hits, 3 labels"):
        parity_gap([True] * 3, [True] * 2, [0] * 3)


@pytest.mark.parametrize("images", [1, 2, 7, 8, 41, 150])
def test_median_has_the_interval_of_the_plain_bootstrap(images):
    values_N = np.random.default_rng(images).permutation(np.arange(images)) ** 2.0
    interval = bootstrap_median(values_N, resamples=RESAMPLES)
    step = np.diff(np.sort(values_N)).max(initial=0)  # the statistic jumps from one value to the next
    _check(interval, np.median(values_N), lambda drawn: np.median(values_N[drawn]), images, step)


@pytest.mark.parametrize("images", [3, 4])
def test_median_of_few_numbers_has_its_exact_distribution(images):
    # All images^images resamples, enumerated.
    values_N = np.array([0.0, 1.0, 10.0, 100.0])[:images]
    every = np.stack(np.meshgrid(*[values_N] * images), -1).reshape(-1, images)
    exact, times = np.unique(np.median(every, axis=1), return_counts=True)
    drawn = []
    percentiles = np.percentile  # what it is called on is the resamples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "percentile", lambda x, q: drawn.append(x) or percentiles(x, q))
        bootstrap_median(values_N, resamples=200_000)
    found, counts = np.unique(drawn[0], return_counts=True)
    assert found.tolist() == exact.tolist()
    np.testing.assert_allclose(counts / 200_000, times / times.sum(), atol=0.005)  # 4.5 standard deviations


def test_the_same_seed_gives_the_same_interval():
    hit_N, other_N, label_N = _outcomes()
    for function in (
        lambda seed: hit_rate(hit_N, seed=seed),
        lambda seed: mean_per_class_recall(hit_N, label_N, seed=seed),
        lambda seed: parity_gap(hit_N, other_N, label_N, seed=seed),
        lambda seed: bootstrap_median(label_N + 0.1 * hit_N, seed=seed),
    ):
        assert function(0) == function(0)
        assert len({function(seed) for seed in range(5)}) > 1  # which of a statistic that moves in steps may agree


def test_an_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(3)
    intervals = [hit_rate(generator.random(200) < 0.7, seed=seed) for seed in range(400)]
    covered = np.mean([interval.low <= 0.7 <= interval.high for interval in intervals])
    assert 0.91 <= covered <= 0.98  # 0.95 less what steps of 1/200 cost; standard deviation 0.011


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
        caption_hit_rate(none, labels),
        mean_per_class_recall(none, labels),
        parity_gap(none, none, labels),
        bootstrap_median(none),
    ):
        assert np.isnan(interval).all()
