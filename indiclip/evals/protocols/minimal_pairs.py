"""Minimal pairs: two captions that differ in one name only, and two images, each of which goes with one of them.

Shape letters: P pairs of images, M those of them whose classes have a name in a language, T templates, Q questions, N
images, E embedding length.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from indiclip.datasets.tables import stable_hash
from indiclip.evals.protocols.answers import Answered
from indiclip.evals.protocols.cosines import as_near
from indiclip.evals.protocols.metrics import clustered_rate
from indiclip.evals.protocols.protocol import Options, Protocol
from indiclip.evals.results import Score, column_of

if TYPE_CHECKING:
    from indiclip.evals.card_scorer import CardScorer
    from indiclip.evals.cards.card import Card
    from indiclip.evals.images.items import Items

# Captions of languages that a card has no prompts in. The name stands after a colon, so that no grammar bends it.
CAPTIONS = {
    "en": "picture: {c}",
    "hi": "चित्र: {c}",
    "bn": "ছবি: {c}",
    "ta": "படம்: {c}",
    "te": "చిత్రం: {c}",
    "mr": "चित्र: {c}",
    "gu": "ચિત્ર: {c}",
    "kn": "ಚಿತ್ರ: {c}",
    "ml": "ചിത്രം: {c}",
    "pa": "ਤਸਵੀਰ: {c}",
    "or": "ଛବି: {c}",
    "as": "ছবি: {c}",
    "ur": "تصویر: {c}",
}
# Of four cosines in random order; of the 24 orders 12, 6, 6 and 4 are right.
CHANCES = {"pair_accuracy": 1 / 2, "text_score": 1 / 4, "image_score": 1 / 4, "group_score": 1 / 6}


class Pairs(NamedTuple):
    """An image of a class and one of a class that it is confused with: int64, classes are indices into the card's."""

    image_P2: np.ndarray
    class_P2: np.ndarray
    classes_P: np.ndarray  # which pair of classes it is of


class MinimalPairs(Protocol):
    """Winoground's scores (Thrush et al., CVPR 2022, arXiv 2204.03162) on pairs of confusable classes.

    Of two images and their captions, s(c, i) being a cosine, `text_score` counts the pairs in which each image is
    nearer to its own caption: s(c0, i0) > s(c1, i0) and s(c1, i1) > s(c0, i1); `image_score` those in which each
    caption is nearer to its own image: s(c0, i0) > s(c0, i1) and s(c1, i1) > s(c1, i0); `group_score` those in which
    both hold. `pair_accuracy` is of one image and two captions: s(c0, i0) > s(c1, i0).

    Captions are one prompt of the card with both names in turn, in every language in which two confusable classes have
    a name; the card's prompts are scored one by one and averaged for each pair.

    `hard_pairs` asks another question: it sets an image against all classes that its own is confused with at once, and
    a class is the mean of all its prompts. With one prompt and one such class `pair_accuracy` is its accuracy, but for
    the images that are drawn; no score here that looks at two images is.

    Intervals draw pairs of classes, each with its pairs of images: these are right or wrong together.

    Args:
        most: Pairs of images of each pair of classes. Those of either class with the lowest hashes of their keys are
            taken, each once.
    """

    name = "minimal_pairs"
    metrics = ("group_score", "text_score", "image_score", "pair_accuracy")
    chance = CHANCES["group_score"]

    def __init__(self, most: int = 20) -> None:
        if most < 1:
            raise ValueError(f"most: found {most}; expected a whole number from 1")
        self.most = most

    def check(self, items: "Items") -> None:
        if not any(one.confusable_with for one in items.card.classes):
            raise ValueError(f"{items.card.file}: no class has confusable_with; expected it of those that look alike")

    def texts(self, items: "Items", options: Options) -> Iterator[str]:
        for code in filter(options.wants, items.card.languages):
            names = options.names(items.card, code)
            for template in captions_of(items.card, code):
                yield from (template.replace("{c}", name) for name in names.values())

    def run(self, scorer: "CardScorer") -> Iterator[Score]:
        pairs = draw_pairs(scorer.items, scorer.confusable, self.most)
        for code in filter(scorer.options.wants, scorer.card.languages):
            names = scorer.options.names(scorer.card, code)
            named_P = np.isin(pairs.class_P2, list(names)).all(1)
            if not named_P.any():
                continue
            image_M2, class_M2 = pairs.image_P2[named_P], pairs.class_P2[named_P]
            templates = captions_of(scorer.card, code)
            hits = []
            for template in templates:
                text_DE = scorer.embed([template.replace("{c}", name) for name in names.values()])
                row_M2 = np.searchsorted(list(names), class_M2)
                hits.append(winoground(scorer.image_NE[image_M2], text_DE[row_M2]))
            values = {
                metric: clustered_rate(np.mean([hit[metric] for hit in hits], axis=0), pairs.classes_P[named_P])
                for metric in self.metrics
            }
            yield from scorer.rows(self.name, code, values, len(image_M2), 2, CHANCES)
            is_group_TM = np.array([hit["group_score"] == 1 for hit in hits])
            _keep(scorer, code, templates, image_M2, class_M2, is_group_TM)


def _keep(
    scorer: "CardScorer",
    code: str,
    templates: Sequence[str],
    image_M2: np.ndarray,
    class_M2: np.ndarray,
    is_group_TM: np.ndarray,
) -> None:
    """Of each pair and template an answer for the pair's first image: the other one's class, where not all is right."""
    num_templates = len(templates)
    id_Q2 = np.tile(np.array(scorer.card.ids, dtype=object)[class_M2], (num_templates, 1))
    is_group_Q = is_group_TM.reshape(-1)
    predicted_Q, nothing_Q = np.where(is_group_Q, id_Q2[:, 0], id_Q2[:, 1]), column_of([[]] * len(id_Q2))
    answered = Answered(id_Q2[:, 0], predicted_Q, (~is_group_Q).astype(np.int64), nothing_Q, nothing_Q)
    others = [scorer.items.contents[i] or scorer.items.keys[i] for i in image_M2[:, 1]]
    questions = [f"{template} {other}" for template in templates for other in others]
    scorer.keep("minimal_pairs", code, np.tile(image_M2[:, 0], num_templates), answered, questions=questions)


def captions_of(card: "Card", code: str) -> tuple[str, ...]:
    """Templates with `{c}`: the card's prompts, or the caption of a language that it has none in."""
    return card.prompts.get(code) or (CAPTIONS.get(code, "{c}"),)


def draw_pairs(items: "Items", confusable: list[list[int]], most: int) -> Pairs:
    """Pairs of the images that are scored; the same for the same keys, in any order."""
    images, classes = list[tuple[int, int]](), list[tuple[int, int]]()
    tested, ids = items.tested_N, items.card.ids
    for one, other in sorted({(min(c, rival), max(c, rival)) for c, of in enumerate(confusable) for rival in of}):
        drawn = []
        for label in (one, other):
            found = np.flatnonzero(tested & (items.labels == label)).tolist()
            found.sort(key=lambda i: (stable_hash(f"{ids[one]} {ids[other]} {items.keys[i]}"), items.keys[i]))
            drawn.append(found[:most])
        images += zip(*drawn, strict=False)
        classes += [(one, other)] * min(map(len, drawn))
    class_P2 = np.array(classes, dtype=np.int64).reshape(-1, 2)
    _, classes_P = np.unique(class_P2, axis=0, return_inverse=True)
    return Pairs(np.array(images, dtype=np.int64).reshape(-1, 2), class_P2, classes_P.reshape(-1))


def winoground(image_P2E: Tensor, text_P2E: Tensor) -> dict[str, np.ndarray]:
    """What is right of each pair, from 0 to 1: see `MinimalPairs`. Ties (to rounding) and NaN are wrong.

    Args:
        image_P2E: Of unit length.
        text_P2E: The caption of each image.
    """
    cosine_P22 = image_P2E @ text_P2E.transpose(1, 2)  # image by caption
    own_P2 = cosine_P22[:, [0, 1], [0, 1]]
    is_text_P2 = ~as_near(cosine_P22[:, [0, 1], [1, 0]], own_P2).numpy()  # the same images, the other captions
    is_image_P2 = ~as_near(cosine_P22[:, [1, 0], [0, 1]], own_P2).numpy()  # the same captions, the other images
    text_P, image_P = is_text_P2.all(1), is_image_P2.all(1)
    return {
        "pair_accuracy": is_text_P2.mean(1),
        "text_score": text_P.astype(float),
        "image_score": image_P.astype(float),
        "group_score": (text_P & image_P).astype(float),
    }
