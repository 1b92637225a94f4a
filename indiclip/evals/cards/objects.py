"""What a card names by a Python path: `package.module.Class`, or `{class_path: ..., init_args: {...}}`."""

import importlib
from typing import Any

from indiclip.names import did_you_mean, reason_of, shorten


def named(path: Any, where: str) -> Any:
    """The class or function of a path.

    Raises:
        ValueError: There is no such module, or nothing called so in it; begins with `where`.
    """
    if not isinstance(path, str) or not path.rpartition(".")[0]:
        raise ValueError(f"{where}: found {shorten(path)}; expected a path such as package.module.Class")
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{where}: {path}: {reason_of(error)}") from error
    if not callable(found := getattr(module, name, None)):
        raise ValueError(f"{where}: {module_name} has no {name!r}{did_you_mean(name, vars(module))}")
    return found


def object_of(entry: Any, where: str, kind: type) -> Any:
    """The object that a class path stands for, with the arguments that stand beside it.

    Raises:
        ValueError: As `named` does, for arguments that the class does not take, and for an object of another kind.
    """
    arguments: Any = {}
    if isinstance(entry, dict) and "class_path" in entry and entry.keys() <= {"class_path", "init_args"}:
        entry, arguments = entry["class_path"], entry.get("init_args", {})
    made = named(entry, where)
    try:
        found = made(**arguments)
    except (TypeError, ValueError) as error:  # as Python says it: the argument's name, or what it is not
        raise ValueError(f"{where}: {entry}: {reason_of(error)}") from error
    if not isinstance(found, kind):
        expected = f"expected a class of {kind.__module__}.{kind.__qualname__}"
        raise ValueError(f"{where}: {type(found).__name__} is no {kind.__name__}; {expected}")
    return found
