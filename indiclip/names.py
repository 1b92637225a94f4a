"""Valid names, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A hint such as `; nearest is 'caption'`, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.4)
    return f"; nearest is {near[0]!r}" if near else ""


def check_choice(what: str, found: object, valid: Iterable[str]) -> None:
    """Raise ValueError that names what was chosen, what was found, the nearest valid name and all of them."""
    if found not in (valid := list(valid)):
        hint = did_you_mean(str(found), valid)
        raise ValueError(f"{what}: found {found!r}{hint}; expected one of {', '.join(valid)}")


def shorten(value: object, most: int = 60) -> str:
    """A value for an error message: its `repr`, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
