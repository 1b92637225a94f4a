"""Multi-label classification: mean average precision over classes of which an image may show several.

Shape letters: N images, M of those that are scored, C classes, D of them candidates, R resamples.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from indiclip.evals.protocols.metrics import Interval, bootstrap_weights, resampled
from indiclip.evals.protocols.protocol import Protocol
from indiclip.evals.results import Score

if TYPE_CHECKING:
    from indiclip.evals.card_scorer import CardScorer
    from indiclip.evals.images.items import Items


class MultiLabel(Protocol):
    """Mean average precision of the cosines with the classes' prompts, in every language.

    It is the mean over the classes that any image shows. Column `classes` of a table has an image's classes with `;`
    between them, and is empty where there is none. Intervals are the main setting's alone: they are resampled.
    """

    name = "multi_label"
    required_fields = frozenset({"classes"})
    metrics = ("mean_average_precision",)

    def check(self, items: "Items") -> None:
        _truth(items)

    def shown_classes(self, items: "Items") -> set[int]:
        return set(np.flatnonzero(_truth(items)[items.tested_N].any(0)).tolist())

    def run(self, scorer: "CardScorer") -> Iterator[Score]:
        truth_NC = _truth(scorer.items)
        for language in scorer.languages:
            truth_MD = truth_NC[scorer.tested][:, language.class_D]
            shown_D = truth_MD.any(0)
            if not shown_D.any():
                continue
            cosines = scorer.image_NE[scorer.tested] @ scorer.class_embeddings(language).T
            cosine_MD, truth_MD = cosines.nan_to_num(nan=-1).numpy()[:, shown_D], truth_MD[:, shown_D]
            weights = np.ones((1, len(truth_MD)))
            if scorer.setting.main:
                options = scorer.options
                weights = np.concatenate([weights, bootstrap_weights(len(truth_MD), options.resamples, options.seed)])
            precision_RD = np.stack(
                [average_precision(cosine_MD[:, d], truth_MD[:, d], weights) for d in range(truth_MD.shape[1])], axis=1
            )
            counts_RD = ~np.isnan(precision_RD)
            with np.errstate(invalid="ignore"):  # a resample of few images may show no class
                mean_R = np.nansum(precision_RD, axis=1) / counts_RD.sum(axis=1)
            value = resampled(mean_R[0], mean_R[1:]) if scorer.setting.main else Interval(mean_R[0], np.nan, np.nan)
            # Of any order of the images it is the share of those that show the class, nearly.
            chance = {self.metrics[0]: float(truth_MD.mean())}
            sizes = (len(truth_MD), int(shown_D.sum()))
            yield from scorer.rows(self.name, language.code, {self.metrics[0]: value}, *sizes, chance)


def average_precision(score_M: np.ndarray, truth_M: np.ndarray, weight_RM: np.ndarray) -> np.ndarray:
    """The area under the steps of precision over recall, as scikit-learn's `average_precision_score` defines it.

    Args:
        score_M: Any numbers; images with equal ones are found together.
        truth_M: bool.
        weight_RM: How often each image counts, in each of several computations.

    Returns:
        float64 (R,); NaN where no image that counts is true.
    """
    order = np.argsort(-score_M, kind="stable")
    score_M, truth_M, weight_RM = score_M[order], truth_M[order], weight_RM[:, order]
    last_M = np.searchsorted(-score_M, -score_M, side="right") - 1  # of those with the same score
    found_RM = np.cumsum(weight_RM, axis=1)[:, last_M[truth_M]]
    true_RM = np.cumsum(weight_RM * truth_M, axis=1)[:, last_M[truth_M]]
    own_RM = weight_RM[:, truth_M]
    with np.errstate(invalid="ignore"):
        precision_RM = np.where(own_RM > 0, true_RM / np.maximum(found_RM, 1e-12), 0.0)
        return np.asarray((own_RM * precision_RM).sum(1) / own_RM.sum(1))


def _truth(items: "Items") -> np.ndarray:
    """Which image shows which class, bool (N, C).

    Raises:
        ValueError: A name that is no class of the card; names the image.
    """
    truth_NC = np.zeros((len(items), len(items.card.classes)), bool)
    for image, (key, cells) in enumerate(zip(items.keys, items.columns["classes"], strict=True)):
        for name in ";".join(cells).split(";"):
            if name.strip():
                try:
                    truth_NC[image, items.card.check_place(name.strip(), f"{key}: classes")] = True
                except ValueError as error:
                    raise ValueError(f"{error}; expected names with `;` between them") from error
    return truth_NC
