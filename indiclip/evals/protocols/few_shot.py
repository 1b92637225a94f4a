"""Few-shot probes: a linear classifier that learns from 1, 2, 4, 8 and 16 images of each class.

Shape letters: N images, D draws, S sizes of a draw, C classes, E embedding length.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from indiclip.datasets.tables import stable_hash
from indiclip.evals.protocols import logistic
from indiclip.evals.protocols.metrics import mean_rate
from indiclip.evals.protocols.probes import INVERSE_PENALTY
from indiclip.evals.protocols.protocol import Protocol
from indiclip.evals.results import IMAGES, Score

if TYPE_CHECKING:
    from indiclip.evals.card_scorer import CardScorer

SHOTS = (1, 2, 4, 8, 16)  # CLIP's, arXiv 2103.00020, figure 6


class FewShot(Protocol):
    """Accuracy of the linear probe (see `probes.linear_probe`) after so many images of each class: a mean over draws.

    The images are drawn by the hash of their keys, from the gallery or, where there is none, from those that are
    scored, which a draw then does without. A larger draw holds the smaller ones. A class with fewer gives all it has.

    Args:
        shots: Images of each class.
        draws: How often they are drawn.
        inverse_penalty: scikit-learn's C.
    """

    name = "few_shot"
    embeds_text = False
    uses_gallery = True
    is_probe = True

    def __init__(self, shots: Sequence[int] = SHOTS, draws: int = 3, inverse_penalty: float = INVERSE_PENALTY) -> None:
        if draws < 1 or not shots or min(shots) < 1:
            raise ValueError(f"shots={list(shots)}, draws={draws}: expected 1 or more of each")
        self.shots, self.draws, self.inverse_penalty = tuple(shots), draws, inverse_penalty
        self.metrics = tuple(f"acc1_{count}_shot{'s' * (count > 1)}" for count in self.shots)

    def run(self, scorer: "CardScorer") -> Iterator[Score]:
        items, image_NE = scorer.items, scorer.image_NE
        finite_N = image_NE.isfinite().all(1).numpy()
        can_teach_N = (items.labels >= 0) & finite_N & (True if items.is_train is None else items.is_train)
        order_DN = np.array([_order(items.keys, items.labels, can_teach_N, draw) for draw in range(self.draws)])
        class_C, index_N = np.unique(items.labels[can_teach_N], return_inverse=True)
        asked = np.flatnonzero(items.tested_N & np.isin(items.labels, class_C))
        if len(class_C) < 2 or not len(asked):
            return
        drawn_SDN = np.array([order_DN < shots for shots in self.shots])
        train_FG = torch.from_numpy(drawn_SDN[..., can_teach_N].reshape(len(self.shots) * self.draws, -1))
        gallery_GE = image_NE[torch.from_numpy(can_teach_N)]
        weight_FCE, bias_FC = logistic.fit(gallery_GE, torch.from_numpy(index_N), train_FG, self.inverse_penalty)

        answers = (image_NE[asked] @ weight_FCE.flatten(0, 1).T + bias_FC.flatten()).nan_to_num(nan=-torch.inf)
        hit_ASD = class_C[answers.view(len(asked), *drawn_SDN.shape[:2], -1).argmax(-1).numpy()]
        hit_ASD = (hit_ASD == items.labels[asked, None, None]) & finite_N[asked, None, None]
        is_asked_ASD = ~np.moveaxis(drawn_SDN[..., asked], -1, 0)
        for place, metric in enumerate(self.metrics):
            is_asked_AD = is_asked_ASD[:, place]
            values = {metric: mean_rate(hit_ASD[:, place], is_asked_AD)}
            num_scored = int(is_asked_AD.any(1).sum())  # without those that every draw learns from
            yield from scorer.rows(self.name, IMAGES, values, num_scored, len(class_C), {metric: 1 / len(class_C)})


def _order(keys: Sequence[str], label_N: np.ndarray, among_N: np.ndarray, draw: int) -> np.ndarray:
    """The place of each image among those of its class in a draw; beyond all others where it is not to be drawn."""
    hash_N = np.array([stable_hash(f"{draw} {key}") for key in keys], dtype=np.uint64)
    place_N = np.full(len(keys), np.iinfo(np.int64).max)
    for label in np.unique(label_N[among_N]):
        of_class = np.flatnonzero(among_N & (label_N == label))
        place_N[of_class[np.argsort(hash_N[of_class])]] = np.arange(len(of_class))
    return place_N
