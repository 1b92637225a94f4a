"""From an encoder's configuration to its parts, without a network and without foreign code."""

import importlib
from collections.abc import Mapping
from typing import Any

from indiclip.backbone import Backbone
from indiclip.pooling import Projection
from indiclip.text import TextTower, Tokenizer

_ROOMS = ("indiclip.backbone", "indiclip.text")
_FETCHED = ("pretrained", "source")  # arguments that name weights or files


def build(config: Mapping[str, Any], origin: str, trust_code: bool = False) -> dict[str, Any]:
    """Arguments of `Encoder` from what its `to_config()` gave.

    Args:
        config: With `{class_path, init_args}` in place of objects.
        origin: Where it is from, for messages.
        trust_code: Import and call whatever class it names, and let it name weights or files.

    Raises:
        ValueError: It names foreign classes, weights or files.
    """
    arguments = {name: _build(value, origin, trust_code) for name, value in config.items()}
    for name in ("image_projection", "text_projection"):
        if isinstance(value := arguments.get(name), Mapping):
            arguments[name] = Projection(**value)
    return arguments


def _build(value: Any, origin: str, trust_code: bool) -> Any:
    """`{class_path, init_args}` -> object, innermost first; anything else as it is."""
    if not (isinstance(value, Mapping) and set(value) == {"class_path", "init_args"}):
        return value
    module, _, name = value["class_path"].rpartition(".")
    arguments = value["init_args"]
    if not trust_code:
        made = getattr(importlib.import_module(module), name, None) if module in _ROOMS else None
        if not (isinstance(made, type) and issubclass(made, (Backbone, TextTower, Tokenizer))):
            raise ValueError(f"{origin}: names {value['class_path']}; pass trust_code=True to import and call it")
        for key in _FETCHED:
            if arguments.get(key):
                raise ValueError(f"{origin}: asks for {key} {arguments[key]!r}; pass trust_code=True to fetch it")
    arguments = {key: _build(item, origin, trust_code) for key, item in arguments.items()}
    return getattr(importlib.import_module(module), name)(**arguments)
