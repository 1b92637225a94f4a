"""Which part of a data set is scored: `test`, or `val` where there is none; `train` is the gallery of probes."""

import re
from collections.abc import Iterable

_KINDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
}


def is_split(name: str) -> bool:
    """Whether a folder or value is called by a split."""
    return name.lower() in _KINDS


def split_of(name: str) -> str:
    """The split that stands in a file's name, such as `train-0000` or `cifar10_test.tar`; nothing where none does."""
    return next((word for word in re.findall("[a-z]+", name.lower()) if word in _KINDS), "")


def choose(names: Iterable[str], where: str) -> tuple[dict[str, bool], list[str]]:
    """The splits to read.

    Args:
        names: All that there are.
        where: The folder or table, for the note.

    Returns:
        Name -> whether it is for training; and a line if `val` is not used because there is `test`.
    """
    kinds = {name: _KINDS[name.lower()] for name in names}
    scored = "test" if "test" in kinds.values() else "val"
    chosen = {name: kind == "train" for name, kind in kinds.items() if kind in ("train", scored)}
    left = ", ".join(f"`{name}`" for name in kinds if name not in chosen)
    return chosen, [f"{where}: `test` is scored; {left} is not used"] if left else []
