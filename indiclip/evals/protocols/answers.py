"""What is answered for each question, as predictions keep it: the right one, the nearest, and how many are nearer.

Shape letters: Q questions, X candidates, S pairs of a question and a right candidate, T texts of all questions, K
nearest, E embedding length.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from indiclip.evals.protocols.cosines import as_near, chunks
from indiclip.evals.results import column_of

TOP = 5  # nearest candidates that are kept


class Answered(NamedTuple):
    """Columns of `results.Prediction`, see there.

    Attributes:
        truth_Q: str, as are `predicted_Q` and `top_QK`: NumPy arrays of objects.
        rank_Q: int64.
        cosine_QK: float32, or a list of numbers for each question where they are of several lengths, as `top_QK` then.
    """

    truth_Q: np.ndarray
    predicted_Q: np.ndarray
    rank_Q: np.ndarray
    top_QK: np.ndarray
    cosine_QK: np.ndarray


def among_own(image_QE: Tensor, text_TE: Tensor, texts_Q: Sequence[Sequence[str]]) -> Answered:
    """Questions of which each has texts of its own to choose from, the first of them being right.

    Args:
        image_QE: Of unit length.
        text_TE: All texts of the first question, then those of the next, of unit length.
        texts_Q: The same as answers name them.
    """
    count_Q = list(map(len, texts_Q))
    owner_T = torch.arange(len(count_Q)).repeat_interleave(torch.tensor(count_Q, dtype=torch.int64))
    cosines_Q = torch.linalg.vecdot(image_QE[owner_T], text_TE).split(count_Q)
    rank_Q, predicted, tops, cosines = np.zeros(len(count_Q), np.int64), list[str](), list[list[str]](), []
    for place, (texts, cosine_T) in enumerate(zip(texts_Q, cosines_Q, strict=True)):
        rank_Q[place] = int(as_near(cosine_T[1:], cosine_T[0]).sum())
        nearest_K = cosine_T.nan_to_num(nan=-2).argsort(descending=True, stable=True)[:TOP]
        tops.append([texts[i] for i in nearest_K.tolist()])
        cosines.append(cosine_T[nearest_K].tolist())
        # A tie counts against the right text, wherever it came among equals.
        predicted.append(tops[-1][int(rank_Q[place] > 0 and tops[-1][0] == texts[0])])
    truths = column_of([texts[0] for texts in texts_Q])
    return Answered(truths, column_of(predicted), rank_Q, column_of(tops), column_of(cosines))


def among_all(
    question_QE: Tensor,
    candidate_XE: Tensor,
    names: Sequence[str],
    right: tuple[Tensor, Tensor],
    rank_Q: np.ndarray,
    hidden_Q: Tensor | None = None,
) -> Answered:
    """Questions that all have the same candidates. The first right one of a question, in their order, is its truth.

    Args:
        question_QE: Of unit length.
        candidate_XE: Of unit length.
        names: Of the candidates, as answers name them.
        right: `(question_S, candidate_S)`, at least one for each question.
        rank_Q: int64, how many wrong candidates are at least as near as the nearest right one.
        hidden_Q: int64, one that is no candidate of a question.
    """
    names_X, (question_S, right_S) = np.array(names, dtype=object), right
    k = min(TOP, len(names) - (hidden_Q is not None))
    top_QK, cosine_QK = torch.zeros(len(rank_Q), k, dtype=torch.int64), torch.zeros(len(rank_Q), k)
    right_Q, wrong_Q = torch.zeros(2, len(rank_Q), dtype=torch.int64)
    for part in chunks(len(rank_Q), len(names)):
        cosine_BX = question_QE[part] @ candidate_XE.T
        near_BX = cosine_BX.nan_to_num(nan=-2)
        if hidden_Q is not None:
            near_BX.scatter_(1, hidden_Q[part, None], -3)
        top_QK[part] = near_BX.topk(k, dim=1).indices
        cosine_QK[part] = cosine_BX.gather(1, top_QK[part])
        here_S = (question_S >= part.start) & (question_S < part.stop)
        is_right_BX = torch.zeros_like(near_BX)
        is_right_BX[question_S[here_S] - part.start, right_S[here_S]] = 1
        right_Q[part] = is_right_BX.argmax(1)  # the first of them
        wrong_Q[part] = (near_BX - 4 * is_right_BX).argmax(1)
    predicted_Q = torch.where(torch.from_numpy(rank_Q) == 0, right_Q, wrong_Q)
    truths, predicted, tops = (names_X[places.numpy()] for places in (right_Q, predicted_Q, top_QK))
    return Answered(truths, predicted, rank_Q, tops, cosine_QK.numpy())
