"""Config files that are stacked on an experiment: where they say one thing differently, and whose items a list has."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from indiclip.config_files import SHIPPED
from indiclip.names import shorten
from indiclip.training.run_folder import config_files

_LIST = re.compile(r"\b((?:data|model|trainer)\.\w+)(?:\[(\d+)\])?")


def disagreements(files: Sequence[str]) -> list[str]:
    """A line for each key that two files give different values, the first file aside: that is to be changed.

    Lists that grow (`heads+`) are no such keys. See `data.overrides` and `model.head_overrides` for what they hold.

    Args:
        files: Of `--config`, which parse.

    Raises:
        ValueError: Both are shipped pages of methods, which a user stacks to have both; no other file behind them says
            what is to be.
    """
    said: dict[str, tuple[str, Any]] = {}
    lines: list[str] = []
    clashes: dict[str, str] = {}
    for file in files[1:]:
        for key, value in _values(yaml.safe_load(Path(file).read_text(encoding="utf-8"))):
            first, before = said.get(key, (file, value))
            said[key] = (file, value)
            if not _is_method(file):
                clashes.pop(key, None)
            if value == before:
                continue
            if _is_method(file) and _is_method(first):
                clashes[key] = f"{file} says {shorten(value)}, and {first} {shorten(before)}"
            else:
                lines.append(f"{key}: {file} says {shorten(value)}, in place of {shorten(before)} of {first}")
    for key, found in clashes.items():
        raise ValueError(f"{key}: {found}; expected one of them, or a --config behind them that gives the key")
    return lines


def origins(words: Sequence[str], message: str) -> str:
    """Which files the lists are of that a message names, or their items; empty for lists that are of one file.

    Args:
        words: Of the command. Lists that its flags give or grow are left out.
        message: Names keys as `data.overrides[1]`.
    """
    files: dict[str, list[str]] = {}
    try:
        trees = {file: yaml.safe_load(Path(file).read_text(encoding="utf-8")) for file in config_files(list(words))}
    except (OSError, ValueError, yaml.YAMLError):  # of which the message is
        return ""
    for file, tree in trees.items():
        for group, options in tree.items() if isinstance(tree, dict) else ():
            for name, value in options.items() if isinstance(options, dict) else ():
                key, grows = f"{group}.{name.removesuffix('+')}", name.endswith("+")
                given = value if isinstance(value, list) else [value]
                files[key] = [*(files.get(key, []) if grows else []), *[file] * len(given)]
    said: dict[str, str] = {}
    for key, number in _LIST.findall(message):
        of = files.get(key, [])
        if len({*of}) > 1 and not any(word.startswith(f"--{key}") for word in words):
            if number and int(number) < len(of):
                said[f"{key}[{number}]"] = of[int(number)]
            elif not number:
                said[key] = ", ".join(dict.fromkeys(of))
    return "; ".join(f"{key} is of {file}" for key, file in said.items())


def _is_method(file: str) -> bool:
    return Path(file).resolve().parent == (SHIPPED / "methods").resolve()


def _values(tree: dict[str, Any], key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and what takes the place of their values as a whole: an object of a class, each of its arguments."""
    for name, value in tree.items():
        own = f"{key}.{name}" if key else str(name)
        if isinstance(value, dict) and "class_path" not in value and not key.endswith(".init_args"):
            yield from _values(value, own)
        elif not own.endswith("+"):
            yield own, value
