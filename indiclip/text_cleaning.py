"""How OpenCLIP cleans a text before its tokenizers read it."""

import html
import string
from typing import Literal, get_args

from indiclip.names import check_choice

Cleaning = Literal["canonicalize", "lower", "whitespace"]
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def check_cleaning(mode: str) -> None:
    """Raise ValueError for an unknown mode, or where ftfy is missing."""
    check_choice("tokenizer.clean", mode, get_args(Cleaning))
    try:
        import ftfy  # noqa: F401
    except ImportError as error:
        raise ValueError(f"tokenizer.clean: {mode} needs ftfy: pip install ftfy") from error


def clean_text(text: str, mode: Cleaning) -> str:
    """The text with broken encodings, curly quotes and HTML entities mended, and single spaces.

    Args:
        text: Any.
        mode: `whitespace` does no more than that; `lower` also drops capitals; `canonicalize` (SigLIP's) also
            punctuation of ASCII.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if mode == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION).lower()
    text = " ".join(text.split())
    return text.lower() if mode == "lower" else text
