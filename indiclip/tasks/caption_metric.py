"""How captions are scored: how probable the true ones are, and how near the written ones come to them.

Shape letters: O orders of n-grams; R regions.
"""

import string
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from indiclip.head import ListMetric, Prediction
from indiclip.presentation import Measure

# Of chrF++ (Popović, WMT 2017, W17-4770): how long n-grams are, and how much more recall counts than precision.
_LETTERS, _WORDS, _BETA = 6, 2, 2.0
_FOUND = 0.5  # IoU from which a box counts as found, as in RefCOCO


class CaptionMetric(ListMetric):
    """Captions, and boxes and names of regions, over everything seen since the last reset."""

    def update(self, prediction: Prediction, references: list[str], language: str) -> None:
        """Add an image.

        Args:
            prediction: Of the captioning head.
            references: All its captions in the language that it was written in.
            language: "" where it is unknown.
        """
        names = ("cross_entropy", "num_tokens", "iou", "named")
        statistics = ngram_statistics(prediction["caption"], references)
        self.add(language, statistics, *(prediction.get(name) for name in names))

    def compute(self) -> dict[str, Tensor]:
        """`perplexity` (of a token), `chrf` and, where there are boxes, `box_at_half`, `box_iou` and `named`.

        chrF++, in 0..1, see `ngram_statistics`. Unlike BLEU and CIDEr it gives an inflected word part of its due, which
        is why translation into Indian languages is measured by it.

        With captions in two languages or more also `perplexity/<language>` and `chrf/<language>`. Tokens are of
        different lengths in different languages, so their perplexities do not compare.
        """
        rows = self.rows_of_all_ranks()
        languages = np.array([row[0] for row in rows])
        sums = np.array([[row[2] or 0.0, row[3] or 0] for row in rows])
        statistics = np.stack([row[1] for row in rows])
        codes = sorted({*languages.tolist()} - {""})
        groups = {"": slice(None)} | ({f"/{code}": languages == code for code in codes} if len(codes) > 1 else {})
        numbers: dict[str, float] = {}
        for suffix, group in groups.items():
            numbers[f"chrf{suffix}"] = chrf(statistics[group].sum(0))
            cross_entropy, num_tokens = sums[group].sum(0)
            numbers[f"perplexity{suffix}"] = np.exp(cross_entropy / num_tokens)
        regions = np.array([(iou, named) for *_, iou, named in rows if iou is not None], float)
        if len(regions):
            iou_R, named_R = regions.T
            numbers |= {"box_at_half": (iou_R >= _FOUND).mean(), "box_iou": iou_R.mean(), "named": named_R.mean()}
        return {name: torch.tensor(float(number)) for name, number in numbers.items()}


def ngram_statistics(written: str, references: Sequence[str]) -> np.ndarray:
    """What chrF++ needs of a text, to be added up over texts: (3, O).

    For n-grams of 1 to 6 letters, spaces aside, and of 1 and 2 words, in this order: how many the text shares with the
    reference that it is nearest to, how many it has, and how many the reference has.

    torchmetrics counts alike, in tensors of one number each: 10 s for 500 captions, which are 0.2 s here.
    """
    own = [*_ngrams(written)]
    found = []
    for reference in references:
        pairs = zip(own, _ngrams(reference), strict=True)
        found.append(np.array([((a & b).total(), a.total(), b.total()) for a, b in pairs], float).T)
    return max(found, key=chrf)


def chrf(statistics_3O: np.ndarray) -> float:
    """The mean of the orders' F scores, 0..1."""
    shared_O, own_O, reference_O = statistics_3O
    # F = (1 + b^2) p r / (b^2 p + r), with the precision p = shared / own and the recall r = shared / reference.
    weighted_O = (own_O + _BETA**2 * reference_O) / (1 + _BETA**2)
    return float(np.divide(shared_O, weighted_O, out=np.zeros_like(shared_O), where=weighted_O > 0).mean())


def _ngrams(text: str) -> Iterator[Counter[str]]:
    letters, words = [*"".join(text.split())], [part for word in text.split() for part in _without_punctuation(word)]
    for parts, longest in ((letters, _LETTERS), (words, _WORDS)):
        for n in range(1, longest + 1):
            yield Counter(" ".join(parts[i : i + n]) for i in range(len(parts) - n + 1))


def _without_punctuation(word: str) -> list[str]:
    if len(word) > 1 and word[-1] in string.punctuation:
        return [word[:-1], word[-1]]
    if len(word) > 1 and word[0] in string.punctuation:
        return [word[0], word[1:]]
    return [word]


def caption_measures(regions: bool, num_classes: int) -> dict[str, Measure]:
    """How people read these numbers.

    Args:
        regions: Whether there are boxes.
        num_classes: Of the held-out dataset; 0 where they are unknown.
    """
    found = {
        "chrf": Measure("chrF++ of the written captions", "higher", main=True),
        "perplexity": Measure("perplexity of a caption's token", "lower"),
    }
    if not regions:
        return found
    guess: dict[str, Any] = {}
    if num_classes:
        guess = {"trivial": 1 / num_classes, "answer": f"guessing among {num_classes} classes"}
    return found | {
        "box_at_half": Measure("share of names whose box is found (IoU ≥ 0.5)", "higher"),
        "box_iou": Measure("IoU of the box of a name", "higher"),
        "named": Measure("share of boxes that get the right name", "higher", **guess),
    }
