"""Zero-shot classification: the class whose prompts are nearest to the image.

Shape letters: N images, M of them scored, P prompts, C classes of a card, D of them candidates, R rivals of a class at
most, U other sets of candidates, K nearest classes, E embedding length.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from indiclip.evals.protocols.answers import TOP, Answered
from indiclip.evals.protocols.cosines import Floats, Integers, as_near, chunks, labels_of, num_near, truncate_normalize
from indiclip.evals.protocols.metrics import hit_rate, parity_gap
from indiclip.evals.protocols.protocol import Protocol
from indiclip.evals.protocols.retrieval import chances_at, recalls_at
from indiclip.evals.results import CLEAN, Score

if TYPE_CHECKING:
    from indiclip.evals.card_scorer import CardScorer


class Ranking(NamedTuple):
    """Where the right class of each image came, and the right images of each class.

    Attributes:
        image_M: int64, which images were scored, ascending: those whose class is a candidate.
        rank_M: int64, how many wrong candidates are at least as near as the right one; 0 is a hit.
        nearest_MK: int64, classes, nearest first; the first is the prediction.
        cosine_MK: float32, theirs.
        rivals_M: int64, how many candidates the image's class is confusable with.
        hard_hit_M: bool, the right class is nearer than all of these.
        class_rank_D: int64, for each candidate, how many images of other classes are at least as near to its text as
            the nearest of its own; -1 for a class without images.
        subset_rank_UM: int64, `rank_M` among each of other sets of candidates; without meaning for an image whose class
            is not in the set.
    """

    image_M: np.ndarray
    rank_M: np.ndarray
    nearest_MK: np.ndarray
    cosine_MK: np.ndarray
    rivals_M: np.ndarray
    hard_hit_M: np.ndarray
    class_rank_D: np.ndarray
    subset_rank_UM: np.ndarray


def class_embeddings(prompt_PE: Floats, class_P: Integers, num_classes: int, length: int | None = None) -> Tensor:
    """The mean of each class's prompts, each cut to `length` and of unit length, made a unit vector again.

    That is CLIP's prompt ensemble (arXiv 2103.00020, section 3.1.4) as OpenCLIP and clip-benchmark compute it.

    Args:
        prompt_PE: Prompts of all classes, in any order.
        class_P: The class of each prompt.
        num_classes: C.
        length: Cut the embeddings to this length; None keeps all.

    Returns:
        float32 (C, length).

    Raises:
        ValueError: A class without a prompt; a length that the embeddings do not have.
    """
    classes = labels_of(class_P)
    missing = np.setdiff1d(np.arange(num_classes), classes.numpy())
    if len(missing):
        raise ValueError(f"{len(missing)} of {num_classes} classes have no prompt, first number {missing[0]}")
    prompts = truncate_normalize(prompt_PE, length)
    sum_CE = torch.zeros(num_classes, prompts.shape[1]).index_add_(0, classes, prompts)
    return F.normalize(sum_CE, dim=-1)  # the sum has the direction of the mean


def rank_classes(
    image_NE: Floats,
    class_DE: Floats,
    label_N: Integers,
    classes: Integers | None = None,
    nearest: int = 5,
    confusable: Sequence[Sequence[int]] = (),
    subsets: Sequence[Integers] = (),
) -> Ranking:
    """Ranks the candidate classes for every image and the images for every class, in one product of both.

    Ties (to rounding, 1e-6) and NaN count against what is right, so a model that gives the same vector for everything
    scores 0, not chance.

    Args:
        image_NE: Images, of unit length and as long as the classes' embeddings (see `truncate_normalize`).
        class_DE: From `class_embeddings`; only one row for each candidate.
        label_N: Class of each image, -1 for none.
        classes: (D,) the class of each candidate, where not all classes are candidates (a language in which only some
            have names); images of the others are left out. None: row c is class c.
        nearest: K, at most; how many classes to report.
        confusable: For each of the C classes, the classes that it is confused with; those which are not candidates do
            not count.
        subsets: Other sets of candidates, each of some of `classes`.

    Raises:
        ValueError: The classes are not one for each row.
    """
    text_DE, labels = torch.as_tensor(class_DE, dtype=torch.float32), labels_of(label_N)
    class_D = torch.arange(len(text_DE)) if classes is None else labels_of(classes)
    if not len(text_DE) or not len(class_D) == len(torch.unique(class_D)) == len(text_DE):
        raise ValueError(f"classes={class_D.tolist()} for {len(text_DE)} rows of class embeddings: expected one each")
    column_N = _columns(class_D, labels)
    image_M = (column_N >= 0).nonzero()[:, 0]
    column_M = column_N[image_M]
    images = torch.as_tensor(image_NE, dtype=torch.float32)
    image_ME = images if len(image_M) == len(images) else images[image_M]

    k = min(nearest, len(text_DE))
    rival_DR = _rivals(class_D, confusable)
    in_subset_DU = torch.stack([torch.isin(class_D, labels_of(of)) for of in subsets], 1).float() if subsets else None
    right_M = _right_cosines(image_ME, text_DE, column_M)
    best_D = torch.full((len(text_DE),), -torch.inf).scatter_reduce_(0, column_M, right_M, "amax")
    own_M = column_M[as_near(right_M, best_D[column_M])]
    near_D = -torch.bincount(own_M, minlength=len(text_DE))  # but for a class's own images
    rank_M, hard_hit_M = torch.zeros_like(image_M), torch.zeros_like(image_M, dtype=torch.bool)
    subset_rank_UM = torch.zeros(len(subsets), len(image_M), dtype=torch.int64)
    column_MK, cosine_MK = torch.zeros(len(image_M), k, dtype=torch.int64), torch.zeros(len(image_M), k)
    text_ED = text_DE.T.contiguous()
    for part in chunks(len(image_M), len(text_DE)):
        cosine_BD, column_B1 = image_ME[part] @ text_ED, column_M[part, None]
        right_B1 = cosine_BD.gather(1, column_B1)
        rank_M[part] = num_near(cosine_BD, right_B1, 1) - 1  # it is as near as itself
        near_D += num_near(cosine_BD, best_D, 0)
        cosine_MK[part], column_MK[part] = _nearest(cosine_BD, k)
        rival_BR = rival_DR[column_B1[:, 0]]
        near_BR = as_near(cosine_BD.gather(1, rival_BR), right_B1)
        hard_hit_M[part] = ~(near_BR & (rival_BR != column_B1)).any(1)
        if in_subset_DU is not None:
            subset_rank_UM[:, part] = (as_near(cosine_BD, right_B1).float() @ in_subset_DU).T.long() - 1
    num_rivals_D = (rival_DR != torch.arange(len(text_DE))[:, None]).sum(1)
    near_D = near_D.clamp(min=0)  # two ways to compute a cosine may round to either side of what is as near
    near_D[best_D == -torch.inf] = -1
    found = (image_M, rank_M, class_D[column_MK], cosine_MK, num_rivals_D[column_M], hard_hit_M, near_D, subset_rank_UM)
    return Ranking(*(tensor.numpy() for tensor in found))


def _columns(class_D: Tensor, label_N: Tensor) -> Tensor:
    """The row of each image's class among the candidates, -1 where it is none."""
    sorted_D, order_D = class_D.sort()
    column_N = order_D[torch.searchsorted(sorted_D, label_N).clamp(max=len(class_D) - 1)]
    return column_N.where(class_D[column_N] == label_N, torch.tensor(-1))


def _rivals(class_D: Tensor, confusable: Sequence[Sequence[int]]) -> Tensor:
    """Rows of the candidates that each one is confusable with, (D, R), filled up with its own row."""
    column_of = {int(c): column for column, c in enumerate(class_D)}
    rivals_D = [
        [column_of[other] for other in (confusable[c] if confusable else []) if other in column_of and other != c]
        for c in column_of
    ]
    most = max(map(len, rivals_D))
    return torch.tensor([rivals + [own] * (most - len(rivals)) for own, rivals in enumerate(rivals_D)]).long()


def _right_cosines(image_ME: Tensor, text_DE: Tensor, column_M: Tensor) -> Tensor:
    """Of each image and its class; a part at a time that stays in the cache."""
    parts = [
        torch.linalg.vecdot(image_ME[part], text_DE.index_select(0, column_M[part]))
        for part in chunks(len(image_ME), text_DE.shape[1])
    ]
    return torch.cat(parts) if parts else torch.zeros(0)


def _nearest(cosine_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest cosines and their places; NaN, which topk puts first, comes last."""
    values_BK, places_BK = cosine_BD.topk(k, dim=1)
    if values_BK.isnan().any():
        places_BK = cosine_BD.nan_to_num(nan=-torch.inf).topk(k, dim=1).indices
        values_BK = cosine_BD.gather(1, places_BK)
    return values_BK, places_BK


class ZeroShot(Protocol):
    """Zero-shot accuracy in every language and for every group of images, images that are found by a class's name, and
    what English does better.

    Args:
        name: What it is called, such as `classes` where telling the classes apart comes second.
    """

    metrics = ("acc1", "acc5", "mean_per_class_recall")

    def __init__(self, name: str = "zero_shot") -> None:
        self.name = name
        self.is_plain = name == "zero_shot"

    def run(self, scorer: "CardScorer") -> Iterator[Score]:
        rankings = {language.code: ranking for language, ranking in scorer.rankings()}
        for place, language in enumerate(scorer.languages):
            if (ranking := rankings.get(language.code)) is None:
                continue
            code, num_classes = language.code, len(language.class_D)
            label_M, rank_M, chance = scorer.label_N[ranking.image_M], ranking.rank_M, 1 / num_classes
            for subset, of_M in scorer.subsets(ranking.image_M).items():
                values = {"acc1": hit_rate(rank_M[of_M] == 0)}
                if subset in ("", CLEAN):
                    values = scorer.accuracies(rank_M[of_M], label_M[of_M], num_classes)
                yield from scorer.rows(self.name, code, values, int(of_M.sum()), num_classes, chance, subset)

            found_D = ranking.class_rank_D >= 0
            right_D = np.bincount(label_M, minlength=len(scorer.card.classes))[language.class_D[found_D]]
            values = recalls_at("text_to_image", ranking.class_rank_D[found_D], (1, TOP))
            chances = chances_at("text_to_image", right_D, len(rank_M), (1, TOP))
            yield from scorer.rows(self.name, code, values, len(right_D), len(rank_M), chances)

            if code != "en" and "en" in rankings:
                english = rankings["en"]
                rank_in_M = english.subset_rank_UM[place, np.isin(english.image_M, ranking.image_M)]
                gaps = {
                    "parity_acc1": parity_gap(rank_in_M == 0, rank_M == 0),
                    "parity_mean_per_class_recall": parity_gap(rank_in_M == 0, rank_M == 0, label_M),
                }
                yield from scorer.rows(self.name, code, gaps, len(rank_M), num_classes)

            ids = np.array(scorer.card.ids, dtype=object)
            hard_hit_M = ranking.hard_hit_M.astype(object)
            hard_hit_M[ranking.rivals_M == 0] = None
            predicted_M = ids[predicted(ranking, label_M)]
            answered = Answered(ids[label_M], predicted_M, rank_M, ids[ranking.nearest_MK], ranking.cosine_MK)
            scorer.keep(self.name, code, ranking.image_M, answered, hard_hit_M)


def predicted(ranking: Ranking, label_M: np.ndarray) -> np.ndarray:
    """The class of each image's answer. A tie counts against the right class, wherever it came among equals."""
    first_M, second_M = ranking.nearest_MK[:, 0], ranking.nearest_MK[:, min(1, ranking.nearest_MK.shape[1] - 1)]
    return np.where((ranking.rank_M > 0) & (first_M == label_M), second_M, first_M)
