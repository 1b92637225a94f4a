"""A mistake in a config becomes one line: the key, what was found, what was expected, the nearest valid name."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from indiclip import old_names
from indiclip.loading.data_module import MultiTaskData
from indiclip.masking import is_masked, mask
from indiclip.module import MultiTask
from indiclip.names import did_you_mean, reason_of
from indiclip.strict_yaml import UniqueKeys
from indiclip.training.head_overrides import apply_head_overrides

_GROUPS: dict[str, Any] = {"trainer": Trainer, "model": MultiTask, "data": MultiTaskData}
_TOP_LEVEL = (*_GROUPS, "seed_everything", "name", "runs", "ckpt_path", "override", "config")
# What jsonargparse says around a mistake, and of a type that the value was not meant to be of.
_WRAPPER = re.compile(
    r"""(Parser key "[^"]+":|Problem with given class_path '[^']+':|Does not validate .*|Errors:|Subtypes: .*|Given """
    r"value.*|Expected a path but .*|Expected a NoneType)?$"
)
_OTHER_TYPE = re.compile(r"Expected a ([^:]+)$|Not a valid subclass|Subclass types|a (?:class path|dict with)")
_PLAIN = {  # its words -> ours
    r"Type .* expects a function or a callable class: (Parser key .*:$)?|\. Got value: Namespace\(.*": "",
    r"<class '(?:[\w.]*\.)?(\w+)'>|typing\.Literal\[(.*?)\](?=\. |$)": r"\1\2",
    r"Expected an? (.*)\. Got value: (.*)": r"expected \1; found \2",
}


class ConfigError(ValueError):
    """What is wrong with a config or a flag. The parser's own words; `explain` makes one line of them."""


class OneLineParser(LightningArgumentParser):
    """Raises `ConfigError` where the base class prints its usage, hundreds of lines, and then the error.

    Attributes:
        written: What was parsed last, with references as the user wrote them.
    """

    written: Any = None

    def _parse_common(self, cfg: Namespace, *args: Any, **options: Any) -> Namespace:
        """As the base class, which replaces references by what they stand for and keeps nothing of them.

        Here alone all configs and flags are together, and not yet checked: `model.head_overrides` are applied. The only
        private part of jsonargparse that is touched; tried with 4.53.0.
        """
        apply_head_overrides(cfg)
        parsed: Namespace = super()._parse_common(cfg, *args, **options)
        self.written = cfg
        return parsed

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a nested parser, whose caller adds the key and the class to the message
            super().error(message, ex)
        raise ConfigError(message) from ex


def one_line(error: Exception) -> str:
    """What an error says, where it may be the parser's, on one line and without secrets."""
    message = str(error)
    if isinstance(error, ConfigError) or "of the Union subtypes" in message:  # what builds objects raises plain ones
        message = explain(message)
    return mask(" ".join(message.split()))


def explain(message: str) -> str:
    """jsonargparse's nested message as one line with a suggestion."""
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message)).replace(".[", "[")
    key = "" if key.startswith("[") else key  # while objects are built, where their own words name it
    classes = re.findall(r"class_path[ =]'([^']+)'", message)
    plain = message
    for words, ours in _PLAIN.items():
        plain = re.sub(words, ours, plain, flags=re.MULTILINE)
    lines = [line.lstrip(" -") for line in plain.splitlines()]
    lines = [line for line in lines if not _WRAPPER.match(line)]
    reason = " ".join(line for line in lines if not _OTHER_TYPE.match(line)) or " ".join(lines) or message
    types = dict.fromkeys(found[1] for line in lines if (found := _OTHER_TYPE.match(line)))
    if all(types) and len(types) == len({*lines}) and (given := re.search(r"Given value: (.*)", message)):
        reason = f"expected {' or '.join(types)}; found {given[1]}"
    if item := re.search(
        r"unrecognized arguments: -*(data\.(?:train|val)|model\.heads|trainer\.callbacks)\[\d+\]", reason
    ):
        return f"{item[1]}: items of a list are changed in a --config, which gives all of them; --{item[1]}+ adds one"
    if option := re.search(r"(?:[Oo]ption '|unrecognized arguments: -*)([\w.]+)", reason):
        name = option[1].partition(".")[0]
        if classes:
            near = did_you_mean(name, _parameters(pkgutil.resolve_name(owner := _innermost(classes))))
            return f"{key}.{name}: {owner} has no such option{near}".lstrip(".")
        known = [f"{group}.{parameter}" for group, made in _GROUPS.items() for parameter in _parameters(made)]
        name = option[1] if name in _GROUPS else name
        return f"{name}: no such option{did_you_mean(name, [*_TOP_LEVEL, *known])}"
    if linked := re.search(r"Call to compute_fn of link '\w+\((\w+)\).* failed: (.*)", reason):
        return f"{linked[1]}: {linked[2]}"
    if missing := re.search(r"module '([^']+)' has no attribute '([^']+)'", reason):
        module = missing[1]
        beside = [name.rpartition(".")[2] for name in _modules(f"{module}.x")]
        public = {name: one for name, one in vars(importlib.import_module(module)).items() if not name.startswith("_")}
        own = [name for name, one in public.items() if str(getattr(one, "__module__", "")).startswith(module)]
        return f"{key}: {missing[0]}{did_you_mean(missing[2], own + beside) or did_you_mean(missing[2], public)}"
    if missing := re.search(r"No module named '([^']+)'", reason):
        wanted = classes[-1].rpartition(".")[0] if classes else missing[1]
        hint = did_you_mean(wanted, [*_modules(wanted), *old_names.MODULES])
        return f"{key}: {missing[0]}" + re.sub("'(.*)'", lambda near: repr(old_names.translated(near[1])), hint)
    if re.search(r"arguments are required: \w+\.(model|data)\.", reason):
        return f"{reason}; does a --config FILE give them?"
    names_its_key = re.match(r"(data|model|trainer|heads)\b[.:\[]", reason)
    where = key or ("" if names_its_key else ", ".join(dict.fromkeys(classes)))
    return f"{where}: {reason}" if where and where not in reason else reason


def check_yaml(files: Iterable[str]) -> None:
    """Raise ConfigError unless each file parses."""
    for name in files:
        try:
            with Path(name).open(encoding="utf-8") as opened:
                content = yaml.load(opened, UniqueKeys)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name}: not a YAML file: {reason_of(error, None)}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{name}: expected the keys {', '.join(_GROUPS)}, found {type(content).__name__}")


def check_unmasked(tree: Any, key: str = "") -> None:
    """Raise ConfigError for a URL of a run's config.yaml without the password or signature that it had."""
    if isinstance(tree, dict | list):
        for name, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            check_unmasked(item, f"{key}[{name}]" if isinstance(tree, list) else f"{key}.{name}".lstrip("."))
    elif isinstance(tree, str) and is_masked(tree):
        raise ConfigError(
            f"{key}: found {tree}, whose password or signature was not written down; give it again, or write "
            "${oc.env:NAME} in its place"
        )


def _parameters(made: Any) -> list[str]:
    """Of a function, or of a class's constructor and of those that it hands its `**arguments` on to."""
    functions = [vars(base).get("__init__") for base in getattr(made, "__mro__", ())] or [made]
    signatures = [inspect.signature(function) for function in functions if inspect.isfunction(function)]
    return [name for signature in signatures for name in signature.parameters if name != "self"]


def _innermost(classes: list[str]) -> str:
    """The last one that is not the base of another, which a union of a class and a list of them is tried with too."""
    made = [pkgutil.resolve_name(name) for name in classes]
    types = [item for item in made if isinstance(item, type)]
    is_base = [any(item in other.__mro__[1:] for other in types) for item in made]
    return [name for name, base in zip(classes, is_base, strict=True) if not base][-1]


def _modules(name: str) -> list[str]:
    """Names of the modules beside a missing one."""
    parent = name.rpartition(".")[0]
    try:
        paths = getattr(importlib.import_module(parent), "__path__", []) if parent else None
    except ImportError:
        return []
    prefix = f"{parent}." if parent else ""
    return [module.name for module in pkgutil.iter_modules(paths, prefix)]
