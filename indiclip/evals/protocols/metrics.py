"""What a benchmark reports: accuracies and medians with intervals, and the gap between languages.

Intervals are 95% percentile intervals of the plain bootstrap over images (Efron and Tibshirani, An Introduction to the
Bootstrap, chapter 13): N images drawn with replacement, 1,000 times, from a fixed seed. What is computed of an image
here is one of few cells (its class, hit or miss), and how often the cells occur in a resample is multinomial. So the
counts are drawn and not the images: the same distribution, at a cost that does not grow with N.

They tell how sure the number is for this model and other images of this kind. Two models or languages on the same
images differ by far less than their intervals suggest: compare those with `parity_gap`.

Where all images are hit, or none, they are in a resample too, and the interval is a point. It does not say that one can
be sure: with N images and no miss, up to 3 / N of others may be missed (Hanley and Lippman-Hand, JAMA 249, 1983).

Shape letters: N images, T captions, C classes, S cells that occur, R resamples.
"""

import math
from typing import Literal, NamedTuple

import numpy as np

RESAMPLES, SEED = 1000, 0
_PERCENTILES = (2.5, 97.5)

Average = Literal["images", "classes"]


class Interval(NamedTuple):
    """A number and its 95% interval; all NaN where there is nothing to compute it from."""

    value: float
    low: float
    high: float


def hit_rate(hit_N: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """Share of hits."""
    if (count := len(hit_N)) == 0:
        return _NOTHING
    value = float(np.mean(hit_N))
    return _interval(value, np.random.default_rng(seed).binomial(count, value, resamples) / count)


def caption_hit_rate(hit_T: np.ndarray, image_T: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """Share of hits among captions, of which an image may have several.

    Images are drawn, each with all its captions: these are right or wrong together more often than those of different
    images, and drawn one by one they would promise an interval that is too narrow.

    Args:
        hit_T: bool.
        image_T: The image of each caption, >= 0.
    """
    if len(hit_T) == 0:
        return _NOTHING
    hits, captions = np.bincount(image_T, weights=hit_T), np.bincount(image_T)
    cells_2S, count_S = np.unique(np.stack([hits, captions])[:, captions > 0], axis=1, return_counts=True)
    drawn_RS = np.random.default_rng(seed).multinomial(count_S.sum(), count_S / count_S.sum(), resamples)
    hits_R, captions_R = cells_2S @ drawn_RS.T
    return _interval(float(np.mean(hit_T)), hits_R / captions_R)


def mean_per_class_recall(
    hit_N: np.ndarray, label_N: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """Mean over the classes of the share of hits among their images, also called balanced accuracy.

    Classes without images are left out, in a resample too.

    Args:
        hit_N: bool.
        label_N: Class of each, >= 0.
    """
    return _mean_over_classes(np.asarray(hit_N, dtype=np.int64), label_N, resamples, seed)


def parity_gap(
    reference_hit_N: np.ndarray,
    hit_N: np.ndarray,
    label_N: np.ndarray,
    average: Average = "images",
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """By how much a reference (English) is better than another language on the same images.

    Each resample draws images, and with an image what both make of it. That is the paired bootstrap: its interval is
    that of the difference, where both being right on easy images and wrong on hard ones cancels out.

    Args:
        reference_hit_N: bool, what English gets right.
        hit_N: bool, what the other language gets right, image by image, with the same candidate classes.
        label_N: Class of each, >= 0.
        average: Difference of the accuracies over all images, or of the mean per-class recalls.

    Raises:
        ValueError: The images are not the same.
    """
    reference, other = np.asarray(reference_hit_N, dtype=np.int64), np.asarray(hit_N, dtype=np.int64)
    if not len(reference) == len(other) == len(label_N):
        raise ValueError(f"{len(reference)} hits, {len(other)} hits, {len(label_N)} labels: expected the same images")
    labels = np.zeros_like(other) if average == "images" else label_N
    return _mean_over_classes(reference - other, labels, resamples, seed)


def chance_corrected(interval: Interval, chance: float) -> Interval:
    """0 for guessing and 1 for perfection: (accuracy - chance) / (1 - chance), Cohen's kappa for uniform guesses."""
    return Interval(*((number - chance) / (1 - chance) if chance < 1 else math.nan for number in interval))


def bootstrap_median(values_N: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """Median of any numbers.

    The order statistics of N uniform numbers are beta-distributed, and a resample draws from the sorted values the
    places floor(N u). So the middle place, or the middle two, are drawn directly, which is the plain bootstrap.
    """
    values, generator = np.sort(np.asarray(values_N, dtype=np.float64)), np.random.default_rng(seed)
    if (count := len(values)) == 0:
        return _NOTHING
    middle = (count + 1) // 2  # from 1
    lower = generator.beta(middle, count - middle + 1, resamples)
    upper = lower
    if count % 2 == 0:  # of the count - middle numbers above, the lowest
        upper = lower + (1 - lower) * generator.beta(1, count - middle, resamples)
    low_R, high_R = (values[np.minimum((count * u).astype(np.int64), count - 1)] for u in (lower, upper))
    return _interval(float(np.median(values)), (low_R + high_R) / 2)


_NOTHING = Interval(math.nan, math.nan, math.nan)


def _interval(value: float, resampled_R: np.ndarray) -> Interval:
    low, high = np.percentile(resampled_R, _PERCENTILES)
    return Interval(value, float(low), float(high))


def _mean_over_classes(gain_N: np.ndarray, label_N: np.ndarray, resamples: int, seed: int) -> Interval:
    """Mean over the classes that occur of their images' mean gain, which is 1, 0 or -1 for each, and its interval."""
    if not len(gain_N):
        return _NOTHING
    classes, class_N = np.unique(np.asarray(label_N, dtype=np.int64), return_inverse=True)
    cell_N = (gain_N - 1) % 3 * len(classes) + class_N  # of gain 1, then of -1, then of 0
    count_S = np.bincount(cell_N, minlength=3 * len(classes))
    occurs_S = count_S > 0
    counts = np.zeros((1 + resamples, len(count_S)), dtype=np.int64)
    counts[0], share_S = count_S, count_S[occurs_S] / len(gain_N)
    counts[1:, occurs_S] = np.random.default_rng(seed).multinomial(len(gain_N), share_S, resamples)
    up, down, same = np.moveaxis(counts.reshape(-1, 3, len(classes)), 1, 0)
    whole = up + down + same
    mean_R = ((up - down) / np.maximum(whole, 1)).sum(-1) / (whole > 0).sum(-1)
    return _interval(float(mean_R[0]), mean_R[1:])
