"""What is done to a text before a tokenizer reads it: Unicode's NFC, OpenCLIP's cleaning, or nothing."""

import html
import re
import string
import unicodedata
from typing import Any, Literal, get_args

from indiclip.names import check_choice

Cleaning = Literal["canonicalize", "lower", "nothing", "whitespace"]
OPEN_CLIP = ("canonicalize", "lower", "whitespace")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def check_cleaning(mode: str) -> None:
    """Raise ValueError for an unknown mode, or where ftfy is missing."""
    check_choice("tokenizer.clean", mode, get_args(Cleaning))
    if mode not in OPEN_CLIP:
        return
    try:
        import ftfy  # noqa: F401
    except ImportError as error:
        raise ValueError(f"tokenizer.clean: {mode} needs ftfy: pip install ftfy") from error


def clean_text(text: str, mode: Cleaning | None) -> str:
    """The text as a tokenizer is to read it.

    Args:
        text: Any.
        mode: None puts it in NFC, `nothing` leaves it as it is. The others are OpenCLIP's: with `whitespace`, broken
            encodings, curly quotes and HTML entities are mended, and spaces are single; `lower` also drops capitals,
            `canonicalize` (SigLIP's) also punctuation of ASCII.
    """
    if mode is None:
        return unicodedata.normalize("NFC", text)
    if mode == "nothing":
        return text
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if mode == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION).lower()
    text = " ".join(text.split())
    return text.lower() if mode == "lower" else text


def normalizers_of(mode: Cleaning | None) -> list[Any]:
    """What `clean_text` does, as normalizers of `tokenizers`: all but what ftfy mends, and HTML entities."""
    from tokenizers import Regex, normalizers

    if mode == "nothing":
        return []
    steps: list[Any] = [normalizers.NFC()]  # which ftfy does, too
    if mode == "canonicalize":
        punctuation = Regex(f"[{re.escape(string.punctuation)}]")
        steps += [normalizers.Replace("_", " "), normalizers.Replace(punctuation, "")]
    if mode in ("canonicalize", "lower"):
        steps.append(normalizers.Lowercase())
    if mode is not None:
        steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    return steps
