"""Numbers of a study: intervals and verdicts by hand and by scipy, and scores whose answers are known."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from _study_protocols import PROTOCOLS, Embedded
from _study_statistics import Difference, holm, paired, pooled


def test_paired_intervals_are_those_of_the_books():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.303; scipy's paired test gives p."""
    found = paired({0: 2.0, 1: 4.0, 2: 6.0, 7: 9.0}, {0: 1.0, 1: 2.0, 2: 3.0, 9: 0.0})
    assert (found.value, found.num) == (2.0, 3)
    assert (found.low, found.high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)
    assert found.p == pytest.approx(ttest_rel([2, 4, 6], [1, 2, 3]).pvalue)
    assert paired({0: 1.0}, {0: 0.0}).verdict(0.0, "higher") == "not judged"
    apart = paired({0: 0.5, 1: 0.25}, {0: 0.375, 1: 0.125})  # by an eighth in both seeds: no spread to judge it by
    assert (apart.value, apart.verdict(0.0, "higher")) == (0.125, "not judged")


def test_folds_widen_intervals():
    """Nadeau and Bengio's variance of five folds' mean is 1/5 + 1/4 of that of one, in place of 1/5."""
    arms = {
        "control": dict(enumerate([0.0, 1.0, 2.0, 3.0, 4.0])),
        "a": dict(enumerate([1.0, 3.0, 2.0, 5.0, 6.0])),
        "b": dict(enumerate([0.0, 2.0, 1.0, 3.0, 5.0])),
    }
    for judged in (
        lambda folds: paired(arms["a"], arms["control"], folds),
        lambda folds: pooled(arms, {"a": paired(arms["a"], arms["control"])}, folds)["a"],
    ):
        seeds, folds = judged(0), judged(5)
        assert folds.value == seeds.value
        assert folds.high - folds.low == pytest.approx(1.5 * (seeds.high - seeds.low))
        assert folds.p > seeds.p


def test_the_pooled_spread_is_that_of_a_model_of_arms_and_seeds():
    """Least squares with a column for each arm and seed; and with two arms it is the paired t-test itself."""
    arms = {"control": {0: 1.0, 1: 4.0, 2: 2.0}, "a": {0: 2.0, 1: 4.5, 2: 4.0}, "b": {0: 0.0, 1: 5.0, 2: 1.5}}
    own = {arm: paired(arms[arm], arms["control"]) for arm in ("a", "b")}
    y = np.array([value for of in arms.values() for value in of.values()])
    columns = np.hstack([np.kron(np.eye(3), np.ones((3, 1))), np.kron(np.ones((3, 1)), np.eye(3))])
    residual = y - columns @ np.linalg.lstsq(columns, y, rcond=None)[0]
    half = 2.776 * math.sqrt(residual @ residual / 4 * 2 / 3)  # t(0.975, 4)
    found = pooled(arms, own)["a"]
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=1e-3)
    two = {name: arms[name] for name in ("control", "a")}
    assert pooled(two, {"a": own["a"]})["a"].p == pytest.approx(own["a"].p)


def test_holm_and_the_verdicts():
    assert holm([0.01, 0.04, math.nan, 0.03]) == pytest.approx([0.03, 0.06, math.nan, 0.06], nan_ok=True)
    worse = Difference(-0.2, -0.3, -0.1, 0.02, 3)
    assert worse.verdict(0.04, "higher") == "worse"
    assert worse.verdict(0.04, "lower") == "better"
    assert worse.verdict(0.06, "higher") == "perhaps worse"
    assert Difference(0.1, -0.1, 0.3, 0.4, 3).verdict(0.01, "higher") == "no difference seen"


def test_protocols_on_embeddings_whose_answers_are_known():
    """Images and texts on the axes: one image of four is nearest to the other class's name; equal captions are one."""
    axes = {"kite": [1.0, 0.0], "drum": [0.0, 1.0]}

    class Encoder:
        def embed_text(self, texts):
            return torch.tensor([axes[text] for text in texts])

    image_NE = torch.tensor([[1.0, 0.1], [0.2, 1.0], [1.0, 0.3], [0.9, 0.1]])
    captions = [{"en": ["kite"]}, {"en": ["drum"]}, {"en": ["kite"]}, {"en": ["drum"]}]
    data = Embedded(
        image_NE, np.array([0, 1, 0, 1]), np.zeros(4, bool), list("abcd"), captions, ["kite", "drum"], ["{}"], Encoder()
    )
    value, hit_N = PROTOCOLS["zero_shot"](data, 2)["zero_shot"]
    assert (value, hit_N.tolist()) == (0.75, [True, True, True, False])
    assert PROTOCOLS["retrieval"](data, 2)["recall5/en"][0] == 1.0  # two candidates, four images
