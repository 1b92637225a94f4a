"""Folders that `indiclip export --to vitdet` wrote: the backbone of an encoder, under the names of detectron2's ViT."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from indiclip.backbone import NaFlexViT
from indiclip.pretrained.model_names import read_config
from indiclip.pretrained.weights import Weights, read_tensors
from indiclip.text import describe


def read_vitdet(what: str) -> Weights:
    """The image tower of a folder, with the final norm that detectron2's ViT does without.

    Raises:
        FileNotFoundError: A file of it is missing.
        ValueError: Written by a newer version, or damaged.
    """
    folder = Path(what)
    config = read_config(folder / "config.json")
    if config.get("version") != 1:
        raise ValueError(f"{folder / 'config.json'}: found version {config.get('version')}; expected 1")
    content = read_tensors(folder / "model.pth")
    tensors = {"backbone.vit.norm." + name: tensor for name, tensor in content["final_norm"].items()}
    for name, tensor in content["model"].items():
        tensors["backbone.vit." + _own_name(name.removeprefix("backbone.net."))] = _own_shape(name, tensor)
    with torch.device("meta"):
        backbone = _backbone(config, bool(content["final_norm"]))
    return Weights(f"vitdet:{what}", {"backbone": describe(backbone)}, tensors)


def _own_name(name: str) -> str:
    return "embeds." + name.removeprefix("patch_embed.") if name.startswith(("patch_embed.", "pos_embed")) else name


def _own_shape(name: str, tensor: Tensor) -> Tensor:
    if name.endswith("patch_embed.proj.weight"):
        return tensor.permute(0, 2, 3, 1).flatten(1)
    if name.endswith("pos_embed"):
        side = round(tensor.shape[1] ** 0.5)
        return tensor.reshape(1, side, side, -1)
    return tensor


def _backbone(config: dict[str, Any], final_norm: bool) -> NaFlexViT:
    vit, positions = config["vit"], config["positions"]
    options = {"mlp_ratio": vit["mlp_ratio"], "qkv_bias": vit["qkv_bias"], "norm_eps": vit["norm_eps"]}
    options |= {"act_layer": vit["activation"], "final_norm": final_norm}
    options |= {"pos_embed_interp_mode": positions["mode"], "pos_embed_antialias": positions["antialias"]}
    options |= {"pos_embed_align_corners": positions["align_corners"]}
    options |= {"pos_embed_use_grid_sample": config["grid_sample"]}
    side = vit["pretrain_img_size"] // vit["patch_size"]
    options |= {"pos_embed_grid_size": [side, side]} if vit["use_abs_pos"] else {"pos_embed": "none"}
    return NaFlexViT(
        width=vit["embed_dim"],
        depth=vit["depth"],
        num_heads=vit["num_heads"],
        patch_size=vit["patch_size"],
        options=options,
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
    )
