"""Zero-shot classification: the class whose prompts are nearest to the image.

Shape letters: N images, M of them scored, P prompts, C classes of a card, D of them candidates, K nearest classes,
E embedding length.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from indiclip.evals.protocols.cosines import Floats, Integers, as_near, chunks, labels_of, truncate_normalize


class Ranking(NamedTuple):
    """Where the right class of each image came.

    Attributes:
        image_M: int64, which images were scored, ascending: those whose class is a candidate.
        rank_M: int64, how many wrong candidates are at least as near as the right one; 0 is a hit.
        nearest_MK: int64, classes, nearest first; the first is the prediction.
        cosine_MK: float32, theirs.
    """

    image_M: np.ndarray
    rank_M: np.ndarray
    nearest_MK: np.ndarray
    cosine_MK: np.ndarray


class HardPairs(NamedTuple):
    """Images against the classes that theirs is confused with.

    Attributes:
        image_M: int64, which images were scored, ascending: those whose class is a candidate with confusable ones.
        hit_M: bool, the right class is nearer than all confusable ones.
        chance: Hit rate of guessing, NaN without images.
    """

    image_M: np.ndarray
    hit_M: np.ndarray
    chance: float


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
) -> Ranking:
    """Ranks the candidate classes for every image.

    Ties (to rounding, 1e-6) and NaN count against the right class, so a model that gives the same vector for
    everything scores 0, not chance.

    Args:
        image_NE: Images, of any norm; they are cut to the length of the classes.
        class_DE: From `class_embeddings`; only one row for each candidate.
        label_N: Class of each image, -1 for none.
        classes: (D,) the class of each candidate, where not all classes are candidates (a language in which only some
            have names); images of the others are left out. None: row c is class c.
        nearest: K, at most; how many classes to report.
    """
    images, candidates, image_M, column_M, class_D = candidates_of(image_NE, class_DE, label_N, classes)
    k = min(nearest, len(candidates))
    rank_M = torch.zeros(len(images), dtype=torch.int64)
    column_MK = torch.zeros(len(images), k, dtype=torch.int64)
    cosine_MK = torch.zeros(len(images), k)
    for part in chunks(len(images), len(candidates)):
        cosine_BD = images[part] @ candidates.T
        right_B1 = cosine_BD.gather(1, column_M[part, None])
        near_BD = as_near(cosine_BD, right_B1).scatter_(1, column_M[part, None], False)
        rank_M[part] = near_BD.sum(1)
        column_MK[part] = cosine_BD.nan_to_num(nan=-torch.inf).topk(k, dim=1).indices  # topk would put NaN first
        cosine_MK[part] = cosine_BD.gather(1, column_MK[part])
    return Ranking(image_M.numpy(), rank_M.numpy(), class_D[column_MK].numpy(), cosine_MK.numpy())


def hard_pairs(
    image_NE: Floats,
    class_DE: Floats,
    label_N: Integers,
    confusable: Sequence[Sequence[int]],
    classes: Integers | None = None,
) -> HardPairs:
    """Asks for each image only whether its class is nearer than those it is known to be confused with.

    Ties and NaN count against the right class, as in `rank_classes`. Chance is the mean of 1 / (1 + k) over the scored
    images, k being the number of candidates that an image's class is confusable with.

    Args:
        image_NE: Images, of any norm.
        class_DE: As in `rank_classes`.
        label_N: Class of each image, -1 for none.
        confusable: For each of the C classes, the classes that it is confused with; those which are not candidates do
            not count.
        classes: (D,) the class of each candidate; None: row c is class c.
    """
    images, candidates, image_M, column_M, class_D = candidates_of(image_NE, class_DE, label_N, classes)
    column_of = {int(c): column for column, c in enumerate(class_D)}
    pairs_DD = torch.zeros(len(class_D), len(class_D), dtype=torch.bool)
    for c, column in column_of.items():
        rivals = [column_of[other] for other in confusable[c] if other in column_of and other != c]
        pairs_DD[column, rivals] = True
    asked_M = pairs_DD.any(1)[column_M]
    images, image_M, column_M = images[asked_M], image_M[asked_M], column_M[asked_M]
    hit_M = torch.zeros(len(images), dtype=torch.bool)
    for part in chunks(len(images), len(candidates)):
        cosine_BD = images[part] @ candidates.T
        near_BD = as_near(cosine_BD, cosine_BD.gather(1, column_M[part, None]))
        hit_M[part] = ~(near_BD & pairs_DD[column_M[part]]).any(1)
    chance = (1 / (1 + pairs_DD.sum(1).double()))[column_M].mean().item()
    return HardPairs(image_M.numpy(), hit_M.numpy(), chance)


class Candidates(NamedTuple):
    """Images whose class is a candidate, and the candidates, at the candidates' length.

    Attributes:
        images: (M, E), of unit length.
        texts: (D, E), likewise.
        image_M: int64, which images these are, ascending.
        column_M: int64, the row of `texts` of each one's class.
        class_D: int64, the class of each row.
    """

    images: Tensor
    texts: Tensor
    image_M: Tensor
    column_M: Tensor
    class_D: Tensor


def candidates_of(image_NE: Floats, class_DE: Floats, label_N: Integers, classes: Integers | None) -> Candidates:
    """Who is asked about what. `classes` are those of the rows of `class_DE`; None: row c is class c."""
    texts, labels = truncate_normalize(class_DE), labels_of(label_N)
    class_D = torch.arange(len(texts)) if classes is None else labels_of(classes)
    if not len(texts) or not len(class_D) == len(torch.unique(class_D)) == len(texts):
        raise ValueError(f"classes={class_D.tolist()} for {len(texts)} rows of class embeddings: expected one each")
    sorted_D, order_D = class_D.sort()
    column_N = order_D[torch.searchsorted(sorted_D, labels).clamp(max=len(texts) - 1)]
    image_M = (class_D[column_N] == labels).nonzero()[:, 0]
    images = truncate_normalize(torch.as_tensor(image_NE)[image_M], texts.shape[1])
    return Candidates(images, texts, image_M, column_N[image_M], class_D)
