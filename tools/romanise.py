"""Indic scripts in Latin letters, by rule: ISO 15919 with its diacritics, and plain letters as people type them.

    python tools/romanise.py my_card.yaml

gives the classes of benchmark cards `romanised` names, made by rule of their names in Indic scripts and checked by
nobody. A class that has a romanised name of its own in a language keeps it, and two classes that would be written alike
get none. Only the lines of classes change; `names: {...}` of each must be on one line.

Unicode took its Brahmic blocks over from ISCII, so the same letter has the same place in each: one table serves nine
scripts. Perso-Arabic script does not write most vowels, which no rule can add: Urdu is not romanised, and neither are
Ol Chiki and Meetei Mayek, which have other blocks.

Typed text follows no standard. What comes out here is one plain spelling: no long vowels (`puri`, not `poori`), `ch`
and `chh`, `sh`, and the vowel that nobody pronounces left out (`jalebi`, `chulbul`).
"""

from __future__ import annotations

import argparse
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from indiclip.evals.cards.card import Card, load_card

# The languages and the script that each is written in here; `romanise` knows them.
LANGUAGES = ("as", "bn", "doi", "gu", "hi", "kn", "kok", "mai", "ml", "mr", "ne", "or", "pa", "sa", "ta", "te")

_FIRST, _LAST, _BLOCK = 0x900, 0xD7F, 0x80
_SIGNS_SHARED = "।॥"  # one danda serves all scripts


class _Letter(NamedTuple):
    kind: str  # C consonant, V vowel, A inherent vowel, N nasal or breath after a vowel, X anything else
    iso: str


_VOWELS = {
    **dict(zip(range(0x05, 0x0D), ("a", "ā", "i", "ī", "u", "ū", "r̥", "l̥"), strict=True)),
    **dict(zip(range(0x0D, 0x15), ("ê", "e", "ē", "ai", "ô", "o", "ō", "au"), strict=True)),
    0x60: "r̥̄",
    0x61: "l̥̄",
    0x72: "ê",
}
_VOWEL_SIGNS = {
    **dict(zip(range(0x3E, 0x45), ("ā", "i", "ī", "u", "ū", "r̥", "r̥̄"), strict=True)),
    **dict(zip(range(0x45, 0x4D), ("ê", "e", "ē", "ai", "ô", "o", "ō", "au"), strict=True)),
    0x57: "au",  # Malayalam's short form, and Tamil's second half where it stands alone
    0x62: "l̥",
    0x63: "l̥̄",
}
_CONSONANTS = dict(
    zip(
        range(0x15, 0x3A),
        (
            *("k", "kh", "g", "gh", "ṅ", "c", "ch", "j", "jh", "ñ", "ṭ", "ṭh", "ḍ", "ḍh", "ṇ"),
            *("t", "th", "d", "dh", "n", "ṉ", "p", "ph", "b", "bh", "m"),
            *("y", "r", "ṟ", "l", "ḷ", "ḻ", "v", "ś", "ṣ", "s", "h"),
        ),
        strict=True,
    )
)
_DOTTED = {"k": "q", "kh": "ḵẖ", "g": "ġ", "j": "z", "ḍ": "ṛ", "ḍh": "ṛh", "ph": "f", "y": "ẏ", "s": "ś", "l": "ḷ"}
_NASALS = {0x01: "m̐", 0x02: "ṁ", 0x03: "ḥ"}
_NUKTA, _AVAGRAHA, _VIRAMA = 0x3C, 0x3D, 0x4D
# Where a block goes its own way: Bengali khanda ta, Assamese ra and wa, Gurmukhi rra and tippi, Odia wa, Tamil aytham,
# Kannada llla, Malayalam's vowelless letters, om.
_OWN = {
    0x9CE: _Letter("X", "t"),
    0x9F0: _Letter("C", "r"),
    0x9F1: _Letter("C", "v"),
    0xA5C: _Letter("C", "ṛ"),
    0xA70: _Letter("N", "ṁ"),
    0xB5F: _Letter("C", "ẏ"),  # which other scripts write with a dot below y
    0xB71: _Letter("C", "v"),
    0xB83: _Letter("X", "ḵ"),
    0xCDE: _Letter("C", "ḻ"),
    **{0xD7A + i: _Letter("X", iso) for i, iso in enumerate(("ṇ", "n", "r", "l", "ḷ", "k"))},
    0x950: _Letter("V", "ōm"),
    0xAD0: _Letter("V", "ōm"),
}
_ADDAK = 0xA71  # Gurmukhi: doubles the next consonant
_JOINERS = "\u200c\u200d"  # how letters are joined, which Latin letters are not


def iso15919(text: str) -> str:
    """Text in one of the nine scripts -> ISO 15919; everything else stays.

    Every sign is kept apart, so it can be read back: `ē` and `ō` are long, the anusvara is `ṁ`, and a colon parts
    letters that would be read as one (`baṛha:ī`).

    Args:
        text: In any of Unicode's normal forms.
    """
    return "".join(letter.iso for letter in _letters(text))


def romanise(text: str, language: str) -> str:
    """Text as its speakers type it in plain Latin letters, in lower case.

    In Hindi and its neighbours the inherent vowel is silent at the end of a word and between `V C _ C V` (M. Ohala,
    "Aspects of Hindi Phonology", 1983, applied from the right); compounds, which the rule does not see, come out with a
    vowel too many or too few. Tamil letters, which do not mark voice, are voiced between vowels and after nasals.

    Args:
        text: In the language's Indic script; what is Latin already stays.
        language: One of `LANGUAGES`.

    Raises:
        ValueError: A language that is not written in one of the nine scripts.
    """
    if language not in LANGUAGES:
        raise ValueError(f"romanise: {language!r} is not among the languages {', '.join(LANGUAGES)}")
    words, word = [], list[_Letter]()
    for letter in [*_letters(text), _Letter("", "")]:
        if letter.kind in ("C", "V", "A", "N") or (letter.kind == "X" and letter.iso.isalpha()):
            word.append(letter)
        else:
            words += [_typed(word, language), letter.iso]
            word = []
    return "".join(words).replace(":", "").lower()


def is_romanisable(text: str) -> bool:
    """Whether all of a text's letters are of the nine scripts or ASCII."""
    letters = [character for character in unicodedata.normalize("NFC", text) if character.isalpha()]
    return any(map(_is_indic, letters)) and all(_is_indic(one) or one.isascii() for one in letters)


def _is_indic(character: str) -> bool:
    return _FIRST <= ord(character) <= _LAST


def _letters(text: str) -> list[_Letter]:
    """One by one, each consonant followed by its vowel, if it has one."""
    found: list[_Letter] = []
    is_open = doubles = False  # whether the last consonant still waits for its vowel
    for character in unicodedata.normalize("NFC", text):
        point = ord(character)
        place = point % _BLOCK if _is_indic(character) and character not in _SIGNS_SHARED else -1
        if character in _JOINERS:
            continue
        if place == _NUKTA and found:
            found[-1] = _Letter("C", _DOTTED.get(found[-1].iso, found[-1].iso))
            continue
        if is_open and place != _VIRAMA and place not in _VOWEL_SIGNS:
            found.append(_Letter("A", "a"))
        is_open = False
        if point == _ADDAK:
            doubles = True
        elif place != _VIRAMA:
            found += _parted(found, _letter(character, place), doubles)
            is_open, doubles = found[-1].kind == "C", False
    return [*found, _Letter("A", "a")] if is_open else found


def _letter(character: str, place: int) -> _Letter:
    if ord(character) in _OWN:
        return _OWN[ord(character)]
    for kind, table in (("C", _CONSONANTS), ("V", _VOWELS), ("V", _VOWEL_SIGNS), ("N", _NASALS)):
        if place in table:
            return _Letter(kind, table[place])
    if place == _AVAGRAHA:
        return _Letter("X", "’")
    if character in _SIGNS_SHARED:
        return _Letter("X", ".")
    digit = unicodedata.digit(character, None) if place >= 0 else None
    return _Letter("X", character if digit is None else str(digit))


def _parted(before: list[_Letter], letter: _Letter, doubles: bool) -> list[_Letter]:
    """A letter, doubled if need be, behind a colon where it would be read together with the last one."""
    if doubles and letter.kind == "C":
        return [_Letter("C", letter.iso[0]), letter]
    last = before[-1] if before else _Letter("", "")
    is_hiatus = last.kind in ("A", "V") and last.iso == "a" and letter.kind == "V" and letter.iso[0] in "iīuū"
    is_breath = last.kind == "C" and last.iso in _CONSONANTS.values() and f"{last.iso}h" in _CONSONANTS.values()
    if is_hiatus or (is_breath and letter == ("C", "h")):
        return [_Letter(letter.kind, f":{letter.iso}")]
    return [letter]


# Of the consonants, how open the mouth is: a cluster that opens towards its end needs a vowel behind it (mitra, surya),
# others do not (sant, dharm).
_SONORITY = {**dict.fromkeys("ṅñṇnṉm", 1), **dict.fromkeys("lḷḻrṟṛ", 2), **dict.fromkeys("yvẏ", 3)}
_DROPS_LAST = ("as", "bn", "doi", "gu", "hi", "kok", "mai", "mr", "ne", "pa")
_DROPS_BETWEEN = ("doi", "gu", "hi", "kok", "mai", "mr", "pa")
_WORD_END_M = ("kn", "ml", "sa", "ta", "te")  # a final anusvara is an m


def _typed(word: list[_Letter], language: str) -> str:
    if not any(letter.kind in ("C", "V") for letter in word):
        return "".join(letter.iso for letter in word)
    if language in _DROPS_LAST and _last_is_silent(word, language):
        word = word[:-1]
    if language in _DROPS_BETWEEN:
        word = _without_silent(word)
    iso = "".join(letter.iso for letter in word).replace(":", "")
    if language == "ta":
        iso = _voiced(iso)
    if language == "ml" and word[-1].kind == "C":
        iso += "u"  # half a vowel, which the sign of no vowel stands for at the end of a word: mundu
    return _plain(iso, language)


def _last_is_silent(word: list[_Letter], language: str) -> bool:
    kinds = "".join(letter.kind for letter in word)
    if not kinds.endswith("CA") or not re.search("[VA]", kinds[:-2]):
        return False
    if not kinds.endswith("CCA"):
        return True
    last, before = (_SONORITY.get(word[place].iso[0], 0) for place in (-2, -3))
    return language in _DROPS_BETWEEN and last <= before


def _without_silent(word: list[_Letter]) -> list[_Letter]:
    word = list(word)
    for place in range(len(word) - 3, 1, -1):
        if re.match("[VA]CAC[VA]", "".join(letter.kind for letter in word[place - 2 : place + 3])):
            del word[place]
    return word


_VOICED = {"k": "g", "ṭ": "ḍ", "t": "d", "p": "b", "c": "j"}


def _voiced(iso: str) -> str:
    """Tamil: one letter serves a stop and its voiced sister; alone between vowels or after a nasal it is voiced."""
    vowels = "aāiīuūeēoō"
    iso = re.sub(f"(?<=[{vowels}])c(?=[{vowels}])", "s", iso)
    iso = re.sub(f"(?<=[{vowels}])[kṭtp](?=[{vowels}])", lambda match: _VOICED[match[0]], iso)
    return re.sub(f"(?<=[ṅñṇnm])[kṭtpc](?=[r{vowels}])", lambda match: _VOICED[match[0]], iso)


_CH = {"c": "ch", "cc": "cch", "ch": "chh", "cch": "chh"}
_RULES = (  # in order
    ("ṁh$", "ngh"),  # singh
    ("ṁ(?=m)", ""),
    ("(ṁ|m̐)(?=[pb])", "m"),
    ("ṁ|m̐", "n"),
    ("[śṣ]", "sh"),
    ("ṟṟ", "tt"),  # Malayalam, as the next one
    ("nṟ", "nt"),
    ("ṛ", "d"),
    ("r̥", "ri"),
    ("l̥", "li"),
)
_OF_LANGUAGE = {
    "as": (("ṁ", "ng"), ("ṛ", "r"), ("ẏ", "y")),
    "bn": (("ṁ", "ng"), ("ṛ", "r"), ("ẏ", "y")),
    "gu": (("jñ", "gn"), ("r̥", "ru")),
    "hi": (("jñ", "gy"), ("(?<=[^aāiīuūeēoō v])v", "w")),
    "kn": (("jñ", "gn"), ("r̥", "ru")),
    "ml": (("ṇṭ", "nd"), ("tth?", "th"), ("t(?!h)", "th"), ("ḻ", "zh"), ("jñ", "jn")),
    "mr": (("jñ", "dny"), ("r̥", "ru"), ("(?<=[^aāiīuūeēoō v])v", "w")),
    "or": (("jñ", "gy"), ("r̥", "ru")),
    "pa": (("ṛ", "r"), ("(?<=[^aāiīuūeēoō v])v", "w")),
    "ta": (("tt", "th"), ("t(?!h)", "th"), ("d", "dh"), ("ḻ", "zh")),
    "te": (("jñ", "gn"), ("r̥", "ru")),
}  # fmt: skip
_OF_LANGUAGE["mai"] = _OF_LANGUAGE["ne"] = _OF_LANGUAGE["doi"] = _OF_LANGUAGE["hi"]
_OF_LANGUAGE["kok"] = _OF_LANGUAGE["mr"]


def _plain(iso: str, language: str) -> str:
    last_m = (("ṁ$", "m"),) if language in _WORD_END_M else ()
    iso = re.sub("c+h?", lambda match: _CH.get(match[0], match[0]), iso)
    for pattern, typed in (*last_m, *_OF_LANGUAGE.get(language, ()), *_RULES):
        iso = re.sub(pattern, typed, iso)
    bare = "".join(one for one in unicodedata.normalize("NFD", iso) if not unicodedata.combining(one))
    return bare.replace("’", "")


def romanised_names(card: Card) -> list[dict[str, str]]:
    """For each class of a card, by language (`hi-Latn`): its names by rule where it has none of its own."""
    by_hand = [{code: name for code, name in one.names.items() if code not in one.derived} for one in card.classes]
    by_rule = [
        {
            f"{code}-Latn": romanise(name, code)
            for code, name in names.items()
            if code in LANGUAGES and is_romanisable(name) and f"{code}-Latn" not in names
        }
        for names in by_hand
    ]
    owners = Counter((code, name.casefold()) for names in (*by_hand, *by_rule) for code, name in names.items())
    return [{code: name for code, name in names.items() if owners[code, name.casefold()] == 1} for names in by_rule]


def write_names(file: Path) -> int:
    """Write the names by rule of a card's classes into its page; how many."""
    page = re.sub(r"(?m)^(.*names: \{.*?\}), romanised: \{.*?\}", r"\1", file.read_text("utf-8"))
    found = romanised_names(load_card(str(file)))
    classes = iter(found)

    def with_names(match: re.Match[str]) -> str:
        names = next(classes, {})
        pairs = ", ".join(f"{code}: {_quoted(name)}" for code, name in names.items())
        return f"{match[0]}, romanised: {{{pairs}}}" if names else match[0]

    page, count = re.subn(r"(?m)^  - \{.*names: \{.*?\}", with_names, page)
    if count != len(found):
        raise ValueError(f"{file}: {count} lines with `names: {{...}}`; expected one for each of {len(found)} classes")
    file.write_text(page, "utf-8")
    return sum(map(len, found))


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[a-z][a-z' -]*[a-z]", name) else json.dumps(name, ensure_ascii=False)


def main() -> None:
    """Add names to the cards named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cards", nargs="+", type=Path, help="YAML files of cards")
    for file in parser.parse_args().cards:
        print(f"{file}: {write_names(file)} names")


if __name__ == "__main__":
    main()
