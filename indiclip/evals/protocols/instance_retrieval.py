"""Instance retrieval: the images of the same thing, not only of its kind, that are nearest to an image.

Shape letters: Q queries, X images of the index, K nearest.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from indiclip.evals.protocols.cosines import ROUNDING, chunks, truncate_normalize
from indiclip.evals.protocols.metrics import Interval, mean_rate
from indiclip.evals.protocols.protocol import Protocol
from indiclip.evals.results import IMAGES, Score

if TYPE_CHECKING:
    from indiclip.evals.card_scorer import CardScorer
    from indiclip.evals.images.items import Items

LENGTH = 64  # numbers that the universal embedding challenge allows (Google, 2022; ILIAS, arXiv 2502.11748, likewise)
TOP = 5


class InstanceRetrieval(Protocol):
    """mP@5 of the universal embedding challenge: the mean over the queries of the hits among the first min(n, 5)
    images, divided by min(n, 5), where the index has n images of the query's instance. The nearest come first, by
    Euclidean distance.

    Column `instance` of a table (or the folder) tells which images show the same thing. The index are the images of the
    split `train`, the queries the others; a query of which the index has no image is not counted. `mp5` is of
    embeddings of unit length, `mp5_64` of the first 64 numbers of the full ones, made unit length again.
    """

    name = "instance_retrieval"
    required_fields = frozenset({"instance"})
    metrics = ("mp5_64", "mp5")
    embeds_text = False
    uses_gallery = True
    candidates = "images"

    def check(self, items: "Items") -> None:
        for key, cells in zip(items.keys, items.columns["instance"], strict=True):
            if not cells[0]:
                raise ValueError(f"{key}: instance: found nothing; expected a name of what the image shows")
        if items.is_train is None:
            raise ValueError(f"{items.card.id}: no images of the split train; they are the index that queries look in")

    def run(self, scorer: "CardScorer") -> Iterator[Score]:
        instances = [cells[0] for cells in scorer.items.columns["instance"]]
        _, instance_N = np.unique(instances, return_inverse=True)
        index = np.flatnonzero(~scorer.items.tested_N)
        count_Q = np.bincount(instance_N[index], minlength=instance_N.max() + 1)[instance_N[scorer.tested]]
        queries = scorer.tested[count_Q > 0]
        if not len(queries):
            return
        spaces = {"mp5": scorer.image_NE}
        if scorer.setting.length == scorer.lengths[-1]:
            spaces["mp5_64"] = truncate_normalize(scorer.image_NE, min(LENGTH, scorer.image_NE.shape[1]))
        values = {
            metric: _mean_precision(image_NE[queries], image_NE[index], instance_N[queries], instance_N[index])
            for metric, image_NE in spaces.items()
        }
        chances = dict.fromkeys(values, float((count_Q[count_Q > 0] / len(index)).mean()))
        yield from scorer.rows(self.name, IMAGES, values, len(queries), len(index), chances)


def _mean_precision(query_QE: Tensor, index_XE: Tensor, instance_Q: np.ndarray, instance_X: np.ndarray) -> Interval:
    of_query, of_index = torch.from_numpy(instance_Q), torch.from_numpy(instance_X)
    precision_Q = torch.zeros(len(query_QE), dtype=torch.float64)
    for part in chunks(len(query_QE), len(index_XE)):
        # Of unit vectors the squared distance is 2 - 2 cosines. Ties count against what is right, as NaN does.
        right_BX = of_query[part, None] == of_index
        near_BX = (query_QE[part] @ index_XE.T - ROUNDING * right_BX).nan_to_num(nan=2.0)
        near_BX[right_BX & (near_BX == 2.0)] = -2.0
        top_BK = near_BX.topk(min(TOP, len(index_XE)), dim=1).indices
        most_B = right_BX.sum(1).clamp(max=TOP)
        counts_BK = torch.arange(top_BK.shape[1]) < most_B[:, None]
        precision_Q[part] = (right_BX.gather(1, top_BK) & counts_BK).sum(1) / most_B
    return mean_rate(precision_Q.numpy()[:, None])
