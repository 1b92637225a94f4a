"""Group gaps: how much better a model is for one group of images than for another, such as people of another age.

Shape letters: M images that are scored, G groups.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from indiclip.evals.protocols.metrics import Interval, hit_rate, wilson
from indiclip.evals.protocols.protocol import Protocol
from indiclip.evals.results import Score

if TYPE_CHECKING:
    from indiclip.evals.card_scorer import CardScorer

UNKNOWN = "not said"  # of images whose cell is empty; they count in no gap


class GroupGaps(Protocol):
    """Zero-shot accuracy for each group of images, `largest_gap_<column>` from the best to the worst of them, and
    `worst_group_<column>`, in every language.

    Each of the columns divides the images anew; a group is called `<column>=<cell>` in the scores.

    Args:
        by: Columns of the table beside `file` and `class`, such as [age, gender, skin_tone].
        least: Groups of fewer images have their accuracy, and count in no gap.
    """

    name = "group_gaps"

    def __init__(self, by: Sequence[str], least: int = 10) -> None:
        if isinstance(by, str) or not by or not all(isinstance(column, str) and column for column in by):
            raise ValueError(f"by: found {by!r}; expected a list of columns, such as [age, gender]")
        if least < 1:
            raise ValueError(f"least: found {least}; expected a whole number from 1")
        self.by, self.least = list(dict.fromkeys(by)), least
        self.required_fields = frozenset({"class", *self.by})
        self.metrics = tuple(f"{metric}_{column}" for column in self.by for metric in ("worst_group", "largest_gap"))

    def run(self, scorer: "CardScorer") -> Iterator[Score]:
        for language, ranking in scorer.rankings():
            hit_M, num_classes = ranking.rank_M == 0, len(language.class_D)
            chance = 1 / num_classes
            for column in self.by:
                cells = scorer.items.columns[column]
                group_M = np.array([cells[image][0] or UNKNOWN for image in ranking.image_M], dtype=object)
                hits = {str(group): hit_M[group_M == group] for group in sorted(set(group_M))}
                for group, of_group in hits.items():
                    values, subset = {"acc1": hit_rate(of_group)}, f"{column}={group}"
                    yield from scorer.rows(self.name, language.code, values, len(of_group), num_classes, chance, subset)
                known = [of for group, of in hits.items() if group != UNKNOWN and len(of) >= self.least]
                if len(known) > 1:
                    worst, gap = f"worst_group_{column}", largest_gap(known)
                    values = {worst: hit_rate(min(known, key=np.mean)), f"largest_gap_{column}": gap}
                    images = sum(map(len, known))
                    yield from scorer.rows(self.name, language.code, values, images, num_classes, {worst: chance})


def largest_gap(hits_G: Sequence[np.ndarray]) -> Interval:
    """The highest less the lowest of the groups' rates.

    Which groups these are is found on the same images, and the largest of many differences is large by chance alone. So
    each difference of two groups has an interval that holds for all of them at once (Newcombe, Statistics in Medicine
    17, 1998, p. 873, method 10, with Bonferroni's level), and the largest difference lies between the highest of their
    lower and the highest of their upper ends.

    Args:
        hits_G: bool, of the images of each group.
    """
    pairs = list(combinations(hits_G, 2))
    z = NormalDist().inv_cdf(1 - 0.05 / (2 * len(pairs)))
    gaps = []
    for pair in pairs:
        low, high = sorted(
            (wilson(float(np.mean(hit_M)), len(hit_M), z) for hit_M in pair), key=lambda rate: rate.value
        )
        gap = high.value - low.value
        under = math.hypot(high.value - high.low, low.high - low.value)
        gaps.append((gap, gap - under, gap + math.hypot(high.high - high.value, low.value - low.low)))
    value, lowest, highest = (max(ends) for ends in zip(*gaps, strict=True))
    return Interval(value, max(lowest, 0.0), highest)
