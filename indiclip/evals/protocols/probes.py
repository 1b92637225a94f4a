"""Probes: what a classifier on top of frozen image embeddings finds, without text.

Both probes predict the class of the same images. With a split (`is_train_N`) those are the labelled images outside it,
and the gallery is the training images. Without one every labelled image is predicted from others: from all others
(kNN), or by the classifier of the fold that it is held out of (linear probe). Then a class with a single image has
nothing to be learned from and takes no part. An image whose embedding is not finite is predicted as -1, never right.

Shape letters: N images, M of them predicted, A of these with a finite embedding, G gallery, B rows at a time, E
embedding length, C classes of the gallery, K neighbours, F folds.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from indiclip.datasets.tables import stable_hash
from indiclip.evals.protocols import logistic
from indiclip.evals.protocols.cosines import Floats, Integers, chunks, labels_of, truncate_normalize
from indiclip.evals.protocols.protocol import Protocol
from indiclip.evals.results import IMAGES, Score
from indiclip.names import check_choice

if TYPE_CHECKING:
    from indiclip.evals.card_scorer import CardScorer

NEIGHBOURS, TEMPERATURE = 20, 0.07  # of DINO's evaluation, arXiv 2104.14294
INVERSE_PENALTY = 31.6  # CLIP's example has C = 0.316 for embeddings of length about 10: the same for length 1
FOLDS = 5


class Predictions(NamedTuple):
    """What a probe says.

    Attributes:
        image_M: int64, which images were predicted, ascending.
        class_M: int64, the predicted class; -1 for none.
    """

    image_M: np.ndarray
    class_M: np.ndarray


def knn(image_NE: Floats, label_N: Integers, is_train_N: np.ndarray | None = None, k: int = NEIGHBOURS) -> Predictions:
    """The class with most votes among the nearest neighbours, each weighing exp(cosine / `TEMPERATURE`).

    Args:
        image_NE: Images, of any norm.
        label_N: Class of each, -1 for none.
        is_train_N: bool, the gallery; None has each image ask all others.
        k: Neighbours, or as many as the gallery has.
    """
    task = _Task(image_NE, label_N, is_train_N)
    k = min(k, len(task.index_G) - task.leave_one_out)
    for part in chunks(len(task.asked_A), len(task.index_G)) if k > 0 else ():
        cosine_BG = task.asked_AE[part] @ task.gallery_GE.T
        if task.leave_one_out:
            cosine_BG.diagonal(part.start).fill_(-torch.inf)  # the gallery are the images that ask
        cosine_BK, near_BK = cosine_BG.topk(k, dim=1)
        weight_BK = ((cosine_BK - cosine_BK[:, :1]) / TEMPERATURE).exp()  # of the nearest 1: no overflow
        votes_BC = torch.zeros(len(weight_BK), len(task.class_C))
        task.answer(part, votes_BC.scatter_add_(1, task.index_G[near_BK], weight_BK))
    return task.predictions()


def linear_probe(
    image_NE: Floats,
    label_N: Integers,
    is_train_N: np.ndarray | None = None,
    keys: Sequence[str] | None = None,
    inverse_penalty: float = INVERSE_PENALTY,
) -> Predictions:
    """The class that a logistic regression on the unit-length embeddings gives (see `logistic.fit`).

    Args:
        image_NE: Images, of any norm.
        label_N: Class of each, -1 for none.
        is_train_N: bool, the images to train on; None trains on all but a fold, for each of five stratified folds.
        keys: Name of each image. Its hash says which fold it is in; None takes the image's place.
        inverse_penalty: scikit-learn's C.
    """
    task = _Task(image_NE, label_N, is_train_N)
    if not len(task.index_G):
        return task.predictions()
    fold_A, train_FG = torch.zeros(len(task.asked_A), dtype=torch.int64), torch.ones(1, len(task.index_G)).bool()
    if task.leave_one_out:
        names = [str(i) if keys is None else keys[i] for i in task.gallery_G.tolist()]
        fold_A = folds(task.index_G.numpy(), names)
        train_FG = torch.arange(FOLDS)[:, None] != fold_A
    weight_FCE, bias_FC = logistic.fit(task.gallery_GE, task.index_G, train_FG, inverse_penalty)
    for fold in range(len(train_FG)):
        held_out = (fold_A == fold).nonzero()[:, 0]
        task.answer(held_out, task.asked_AE[held_out] @ weight_FCE[fold].T + bias_FC[fold])
    return task.predictions()


def folds(label_N: np.ndarray, keys: Sequence[str]) -> Tensor:
    """Stratified folds that depend on labels and keys alone, not on the order of the images.

    The images of a class are dealt out in the order of their keys' hashes, each class beginning where the one before
    it ended: two images of a class are in two folds, and the folds differ by one image at most.

    Returns:
        int64 (N,), 0 to `FOLDS` - 1.
    """
    hashes = np.array([stable_hash(key) for key in keys], dtype=np.uint64)
    fold_N = np.empty(len(label_N), dtype=np.int64)
    fold_N[np.lexsort((hashes, label_N))] = np.arange(len(label_N)) % FOLDS
    return torch.from_numpy(fold_N)


class _Task:
    """Who asks whom, and what was answered.

    Attributes:
        leave_one_out: The images ask each other.
        gallery_G: Images that are asked; `gallery_GE` their embeddings, `index_G` their classes among `class_C`.
        image_M: Images that are predicted.
        asked_A: Places in `image_M` of those with a finite embedding, `asked_AE`.
    """

    def __init__(self, image_NE: Floats, label_N: Integers, is_train_N: np.ndarray | None) -> None:
        images, labels = truncate_normalize(image_NE), labels_of(label_N)
        finite_N = images.isfinite().all(1)
        self.leave_one_out = is_train_N is None
        if is_train_N is None:
            image_N, gallery_N = _two_of_a_class(labels, labels >= 0), _two_of_a_class(labels, (labels >= 0) & finite_N)
            asked_N = gallery_N
        else:
            train_N = torch.as_tensor(is_train_N, dtype=torch.bool)
            image_N, gallery_N = (labels >= 0) & ~train_N, (labels >= 0) & train_N & finite_N
            asked_N = image_N & finite_N
        self.gallery_G, self.image_M = gallery_N.nonzero()[:, 0], image_N.nonzero()[:, 0]
        self.asked_A = asked_N[self.image_M].nonzero()[:, 0]
        self.gallery_GE, self.asked_AE = images[gallery_N], images[asked_N]
        self.class_C, self.index_G = torch.unique(labels[gallery_N], return_inverse=True)
        self._class_M = torch.full((len(self.image_M),), -1)

    def answer(self, part: slice | Tensor, scores_BC: Tensor) -> None:
        """For a part of `asked_A`: the class with the highest score."""
        self._class_M[self.asked_A[part]] = self.class_C[scores_BC.argmax(1)]

    def predictions(self) -> Predictions:
        return Predictions(self.image_M.numpy(), self._class_M.numpy())


def _two_of_a_class(labels: Tensor, among_N: Tensor) -> Tensor:
    """Those of `among_N` whose class has at least two of them."""
    count_C = labels[among_N].bincount(minlength=int(labels.max()) + 1 if len(labels) else 0)
    return among_N & (count_C[labels.clamp(min=0)] > 1) if among_N.any() else among_N


class Probe(Protocol):
    """What a classifier on the images alone finds.

    Args:
        without_gallery: What becomes of the images that are scored of a class of which none is in the gallery, so that
            no probe can name it: `miss` counts them as mistakes, `exclude` leaves them out.
    """

    metrics = ("acc1", "mean_per_class_recall")
    embeds_text = False
    uses_gallery = True
    is_probe = True

    def __init__(self, without_gallery: Literal["miss", "exclude"] = "miss") -> None:
        check_choice("without_gallery", without_gallery, ("miss", "exclude"))
        self.excludes = without_gallery == "exclude"

    def run(self, scorer: "CardScorer") -> Iterator[Score]:
        label_N, is_train_N = scorer.items.labels, scorer.items.is_train
        if is_train_N is not None and self.excludes:
            label_N = np.where(is_train_N | np.isin(label_N, label_N[is_train_N]), label_N, -1)
        found = self.predict(scorer, label_N)
        label_M = label_N[found.image_M]
        # Those that it can answer: without a gallery, the ones that have another image to be learned from.
        answers = label_M if is_train_N is None else label_N[is_train_N & (label_N >= 0)]
        num_classes = len(np.unique(answers))
        if not len(label_M) or num_classes < 2:
            return
        values = scorer.accuracies((found.class_M != label_M).astype(np.int64), label_M, num_classes)
        values.pop("acc5", None)
        yield from scorer.rows(self.name, IMAGES, values, len(label_M), num_classes, 1 / num_classes)

    @abstractmethod
    def predict(self, scorer: "CardScorer", label_N: np.ndarray) -> Predictions:
        """The classes of the images that have a label and are not in the gallery."""


class KNN(Probe):
    """Accuracy of the class that most of the nearest images are of, without any text, see `knn`."""

    name = "knn"

    def predict(self, scorer: "CardScorer", label_N: np.ndarray) -> Predictions:
        return knn(scorer.image_NE, label_N, scorer.items.is_train)


class LinearProbe(Probe):
    """Accuracy of a logistic regression on the images alone, see `linear_probe`."""

    name = "linear_probe"

    def predict(self, scorer: "CardScorer", label_N: np.ndarray) -> Predictions:
        return linear_probe(scorer.image_NE, label_N, scorer.items.is_train, scorer.items.keys)
