"""Composed retrieval: the image that a picture and a text about what is to change lead to.

Shape letters: N images, Q queries, E embedding length.
"""

from collections.abc import Iterator
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from indiclip.evals.protocols.answers import among_all
from indiclip.evals.protocols.cosines import as_near, chunks
from indiclip.evals.protocols.metrics import hit_rate
from indiclip.evals.protocols.protocol import Protocol
from indiclip.evals.results import Score
from indiclip.names import did_you_mean

if TYPE_CHECKING:
    from indiclip.evals.card_scorer import CardScorer
    from indiclip.evals.images.items import Items

RECALL_AT = (1, 5, 10, 50)


class ComposedRetrieval(Protocol):
    """Recall of the target image, by the sum of the picture's and the text's embeddings, in every language.

    A row of a table has a picture (`file`), the text in a column of its language, and the file of the `target`; rows
    without these are candidates only. The picture itself is no candidate, all other images are. `image_only_` and
    `text_only_` are the recalls of one of both: a composition is worth what it is above them.

    Args:
        text_weight: Of the text's unit vector in the sum, the picture's having the rest of 1.
    """

    name = "composed_retrieval"
    required_fields = frozenset({"captions", "target"})
    metrics = ("r10", "r1", "r5", "r50")
    uses_gallery = True
    candidates = "images"

    def __init__(self, text_weight: float = 0.5) -> None:
        if not 0 <= text_weight <= 1:
            raise ValueError(f"text_weight: found {text_weight}; expected 0 to 1")
        self.text_weight = text_weight

    def check(self, items: "Items") -> None:
        places = set(items.keys)
        for code in items.captions:
            for key, texts, targets in _queries(items, code):
                if missing := [target for target in targets if target not in places]:
                    hint = did_you_mean(missing[0], places)
                    expected = "expected the `file` of a row: a target needs one of its own"
                    raise ValueError(f"{key}: target: {missing[0]!r} is no image of the table{hint}; {expected}")
                if len(texts) != len(targets):
                    found = f"{len(texts)} texts in {code} and {len(targets)} targets"
                    raise ValueError(f"{key}: {found}; expected one for each row")

    def run(self, scorer: "CardScorer") -> Iterator[Score]:
        place = {key: i for i, key in enumerate(scorer.items.keys)}
        for code, *_ in scorer.captions():
            rows = [
                (place[key], text, place[target])
                for key, texts, targets in _queries(scorer.items, code)
                for text, target in zip(texts, targets, strict=True)
                if target in place  # it may be unreadable
            ]
            if not rows:
                continue
            pictures, texts, targets = zip(*rows, strict=True)
            picture_Q, target_Q = np.array(pictures), np.array(targets)
            picture_QE = scorer.image_NE[picture_Q]
            text_QE = scorer.embed(texts)
            weights = {"": self.text_weight, "image_only_": 0.0, "text_only_": 1.0}
            for way, weight in weights.items():
                query_QE = F.normalize((1 - weight) * picture_QE + weight * text_QE, dim=1)
                rank_Q = _ranks(query_QE, scorer.image_NE, picture_Q, target_Q)
                num_candidates = len(place) - 1
                values = {f"{way}r{k}": hit_rate(rank_Q < k) for k in RECALL_AT}
                chances = {f"{way}r{k}": min(k / max(num_candidates, 1), 1.0) for k in RECALL_AT}
                yield from scorer.rows(self.name, code, values, len(rank_Q), num_candidates, chances)
                if not way and scorer.setting.main:
                    targets = (torch.arange(len(target_Q)), torch.from_numpy(target_Q))
                    hidden_Q = torch.from_numpy(picture_Q)
                    found = among_all(query_QE, scorer.image_NE, scorer.items.keys, targets, rank_Q, hidden_Q)
                    scorer.keep(self.name, code, picture_Q, found, questions=texts)


def _queries(items: "Items", code: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """The key of each picture to score that has a target, its texts in a language and its targets."""
    rows = zip(items.keys, items.captions[code], items.columns["target"], strict=True)
    for key, texts, targets in compress(rows, items.tested_N):
        if texts and any(targets):
            yield key, texts, [target for target in targets if target]


def _ranks(query_QE: torch.Tensor, image_NE: torch.Tensor, picture_Q: np.ndarray, target_Q: np.ndarray) -> np.ndarray:
    """How many wrong candidates are at least as near as the target. Ties and NaN count against it."""
    rank_Q = np.zeros(len(query_QE), np.int64)
    for part in chunks(len(query_QE), len(image_NE)):
        cosine_BN = query_QE[part] @ image_NE.T
        target_B1 = torch.from_numpy(target_Q[part])[:, None]
        near_BN = as_near(cosine_BN, cosine_BN.gather(1, target_B1))
        near_BN.scatter_(1, target_B1, False)
        near_BN.scatter_(1, torch.from_numpy(picture_Q[part])[:, None], False)
        rank_Q[part] = near_BN.sum(1).numpy()
    return rank_Q
