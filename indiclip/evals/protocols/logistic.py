"""Multinomial logistic regression with an L2 penalty, on several splits of the same samples at once.

The problem is that of scikit-learn's `LogisticRegression`: minimise, with an intercept that is not penalised,

    inverse_penalty * sum of cross entropies + |weights|^2 / 2.

It is convex with one solution (but for a constant added to all intercepts), so where the solver starts and in which
coordinates it walks change the time and not the answer. L-BFGS walks here along the principal axes of the samples,
each scaled by the curvature that the problem is expected to have along it, as in the fixed Hessian of Böhning (Ann.
Inst. Statist. Math. 44, 1992). The variances of embeddings differ by factors of thousands: this takes tens of steps,
the plain coordinates hundreds.

Shape letters: N samples, E length, A = E + 1 coordinates (the last is the intercept), C classes, F splits.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from indiclip.evals.protocols.cosines import chunks

_HISTORY = 10  # steps that L-BFGS remembers, as in scikit-learn
_MAX_STEPS = 500  # several times what the hardest of our tries took
_SCALE = 1e4  # of the objective: torch's solver drops steps along which it curves by less than 1e-10
_CURVATURE = 0.1  # p * (1 - p) of a class's probability, typically: 1/4 is the most, 0 at a sample that is certain


class Logistic(NamedTuple):
    """Logits of split f are `x_NE @ weight_FCE[f].T + bias_FC[f]`."""

    weight_FCE: Tensor
    bias_FC: Tensor


def fit(x_NE: Tensor, label_N: Tensor, train_FN: Tensor, inverse_penalty: float, tolerance: float = 1e-6) -> Logistic:
    """Trains a classifier on each split.

    Args:
        x_NE: float32, finite.
        label_N: int64, 0 to C - 1.
        train_FN: bool, the samples that each split trains on, of every class some: a class without any has no
            finite intercept.
        inverse_penalty: scikit-learn's C, > 0. With two classes scikit-learn has one vector of weights, the difference
            of the two here, and the penalty is set so that both problems are the same.
        tolerance: Nats per training sample by which the objective may lie above the lowest possible. For a gradient g
            and a penalty of p x^2 / 2 in each coordinate, strong convexity bounds this by the sum of g^2 / 2p.

    Returns:
        float32 weights and intercepts.
    """
    num_classes = int(label_N.max()) + 1
    problem = _Problem(x_NE, label_N, penalty=(2 if num_classes == 2 else 1) / inverse_penalty)
    solution = torch.zeros(1, num_classes, x_NE.shape[1] + 1)
    if len(train_FN) > 1:  # the splits' solutions are near that of all samples, which costs one split's price
        solution = _minimise(problem, train_FN.any(0, keepdim=True), solution, tolerance)
    solution = _minimise(problem, train_FN, solution.repeat(len(train_FN), 1, 1), tolerance)
    return problem.original(solution)


class _Problem:
    """The objective and its gradient in the coordinates that the solver walks in.

    Args:
        x_NE: Samples.
        label_N: Their classes.
        penalty: Of |weights|^2 / 2, beside a sum of cross entropies.
    """

    def __init__(self, x_NE: Tensor, label_N: Tensor, penalty: float) -> None:
        self.label_N = label_N
        self.mean_E = x_NE.mean(0)  # moved into the intercept: nothing but the correlation with it changes
        centred_NE = x_NE - self.mean_E
        variance_E, axes_EE = torch.linalg.eigh(centred_NE.T @ centred_NE)
        scale_E = (penalty + _CURVATURE * variance_E.clamp(min=0)).rsqrt()
        self.axes_EE = axes_EE * scale_E
        self.intercept = (_CURVATURE * len(x_NE)) ** -0.5
        intercept_N1 = torch.full((len(x_NE), 1), self.intercept)
        self.z_NA = torch.cat([centred_NE @ self.axes_EE, intercept_N1], dim=1)
        self.penalty_A = torch.cat([penalty * scale_E.square(), torch.zeros(1)])
        self.floor_A = torch.cat([self.penalty_A[:-1], torch.ones(1)])

    def evaluate(self, v_FCA: Tensor, train_FN: Tensor) -> tuple[float, Tensor]:
        """The sum of the splits' objectives and its gradient (F, C, A)."""
        splits, classes, _ = v_FCA.shape
        penalty_FCA = self.penalty_A * v_FCA
        objective = (penalty_FCA * v_FCA).sum(dtype=torch.float64).item() / 2
        gradient = penalty_FCA.reshape(splits * classes, -1)
        for part in chunks(len(self.z_NA), splits * classes):
            logits_FCB = (v_FCA.flatten(0, 1) @ self.z_NA[part].T).view(splits, classes, -1)
            train_F1B = train_FN[:, None, part]
            label_F1B = self.label_N[part].expand(splits, 1, -1)
            log_probs_FCB = logits_FCB.log_softmax(1)
            objective -= (log_probs_FCB.gather(1, label_F1B) * train_F1B).sum(dtype=torch.float64).item()
            error_FCB = log_probs_FCB.exp_().scatter_add_(1, label_F1B, torch.tensor(-1.0).expand(label_F1B.shape))
            error_FCB *= train_F1B
            gradient.addmm_(error_FCB.flatten(0, 1), self.z_NA[part])
        return objective, gradient.view_as(v_FCA)

    def excess(self, gradient_FCA: Tensor, train_FN: Tensor) -> float:
        """How much the worst split may lie above its minimum, in nats per training sample.

        A bound in the weights; the intercepts, which have no penalty, count with the curvature expected of them.
        """
        bound_F = (gradient_FCA.square() / (2 * self.floor_A)).sum((1, 2)) / train_FN.sum(1)
        return bound_F.max().item()

    def original(self, v_FCA: Tensor) -> Logistic:
        weight_FCE = v_FCA[..., :-1] @ self.axes_EE.T
        return Logistic(weight_FCE, v_FCA[..., -1] * self.intercept - weight_FCE @ self.mean_E)


def _minimise(problem: _Problem, train_FN: Tensor, start_FCA: Tensor, tolerance: float) -> Tensor:
    """L-BFGS, all splits in one step, until each is within the tolerance."""
    v_FCA, excess = start_FCA.clone(), 0.0
    solver = torch.optim.LBFGS(
        [v_FCA],
        max_iter=_MAX_STEPS,
        history_size=_HISTORY,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def evaluate() -> float:
        nonlocal excess
        objective, gradient = problem.evaluate(v_FCA, train_FN)
        excess = problem.excess(gradient, train_FN)
        # Near enough: without a slope the solver stops.
        v_FCA.grad = gradient * (_SCALE if excess > tolerance else 0)
        return objective * _SCALE

    solver.step(evaluate)  # type: ignore[no-untyped-call]
    if excess > tolerance:
        warnings.warn(
            f"the linear probe stopped after {_MAX_STEPS} steps, up to {excess:.1g} nats above its minimum",
            stacklevel=2,
        )
    return v_FCA
