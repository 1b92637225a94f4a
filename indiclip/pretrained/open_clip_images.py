"""OpenCLIP's image towers as timm's models."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from math import isqrt
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import byobnet
from torch import Tensor

from indiclip.backbone import Backbone, NaFlexViT
from indiclip.names import check_choice
from indiclip.pooling import Projection
from indiclip.pretrained.model_names import read_config
from indiclip.pretrained.open_clip_source import LOCAL, OpenClipSource, vision_cfg_of
from indiclip.pretrained.open_clip_texts import activation, norm_eps
from indiclip.pretrained.timm_models import image_tower
from indiclip.pretrained.weights import Weights
from indiclip.text import describe
from indiclip.timm_backbone import TimmBackbone

_NAMES = [
    (r"class_embedding", "embeds.cls_token"),
    (r"positional_embedding", "embeds.pos_embed"),
    (r"conv1", "embeds.proj"),
    (r"ln_pre", "norm_pre"),
    (r"transformer\.resblocks\.(\d+)\.ln_", r"blocks.\1.norm"),
    (r"transformer\.resblocks\.(\d+)\.ls_", r"blocks.\1.ls"),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj", r"blocks.\1.attn.proj"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc", r"blocks.\1.mlp.fc1"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj", r"blocks.\1.mlp.fc2"),
]
_HEADS = {
    "head.proj.": "image_projection.",
    "head.mlp.fc1.": "image_projection.0.",
    "head.mlp.fc2.": "image_projection.2.",
}
# Blocks of each stage -> timm's name; the width is free.
_RESNETS = {
    (3, 4, 6, 3): "resnet50_clip",
    (3, 4, 23, 3): "resnet101_clip",
    (4, 6, 10, 6): "resnet50x4_clip",
    (6, 8, 18, 8): "resnet50x16_clip",
    (3, 15, 36, 10): "resnet50x64_clip",
}


def image_weights(source: OpenClipSource, tensors: dict[str, Tensor]) -> Weights:
    """The tower with its own pooling, and its projection.

    Args:
        source: With a whole configuration.
        tensors: Of the tower, by OpenCLIP's names.
    """
    config = source.model["vision_cfg"]
    if config["timm_model_name"]:
        return _of_timm(source, tensors)
    if isinstance(config["layers"], Sequence):
        return _resnet(source, tensors)
    return _transformer(source, tensors)


def _transformer(source: OpenClipSource, tensors: dict[str, Tensor]) -> Weights:
    """OpenCLIP's own VisionTransformer."""
    config, origin = source.model["vision_cfg"], f"{source.origin}: vision_cfg"
    check_choice(f"{origin}.pool_type", config["pool_type"], ("tok", "avg"))
    patch_hw, image_hw = _pair(config["patch_size"]), _pair(config["image_size"])
    if patch_hw[0] != patch_hw[1]:
        raise ValueError(f"{origin}.patch_size: found {patch_hw}; expected squares")
    cells_hw = (image_hw[0] // patch_hw[0], image_hw[1] // patch_hw[1])
    grid_hw = _grid(len(tensors["positional_embedding"]) - 1, cells_hw)
    moved = transformer_tensors(tensors, grid_hw, config["final_ln_after_pool"])
    notes = []
    if config["no_ln_pre"]:  # timm leaves the bias of the patches out only where a norm follows them
        moved["backbone.vit.embeds.proj.bias"] = torch.zeros(config["width"])
        notes.append("the patches have a bias of zeros, which training may move")
    backbone = NaFlexViT(
        width=config["width"],
        depth=config["layers"],
        num_heads=config["width"] // config["head_width"],
        patch_size=patch_hw[0],
        mean=source.pixels["mean"],
        std=source.pixels["std"],
        interpolation=source.pixels["interpolation"],
        options={
            "mlp_ratio": (int(config["width"] * config["mlp_ratio"]) + 0.5) / config["width"],  # timm rounds down
            "norm_eps": norm_eps(config, origin),
            "act_layer": activation(source, config)[0],
            "init_values": config["ls_init_value"],
            "class_token": True,
            "pre_norm": not config["no_ln_pre"],
            "fc_norm": config["final_ln_after_pool"],
            "global_pool": "token" if config["pool_type"] == "tok" else "avg",
            "pos_embed_grid_size": list(grid_hw),
            "pos_embed_use_grid_sample": False,
        },
    )
    return _weights(source, backbone, moved, Projection(), notes)


def transformer_tensors(
    tensors: dict[str, Tensor], grid_hw: tuple[int, int] | None = None, norm_is_last: bool = False
) -> dict[str, Tensor]:
    """Those of OpenCLIP's or OpenAI's VisionTransformer by our names.

    Args:
        tensors: By the names behind `visual.`.
        grid_hw: Of the table of positions; None where it is square.
        norm_is_last: Whether the last norm comes behind the pooling.
    """
    found = {}
    for name, tensor in tensors.items():
        for theirs, ours in _NAMES:
            name = re.sub(f"^{theirs}", ours, name)
        found[name.replace("ln_post", "fc_norm" if norm_is_last else "norm")] = tensor
    table = found["embeds.pos_embed"]
    side = isqrt(len(table) - 1)
    found["embeds.cls_token"] = (found["embeds.cls_token"] + table[0]).reshape(1, 1, -1)
    found["embeds.pos_embed"] = table[1:].reshape(1, *(grid_hw or (side, side)), -1)
    found["embeds.proj.weight"] = found["embeds.proj.weight"].permute(0, 2, 3, 1).flatten(1)
    moved = {f"backbone.vit.{name}": tensor for name, tensor in found.items() if name != "proj"}
    return moved | {"image_projection.weight": found["proj"].T}


def _resnet(source: OpenClipSource, tensors: dict[str, Tensor]) -> Weights:
    """OpenCLIP's ModifiedResNet, with CLIP's attention pool."""
    config = source.model["vision_cfg"]
    layers, side = tuple(config["layers"]), config["image_size"]
    if layers not in _RESNETS:
        known = ", ".join(map(str, _RESNETS))
        raise ValueError(f"{source.origin}: vision_cfg.layers: found {layers}; timm has {known}")
    options = {"width_factor": config["width"] / 64, "img_size": side}
    backbone = TimmBackbone(
        _RESNETS[layers],
        _pair(side),
        _cell(_pair(side)),
        options=options,
        mean=source.pixels["mean"],
        std=source.pixels["std"],
        interpolation=source.pixels["interpolation"],
    )
    return _weights(source, backbone, resnet_tensors(tensors, backbone.net), Projection(bias=True))


def resnet_tensors(tensors: dict[str, Tensor], net: Any) -> dict[str, Tensor]:
    """Those of OpenCLIP's or OpenAI's ModifiedResNet, by the names behind `visual.`, by our names."""
    by_timm = byobnet.checkpoint_filter_fn({f"visual.{name}": t for name, t in tensors.items()}, net)
    moved = {f"backbone.net.{name}": tensor for name, tensor in by_timm.items()}
    for kind in ("weight", "bias"):
        moved[f"image_projection.{kind}"] = moved.pop(f"backbone.net.head.proj.{kind}")
    return moved


def _of_timm(source: OpenClipSource, tensors: dict[str, Tensor]) -> Weights:
    """OpenCLIP's TimmModel: `trunk` is timm's, `head` a projection; without one the trunk's classifier projects."""
    config, origin = source.model["vision_cfg"], f"{source.origin}: vision_cfg"
    name, pool, embed_dim = config["timm_model_name"], config["timm_pool"], source.model["embed_dim"]
    kind = config["timm_proj"] or ""
    options = {"global_pool": pool} if pool else {}
    if name.startswith(LOCAL) and source.folder is not None:
        here = vision_cfg_of(source.folder, {"model_cfg": source.model})["timm_model_name"].removeprefix(LOCAL)
        described = read_config(Path(here) / "config.json")
        name, options = described["architecture"], (described.get("model_args") or {}) | options
    check_choice(f"{origin}.timm_model_name", name, timm.list_models())
    check_choice(f"{origin}.timm_proj", kind, ("linear", "mlp", "none", ""))
    if pool in ("abs_attn", "rot_attn") or (not pool and kind in ("none", "")):
        raise ValueError(f"{origin}.timm_pool: found {pool!r}; expected one of timm's own poolings")
    trunk = {n.removeprefix("trunk."): t for n, t in tensors.items() if n.startswith("trunk.")}
    classifier = str(timm.get_pretrained_cfg(name).classifier)  # type: ignore[union-attr]
    moved = {}
    if not kind:
        for part in ("weight", "bias"):
            if (tensor := trunk.pop(f"{classifier}.{part}", None)) is not None:
                moved[f"image_projection.{part}"] = tensor
    tower = image_tower(source.origin, name, trunk, options, {})
    arguments = tower.config["backbone"]["init_args"]
    arguments |= {key: source.pixels[key] for key in ("mean", "std", "interpolation")}
    if "canvas_hw" in arguments:
        canvas_hw = _pair(config["image_size"])
        arguments |= {"canvas_hw": list(canvas_hw), "patch_size": _cell(canvas_hw)}
    moved |= head_tensors(tensors)
    bias = config["timm_proj_bias"]
    projection = {
        "none": Projection("none"),
        "": Projection(bias="image_projection.bias" in moved),
        "linear": Projection(bias=bias),
        "mlp": Projection("mlp", bias=bias, hidden=2 * embed_dim, hidden_bias=True),
    }[kind]
    tower.tensors |= moved
    tower.config["image_projection"] = asdict(projection)
    tower.unused += [n for n in tensors if not n.startswith(("trunk.", *_HEADS))]
    return tower


def head_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The projection behind a timm tower of OpenCLIP by our names."""
    found: dict[str, Tensor] = {}
    for theirs, ours in _HEADS.items():
        found |= {n.replace(theirs, ours, 1): t for n, t in tensors.items() if n.startswith(theirs)}
    return found


def _weights(
    source: OpenClipSource,
    backbone: Backbone,
    tensors: dict[str, Tensor],
    projection: Projection,
    notes: Sequence[str] = (),
) -> Weights:
    config: dict[str, Any] = {"backbone": describe(backbone), "pool": "tower", "image_projection": asdict(projection)}
    return Weights(source.origin, config, tensors, notes=list(notes))


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _cell(canvas_hw: tuple[int, int]) -> int:
    """Side of the patches in which images travel: the largest up to 32 that divides the canvas."""
    return max(side for side in range(1, 33) if all(whole % side == 0 for whole in canvas_hw))


def _grid(count: int, grid_hw: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a table of positions, which may be of another image size than the configuration."""
    if grid_hw[0] * grid_hw[1] == count:
        return grid_hw
    if (side := isqrt(count)) ** 2 != count:
        raise ValueError(
            f"visual.positional_embedding: found {count} positions; expected {grid_hw[0]}x{grid_hw[1]} or a square"
        )
    return side, side
