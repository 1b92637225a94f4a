"""Lettering: generated images of single words in the scripts of India, to train and test reading without photographs.

An image is a pure function of (part, seed, index) and of the fonts on the machine. Parts share neither words nor font
families, nor do a test word's distractors occur in training. Every other word is a real one; the rest is made up (see
`indiclip.generated.lettering_words`).

    words = Lettering(num_words=1200, part="test")
    words[7]["image"], words[7]["caption"], words.candidates(7)
"""

from collections.abc import Sequence

from numpy.random import Generator, default_rng

from indiclip.generated.base import PARTS, Generated
from indiclip.generated.fonts import check_shaping, find_face
from indiclip.generated.lettering_draw import MIN_SIDE, draw_word
from indiclip.generated.lettering_words import Script, distractors, load_scripts, made_up_word
from indiclip.names import check_choice
from indiclip.types import Sample

SCRIPTS: dict[str, Script] = load_scripts()
# The twelve scripts of India's own. Assamese is written in the Bengali script and is no script beside it.
INDIAN = [script for script in SCRIPTS if script != "latin"]
_WORD, _PICTURE, _CANDIDATES, _ORDER = range(4)  # streams of random numbers that never touch each other


class Lettering(Generated):
    """Images of words as a map-style data set; the scripts take turns.

    `caption` is the word, `label` the place of its script in `scripts`.

    Args:
        num_words: Length of the data set.
        part: "train" or "test": other words in other families of fonts.
        scripts: Ids of scripts; None for the twelve of India's own. `latin` can be had too.
        size: Of the images in pixels: one number for square ones, or [height, width].
        seed: Which data set.
        num_distractors: Wrong words among the candidates of an image.

    Raises:
        MissingFonts: A font, fontconfig or Pillow's shaping is not there; names the package.
        ValueError: An argument is out of its range, or a font lacks a character of its script.
    """

    def __init__(
        self,
        num_words: int = 12_000,
        part: str = "train",
        scripts: Sequence[str] | None = None,
        size: int | list[int] = 224,
        seed: int = 0,
        num_distractors: int = 9,
    ) -> None:
        check_choice("part", part, PARTS)
        self.scripts = list(INDIAN if scripts is None else scripts)
        for script in self.scripts:
            check_choice("scripts", script, SCRIPTS)
        if not self.scripts:
            raise ValueError(f"scripts: expected a list such as ['tamil', 'telugu']; found {scripts!r}")
        super().__init__(f"lettering-{part}", size, MIN_SIDE, seed, num_words=num_words)
        self.part, self.num_distractors = part, num_distractors
        check_shaping()
        self.faces = {script: find_face(SCRIPTS[script].fonts[part]) for script in self.scripts}
        for script, face in self.faces.items():
            face.require(SCRIPTS[script].characters)

    def __getitem__(self, index: int) -> Sample:
        word = self.word(index)
        face = self.faces[self.script(index)]
        return {
            "image": draw_word(self._rng(index, _PICTURE), word, face, self.size_hw),
            "key": self.key(index),
            "caption": word,
            "label": self.label(index),
        }

    def label(self, index: int) -> int:
        """The place of the word's script in `scripts`."""
        self.must_have(index)
        return index % len(self.scripts)

    def script(self, index: int) -> str:
        """The id of the word's script."""
        return self.scripts[self.label(index)]

    def is_made_up(self, index: int) -> bool:
        """Whether the word is one of no language, which nobody can guess."""
        self.must_have(index)
        return index // len(self.scripts) % 2 == 1

    def word(self, index: int) -> str:
        """What is written, in Unicode NFC."""
        script = SCRIPTS[self.script(index)]
        if self.is_made_up(index):
            return made_up_word(self._rng(index, _WORD), script, self.part)
        # Real words come in a drawn order, each once before any comes again.
        words = script.words_of(self.part)
        order = self._rng(list(SCRIPTS).index(script.id), _ORDER).permutation(len(words))
        return words[int(order[index // len(self.scripts) // 2 % len(words)])]

    def candidates(self, index: int) -> list[str]:
        """The word first, then `num_distractors` of its script and part at edit distance 1 or 2; all different."""
        word = self.word(index)
        rng = self._rng(index, _CANDIDATES)
        return [word, *distractors(rng, SCRIPTS[self.script(index)], word, self.num_distractors)]

    def _rng(self, number: int, stream: int) -> Generator:
        return default_rng([self.seed, number, stream, PARTS.index(self.part)])
