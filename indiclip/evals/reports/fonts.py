"""Fonts that a page carries, so that no text of India shows as boxes on a machine without fonts for it.

Each font is cut to the page's own characters with all that shaping needs (GSUB, GPOS, GDEF), and packed as WOFF. Texts
of a script are set in this font whatever the reader's machine has. Signs between scripts, such as ✓, are taken from the
machine where it has them.
"""

import base64
import html
import io
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from unicodedata import category, normalize

from fontTools import subset
from fontTools.ttLib import TTFont
from fontTools.varLib.instancer import instantiateVariableFont

from indiclip.generated.fonts import Face, MissingFonts, find_covering, find_face

# Tried first, one after the other; whatever none of them has is looked for in all fonts of the machine.
_FAMILIES = (
    *("Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Gurmukhi", "Noto Sans Gujarati", "Noto Sans Oriya"),
    *("Lohit Odia", "Noto Sans Tamil", "Noto Sans Telugu", "Noto Sans Kannada", "Noto Sans Malayalam"),
    *("Noto Naskh Arabic", "Noto Sans Ol Chiki", "Noto Sans Meetei Mayek"),
)
# Urdu is read in Nastaliq, of which a subset has 300 kB and takes 4 s: from the reader's machine, if it is there.
_NEARER = {"Noto Naskh Arabic": "Noto Nastaliq Urdu"}
_LATIN = 0x250  # below, a page's text is Latin, which every machine has
_JOINERS = frozenset("\u200c\u200d")
_DOTTED_CIRCLE = "◌"
_PRIVATE = ("Cc", "Cf", "Cn", "Co", "Cs", "Zs", "Zl", "Zp")  # categories without a picture of their own
_NAMED = 12  # missing characters that a page names
TEXT, SIGNS = "page text", "page signs"  # what a style sheet calls them


class Fonts(NamedTuple):
    """What a page needs to show its characters.

    Attributes:
        css: `@font-face` rules of the families `page text` and `page signs`.
        missing: A line for the reader on what may show as boxes; empty where nothing does.
    """

    css: str
    missing: str


def page_fonts(page: str) -> Fonts:
    """Of a page of HTML."""
    shown = set(html.unescape(re.sub(r"<style.*?</style>|data:[^\"]*", "", page, flags=re.DOTALL)))
    wanted = {c for c in shown if ord(c) >= _LATIN and category(c) not in _PRIVATE}
    signs = {c for c in wanted if _is_sign(c)}
    texts = wanted - signs
    rules, lacking = _rules(TEXT, texts, shown & _JOINERS, _faces(texts))
    sign_rules, _ = _rules(SIGNS, signs, set(), [_dejavu()])
    return Fonts("\n".join((*rules, *sign_rules)), _missing(lacking))


def _is_sign(character: str) -> bool:
    """Of no script: no letter, digit or punctuation that is written in certain scripts, such as the danda."""
    code = ord(character)
    return 0x2000 <= code < 0x2C00 or 0xFE00 <= code < 0xFE30 or code >= 0x1F000


def _rules(family: str, wanted: set[str], joiners: set[str], faces: Iterable[Face]) -> tuple[list[str], set[str]]:
    """The rules, and the characters that none of the fonts has."""
    rules = []
    for face in faces:
        lacking = set(face.missing("".join(wanted)))
        if own := wanted - lacking:
            # Shaping takes a vowel sign of two parts apart, and shows one without a letter on a dotted circle.
            parts = set("".join(normalize("NFD", character) for character in own))
            rules.append(_rule(family, face, own | parts | joiners))
        wanted = lacking
    return rules, wanted


def _faces(wanted: set[str]) -> Iterator[Face]:
    """Fonts that may have them, the better ones first."""
    for family in _FAMILIES if wanted else ():
        try:
            face = find_face(family)
        except MissingFonts:
            continue
        yield face
        wanted = set(face.missing("".join(wanted)))
    for character in sorted(wanted):
        if character in wanted and (found := find_covering(character)):
            yield found
            wanted = set(found.missing("".join(wanted)))


def _dejavu() -> Face:
    """It comes with matplotlib, so that it is on every machine that writes pages."""
    import matplotlib

    return Face("DejaVu Sans", str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"))


def _rule(family: str, face: Face, characters: set[str]) -> str:
    drawn = characters | {_DOTTED_CIRCLE} if family == TEXT else characters
    content = base64.b64encode(cut(face, frozenset(drawn))).decode()
    places = ", ".join(f"U+{ord(character):X}" for character in sorted(characters))
    local = f'local("{_NEARER[face.family]}"), ' if face.family in _NEARER else ""
    source = f'{local}url(data:font/woff;base64,{content}) format("woff")'
    return f'@font-face {{ font-family: "{family}"; unicode-range: {places};\n  src: {source}; }}'


@lru_cache(maxsize=32)
def cut(face: Face, characters: frozenset[str]) -> bytes:
    """A font with these characters alone and the tables that shape them, as WOFF."""
    # WOFF, not the smaller WOFF2, whose compression needs a package beside fontTools.
    options = subset.Options(hinting=False, notdef_outline=True)
    options.drop_tables += ["FFTM", "STAT"]
    with TTFont(face.file, fontNumber=face.index & 0xFFFF) as font:
        if "fvar" in font:
            instantiateVariableFont(font, {axis.axisTag: axis.defaultValue for axis in font["fvar"].axes}, inplace=True)
        subsetter = subset.Subsetter(options)
        subsetter.populate(unicodes=[ord(character) for character in characters])
        subsetter.subset(font)
        content = io.BytesIO()
        font.flavor = "woff"
        font.save(content)
    return content.getvalue()


def _missing(lacking: set[str]) -> str:
    if not lacking:
        return ""
    named = " ".join(f"U+{ord(character):04X}" for character in sorted(lacking)[:_NAMED])
    more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
    return (
        f"The machine that wrote this page had no font for {len(lacking)} of its characters ({named}{more}), which may "
        "show as boxes. With the packages fontconfig, fonts-noto-core and fonts-lohit-orya there, a page brings its "
        "own fonts."
    )
