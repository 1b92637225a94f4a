"""In-scene retrieval: which of a few words stands somewhere in a photo.

Shape letters: W words of all photos that are scored, T texts of all questions, E embedding length.
"""

import random
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from indiclip.datasets.tables import stable_hash
from indiclip.evals.protocols.answers import among_own
from indiclip.evals.protocols.protocol import Options, Protocol, check_group
from indiclip.evals.results import Score

if TYPE_CHECKING:
    from indiclip.evals.card_scorer import CardScorer
    from indiclip.evals.images.items import Items


class Question(NamedTuple):
    """A word of a photo among words of the same script that stand on other photos only."""

    image: int
    script: str
    texts: list[str]  # the right one first


class InScene(Protocol):
    """Accuracy over the words, as the card's first English prompt asks for them.

    A table has a row for each word of a photo: `file`, `word`, `script`. Wrong texts are words of the same script that
    do not stand on the photo, whatever their case; they are a function of the photo's key, the word and the words of
    all photos. The interval is that of drawn photos, each with all its words.

    Args:
        num_candidates: Texts that a word is found among, itself included; fewer where a script has fewer.
    """

    name = "in_scene"
    required_fields = frozenset({"word", "script"})
    metrics = ("acc1",)
    candidates = "texts"
    is_plain = True

    def __init__(self, num_candidates: int = 10) -> None:
        if num_candidates < 2:
            raise ValueError(f"num_candidates: found {num_candidates}; expected at least 2")
        self.num_candidates = num_candidates

    def check(self, items: "Items") -> None:
        for name in ("word", "script"):
            for key, cells in zip(items.keys, items.columns[name], strict=True):
                if not all(map(str.strip, cells)):
                    raise ValueError(f"{key}: {name}: found an empty cell; expected a {name} in each row of a photo")
        for key, scripts in zip(items.keys, items.columns["script"], strict=True):
            for script in scripts:
                check_group(script, f"{key}: script")

    def texts(self, items: "Items", options: Options) -> Iterator[str]:
        # Every word: of fewer photos, where some cannot be read, others are drawn.
        yield from items.card.asked([word for words in _words(items) for word in words])

    def questions(self, items: "Items") -> Iterator[Question]:
        """One for each different word of each photo that is scored."""
        words_N = _words(items)
        pools: dict[str, dict[str, str]] = defaultdict(dict)  # script -> a word in small letters -> the word
        for words, scripts in zip(words_N, items.columns["script"], strict=True):
            for word, script in zip(words, scripts, strict=True):
                pools[script].setdefault(word.casefold(), word)
        for image in np.flatnonzero(items.tested_N).tolist():
            own = {word.casefold(): word for word in words_N[image]}
            script_of = dict(zip(map(str.casefold, words_N[image]), items.columns["script"][image], strict=True))
            for folded, word in own.items():
                script = script_of[folded]
                others = sorted(other for name, other in pools[script].items() if name not in own)
                drawn = random.Random(stable_hash(f"{items.keys[image]}\n{word}"))
                wrong = drawn.sample(others, min(len(others), self.num_candidates - 1))
                yield Question(image, script, [word, *wrong])

    def run(self, scorer: "CardScorer") -> Iterator[Score]:
        questions = list(self.questions(scorer.items))
        image_W = np.array([question.image for question in questions])
        texts_W = [question.texts for question in questions]
        text_TE = scorer.embed([text for texts in texts_W for text in scorer.card.asked(texts)])
        answered = among_own(scorer.image_NE[image_W], text_TE, texts_W)

        chance_W = np.array([1 / len(texts) for texts in texts_W])
        subsets = scorer.subsets(image_W, [question.script for question in questions])
        yield from scorer.among_texts(self.name, "en", answered.rank_Q == 0, chance_W, subsets, image_W)
        scorer.keep(self.name, "en", image_W, answered, questions=[texts[0] for texts in texts_W])


def _words(items: "Items") -> list[list[str]]:
    return [[unicodedata.normalize("NFC", word.strip()) for word in cells] for cells in items.columns["word"]]
