"""Bitext retrieval: whether a text and its translation are each other's nearest, and how near. No image is asked for.

Shape letters: N texts, T distinct texts of a language, S pairs of translations, E embedding length.
"""

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch

from indiclip.evals.protocols.answers import among_all
from indiclip.evals.protocols.cosines import pair_ranks
from indiclip.evals.protocols.metrics import Interval, hit_rate, mean
from indiclip.evals.protocols.protocol import Protocol
from indiclip.evals.protocols.retrieval import chance_recall
from indiclip.evals.results import Score

if TYPE_CHECKING:
    from indiclip.evals.card_scorer import CardScorer


class Bitext(Protocol):
    """Of parallel text, English in one column and other languages in others: recall@1 of a text's translation among
    all of the other language (Artetxe and Schwenk, TACL 7, 2019, Tatoeba), both ways, for every language.

    Equal texts are one candidate, and any translation that a table gives is right. `similarity` is the mean cosine of
    translations, `similarity_gap` how much that is above the mean of texts that are none.
    """

    name = "bitext"
    required_fields = frozenset({"captions"})
    embeds_images = False
    metrics = ("to_english_r1", "from_english_r1")
    candidates = "images"

    def run(self, scorer: "CardScorer") -> Iterator[Score]:
        captions = scorer.items.captions
        for code, texts_N, image_M in scorer.captions():
            if code == "en" or "en" not in captions:
                continue
            pairs, row_of = set[tuple[str, str]](), dict[str, int]()  # the first row that has a text
            for row in image_M.tolist():
                pairs.update(product(texts_N[row], captions["en"][row]))
                for text in texts_N[row]:
                    row_of.setdefault(text, row)
            if len(pairs) < 2:
                continue
            pair_S2 = np.array(sorted(pairs), dtype=object)
            (ones, one_S), (others, other_S) = (_distinct(text_S) for text_S in pair_S2.T)
            one_TE, other_TE = scorer.embed(ones), scorer.embed(others)
            rank_one, rank_other = (rank.numpy() for rank in pair_ranks(one_TE, other_TE, one_S, other_S))
            values = {"to_english_r1": hit_rate(rank_one < 1), "from_english_r1": hit_rate(rank_other < 1)}
            chances = {
                "to_english_r1": chance_recall(np.bincount(one_S), len(others), 1),
                "from_english_r1": chance_recall(np.bincount(other_S), len(ones), 1),
            }
            cosine_S = torch.linalg.vecdot(one_TE[one_S], other_TE[other_S]).double().numpy()
            values["similarity"] = mean(cosine_S)
            unrelated = _mean_cosine_of_others(one_TE, other_TE, cosine_S)
            values["similarity_gap"] = Interval(*(end - unrelated for end in values["similarity"]))
            yield from scorer.rows(self.name, code, values, len(ones), len(others), chances)
            if scorer.setting.main:
                answered = among_all(one_TE, other_TE, others, (one_S, other_S), rank_one)
                scorer.keep(self.name, code, np.array([row_of[text] for text in ones]), answered, questions=ones)


def _distinct(text_S: np.ndarray) -> tuple[list[str], torch.Tensor]:
    """The different texts, and which of them each is."""
    texts, place_S = np.unique(text_S, return_inverse=True)
    return texts.tolist(), torch.from_numpy(place_S)


def _mean_cosine_of_others(one_TE: torch.Tensor, other_TE: torch.Tensor, cosine_S: np.ndarray) -> float:
    """Of all pairs but the translations."""
    total = float(one_TE.double().sum(0) @ other_TE.double().sum(0))
    num_others = len(one_TE) * len(other_TE) - len(cosine_S)
    return (total - float(cosine_S.sum())) / num_others if num_others else float("nan")
