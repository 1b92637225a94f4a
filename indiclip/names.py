"""Names and numbers in messages."""

import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

# A terminal's sequences: with parameters, with a string, and of one letter more.
_ESCAPES = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?|\x1b[\]P^_X][^\x07\x1b\n]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]?")
_SPACES = re.compile("[\t-\r\x1c-\x1f\x85\u2028\u2029]")
# Other controls, and marks that turn what follows around. Joiners stay, which Indian scripts are written with.
_HIDDEN = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_SURROGATES = re.compile("[\ud800-\udfff]")


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A hint such as `; nearest is 'caption'`, or nothing where none is near. `learning_rate` and `lr` are near."""
    valid = list(valid)
    short = [other for other in valid if name and other and (other == _initials(name) or name == _initials(other))]
    # A slip of the pen is nearer than an abbreviation, which is nearer than a name that is like it.
    near = difflib.get_close_matches(name, valid, 1, 0.8) or short or difflib.get_close_matches(name, valid, 1)
    return f"; nearest is {near[0]!r}" if near else ""


def _initials(name: str) -> str:
    """`model.lr` of `model.learning_rate`; nothing of a single word."""
    key, dot, last = name.rpartition(".")
    return key + dot + "".join(word[:1] for word in last.split("_")) if "_" in last else ""


def nearest_beside(path: Path, pattern: str = "*") -> str:
    """The same for a path that is not there, of what its folder holds; nothing of hidden entries."""
    return did_you_mean(path.name, [near.name for near in path.parent.glob(pattern) if not near.name.startswith(".")])


def check_choice(what: str, found: object, valid: Iterable[str]) -> None:
    """Raise ValueError that names what was chosen, what was found, the nearest valid name and all of them."""
    if found not in (valid := list(valid)):
        hint = did_you_mean(str(found), valid)
        raise ValueError(f"{what}: found {found!r}{hint}; expected one of {', '.join(valid)}")


def check_range(
    found: Mapping[str, float | None],
    least: float = 0,
    most: float = sys.float_info.max,
    without: float | None = None,
) -> None:
    """Raise ValueError for the first number that does not lie from `least` to `most`, naming its key; None may be.

    Args:
        found: The numbers by their keys.
        least: Allowed itself, as `most` is.
        most: See there.
        without: One of the two that is not allowed after all.
    """
    for key, number in found.items():
        if number is not None and (number == without or not least <= number <= most):  # as NaN
            lowest = f"above {least}" if without == least else f"{least}"
            highest = f"below {most}" if without == most else f"{most}"
            unbounded = lowest if without == least else f"{least} or more"
            expected = unbounded if most == sys.float_info.max else f"{lowest} to {highest}"
            raise ValueError(f"{key}: found {number}; expected {expected}")


def is_whole(number: object) -> bool:
    """Whether it is a whole number of Python's or NumPy's, and not text, a float such as 64.0, or True."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def check_whole(found: Mapping[str, Any], least: int = 1, most: int = sys.maxsize) -> None:
    """Raise ValueError for the first that is no whole number from `least` to `most`, naming its key."""
    for key, number in found.items():
        if not is_whole(number) or not least <= number <= most:
            expected = f"from {least}" + f" to {most}" * (most != sys.maxsize)
            raise ValueError(f"{key}: found {shorten(number)}; expected a whole number {expected}")


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Where two trees of plain values differ, as deep as they are of the same classes: the dotted key, and a line.

    An item that only one of two lists has is named as such, whatever its place: those behind it are compared with
    their like.
    """
    if isinstance(old, dict) and isinstance(new, dict) and old.get("class_path") == new.get("class_path"):
        for name in [*old, *(new.keys() - old.keys())]:
            yield from differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif isinstance(old, list) and isinstance(new, list):
        yield from _items_apart(old, new, key)
    elif old != new:
        yield key, f"{key}: {' -> '.join(_told_apart(old, new))}"


def _items_apart(old: list[Any], new: list[Any], key: str) -> Iterator[tuple[str, str]]:
    """Items are like each other that are equal, or of the same class at the same place among those that are not."""
    if len(old) == len(new):
        blocks: Sequence[tuple[str, int, int, int, int]] = [("replace", 0, len(old), 0, len(new))]
    else:
        was, now = ([repr(item) for item in items] for items in (old, new))
        blocks = difflib.SequenceMatcher(None, was, now, False).get_opcodes()
    for kind, first, last, other, end in blocks:
        if kind == "equal":
            continue
        both = min(last - first, end - other)
        for number in range(both):
            place = f"{key}[{first + number}]"
            yield from differences(old[first + number], new[other + number], place)
        for number in range(first + both, last):
            yield f"{key}[{number}]", f"{key}[{number}]: {_named(old[number])} -> none"
        for number in range(other + both, end):
            yield f"{key}[{number}]", f"{key}[{number}]: none -> {_named(new[number])}"


def _told_apart(old: Any, new: Any) -> tuple[str, str]:
    """Two values, cut to where they differ if they begin alike."""
    if (was := _named(old)) != (now := _named(new)):
        return was, now
    texts = repr(old), repr(new)
    apart = next((i for i, (one, other) in enumerate(zip(*texts, strict=False)) if one != other), min(map(len, texts)))
    was, now = (f"...{text[max(apart - 20, 0) :][:57]}" for text in texts)
    return was, now


def _named(item: Any) -> str:
    """An item of a list: a class by its whole name, which tells two of them apart."""
    return str(item["class_path"]) if isinstance(item, dict) and "class_path" in item else shorten(item)


def plain(text: str) -> str:
    """Words of others, such as a card's title or a file's name, on one line, without what a terminal would act on."""
    return _HIDDEN.sub("", _SPACES.sub(" ", _ESCAPES.sub("", well_formed(text))))


def well_formed(text: str) -> str:
    """Text that UTF-8 can hold: halves of surrogate pairs, as which Python reads other bytes of a path, are U+FFFD."""
    return _SURROGATES.sub("\ufffd", text)


def reason_of(error: Exception, most: int | None = 200) -> str:
    """What an error of another library says, without its line breaks, cut where it is longer than `most`."""
    return " ".join(str(error).split())[:most]


def shorten(value: object, most: int = 60) -> str:
    """A value for an error message: its `repr`, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def with_prefix(number: float, digits: int = 2) -> str:
    """A number of a unit that follows, in thousands: 1,234,567 is `1.23 M`."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:,.{digits}f} {prefix}"
    return f"{number:,.0f} "
