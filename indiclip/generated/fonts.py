"""Fonts found through fontconfig, and the promise that a text is drawn as it is written.

Three things make an image of Indian text silently wrong: a font without the characters (boxes), a Pillow that lays
characters one by one (signs in the wrong place, no conjuncts), and a library for right-to-left text that is missing.
Each of them is an error here.
"""

import subprocess
from dataclasses import dataclass
from functools import lru_cache

from fontTools.ttLib import TTFont
from PIL import ImageFont, features

# Debian's and Ubuntu's names of the packages that hold the families of lettering.yaml.
PACKAGES = {"Lohit Odia": "fonts-lohit-orya", "UniOl": "fonts-uniol", "Eeyek": "fonts-eeyek"}
CORE = "fonts-noto-core"
NEEDED = ("fontconfig", "libfribidi0", CORE, *PACKAGES.values())
_INVISIBLE = "\u200c\u200d"  # joiners steer the shaping and have no picture of their own


class MissingFonts(FileNotFoundError):
    """Words cannot be drawn on this machine; the message names what to install."""


@dataclass(frozen=True)
class Face:
    """A font file: its family, and which of the file's faces."""

    family: str
    file: str
    index: int = 0

    def missing(self, text: str) -> str:
        """The characters of a text that the font has no glyph for, each once, in order."""
        return "".join(dict.fromkeys(c for c in text if ord(c) not in _covered(self) and c not in _INVISIBLE))

    def require(self, text: str) -> None:
        """Check that every character of a text can be drawn.

        Raises:
            ValueError: The font lacks some; names font and characters.
        """
        if lacking := self.missing(text):
            named = ", ".join(f"{character!r} (U+{ord(character):04X})" for character in lacking)
            raise ValueError(f"font {self.family} ({self.file}) has no glyph for {named} of {text!r}")

    def at(self, pixels: int) -> ImageFont.FreeTypeFont:
        """The font at a size, with shaping.

        Raises:
            MissingFonts: Pillow cannot shape here.
        """
        check_shaping()
        return _loaded(self, pixels)


def check_shaping() -> None:
    """Check that Pillow shapes text: without raqm it lays the characters side by side, and says nothing.

    Raises:
        MissingFonts: It cannot; names the package that is missing.
    """
    if not features.check("raqm"):
        raise MissingFonts("Pillow was built without raqm, so Indian text comes out wrong; Pillow's own wheels have it")
    if not features.check("fribidi"):
        raise MissingFonts(f"no libfribidi, so Pillow cannot shape text; {_install('libfribidi0')}")


@lru_cache(maxsize=64)
def find_face(family: str) -> Face:
    """The regular face of a family.

    Raises:
        MissingFonts: fontconfig or the family is not there; names the package to install.
    """
    # Not fc-match: it answers with another family where the asked one is missing.
    faces = _listed(f":family={family}:style=Regular")
    if not faces:
        raise MissingFonts(f"no font {family!r} on this machine; {_install(PACKAGES.get(family, CORE))}")
    return Face(family, faces[0].file, faces[0].index)


@lru_cache(maxsize=512)
def find_covering(character: str) -> Face | None:
    """A regular face of any family that has a character, one without serifs if there is one; None without any."""
    try:
        listed = _listed(f":charset={ord(character):x}:style=Regular")
    except MissingFonts:
        return None
    faces = [face for face in listed if face.file.endswith((".ttf", ".otf", ".ttc"))]  # what fontTools reads
    return min(faces, key=lambda face: "Sans" not in face.family, default=None)


def _listed(pattern: str) -> list[Face]:
    """The faces that fontconfig lists for a pattern, in the order of their files, which is the same everywhere.

    Raises:
        MissingFonts: fontconfig is not there, or failed.
    """
    command = ["fc-list", "--format=%{file}\t%{index}\t%{family[0]}\n", pattern]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except FileNotFoundError as error:
        raise MissingFonts(f"no fc-list to find fonts with; {_install('fontconfig')}") from error
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise MissingFonts(f"{' '.join(command)!r} failed: {error}") from error
    rows = (line.split("\t") for line in listed.splitlines())
    return [Face(family, file, index) for file, index, family in sorted((row[0], int(row[1]), row[2]) for row in rows)]


def _install(package: str) -> str:
    return f"install {package} (Debian, Ubuntu: apt-get install {' '.join(NEEDED)})"


@lru_cache(maxsize=64)
def _covered(face: Face) -> frozenset[int]:
    with TTFont(face.file, fontNumber=face.index & 0xFFFF, lazy=True) as font:  # above: the instance of a variable font
        return frozenset(font.getBestCmap() or ())


@lru_cache(maxsize=512)
def _loaded(face: Face, pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(face.file, pixels, index=face.index, layout_engine=ImageFont.Layout.RAQM)
