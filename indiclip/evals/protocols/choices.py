"""Choices: which of a few captions is the true one, in every language.

Shape letters: M images that are scored.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from indiclip.evals.protocols.matching import match
from indiclip.evals.protocols.metrics import chance_corrected, hit_rate, parity_gap
from indiclip.evals.protocols.protocol import Options, Protocol
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
        for code, texts_N in (items.captions or {}).items():
            for key, texts in zip(items.keys, texts_N, strict=True):
                if texts and len(set(texts)) < max(len(texts), 2):
                    found = f"found {len(texts)}, {len(set(texts))} of them different"
                    raise ValueError(f"{key}: captions in {code}: {found}; expected at least two, all different")

    def texts(self, items: "Items", options: Options) -> Iterator[str]:
        for code, texts_N in (items.captions or {}).items():
            for image in np.flatnonzero(items.tested_N).tolist() if options.wants(code) else ():
                yield from texts_N[image]

    def run(self, scorer: "CardScorer") -> Iterator[Score]:
        kind_N = np.array([cells[0] for cells in scorer.items.columns["kind"]], dtype=object)
        hit_N: dict[str, dict[int, bool]] = {}
        captions = scorer.items.captions or {}
        for code in sorted(captions, key=lambda code: code != "en"):  # English first: gaps are to it
            texts_N = captions[code]
            image_M = np.array([i for i in scorer.tested.tolist() if texts_N[i]], dtype=np.int64)
            if not len(image_M) or not scorer.options.wants(code):
                continue
            texts_M = [texts_N[i] for i in image_M.tolist()]
            found = match(scorer, image_M, texts_M, texts_M)
            hit_M, chance_M = found.rank_M == 0, np.array([1 / len(texts) for texts in texts_M])
            kinds = {str(kind): kind_N[image_M] == kind for kind in sorted(set(kind_N[image_M]) - {""})}
            for subset, of_M in (scorer.subsets(image_M) | kinds).items():
                chance = float(chance_M[of_M].mean())
                values = {"acc1": hit_rate(hit_M[of_M])}
                if not subset:
                    values["acc1_corrected"] = chance_corrected(values["acc1"], chance)
                yield from scorer.rows(self.name, code, values, int(of_M.sum()), round(1 / chance), chance, subset)
            hit_N[code] = dict(zip(image_M.tolist(), hit_M.tolist(), strict=True))
            both = [i for i in hit_N[code] if i in hit_N.get("en", {})]
            if code != "en" and both:
                english, other = (np.array([hit_N[language][i] for i in both]) for language in ("en", code))
                gap = parity_gap(english, other, np.zeros(len(both), np.int64))
                yield from scorer.rows(self.name, code, {"parity_acc1": gap}, len(both))
            scorer.keep(self.name, code, image_M, *found)
