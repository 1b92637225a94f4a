"""From an encoder's configuration to its parts, without a network and without foreign code.

A checkpoint is data, but what it names is built: classes, architectures, and options that timm and transformers could
take for files, repositories or kernels to load. Only what is listed here gets through.
"""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import timm
from huggingface_hub import constants
from timm.models import build_model_with_cfg

from indiclip.backbone import Backbone
from indiclip.lora import LoRA
from indiclip.names import did_you_mean, reason_of, shorten
from indiclip.pooling import Projection
from indiclip.text import TextTower, architecture_keys
from indiclip.tokenizers import Tokenizer

# Modules whose classes a checkpoint may name.
_TRUSTED = {f"indiclip.{name}" for name in ("backbone", "timm_backbone", "transformers_backbone", "tokenizers", "text")}
_FETCHED = ("pretrained", "source")  # arguments that name weights or files
# What timm reads itself before it makes a model: weights, their place, wrappers.
_OF_TIMM = {*signature(timm.create_model).parameters, *signature(build_model_with_cfg).parameters}
_OF_ENCODER: dict[str, type] = {
    "backbone": Backbone,
    "text": TextTower,
    "image_projection": Projection,
    "text_projection": Projection,
    "lora": LoRA,
    "embed_dim": int,
    "lengths": list,
}
NOT_BUILT = "its encoder cannot be built"
NEWER = "was it written by a newer IndiCLIP?"
_PLAIN = (str, int, float, bool, type(None))


def build(config: Mapping[str, Any], origin: str, trust_code: bool = False) -> dict[str, Any]:
    """Arguments of `Encoder` from what its `to_config()` gave.

    Args:
        config: With `{class_path, init_args}` in place of objects.
        origin: Where it is from, for messages.
        trust_code: Import and call whatever class it names, and let it name weights or files.

    Raises:
        ValueError: It names foreign classes, weights or files.
    """
    with naming(origin, NOT_BUILT), offline(not trust_code):
        arguments = {name: _build(value, origin, trust_code) for name, value in config.items()}
        for name, made in _OF_ENCODER.items():
            value = arguments.get(name)
            if made in (Projection, LoRA) and isinstance(value, Mapping):
                arguments[name] = _call(made, value, origin)
            elif value is not None and not isinstance(value, made):
                raise ValueError(f"{origin}: {name}: found {shorten(value)}; expected {made.__name__}")
    return arguments


@contextmanager
def naming(origin: str, failed: str) -> Iterator[None]:
    """Whatever a model's files or configuration make other code raise, as a ValueError of one line that names it.

    Args:
        origin: The model, as the user wrote it or its file.
        failed: What did not work, such as `timm cannot read it`.
    """
    try:
        yield
    except (ImportError, FileNotFoundError):  # these name what is to be installed or brought
        raise
    except Exception as error:
        said = reason_of(error, None)
        if isinstance(error, ValueError) and origin in said:
            raise
        if isinstance(error, KeyError):  # a tensor or key that the configuration promises
            said = f"{failed}: it lacks {said}; is it whole?"
        elif type(error) is not ValueError:
            said = f"{failed} ({type(error).__name__}: {said[:300]})"
        raise ValueError(f"{origin}: {said}") from error


def _build(value: Any, origin: str, trust_code: bool) -> Any:
    """`{class_path, init_args}` -> object, innermost first; anything else as it is."""
    if not (isinstance(value, Mapping) and set(value) == {"class_path", "init_args"}):
        return value
    path, arguments = value["class_path"], value["init_args"]
    if not (isinstance(path, str) and isinstance(arguments, Mapping)):
        raise ValueError(f"{origin}: found {shorten(value)}; expected the name of a class and its arguments")
    module, _, name = path.rpartition(".")
    if not trust_code:
        made = getattr(importlib.import_module(module), name, None) if module in _TRUSTED else None
        if not (isinstance(made, type) and issubclass(made, (Backbone, TextTower, Tokenizer))):
            raise ValueError(f"{origin}: names {path}; pass trust_code=True to import and call it")
        for key in _FETCHED:
            if arguments.get(key):
                raise ValueError(f"{origin}: asks for {key} {arguments[key]!r}; pass trust_code=True to fetch it")
        check_options(arguments.get("options") or {}, origin)
        if (architecture := arguments.get("architecture")) is not None:
            _check_architecture(architecture, "text" if issubclass(made, TextTower) else "backbone", origin)
    arguments = {key: _build(item, origin, trust_code) for key, item in arguments.items()}
    return _call(getattr(importlib.import_module(module), name), arguments, origin)


def _call(made: Any, arguments: Mapping[str, Any], origin: str) -> Any:
    for key in arguments:
        if key not in (known := signature(made).parameters):
            raise ValueError(f"{origin}: {made.__name__} has no {key!r}{did_you_mean(key, known)}; {NEWER}")
    return made(**arguments)


def check_options(options: Any, origin: str) -> None:
    """Raise ValueError for an option of a timm model that is not the model's own, but may name files."""
    if not isinstance(options, Mapping):
        raise ValueError(f"{origin}: found {shorten(options)}; expected the options of a model by their names")
    for key, value in options.items():
        if key in _OF_TIMM or not _is_plain(value):
            expected = "expected a plain option of the model itself"
            raise ValueError(f"{origin}: backbone.options.{key}: found {shorten(value)}; {expected}")


def _check_architecture(architecture: Any, side: str, origin: str) -> None:
    """Raise ValueError for a transformers configuration with keys that its type does not declare, or with others in it.

    A configuration in another may name code and files as that one may; no text or image model alone has any.
    """
    from transformers import CONFIG_MAPPING

    where = f"{origin}: {side}.architecture"
    if not isinstance(architecture, Mapping):
        raise ValueError(f"{where}: found {shorten(architecture)}; expected a configuration of transformers")
    kind = str(architecture.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{where}.model_type: transformers has no {kind!r}")
    known = architecture_keys(kind) - CONFIG_MAPPING[kind].sub_configs.keys()
    if side == "text" and "vocab_size" not in known:
        raise ValueError(f"{where}.model_type: found {kind}; expected a text model")
    for key, value in architecture.items():
        if key not in known or not _is_plain(value):
            expected = f"expected a plain key of {kind}"
            raise ValueError(f"{where}.{key}: found {shorten(value)}; {expected}")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    return isinstance(value, _PLAIN)


@contextmanager
def offline(wanted: bool) -> Iterator[None]:
    """Keep the hub out of it."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
