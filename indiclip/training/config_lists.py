"""Lists of a config: one without `+` takes the place of the earlier one whole, and a dotted option says where it went.

jsonargparse gives the items of a list of equal length what the earlier ones had: a source would keep a limit that its
page does not name. Its function that merges values is replaced; tried with 4.53.0.
"""

import sys
import warnings
from collections.abc import Callable
from typing import Any

from jsonargparse import _typehints

from indiclip.training.run_folder import is_first_process


def replace_lists_whole() -> None:
    """Have every parser of this process do so."""
    inner: Callable[..., Any] = _typehints.adapt_typehints
    if inner.__module__ == __name__:
        return

    def adapt(value: Any, kind: Any, **options: Any) -> Any:
        before = options.get("prev_val")
        if isinstance(value, list) and not options.get("append"):
            options.pop("prev_val", None)
        adapted = inner(value, kind, **options)
        if isinstance(value, _typehints.NestedArg) and isinstance(before, list) and before and is_first_process():
            _tell_item(value.key, before)
        return adapted

    _typehints.adapt_typehints = adapt


def _tell_item(key: str, items: list[Any]) -> None:
    """Say which of several items an option as `--model.heads.weight` has changed."""
    option = next((word for word in sys.argv if word.partition("=")[0].endswith(f".{key}")), key).partition("=")[0]
    named = items[-1].get("class_path") or items[-1].get("task") if hasattr(items[-1], "get") else None
    item = f"the last of {len(items)} items" + (f", {named}" if named else "")
    warnings.warn(f"{option}: changes {item}", stacklevel=2)
