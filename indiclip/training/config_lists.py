"""Lists of a config: one without `+` takes the place of the earlier one whole, and a dotted option says where it went.

jsonargparse gives the items of a list of equal length what the earlier ones had: a source would keep a limit that its
page does not name. Its function that merges values is replaced; tried with 4.53.0.
"""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import jsonargparse._typehints
from jsonargparse import Namespace

_library: Any = jsonargparse._typehints


def replace_lists_whole() -> None:
    """Have every parser of this process do so."""
    inner: Callable[..., Any] = _library.adapt_typehints
    if inner.__module__ == __name__:
        return

    def adapt(value: Any, kind: Any, **options: Any) -> Any:
        before = options.get("prev_val")
        if isinstance(value, list) and not options.get("append"):
            options.pop("prev_val", None)
        adapted = inner(value, kind, **options)
        if isinstance(value, _library.NestedArg) and isinstance(before, list) and before:
            _tell_item(value.key, before)
        return adapted

    _library.adapt_typehints = adapt


def _tell_item(key: str, items: list[Any]) -> None:
    """Say which of several items an option as `--model.heads.weight` has changed."""
    option = next((word for word in sys.argv if word.partition("=")[0].endswith(f".{key}")), key).partition("=")[0]
    last = items[-1] if isinstance(items[-1], dict | Namespace) else {}
    arguments = last.get("init_args") or last
    name = arguments.get("name") or arguments.get("task") or last.get("class_path")
    warnings.warn(f"{option}: changes the last of {len(items)} items" + (f", {name}" if name else ""), stacklevel=2)
