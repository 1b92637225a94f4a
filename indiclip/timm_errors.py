"""What timm would refuse late, silently or in words of its own: ValueErrors of one line that name the YAML key."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from inspect import signature
from typing import Any

import timm
from timm.layers.patch_dropout import PatchDropout, PatchDropoutWithIndices
from timm.models.naflexvit import NaFlexVitCfg
from torch import nn

from indiclip.names import check_range, did_you_mean, reason_of


def check_keeps_patches(model: nn.Module) -> None:
    """Raise ValueError where a timm model leaves out patches while it trains: features have a token of each."""
    if isinstance(getattr(model, "patch_drop", None), PatchDropout | PatchDropoutWithIndices):
        raise ValueError("model.encoder.backbone.options.patch_drop_rate: expected 0: heads need a token of each patch")


def check_rates(options: Mapping[str, Any]) -> None:
    """Raise ValueError for a dropout rate among a timm model's options with which nothing would be left, or no rate."""
    rates = {f"model.encoder.backbone.options.{name}": rate for name, rate in options.items() if name.endswith("_rate")}
    check_range({key: rate for key, rate in rates.items() if isinstance(rate, int | float)}, 0, 1, without=1)


@contextmanager
def making(name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """While a timm model is made: let an error of it be a ValueError that names the options, if there are any."""
    with reworded(
        f"model.encoder.backbone.options: {name} cannot be made of {options}"
        if options
        else f"model.encoder.backbone.name: {name}"
    ):
        yield


@contextmanager
def reworded(problem: str) -> Iterator[None]:
    """Let an error of timm, which has no class of its own for them, be a ValueError of one line.

    Args:
        problem: The key, and what cannot be done; the line's beginning.
    """
    try:
        yield
    except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        said = reason_of(error, 300) or type(error).__name__  # many of its checks say nothing
        raise ValueError(f"{problem}: {said}{_nearest_argument(said)}") from error


def _nearest_argument(said: str) -> str:
    """The argument that may have been meant, where a class of timm says that it has no such argument."""
    found = re.search(r"(\w+)\.__init__\(\) got (?:an )?unexpected keyword argument[^']*'(\w+)'", said)
    if found is None:
        return ""
    if not found[1].startswith("NaFlex") and found[2] in {option.name for option in fields(NaFlexVitCfg)}:
        return f"; expected an indiclip.backbone.NaFlexViT for {found[2]}"
    kinds = [getattr(timm.models, kind, None) for kind in (found[1], f"{found[1]}Cfg")]
    return did_you_mean(found[2], [argument for kind in kinds if kind for argument in signature(kind).parameters])


def check_timm_name(name: str, where: str = "model.encoder.backbone.name") -> None:
    """Raise ValueError with the nearest name unless timm knows the model, and the tag of its weights, if there is one.

    Args:
        name: `ARCHITECTURE` or `ARCHITECTURE.TAG`.
        where: What names it, for the message.
    """
    if not timm.is_model(name):
        raise ValueError(f"{where}: timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = timm.list_models(f"{name.partition('.')[0]}*", pretrained=True)
        raise ValueError(f"{where}: timm has no weights {name!r}{did_you_mean(name, known)}") from error
