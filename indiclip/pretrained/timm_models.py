"""Image models of timm: names, and folders as `timm.models.push_to_hf_hub` and `save_for_hf` write them."""

from pathlib import Path
from typing import Any

import timm
import timm.models
from timm.models import naflexvit
from torch import Tensor

from indiclip.backbone import NaFlexViT, TimmBackbone
from indiclip.names import did_you_mean
from indiclip.pretrained.model_names import read_config
from indiclip.pretrained.weights import Weights, read_tensors
from indiclip.text import describe

_FILES = ("model.safetensors", "pytorch_model.bin")


def read_timm(what: str) -> Weights:
    """`NAME:FILE` or a folder; see `indiclip.pretrained.read.read_weights`."""
    folder = Path(what)
    if folder.is_dir():
        config = read_config(folder / "config.json")
        name, options, overlay = config["architecture"], dict(config.get("model_args") or {}), config["pretrained_cfg"]
        file = next((folder / name for name in _FILES if (folder / name).is_file()), folder / _FILES[0])
    else:
        name, _, weights = what.partition(":")
        options, overlay, file = {}, {}, Path(weights)
    if not timm.is_model(name):
        raise ValueError(f"timm:{what}: timm has no {name!r}{did_you_mean(name, timm.list_models())}")
    tensors = read_tensors(file)
    return image_tower(f"timm:{what}", name, tensors, options, overlay)


def image_tower(
    origin: str, name: str, tensors: dict[str, Tensor], options: dict[str, Any], overlay: dict[str, Any]
) -> Weights:
    """A timm model's weights as a backbone that pools by itself.

    Args:
        origin: For messages.
        name: The architecture.
        tensors: By timm's names.
        options: Arguments of the architecture.
        overlay: What differs from its `pretrained_cfg`: `mean`, `std`, ...
    """
    backbone: NaFlexViT | TimmBackbone
    options = {key: value for key, value in options.items() if key != "use_naflex"}  # which NaFlexViT always does
    try:
        backbone = naflex = NaFlexViT(name=name, options=options, mean=overlay.get("mean"), std=overlay.get("std"))
        tensors, prefix = naflexvit.checkpoint_filter_fn(tensors, naflex.vit), "backbone.vit."
    except ValueError:
        backbone, prefix = TimmBackbone(name, options=options), "backbone.net."
    own = backbone.state_dict()
    config = timm.get_pretrained_cfg(name)
    classifier = str(config.classifier if config else None)
    ignored = [
        key for key in tensors if f"{prefix.removeprefix('backbone.')}{key}" not in own and key.startswith(classifier)
    ]
    kept = {f"{prefix}{key}": tensor for key, tensor in tensors.items() if key not in ignored}
    return Weights(origin, {"backbone": describe(backbone), "pool": "tower"}, kept, ignored=ignored)
