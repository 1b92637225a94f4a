"""Words of the scripts of India, made-up words beside them, and words that differ from one by a character or two.

The unit is what a reader sees as one character: a letter with its signs. Whether consonants joined by a virama are one
character or several is taught differently from script to script, so every distance here holds for both counts.

Made-up words are syllables of the script's own letters. They follow its spelling, mean nothing in any language, and so
cannot be guessed by a model that knows words but cannot read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unicodedata import category, combining, normalize

from numpy.random import Generator

from indiclip.datasets.tables import stable_hash
from indiclip.generated.base import PARTS, load_table, pick

MAX_DISTANCE = 2
_TRIES = 5000  # for a word with many neighbours some dozens are enough
_VIRAMA = 9  # Unicode's combining class of the signs that join consonants
_TAMIL_PULLI = "\u0bcd"  # of that class too, but it only kills the vowel
# Letters that change the one before them: Urdu's he of aspiration, Ol Chiki's aspiration and its signs.
_FOLLOWERS = "\u06be\u1c77\u1c78\u1c79\u1c7a"


def clusters(text: str, joined: bool = True) -> list[str]:
    """Split a text into the characters that a reader sees: letters with their signs.

    Args:
        text: In Unicode NFC.
        joined: Consonants joined by a virama are one character, as are a letter and its sign of aspiration; else each.
    """
    found: list[str] = []
    for character in text:
        if found and (_is_sign(character) or (joined and _joins(found[-1], character))):
            found[-1] += character
        else:
            found.append(character)
    return found


def _is_sign(character: str) -> bool:
    return category(character).startswith("M") or character in "\u200c\u200d"


def _joins(before: str, character: str) -> bool:
    dead = combining(before[-1]) == _VIRAMA and before[-1] != _TAMIL_PULLI
    return dead or character in _FOLLOWERS


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein's: the fewest units put in, taken out or replaced."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def part_of(word: str) -> str:
    """The part that a word belongs to, real or made up: half of all words each, by a hash."""
    return PARTS[stable_hash(f"lettering:{word}") % 2]


@dataclass(frozen=True)
class Script:
    """What lettering.yaml says of a script; all in Unicode NFC."""

    id: str
    fonts: dict[str, str]
    words: tuple[str, ...]
    consonants: tuple[str, ...]
    signs: tuple[str, ...]
    vowels: tuple[str, ...]
    conjuncts: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    closers: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    vowelled: bool = False

    @cached_property
    def onsets(self) -> tuple[str, ...]:
        """What a syllable begins with."""
        return self.consonants + self.conjuncts

    @cached_property
    def characters(self) -> str:
        """Every character that the script's words are written in."""
        parts = (self.words, self.onsets, self.signs, self.vowels, self.marks, self.closers, self.last)
        return "".join(sorted(set("".join(text for part in parts for text in part))))

    def words_of(self, part: str) -> list[str]:
        """The real words of a part."""
        return [word for word in self.words if part_of(word) == part]


def load_scripts() -> dict[str, Script]:
    """All scripts of lettering.yaml by id."""
    scripts = {}
    for id_, fields in load_table("lettering.yaml").items():
        texts = {key: normalize("NFC", value).split() for key, value in fields.items() if isinstance(value, str)}
        lists: dict[str, Any] = {key: tuple(dict.fromkeys(parts)) for key, parts in texts.items()}
        scripts[id_] = Script(id_, **(fields | lists))
    return scripts


def made_up_word(rng: Generator, script: Script, part: str) -> str:
    """Two to four syllables of a script; a word of the part, and none of the script's real ones."""
    while True:
        syllables = [_syllable(rng, script, first=i == 0) for i in range(rng.integers(2, 5))]
        if script.last and rng.random() < 0.2:
            syllables.append(pick(rng, script.last))
        word = normalize("NFC", "".join(syllables))
        if part_of(word) == part and word not in script.words:
            return word


def _syllable(rng: Generator, script: Script, first: bool) -> str:
    if first and rng.random() < 0.12:
        return pick(rng, script.vowels)
    conjunct = script.conjuncts and not first and rng.random() < 0.2  # few words begin with one
    onset = pick(rng, script.conjuncts if conjunct else script.consonants)
    nucleus = pick(rng, script.signs) if script.vowelled or rng.random() < 0.65 else ""
    if script.marks and not nucleus and rng.random() < 0.2:
        nucleus = pick(rng, script.marks)
    closer = pick(rng, script.closers) if script.closers and rng.random() < 0.25 else ""
    return onset + nucleus + closer


def distractors(rng: Generator, script: Script, word: str, count: int) -> list[str]:
    """Words of the same script and part at edit distance 1 or 2, all different, none equal to the word.

    The first is an edit of the word, the others are edits of the first. Were all edits of the word, it would lie in
    their midst: the texts alone would tell it, and a model that sees nothing would score far below chance.

    Raises:
        ValueError: The word has fewer neighbours than that.
    """
    units, found = clusters(word), dict.fromkeys([word])
    middle = units
    for _ in range(_TRIES):
        edited = _edit(rng, script, middle)
        other = normalize("NFC", "".join(edited))
        distance = MAX_DISTANCE if middle is not units else 1  # so that edits of the first are near, too
        if (
            part_of(other) == part_of(word)
            and _is_near(word, other, distance)
            and _is_well_formed(script, edited, units)
        ):
            found[other] = None
            middle = edited if middle is units else middle
        if len(found) > count:
            return list(found)[1:]
    raise ValueError(f"{script.id}: found {len(found) - 1} words near {word!r}; expected {count}")


def _is_near(word: str, other: str, most: int) -> bool:
    distances = [edit_distance(clusters(word, joined), clusters(other, joined)) for joined in (True, False)]
    return all(1 <= distance <= most for distance in distances)


def _is_well_formed(script: Script, units: list[str], model: list[str]) -> bool:
    """Whether the units stay apart when they are written in a row, and each may stand where it does.

    Real words have spellings that made-up ones have not (a vowel's letter inside a word): those of `model` are allowed.
    """
    if len(units) < 2 or clusters("".join(units)) != units or _is_sign(units[0][0]):
        return False
    return _misplaced(script, units) <= _misplaced(script, model)


def _misplaced(script: Script, units: list[str]) -> set[str]:
    inner = {*script.vowels} - {*script.onsets, *script.signs}
    closing = {*script.closers, *script.last} - {*script.onsets, *script.vowels}
    wrong = {unit for unit in units[1:] if unit in inner} | {unit for unit in units[:-1] if unit in script.last}
    return wrong | ({units[0]} & closing)


def _edit(rng: Generator, script: Script, units: list[str]) -> list[str]:
    """Replace one unit by one that looks or sounds similar (most often), or put one in, take one out, swap two."""
    kind, place = rng.random(), int(rng.integers(len(units)))
    if kind < 0.7:
        return [*units[:place], _similar(rng, script, units[place]), *units[place + 1 :]]
    if kind < 0.8:
        new = clusters(_syllable(rng, script, first=False))[0]
        return [*units[: place + 1], new, *units[place + 1 :]]
    if kind < 0.9 and len(units) > 2:
        return units[:place] + units[place + 1 :]
    if place + 1 < len(units):
        return [*units[:place], units[place + 1], units[place], *units[place + 2 :]]
    return units


def _similar(rng: Generator, script: Script, unit: str) -> str:
    """Another unit with the same consonant or the same vowel; of the same kind where the unit is a bare letter."""
    for letters in (script.last, script.closers, script.vowels, script.signs):
        if unit in letters:
            return pick(rng, letters)
    onset = max((onset for onset in script.onsets if unit.startswith(onset)), key=len, default="")
    rest = unit[len(onset) :]
    if not onset or any(_is_sign(sign) and sign not in script.signs + script.marks for sign in rest):
        return clusters(_syllable(rng, script, first=False))[0]
    combining = tuple(sign for sign in script.signs if _is_sign(sign[0]))
    if combining and rng.random() < 0.5:
        return onset + pick(rng, ("", *combining))
    return pick(rng, script.onsets) + rest
