"""Image models of timm: names, files, and folders as `timm.models.push_to_hf_hub` and `save_for_hf` write them."""

import sys
from math import gcd
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import timm.models
import torch
from timm.models import adapt_input_conv, clean_state_dict
from torch import Tensor

from indiclip.backbone import NaFlexViT, TimmBackbone
from indiclip.names import did_you_mean
from indiclip.pretrained.model_names import read_config
from indiclip.pretrained.weights import Weights, read_tensors
from indiclip.text import describe

_FILES = ("model.safetensors", "pytorch_model.bin")
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # the order in which timm looks, too
_KEPT = ("mean", "std", "interpolation", "input_size", "in_chans", "first_conv")
_NOT_OURS = ("num_classes", "in_chans", "use_naflex", "features_only", "pretrained", "global_pool_ratio")


def read_timm(what: str) -> Weights:
    """`NAME`, `NAME:FILE` or a folder; see `indiclip.pretrained.read.read_weights`.

    Raises:
        FileNotFoundError: No such file; without a network, a name whose weights were not downloaded before.
    """
    folder = Path(what)
    options: dict[str, Any] = {}
    overlay: dict[str, Any] = {}
    if folder.is_dir():
        config = read_config(folder / "config.json")
        name = _architecture(config, folder)
        options, overlay = dict(config.get("model_args") or {}), dict(config.get("pretrained_cfg") or config)
        file = next((folder / name for name in _FILES if (folder / name).is_file()), folder / _FILES[0])
    else:
        name, _, path = what.partition(":")
        check_name(name, what)
        file = Path(path) if path else _downloaded(name)
    return image_tower(f"timm:{what}", name, _unwrapped(read_tensors(file)), options, overlay)


def check_name(name: str, what: str) -> None:
    """Raise ValueError with the nearest name unless timm knows the model."""
    if not timm.is_model(name):
        raise ValueError(f"timm:{what}: timm has no {name!r}{did_you_mean(name, timm.list_models())}")


def image_tower(
    origin: str, name: str, tensors: dict[str, Tensor], options: dict[str, Any], overlay: dict[str, Any]
) -> Weights:
    """A timm model's weights as a backbone that pools by itself: a NaFlexViT, else a TimmBackbone.

    Args:
        origin: For messages.
        name: The architecture.
        tensors: By timm's names.
        options: Arguments of the architecture.
        overlay: What differs from its `pretrained_cfg`: `mean`, `std`, ...
    """
    options = {key: value for key, value in options.items() if key not in _NOT_OURS}
    pixels = {key: overlay[key] for key in ("mean", "std") if key in overlay}
    with torch.device("meta"):
        backbone = _fixed_size(name, options, overlay, pixels)
        naflex = _any_size(name, options, pixels)
    converted, ignored, notes = _by_own_names(backbone.net, tensors)
    if naflex is not None:
        moved = _naflex_names(converted, backbone.net)
        if moved.keys() == naflex.vit.state_dict().keys():
            return _weights(origin, naflex, "backbone.vit.", moved, ignored, notes)
    return _weights(origin, backbone, "backbone.net.", converted, ignored, notes)
