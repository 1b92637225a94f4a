"""Names of commit 67a1ab8 and what they are called now, so that old configs and checkpoints go on working."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

_CLASSES = {
    "indiclip.backbone.FixedSize": "indiclip.backbone.TimmBackbone",
    "indiclip.survival.vote.StepVote": "indiclip.training.fault_tolerance.step_sync.StepSync",
    "indiclip.survival.owed_validation.OwedValidation": (
        "indiclip.training.fault_tolerance.resume_validation.ResumeValidation"
    ),
}
MODULES = {
    "indiclip.data.module": "indiclip.loading.data_module",
    "indiclip.data.texts": "indiclip.datasets.corpora",
    "indiclip.data.images": "indiclip.images",
    "indiclip.data.lab": "indiclip.generated.cielab",
    "indiclip.survival": "indiclip.training.fault_tolerance",
    "indiclip.evals.callback": "indiclip.training.india_bench",
    "indiclip.evals.monitors": "indiclip.training.monitors",
}
_ROOMS = {  # new package -> old one and the modules that went over under their own names
    "datasets": ("data", "captions coco densepose languages masks points scripts split tables"),
    "generated": (
        "data",
        "fonts lettering lettering_draw lettering_words mela mela_layout mela_people mela_scene mela_shapes "
        "mela_things mela_words romanise swatch_draw swatch_shapes swatches",
    ),
    "loading": ("data", "plan source steps transforms workers"),
    "webdataset": ("data", "box_shards cache shard_files shard_writer shards tar_index tar_members"),
    "training": ("", "callbacks config_errors record run_folder"),
}
for _new, (_old, _names) in _ROOMS.items():
    MODULES |= {f"indiclip.{_old}.{name}".replace("..", "."): f"indiclip.{_new}.{name}" for name in _names.split()}
_WEIGHTS = {
    r"^(heads\.[^.]+)\.modulate\.": r"\1.film.",  # counting
    r"^(heads\.[^.]+)\.towers\.sides\.": r"\1.towers.ltrb.",  # detection
}
_OLD_BETAS = [0.9, 0.98]  # AdamW's, when `betas` was a key of the model
_OLD_SOURCE = {"group_by_length": True}  # of every source, when there was no such option


def translated(name: str) -> str:
    """Today's path of a class or module; a path that never changed, and any other string, as it is."""
    if name in _CLASSES:
        return _CLASSES[name]
    module, _, last = name.rpartition(".")
    while module:
        if module in MODULES:
            return f"{MODULES[module]}.{last}"
        module, _, first = module.rpartition(".")
        last = f"{first}.{last}"
    return MODULES.get(name, name)


def translate_config(value: Any) -> Any:
    """A config as read from a YAML, or a part of one, with today's names and keys.

    Where any of them was another one, the config is of that commit, and its sources get the options that make the same
    batches: a run that goes on must see the samples that it would have seen.
    """
    found = _renamed(value)
    if found == value:
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


def _renamed(value: Any) -> Any:
    if isinstance(value, str):
        return translated(value)
    if isinstance(value, list):
        return [_renamed(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _renamed(item) for key, item in value.items()}
    if isinstance(model := found.get("model"), dict) and (betas := model.pop("betas", None)) not in (None, _OLD_BETAS):
        arguments = {"lr": 1e-3, "betas": betas, "weight_decay": 0.05, "fused": True}
        model["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": arguments}
    return found


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
    short = {old.rpartition(".")[2]: new.rpartition(".")[2] for old, new in _CLASSES.items()}
    callbacks = checkpoint.get("callbacks", {})
    checkpoint["callbacks"] = {short.get(key, key): state for key, state in callbacks.items()}
    if "owed" in (validation := checkpoint["callbacks"].get("ResumeValidation", {})):
        validation["due"] = validation.pop("owed")
    for old, new in _WEIGHTS.items():
        weights = checkpoint.get("state_dict", {})
        checkpoint["state_dict"] = {re.sub(old, new, name): weight for name, weight in weights.items()}
