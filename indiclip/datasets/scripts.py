"""The scripts of a text, and the language where the script alone tells it.

The ranges are those of Unicode's property Script; signs that many scripts share (the danda, accents) are in none.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

# First and last code point. Scripts in which India's languages are written today, then the world's most frequent ones.
RANGES: dict[str, tuple[tuple[int, int], ...]] = {
    "Devanagari": ((0x900, 0x950), (0x955, 0x963), (0x966, 0x97F), (0xA8E0, 0xA8FF), (0x11B00, 0x11B09)),
    "Bengali": ((0x980, 0x9FF),),
    "Gurmukhi": ((0xA00, 0xA7F),),
    "Gujarati": ((0xA80, 0xAFF),),
    "Odia": ((0xB00, 0xB7F),),
    "Tamil": ((0xB80, 0xBFF), (0x11FC0, 0x11FFF)),
    "Telugu": ((0xC00, 0xC7F),),
    "Kannada": ((0xC80, 0xCFF),),
    "Malayalam": ((0xD00, 0xD7F),),
    "Ol Chiki": ((0x1C50, 0x1C7F),),
    "Meetei Mayek": ((0xABC0, 0xABFF), (0xAAE0, 0xAAFF)),
    "Arabic": (
        *((0x600, 0x604), (0x606, 0x60B), (0x60D, 0x61A), (0x61C, 0x61E), (0x620, 0x63F), (0x641, 0x64A)),
        *((0x656, 0x66F), (0x671, 0x6DC), (0x6DE, 0x6FF), (0x750, 0x77F), (0x870, 0x8E1), (0x8E3, 0x8FF)),
        *((0xFB50, 0xFD3D), (0xFD40, 0xFDFF), (0xFE70, 0xFEFC)),
    ),
    "Latin": (
        *((0x41, 0x5A), (0x61, 0x7A), (0xAA, 0xAA), (0xBA, 0xBA), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x2B8)),
        *((0x1D00, 0x1D25), (0x1D6B, 0x1D77), (0x1D79, 0x1DBE), (0x1E00, 0x1EFF), (0x2C60, 0x2C7F)),
        *((0xA722, 0xA787), (0xA78B, 0xA7FF), (0xFB00, 0xFB06), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A)),
    ),
    "Sinhala": ((0xD80, 0xDFF),),
    "Tibetan": ((0xF00, 0xFD4), (0xFD9, 0xFDA)),
    "Lepcha": ((0x1C00, 0x1C4F),),
    "Limbu": ((0x1900, 0x194F),),
    "Chakma": ((0x11100, 0x1114F),),
    "Thai": ((0xE01, 0xE3A), (0xE40, 0xE5B)),
    "Cyrillic": ((0x400, 0x484), (0x487, 0x52F)),
    "Greek": ((0x370, 0x373), (0x375, 0x377), (0x37A, 0x37D), (0x37F, 0x37F), (0x386, 0x386), (0x388, 0x3E1)),
    "Hebrew": ((0x591, 0x5F4),),
    "Han": ((0x2E80, 0x2FD5), (0x3005, 0x3005), (0x3007, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF)),
    "Kana": ((0x3041, 0x3096), (0x309D, 0x309F), (0x30A1, 0x30FA), (0x30FD, 0x30FF)),
    "Hangul": ((0x1100, 0x11FF), (0x3131, 0x318E), (0xAC00, 0xD7A3)),
}
# Scripts in which one language is written almost always. Not Bengali (bn, as, mni) and not Arabic (ur, ks, sd, ...).
LANGUAGE = {
    "Gurmukhi": "pa",
    "Gujarati": "gu",
    "Odia": "or",
    "Tamil": "ta",
    "Telugu": "te",
    "Kannada": "kn",
    "Malayalam": "ml",
    "Ol Chiki": "sat",
    "Meetei Mayek": "mni",
    "Sinhala": "si",
    "Thai": "th",
    "Greek": "el",
    "Hangul": "ko",
}
# What the others may be.
CANDIDATES = {
    "Devanagari": "hi, mr, ne, sa, ...",
    "Bengali": "bn, as, mni",
    "Arabic": "ur, ks, sd, ar, fa, ...",
    "Latin": "English, romanised, ...",
}
_MIXED = 0.1  # share of a text's letters from which a script counts

_NAMES = list(RANGES)
_SORTED = sorted((first, last, number) for number, name in enumerate(_NAMES) for first, last in RANGES[name])
_FIRST, _LAST, _NUMBER = (np.array(column) for column in zip(*_SORTED, strict=True))


def count_scripts(text: str) -> dict[str, int]:
    """How many characters of a text belong to each script; punctuation, ASCII digits and rarer scripts to none."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    places = np.searchsorted(_FIRST, points, side="right") - 1
    counts = np.bincount(_NUMBER[places[(places >= 0) & (points <= _LAST[places])]], minlength=len(_NAMES))
    return {_NAMES[number]: int(counts[number]) for number in np.flatnonzero(counts)}


def scripts(text: str) -> tuple[str, ...]:
    """The scripts that make up at least a tenth of a text, in alphabetical order; none where it has no letters."""
    counts = count_scripts(text)
    total = sum(counts.values())
    return tuple(sorted(name for name, count in counts.items() if count >= _MIXED * total))


@lru_cache(maxsize=1024)
def language(found: tuple[str, ...]) -> str:
    """The language of a text in these scripts, by its ISO 639 code, or what is known of it. Never a guess."""
    if not found:
        return "no letters"
    if len(found) > 1:
        return " + ".join(found)
    (name,) = found
    return LANGUAGE.get(name) or f"{name} ({CANDIDATES[name]})" if name in {*LANGUAGE, *CANDIDATES} else name
