"""What a benchmark reports: rates and medians with 95% intervals, and the gap between languages.

A rate has Wilson's score interval (JASA 22, 1927), which is as wide as it should be where all images are hit, or none:
of 20 hits in 20 it begins at 0.84. Where images are not drawn one by one (captions of an image, images of classes that
weigh the same) its number of images is the effective one: that of single draws of which a rate would vary as much as
this one does (Korn and Graubard, Survey Methodology 24, 1998). The gap of two rates on the same images puts their
Wilson intervals together with their correlation (Newcombe, Statistics in Medicine 17, 1998, p. 2635, method 8; Zou and
Donner, ibid. 27, 2008, for any two estimates). What has no formula is resampled: 1,000 times from a fixed seed.

Intervals tell how sure the number is for this model and other images of this kind. Two models or languages on the same
images differ by far less than their intervals suggest: compare those with `parity_gap`.

Shape letters: N images, T captions, C classes, R resamples.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

RESAMPLES, SEED = 1000, 0
_PERCENTILES = (2.5, 97.5)
_Z = 1.959964  # the normal distribution's 97.5th percentile


class Interval(NamedTuple):
    """A number and its 95% interval; all NaN where there is nothing to compute it from."""

    value: float
    low: float
    high: float


_NOTHING = Interval(math.nan, math.nan, math.nan)


def wilson(rate: float, count: float, z: float = _Z) -> Interval:
    """A rate of so many draws, which need not be a whole number; `z` is the normal distribution's percentile."""
    middle = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(rate * (1 - rate) / count + (z / (2 * count)) ** 2) / (1 + z**2 / count)
    return Interval(rate, min(max(middle - half, 0.0), rate), max(min(middle + half, 1.0), rate))


def hit_rate(hit_N: np.ndarray) -> Interval:
    """Share of hits."""
    return wilson(float(np.mean(hit_N)), len(hit_N)) if len(hit_N) else _NOTHING


def clustered_rate(value_T: np.ndarray, cluster_T: np.ndarray) -> Interval:
    """Mean of numbers from 0 to 1 that come in clusters, which are drawn whole, such as the captions of an image: these
    are right or wrong together more often than others, and one by one they would promise too narrow an interval.

    Args:
        value_T: bool or float.
        cluster_T: The cluster of each, >= 0.
    """
    if len(value_T) == 0:
        return _NOTHING
    rate = float(np.mean(value_T))
    sizes = np.bincount(cluster_T)
    sums, sizes = np.bincount(cluster_T, weights=value_T)[sizes > 0], sizes[sizes > 0]
    variance = np.square(sums - rate * sizes).sum() / len(value_T) ** 2  # of a ratio of sums (Cochran 1977, 6.13)
    others = max(len(sizes) - 1, 1)
    count = _effective(rate, variance * len(sizes) / others, len(sizes))
    if variance > 0:
        # Few clusters say little of the variance (Korn and Graubard).
        count *= (_Z / float(stdtrit(others, 0.975))) ** 2
    return wilson(rate, min(count, len(value_T)))


def mean_per_class_recall(hit_N: np.ndarray, label_N: np.ndarray) -> Interval:
    """Mean over the classes that have images of the share of hits among these, also called balanced accuracy.

    Args:
        hit_N: bool.
        label_N: Class of each, >= 0.
    """
    return _recall(hit_N, label_N) if len(hit_N) else _NOTHING


def parity_gap(
    reference_hit_N: np.ndarray,
    hit_N: np.ndarray,
    label_N: np.ndarray | None = None,
    cluster_N: np.ndarray | None = None,
) -> Interval:
    """By how much a reference (English) is better than another language on the same images.

    The interval is that of the difference, where both being right on easy images and wrong on hard ones cancels out.

    Args:
        reference_hit_N: bool, what English gets right.
        hit_N: bool, what the other language gets right, image by image, with the same candidate classes.
        label_N: Class of each, >= 0: the difference is that of the mean per-class recalls. None: of the accuracies.
        cluster_N: The cluster of each, >= 0, see `clustered_rate`: such as the image that several questions are about.
            None: each is drawn alone, as it is of classes.
    """
    assert label_N is None or cluster_N is None
    if not len(hit_N):
        return _NOTHING
    if label_N is not None:
        reference, other = _recall(reference_hit_N, label_N), _recall(hit_N, label_N)
    elif cluster_N is not None:
        reference, other = clustered_rate(reference_hit_N, cluster_N), clustered_rate(hit_N, cluster_N)
    else:
        reference, other = hit_rate(reference_hit_N), hit_rate(hit_N)
    both = 2 * _correlation(reference_hit_N, hit_N, label_N, cluster_N)
    gap = reference.value - other.value

    def half(one: float, two: float) -> float:
        return math.sqrt(max(one**2 - both * one * two + two**2, 0.0))

    low = gap - half(reference.value - reference.low, other.high - other.value)
    return Interval(gap, low, gap + half(reference.high - reference.value, other.value - other.low))


def mean_rate(value_ND: np.ndarray, counts_ND: np.ndarray | None = None) -> Interval:
    """Mean of numbers from 0 to 1, of each image several, such as the hits of probes that learned from other draws.

    The images vary as well as the draws: the variance is the sum of both means' variances.

    Args:
        value_ND: bool or float.
        counts_ND: bool, which of them count; None: all.
    """
    counts = np.ones(value_ND.shape, bool) if counts_ND is None else counts_ND
    if not counts.any():
        return _NOTHING
    sums = np.where(counts, value_ND, 0).astype(np.float64)
    rate = float(sums.sum() / counts.sum())
    variance = sum(
        float(np.square(sums.sum(axis) - rate * counts.sum(axis)).sum()) / counts.sum() ** 2
        for axis in (0, 1)
        if counts.shape[1 - axis] > 1
    )
    return wilson(rate, min(_effective(rate, variance, len(value_ND)), float(counts.sum())))


def mean(values_N: np.ndarray) -> Interval:
    """Mean of any numbers, with the normal interval."""
    if not len(values_N):
        return _NOTHING
    middle, half = float(values_N.mean()), _Z * float(values_N.std(ddof=1)) / math.sqrt(len(values_N))
    return Interval(middle, middle - half, middle + half)


def chance_corrected(interval: Interval, chance: float) -> Interval:
    """0 for guessing and 1 for perfection: (accuracy - chance) / (1 - chance), Cohen's kappa for uniform guesses."""
    return Interval(*((number - chance) / (1 - chance) if chance < 1 else math.nan for number in interval))


def median(values_N: np.ndarray) -> Interval:
    """Median of any numbers; the ends are the values that Wilson's interval of one half leads to (Woodruff, JASA 47,
    1952).
    """
    if not len(values_N):
        return _NOTHING
    _, *ends = wilson(0.5, len(values_N))
    middle, low, high = np.quantile(np.asarray(values_N, np.float64), [0.5, *ends])
    return Interval(float(middle), float(low), float(high))


def bootstrap_weights(count: int, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """How often each of `count` images is in each resample of the plain bootstrap, int64 (R, N): Efron and Tibshirani,
    An Introduction to the Bootstrap, chapter 13.
    """
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)


def resampled(value: float, drawn_R: np.ndarray) -> Interval:
    """A number with the percentile interval of its resamples; NaN among these are left out."""
    low, high = np.nanpercentile(drawn_R, _PERCENTILES) if np.isfinite(drawn_R).any() else (math.nan, math.nan)
    return Interval(float(value), float(low), float(high))


def _effective(rate: float, variance: float, most: float) -> float:
    """Single draws of which the rate varies as much; `most` where it does not vary."""
    return rate * (1 - rate) / variance if variance > 0 else most


def _recall(hit_N: np.ndarray, label_N: np.ndarray) -> Interval:
    """Mean recall of the classes that occur.

    A class's own rate, from which its part of the variance comes, counts one image more that has the mean rate: a class
    whose few images are all hit is not taken for one that is sure. Were all rates alike, rate * (1 - rate) of that
    would be too small by the factor 1 - n / (n + 1)^2, on average.
    """
    classes, class_N, count_C = np.unique(label_N, return_inverse=True, return_counts=True)
    hits_C = np.bincount(class_N, weights=hit_N)
    rate = float((hits_C / count_C).mean())
    smooth_C = (hits_C + rate) / (count_C + 1)
    variance_C = smooth_C * (1 - smooth_C) / (1 - count_C / (count_C + 1) ** 2) / count_C
    variance = variance_C.sum() / len(classes) ** 2
    return wilson(rate, _effective(rate, variance if 0 < rate < 1 else 0.0, len(classes) ** 2 / (1 / count_C).sum()))


def _correlation(
    one_N: np.ndarray, other_N: np.ndarray, label_N: np.ndarray | None, cluster_N: np.ndarray | None
) -> float:
    """Of the two mean recalls, over draws of the images of each class, or of the two accuracies."""
    label_N = np.zeros(len(one_N), np.int64) if label_N is None else label_N
    _, class_N, count_C = np.unique(label_N, return_inverse=True, return_counts=True)

    def deviations(hit_N: np.ndarray) -> np.ndarray:
        """What each draw adds to the mean recall, less what it adds on average."""
        recall_C = np.bincount(class_N, weights=hit_N) / count_C
        deviation_N = (hit_N - recall_C[class_N]) / count_C[class_N]
        return deviation_N if cluster_N is None else np.bincount(cluster_N, weights=deviation_N)

    one, other = deviations(one_N), deviations(other_N)
    variances = float(one @ one) * float(other @ other)
    return float(one @ other) / math.sqrt(variances) if variances > 0 else 0.0
