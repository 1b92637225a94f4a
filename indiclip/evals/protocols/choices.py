"""Choices: which of a few captions is the true one, in every language.

Shape letters: M images that are scored, T texts of all of them, E embedding length.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from indiclip.evals.protocols.answers import among_own
from indiclip.evals.protocols.metrics import parity_gap
from indiclip.evals.protocols.protocol import Protocol, check_group
from indiclip.evals.results import Score

if TYPE_CHECKING:
    from indiclip.evals.card_scorer import CardScorer
    from indiclip.evals.images.items import Items


class Choices(Protocol):
    """Accuracy among the captions of an image in a language, of which the first is true and the others are not; for
    each kind of question too; and what English does better on the same images.

    A table has a row for each of an image's captions, the true one first: `file`, `kind`, and a column for each
    language. Chance is the mean of 1 / captions over the images.
    """

    name = "choices"
    required_fields = frozenset({"captions", "kind"})
    metrics = ("acc1",)
    candidates = "texts"
    is_plain = True

    def check(self, items: "Items") -> None:
        for key, cells in zip(items.keys, items.columns["kind"], strict=True):
            if cells[0]:  # an image need not have a kind
                check_group(cells[0], f"{key}: kind")
        for code, texts_N in items.captions.items():
            for key, texts in zip(items.keys, texts_N, strict=True):
                if texts and len(set(texts)) < max(len(texts), 2):
                    found = f"found {len(texts)}, {len(set(texts))} of them different"
                    raise ValueError(f"{key}: captions in {code}: {found}; expected at least two, all different")

    def run(self, scorer: "CardScorer") -> Iterator[Score]:
        kind_N = np.array([cells[0] for cells in scorer.items.columns["kind"]], dtype=object)
        hit_N: dict[str, dict[int, bool]] = {}
        for code, texts_N, image_M in scorer.captions():
            texts_M = [texts_N[i] for i in image_M.tolist()]
            text_TE = scorer.embed([text for texts in texts_M for text in texts])
            answered = among_own(scorer.image_NE[image_M], text_TE, texts_M)
            hit_M, chance_M = answered.rank_Q == 0, np.array([1 / len(texts) for texts in texts_M])
            kinds = {str(kind): kind_N[image_M] == kind for kind in sorted(set(kind_N[image_M]) - {""})}
            yield from scorer.among_texts(self.name, code, hit_M, chance_M, scorer.subsets(image_M) | kinds)
            hit_N[code] = dict(zip(image_M.tolist(), hit_M.tolist(), strict=True))
            both = [i for i in hit_N[code] if i in hit_N.get("en", {})]
            if code != "en" and both:
                english, other = (np.array([hit_N[language][i] for i in both]) for language in ("en", code))
                gap = parity_gap(english, other)
                yield from scorer.rows(self.name, code, {"parity_acc1": gap}, len(both))
            scorer.keep(self.name, code, image_M, answered)
