"""How captions are scored: how probable the true ones are, and how near the written ones come to them."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.text import chrf_score

from indiclip.head import ListMetric, Measure, Prediction

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
        names = ("caption", "cross_entropy", "num_tokens", "iou", "named")
        self.add(language, references, *(prediction.get(name) for name in names))

    def compute(self) -> dict[str, Tensor]:
        """`perplexity` (of a token), `chrf` and, where there are boxes, `box_at_half`, `box_iou` and `named`.

        chrF++ (Popović, WMT 2017, W17-4770), in 0..1, compares sequences of letters and of words. Unlike BLEU and CIDEr
        it gives an inflected word part of its due, which is why translation into Indian languages is measured by it.

        With captions in two languages or more also `perplexity/<language>` and `chrf/<language>`. Tokens are of
        different lengths in different languages, so their perplexities do not compare.
        """
        rows = self.rows_of_all_ranks()
        languages = sorted({row[0] for row in rows} - {""})
        numbers = _of_captions(rows)
        for language in languages if len(languages) > 1 else ():
            of_language = _of_captions([row for row in rows if row[0] == language])
            numbers |= {f"{name}/{language}": value for name, value in of_language.items()}
        regions = [(iou, named) for *_, iou, named in rows if iou is not None]
        if regions:
            iou_R, named_R = torch.tensor(regions).unbind(1)
            numbers |= {"box_at_half": (iou_R >= _FOUND).float().mean(), "box_iou": iou_R.mean()}
            numbers["named"] = named_R.mean()
        return numbers


def _of_captions(rows: list[tuple[Any, ...]]) -> dict[str, Tensor]:
    _, references, captions, sums, counts, *_ = zip(*rows, strict=True)
    score = chrf_score(captions, references)
    assert isinstance(score, Tensor)
    return {"chrf": score, "perplexity": torch.tensor(sum(sums) / sum(counts)).exp()}


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
