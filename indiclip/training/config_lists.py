"""Lists of a config: one without `+` takes the place of the earlier one whole, and what is said of an item names it.

jsonargparse gives the items of a list of equal length what the earlier ones had: a source would keep a limit that its
page does not name. And it does not say which item has a mistake, or gets a dotted option. Its function that checks and
merges values is replaced; tried with 4.53.0.
"""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import jsonargparse._typehints
from jsonargparse import Namespace

_library: Any = jsonargparse._typehints


def mend_lists() -> None:
    """Have every parser of this process do so."""
    inner: Callable[..., Any] = _library.adapt_typehints
    if inner.__module__ == __name__:
        return

    def adapt(value: Any, kind: Any, **options: Any) -> Any:
        before, number = options.get("prev_val"), 0
        if isinstance(value, list) and not options.get("append"):
            options.pop("prev_val", None)
        elif isinstance(before, list):
            number = len(before)
        try:
            adapted = inner(value, kind, **options)
        except (ValueError, TypeError) as error:
            items = [value] if options.get("append") and not isinstance(value, list) else value
            told: Any = _of_item(error, items, number)
            told.refused = value
            if told is error:
                raise
            raise told from error
        if isinstance(value, _library.NestedArg) and isinstance(before, list) and before:
            _tell_item(value.key, before)
        return adapted

    _library.adapt_typehints = adapt


def _of_item(error: Exception, items: Any, first: int) -> Exception:
    """The error, with the number of the list's item that was refused last, in the library's words.

    Args:
        error: Has as `refused` the value that was.
        items: What it was part of, if a list.
        first: Number of the first one, of which a list that grows has some already.
    """
    refused = getattr(error, "refused", None)
    numbers = [first + n for n, item in enumerate(items) if item is refused] if isinstance(items, list) else []
    return ValueError(f'Parser key "[{numbers[0]}]":\n{error}') if numbers else error


def _tell_item(key: str, items: list[Any]) -> None:
    """Say which of several items an option as `--model.heads.weight` has changed."""
    option = next((word for word in sys.argv if word.partition("=")[0].endswith(f".{key}")), key).partition("=")[0]
    last = items[-1] if isinstance(items[-1], dict | Namespace) else {}
    arguments = last.get("init_args") or last
    name = arguments.get("name") or str(last.get("class_path", "")).rpartition(".")[2]
    task = f" of task {arguments['task']}" if arguments.get("task") else ""
    warnings.warn(f"{option}: changes the last of {len(items)} items{f', {name}' if name else ''}{task}", stacklevel=2)
