"""Scores of captions: chrF++ of torchmetrics, and perplexities by hand."""

import math

import pytest
from torchmetrics.functional.text import chrf_score

from indiclip.tasks.caption_metric import CaptionMetric, chrf, ngram_statistics

WRITTEN = ["एक लाल पतंग बाज़ार के ऊपर उड़ रही है।", "a red kite, above", "(drums!) two drums", "x", "लाल"]
REFERENCES = [
    ["एक नीली पतंग मैदान के ऊपर उड़ रही है।", "पतंग"],
    ["a drum", "a red kite above the fair."],
    ["two (drums)"],
    ["x"],
    ["लाल पतंगें"],
]


def test_chrf_is_that_of_torchmetrics():
    for written, references in zip(WRITTEN, REFERENCES, strict=True):
        expected = float(chrf_score([written], [references]))
        assert chrf(ngram_statistics(written, references)) == pytest.approx(expected, abs=1e-6)
    total = sum(ngram_statistics(*pair) for pair in zip(WRITTEN, REFERENCES, strict=True))
    assert chrf(total) == pytest.approx(float(chrf_score(WRITTEN, REFERENCES)), abs=1e-6)


@pytest.mark.parametrize(("written", "expected"), [("", 0.0), ("zzz", 0.0), ("a red kite over the fair", 1.0)])
def test_chrf_of_nothing_is_0_and_of_the_caption_1(written, expected):
    assert chrf(ngram_statistics(written, ["a drum", "a red kite over the fair"])) == pytest.approx(expected)


def prediction(caption, cross_entropy, num_tokens, **regions):
    return {"caption": caption, "cross_entropy": cross_entropy, "num_tokens": num_tokens} | regions


def test_numbers_are_of_all_tokens_and_by_language():
    metric = CaptionMetric()
    metric.update(prediction("a red kite over us", 4.0, 4), ["a red kite over us"], "en")
    metric.update(prediction("", 6.0, 1, iou=0.6, named=True), ["लाल पतंग"], "hi")
    metric.update(prediction("", 5.0, 5, iou=0.2, named=False), ["a drum"], "")
    metric.update(prediction("", 0.0, 2, iou=0.5, named=False), ["a drum"], "")
    numbers = {name: value.item() for name, value in metric.compute().items()}
    assert numbers == pytest.approx(
        {
            "perplexity": math.exp(15 / 12),
            "perplexity/en": math.e,
            "perplexity/hi": math.exp(6),
            "chrf": numbers["chrf"],
            "chrf/en": 1.0,
            "chrf/hi": 0.0,
            "box_at_half": 2 / 3,
            "box_iou": 1.3 / 3,
            "named": 1 / 3,
        }
    )
    assert 0 < numbers["chrf"] < 1


def test_one_language_is_not_told_apart():
    metric = CaptionMetric()
    metric.update(prediction("a kite", 2.0, 2), ["a kite"], "en")
    assert {*metric.compute()} == {"perplexity", "chrf"}
