"""Config files that are stacked on an experiment and say one thing differently: the last counts, and it is said."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from indiclip.names import shorten


def disagreements(files: Sequence[str]) -> Iterator[str]:
    """A line for each key that two files give different values, the first file aside: that is to be changed.

    Lists that grow (`heads+`) are no such keys. See `data.overrides` and `model.head_overrides` for what they hold.

    Args:
        files: Of `--config`, which parse.
    """
    said: dict[str, tuple[str, Any]] = {}
    for file in files[1:]:
        for key, value in _values(yaml.safe_load(Path(file).read_text(encoding="utf-8"))):
            first, before = said.get(key, (file, value))
            if value != before:
                yield f"{key}: {file} says {shorten(value)}, in place of {shorten(before)} of {first}"
            said[key] = (file, value)


def _values(tree: dict[str, Any], key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and what takes the place of their values as a whole: an object of a class, each of its arguments."""
    for name, value in tree.items():
        own = f"{key}.{name}" if key else str(name)
        if isinstance(value, dict) and "class_path" not in value and not key.endswith(".init_args"):
            yield from _values(value, own)
        elif not own.endswith("+"):
            yield own, value
