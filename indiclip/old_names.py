"""Names of earlier versions and what they are called now, so that old configs and checkpoints go on working."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import yaml


class _Tables(TypedDict):
    classes: dict[str, str]
    moved: dict[str, str]
    modules: dict[str, str]
    weights: dict[str, str]
    backbones: dict[str, list[str]]


_TABLES: _Tables = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
MODULES = _TABLES["modules"]
_MOVED = _TABLES["moved"]
_LOG_VARIANCE = re.compile(r"^task_weights\.log_variances\.")
_STEP = re.compile(r"heads\.[\w-]+\.step")
_TEACHER = re.compile(r"heads\.[\w-]+\.teacher\.crc32")
_NAMES = _MOVED | _TABLES["classes"] | MODULES
_OLD_BETAS = [0.9, 0.98]  # AdamW's, when `betas` was a key of the model
_OLD_SOURCE = {"group_by_length": True}  # of every source, when there was no such option
_OLD_BACKBONES = {name: set(arguments) for name, arguments in _TABLES["backbones"].items()}
_OLD_INTERPOLATION = {"interpolation": "bilinear"}  # of every backbone, when it was no argument


def translated(name: str, names: dict[str, str] = _NAMES) -> str:
    """Today's path of a class or module; a path that never changed, and any other string, as it is."""
    first, rest = name, ""
    while first and first not in names:
        first, dot, last = first.rpartition(".")
        rest = f"{dot}{last}{rest}"
    return names.get(first, first) + rest


def translate_config(value: Any) -> Any:
    """A config as read from a YAML, or a part of one, with today's names and keys.

    Where any of them was one of that commit alone, the config is of it, and its sources get the options that make the
    same batches: a run that goes on must see the samples that it would have seen.
    """
    today = _renamed(value, _MOVED)
    found = _renamed(today, _NAMES)
    model = found.get("model") if isinstance(found, dict) else None
    if isinstance(model, dict) and (betas := model.pop("betas", None)) not in (None, _OLD_BETAS):
        arguments = {"lr": 1e-3, "betas": betas, "weight_decay": 0.05, "fused": True}
        model["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": arguments}
    is_old = found != today
    if isinstance(model, dict) and model.pop("uncertainty_weighting", False):
        model["task_weights"] = {"class_path": "indiclip.task_weights.Uncertainty"}
    for backbone in _named_backbones(found):
        # All arguments of that time are there: a run wrote it. In what a user writes, none is the model's own.
        if backbone["init_args"].keys() >= _OLD_BACKBONES[backbone["class_path"]]:
            backbone["init_args"] = {**_OLD_INTERPOLATION, **backbone["init_args"]}
    if not is_old:
        return found
    old = [source for source in _sources(found) if not _OLD_SOURCE.keys() <= source.keys()]
    for source in old:
        source |= _OLD_SOURCE
    if old:
        warnings.warn(
            "the config is of an older version, whose batches were of images of similar length; its sources get "
            "group_by_length: true",
            stacklevel=1,  # so that it is said once, whoever asks
        )
    return found


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, str):
        return translated(value, names)
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    return {key: _renamed(item, names) for key, item in value.items()} if isinstance(value, dict) else value


def _named_backbones(value: Any) -> Iterator[dict[str, Any]]:
    """Backbones by the name of a timm model, which has an interpolation of its own."""
    if isinstance(value, list):
        for item in value:
            yield from _named_backbones(item)
    elif isinstance(value, dict):
        arguments = value.get("init_args")
        if str(value.get("class_path")) in _OLD_BACKBONES and isinstance(arguments, dict) and arguments.get("name"):
            yield value
        yield from _named_backbones(list(value.values()))


def _sources(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict) and {"task", "dataset"} <= value.keys():
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _sources(item)


def translate_checkpoint(checkpoint: dict[str, Any]) -> None:
    """Give a checkpoint, in place, today's names of classes, callbacks and weights."""
    if "encoder" in checkpoint:
        checkpoint["encoder"] = translate_config(checkpoint["encoder"])
    short = {old.rpartition(".")[2]: new.rpartition(".")[2] for old, new in _TABLES["classes"].items()}
    callbacks = checkpoint.get("callbacks", {})
    checkpoint["callbacks"] = {short.get(key, key): state for key, state in callbacks.items()}
    # Whether the resumed run still has to validate.
    validation = checkpoint["callbacks"].get("ResumeValidation", {})
    if "owed" in validation:
        validation["due"] = validation.pop("owed")
    # Saved among the weights: a step counter, from which the DensePose head drew its box jitter, and the checksum of a
    # teacher beside the student.
    weights = {name: w for name, w in checkpoint.get("state_dict", {}).items() if not _STEP.fullmatch(name)}
    for name in [name for name in weights if _TEACHER.fullmatch(name)]:
        crc32 = int(weights.pop(name))
        if "train_samples" in checkpoint:
            checkpoint["train_samples"][name.removesuffix(".teacher.crc32")] = {"crc32_of_teacher": crc32}
    for old, new in _TABLES["weights"].items():
        weights = {re.sub(old, new, name): weight for name, weight in weights.items()}
    checkpoint["state_dict"] = weights
    _reshape_log_variances(checkpoint)


def _reshape_log_variances(checkpoint: dict[str, Any]) -> None:
    """Single numbers when `model.uncertainty_weighting` was a switch, in the optimizer too; today of shape (1,)."""
    new = {name: weight.reshape(1) for name, weight in checkpoint["state_dict"].items() if _LOG_VARIANCE.search(name)}
    checkpoint["state_dict"] |= new
    averages = checkpoint.get("averages", {}).get("state_dict", {})
    for name in [name for name in averages if name.startswith("log_variances.")]:
        averages[f"task_weights.{name}"] = averages.pop(name).reshape(1)
    for optimizer in checkpoint.get("optimizer_states", []) if new else []:
        for group in optimizer["param_groups"]:
            if "param_names" in group:
                group["param_names"] = [re.sub("^log_var", "task_weights.log_var", n) for n in group["param_names"]]
        for state in optimizer["state"].values():
            numbers = {
                name: value for name, value in state.items() if name != "step" and getattr(value, "ndim", 1) == 0
            }
            state |= {name: value.reshape(1) for name, value in numbers.items()}
