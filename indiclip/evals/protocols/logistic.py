"""Multinomial logistic regression with an L2 penalty, on several splits of the same samples: scikit-learn's.

Shape letters: N samples, E length, C classes, F splits.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_MAX_STEPS = 200  # of Newton's method: many times what the hardest of our tries took


class Logistic(NamedTuple):
    """Logits of split f are `x_NE @ weight_FCE[f].T + bias_FC[f]`."""

    weight_FCE: Tensor
    bias_FC: Tensor


def fit(x_NE: Tensor, label_N: Tensor, train_FN: Tensor, inverse_penalty: float, tolerance: float = 1e-5) -> Logistic:
    """Trains a classifier on each split, by Newton's method with conjugate gradients.

    The variances of embeddings differ by factors of thousands, for which L-BFGS takes hundreds of steps and Newton's
    method ten. Splits of the same classes are much alike, so each starts from the solution of the one before.

    Args:
        x_NE: float32, finite.
        label_N: int64, 0 to C - 1.
        train_FN: bool, the samples that each split trains on. What is of a class that a split has none of is never
            found there.
        inverse_penalty: scikit-learn's C, > 0.
        tolerance: scikit-learn's, of the largest gradient.

    Returns:
        float32 weights and intercepts.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression  # a second

    x, labels, num_classes = x_NE.numpy(), label_N.numpy(), int(label_N.max()) + 1
    weight_FCE = torch.zeros(len(train_FN), num_classes, x_NE.shape[1])
    bias_FC = torch.full((len(train_FN), num_classes), -torch.inf)
    model, known = None, np.empty(0)
    for split, train_N in enumerate(train_FN.numpy()):
        classes = np.unique(labels[train_N])
        if len(classes) == 1:  # there is nothing to tell apart
            bias_FC[split, classes] = 0
            continue
        if model is None or not np.array_equal(classes, known):
            options = {"solver": "newton-cg", "tol": tolerance, "max_iter": _MAX_STEPS, "warm_start": True}
            model, known = LogisticRegression(C=inverse_penalty, **options), classes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of many lines
            warnings.filterwarnings("ignore", "(?i).*line search")  # rounding ends it, near the minimum
            warnings.filterwarnings("ignore", "The number of unique classes")  # of few shots
            model.fit(x[train_N], labels[train_N])
        if model.n_iter_.max() >= _MAX_STEPS:
            warnings.warn(f"the linear probe stopped after {_MAX_STEPS} steps, before its minimum", stacklevel=2)
        coefficients, intercepts = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
        if len(classes) == 2:  # of two classes it has the difference
            coefficients, intercepts = (torch.cat([-one, one]) / 2 for one in (coefficients, intercepts))
        weight_FCE[split, classes], bias_FC[split, classes] = coefficients.float(), intercepts.float()
    return Logistic(weight_FCE, bias_FC)
