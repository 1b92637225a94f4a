"""Does an arm differ from the control by more than two seeds do? Paired differences, seed by seed.

Two intervals of the mean difference, both of 95%:

- own: Student's t over this arm's differences, with one degree of freedom less than there are seeds. It assumes
  nothing of other arms, and with three seeds (t = 4.30) sees only what is large.
- pooled: the analysis of variance in blocks (Montgomery, Design and Analysis of Experiments, chapter 4): what is left
  of each number after its arm's and its seed's mean is taken away has the same spread in all arms. With A arms and S
  seeds it has (A - 1)(S - 1) degrees of freedom. It assumes that no arm varies more than the others.

Where seeds are folds, two runs learn from many of the same samples, and their differences are not independent. Then the
variance of a mean of S is not 1/S but 1/S + 1/(F - 1) of that of a difference, where F is the number of folds and
1/(F - 1) the share of what is tested to what is trained on (Nadeau and Bengio, Inference for the Generalization Error,
Machine Learning 52, 2003).

A p-value is corrected for the number of arms that are compared with the control by the same score (Holm, Scandinavian
Journal of Statistics 6, 1979); those of `seeds_of` count among themselves. Verdicts: `better` and `worse` where the
corrected p-value is below 0.05; `perhaps` where only the interval leaves out 0; else `no difference seen`, which is no
proof that there is none. `not judged`: there is no interval, as with one seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05
NO_DIFFERENCE, NOT_JUDGED = "no difference seen", "not judged"
Values = Mapping[int, float]  # seed -> score


@dataclass(frozen=True)
class Difference:
    """An arm less the control.

    Attributes:
        value: The mean.
        low: Of its 95% interval, NaN where there is none.
        high: Likewise.
        p: Of no difference, two-sided; NaN where there is no interval.
        num: Seeds that both have.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    num: int = 0

    def verdict(self, corrected_p: float, better: str) -> str:
        """What it says of the arm, see the module."""
        if not math.isfinite(self.p):
            return NOT_JUDGED
        if self.low <= 0 <= self.high:
            return NO_DIFFERENCE
        word = "better" if (self.value > 0) == (better == "higher") else "worse"
        return word if corrected_p < LEVEL else f"perhaps {word}"


def paired(arm: Values, control: Values, folds: int = 0) -> Difference:
    """By Student's t over the seeds that both have; `folds` where a seed is one of so many folds."""
    seeds = sorted(arm.keys() & control.keys())
    if not seeds:
        return Difference(math.nan)
    differences = np.array([arm[seed] - control[seed] for seed in seeds])
    spread = float(differences.std(ddof=1)) * _of_mean(len(seeds), folds) if len(seeds) > 1 else math.nan
    return _interval(float(differences.mean()), spread, len(seeds) - 1, len(seeds))


def _of_mean(num: int, folds: int) -> float:
    """The standard error of a mean of so many, as a share of the standard deviation of one."""
    return math.sqrt(1 / num + (1 / (folds - 1) if folds > 1 else 0.0))


def pooled(arms: Mapping[str, Values], differences: Mapping[str, Difference], folds: int = 0) -> dict[str, Difference]:
    """The differences with the spread that all arms have together.

    Args:
        arms: All of them, the control too; the spread is of the seeds that all have.
        differences: Arm -> its own.
        folds: Where a seed is one of so many folds.
    """
    seeds = sorted(set.intersection(*({*values} for values in arms.values())))
    y_AS = np.array([[values[seed] for seed in seeds] for values in arms.values()])
    freedom = (len(arms) - 1) * (len(seeds) - 1)
    if freedom < 1:
        return dict(differences)
    left_AS = y_AS - y_AS.mean(1, keepdims=True) - y_AS.mean(0) + y_AS.mean()
    variance = float(np.square(left_AS).sum()) / freedom
    return {
        arm: _interval(
            own.value, math.sqrt(2 * variance) * _of_mean(own.num, folds) if own.num else math.nan, freedom, own.num
        )
        for arm, own in differences.items()
    }


def _interval(value: float, spread: float, freedom: int, num: int) -> Difference:
    if freedom < 1 or not math.isfinite(value + spread):
        return Difference(value, num=num)
    if spread <= 1e-9 < abs(value):  # of scores in coarse steps: apart by one number in every seed is no certainty
        return Difference(value, num=num)
    if spread == 0:
        return Difference(value, value, value, 1.0, num)
    half = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * spread
    p = float(2 * stats.t.sf(abs(value) / spread, freedom))
    return Difference(value, value - half, value + half, p, num)


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected for their number; NaN, of comparisons that cannot be made, stay and do not count."""
    order = sorted((p, place) for place, p in enumerate(p_values) if math.isfinite(p))
    corrected, most = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        most = max(most, min(1.0, (len(order) - rank) * p))
        corrected[place] = most
    return corrected
