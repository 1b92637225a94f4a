"""The scripts of a text (Unicode's property Script), and the language where the script alone tells it."""

from collections import Counter
from functools import cache, lru_cache

from fontTools import unicodedata

from indiclip.datasets.languages import NAMES

LANGUAGE: dict[str, str] = NAMES["of_script"]  # where the script alone tells it, else what it may be
_MIXED = 0.1  # share of a text's letters from which a script counts


def count_scripts(text: str) -> dict[str, int]:
    """How many characters of a text belong to each script; those that scripts share (the danda, digits) to none."""
    counts = Counter(map(_script, text))
    counts.pop("", None)
    return counts


@cache
def _script(character: str) -> str:
    code = unicodedata.script(character)
    name: str = unicodedata.script_name(code).replace("_", " ")
    return {"Oriya": "Odia", "Common": "", "Inherited": "", "Unknown": ""}.get(name, name)


def scripts(text: str) -> tuple[str, ...]:
    """The scripts that make up at least a tenth of a text, in alphabetical order; none where it has no letters."""
    counts = count_scripts(text)
    total = sum(counts.values())
    return tuple(sorted(name for name, count in counts.items() if count >= _MIXED * total))


@lru_cache(maxsize=1024)
def language(found: tuple[str, ...]) -> str:
    """The language of a text in these scripts, by its ISO 639 code, or what is known of it. Never a guess."""
    if len(found) == 1:
        return LANGUAGE.get(found[0], found[0])
    return " + ".join(found) or "no letters"
