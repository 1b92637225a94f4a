"""Plain values of a YAML file as dataclasses, whose annotations say what is expected; whatever else is told by its key.

Nothing is converted: `2.0`, `true` and the text `2` are no whole numbers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from indiclip.names import check_choice, did_you_mean, is_whole, shorten

_PLAIN = {
    str: ("text", lambda value: isinstance(value, str)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", is_whole),
    float: ("a number such as 1.5e+14", lambda value: isinstance(value, float) or is_whole(value)),
    Any: ("a value", lambda value: True),
}


def typed(key: str, value: Any, kind: Any, **given: Any) -> Any:
    """A value as a dataclass, `X | None`, a `Literal`, a mapping by text, a tuple without repetitions, or plain.

    Args:
        key: Where it stands, for errors; empty for a whole file.
        value: As YAML gives it.
        kind: What is expected.
        given: Fields of the dataclass that are no keys of the file.

    Raises:
        ValueError: `KEY: found X; expected Y`.
    """
    arguments, origin = get_args(kind), get_origin(kind)
    if origin is UnionType:
        return None if value is None else typed(key, value, arguments[0])
    if origin is Literal:
        check_choice(key, value, arguments)
        return value
    if origin is tuple:
        items = _expect(key, value, isinstance(value, list), "a list")
        return _without_repetition(key, [typed(f"{key}[{i}]", item, arguments[0]) for i, item in enumerate(items)])
    if origin is dict or is_dataclass(kind):
        _expect(key, value, isinstance(value, dict), "keys with values")
        for name in value:
            _expect(key, name, isinstance(name, str), "text as the key")
        if origin is not dict:
            return _dataclass(key, value, kind, given)
        return {name: typed(_join(key, name), item, arguments[1]) for name, item in value.items()}
    expected, fits = _PLAIN[kind]
    return _expect(key, value, fits(value), expected)


def _expect(key: str, value: Any, fits: bool, expected: str) -> Any:
    if fits:
        return value
    found = "nothing" if value is None else f"the text {shorten(value)}" if isinstance(value, str) else shorten(value)
    raise ValueError(f"{key}: found {found}; expected {expected}".removeprefix(": "))


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _without_repetition(key: str, items: list[Any]) -> tuple[Any, ...]:
    shown = Counter(f"{item:g}" if isinstance(item, float) else str(item) for item in items)
    for item, count in shown.items():
        if count > 1:
            raise ValueError(f"{key}: found {item} {count} times; expected each once")
    return tuple(items)


def _dataclass(key: str, tree: dict[str, Any], kind: Any, given: dict[str, Any]) -> Any:
    kinds = get_type_hints(kind)
    keys = {field.name: field for field in fields(kind) if field.name not in given}
    for name in tree:
        if name not in keys:
            near, known = did_you_mean(name, keys), ", ".join(keys)
            raise ValueError(f"{_join(key, name)}: no such key{near}; expected some of {known}")
    for name, field in keys.items():
        if field.default is field.default_factory is MISSING and tree.get(name) in (None, "", [], {}):
            beside = ", ".join(other for other in tree if other != name)
            raise ValueError(f"{_join(key, name)}: found nothing; expected it beside {beside}")
    return kind(**{name: typed(_join(key, name), item, kinds[name]) for name, item in tree.items()}, **given)
