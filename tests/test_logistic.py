"""Logistic regression on several splits against scikit-learn on each alone, in float64 and nearer to the optimum."""

import warnings

import numpy as np
import pytest
import torch

from indiclip.evals.protocols import logistic

linear_model = pytest.importorskip("sklearn.linear_model")


def samples(num=400, classes=5, length=24, seed=0):
    """Unit vectors whose variances differ by a factor of a hundred, around a common mean as embeddings have one."""
    generator = np.random.default_rng(seed)
    spread = np.geomspace(1, 0.1, length)
    label_N = generator.integers(0, classes, num)
    centre_CE = generator.normal(size=(classes, length)) * spread
    x_NE = (generator.normal(size=(num, length)) + 2) * spread + centre_CE[label_N]
    return torch.tensor(x_NE / np.linalg.norm(x_NE, axis=1, keepdims=True), dtype=torch.float32), torch.tensor(label_N)


def exact(x_NE, label_N, c):
    """scikit-learn's solution, a thousand times closer to the optimum than its default stops."""
    return linear_model.LogisticRegression(C=c, tol=1e-8, max_iter=20_000).fit(x_NE.double().numpy(), label_N.numpy())


def objective(weight, bias, x_NE, label_N, c):
    """By the book, in float64, per sample; `weight` of two classes counts as scikit-learn's one."""
    logits = x_NE.double() @ weight.double().T + bias.double()
    penalty = weight.double().square().sum() * (2 if len(weight) == 2 else 1) / 2
    return (torch.nn.functional.cross_entropy(logits, label_N, reduction="sum") + penalty / c).item() / len(x_NE)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("c", [0.1, 1.0, 31.6, 1000.0])
def test_every_split_has_scikit_learns_solution(classes, c):
    x_NE, label_N = samples(classes=classes)
    train_FN = torch.arange(3)[:, None] != torch.arange(len(x_NE)) % 3
    solution = logistic.fit(x_NE, label_N, train_FN, c)
    for weight, bias, train_N in zip(*solution, train_FN, strict=True):
        oracle = exact(x_NE[train_N], label_N[train_N], c)
        theirs = torch.tensor(oracle.coef_), torch.tensor(oracle.intercept_)
        if classes == 2:
            theirs = torch.cat([-theirs[0], theirs[0]]) / 2, torch.cat([-theirs[1], theirs[1]]) / 2
        ours, lowest = (objective(*pair, x_NE[train_N], label_N[train_N], c) for pair in ((weight, bias), theirs))
        assert lowest - 1e-9 <= ours <= lowest + 2e-6  # the tolerance, and float32
        answer_N = (x_NE @ weight.T + bias).argmax(1).numpy()
        assert (answer_N == oracle.predict(x_NE.double().numpy())).mean() >= 0.995  # near ties may fall either way


def test_what_a_split_does_not_train_on_has_no_influence():
    x_NE, label_N = samples()
    train_FN = torch.arange(2)[:, None] != torch.arange(len(x_NE)) % 2
    other_NE = torch.where(train_FN[0][:, None], x_NE, x_NE.flip(0))
    one, other = (logistic.fit(x, label_N, train_FN, 1.0, tolerance=1e-9) for x in (x_NE, other_NE))
    torch.testing.assert_close(one.weight_FCE[0], other.weight_FCE[0], rtol=0, atol=2e-3)
    assert (one.weight_FCE[1] - other.weight_FCE[1]).abs().max() > 0.1


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_samples_that_are_all_the_same_leave_the_shares_of_the_classes(shift):
    label_N = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    weight, bias = logistic.fit(torch.full((100, 4), shift), label_N, torch.ones(1, 100, dtype=torch.bool), 1.0)
    probs = (torch.full((4,), shift) @ weight[0].T + bias[0]).softmax(0)
    torch.testing.assert_close(probs, torch.tensor([0.5, 0.3, 0.2]), rtol=0, atol=2e-3)


def test_the_same_bits_every_time():
    x_NE, label_N = samples()
    train_FN = torch.arange(3)[:, None] != torch.arange(len(x_NE)) % 3
    one, other = logistic.fit(x_NE, label_N, train_FN, 10.0), logistic.fit(x_NE, label_N, train_FN, 10.0)
    assert torch.equal(one.weight_FCE, other.weight_FCE)
    assert torch.equal(one.bias_FC, other.bias_FC)


def test_a_solver_that_does_not_arrive_says_so(monkeypatch):
    x_NE, label_N = samples()
    monkeypatch.setattr(logistic, "_MAX_STEPS", 2)
    with pytest.warns(UserWarning, match="the linear probe stopped after 2 steps, before its minimum"):
        logistic.fit(x_NE, label_N, torch.ones(1, len(x_NE), dtype=torch.bool), 1000.0)


@pytest.mark.parametrize("c", [1e-3, 1e5])
def test_weak_and_strong_penalties_arrive(c):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x_NE, label_N = samples(num=60, length=100)  # fewer samples than numbers: separable
        logistic.fit(x_NE, label_N, torch.ones(1, len(x_NE), dtype=torch.bool), c)
