"""Image towers of transformers: CLIP's and SigLIP's, DINOv2, DINOv3, ViT as timm's models; staged ones as they are."""

import re
from dataclasses import asdict
from math import isclose, isqrt
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from indiclip.backbone import NaFlexViT
from indiclip.names import check_choice
from indiclip.pooling import Projection
from indiclip.preprocessing import Interpolation
from indiclip.pretrained.transformers_files import read_transformers_tensors
from indiclip.pretrained.weights import Weights
from indiclip.text import architecture_of, describe
from indiclip.transformers_backbone import KINDS, TransformersBackbone

# transformers' name of a vision tower's tensor -> timm's NaFlexVit.
_VISION = [
    (r"embeddings\.(class_embedding)", "embeds.cls_token"),
    (r"embeddings\.patch_embedding", "embeds.proj"),
    (r"embeddings\.position_embedding\.weight", "embeds.pos_embed"),
    (r"pre_layrnorm", "norm_pre"),
    (r"post_layernorm", "norm"),
    (r"encoder\.layers\.(\d+)\.layer_norm(\d)", r"blocks.\1.norm\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj", r"blocks.\1.attn.proj"),
    (r"encoder\.layers\.(\d+)\.self_attn\.", r"blocks.\1.attn."),
    (r"encoder\.layers\.(\d+)\.mlp", r"blocks.\1.mlp"),
    (r"head\.probe", "attn_pool.latent"),
    (r"head\.attention\.out_proj", "attn_pool.proj"),
    (r"head\.layernorm", "attn_pool.norm"),
    (r"head\.mlp", "attn_pool.mlp"),
    (r"head\.attention\.", "attn_pool."),
]
# The same for DINOv2, DINOv3 and ViT.
_PLAIN = [
    (r"embeddings\.cls_token", "embeds.cls_token"),
    (r"embeddings\.register_tokens", "embeds.reg_token"),
    (r"embeddings\.position_embeddings", "embeds.pos_embed"),
    (r"embeddings\.patch_embeddings\.(projection\.)?", "embeds.proj."),
    (r"(layernorm|norm)\.", "norm."),
    (r"(encoder\.|model\.)?layer\.(\d+)\.", r"blocks.\2."),
    (r"blocks\.(\d+)\.(layernorm_before|norm1)", r"blocks.\1.norm1"),
    (r"blocks\.(\d+)\.(layernorm_after|norm2)", r"blocks.\1.norm2"),
    (r"blocks\.(\d+)\.attention\.(output\.dense|o_proj)", r"blocks.\1.attn.proj"),
    (r"blocks\.(\d+)\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.", r"blocks.\1.attn.\3_proj."),
    (r"blocks\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"blocks\.(\d+)\.(intermediate\.dense|mlp\.up_proj)", r"blocks.\1.mlp.fc1"),
    (r"blocks\.(\d+)\.(output\.dense|mlp\.down_proj)", r"blocks.\1.mlp.fc2"),
]
_CONTRASTIVE = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "metaclip_2_vision_model")
_OTHERS = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit")
IMAGE_TYPES = (*_CONTRASTIVE, *_OTHERS, *KINDS)
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_RESAMPLE: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_LEFT_OUT = ("embeddings.mask_token", "pooler.", "classifier.", "decoder.")


def read_image_model(folder: Path, origin: str) -> Weights:
    """A folder whose `config.json` is that of one of `IMAGE_TYPES`."""
    config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    tensors = read_transformers_tensors(folder)
    if config.model_type in KINDS:
        return _staged_model(config, tensors, folder, origin)
    found: dict[str, Any] = {"pool": "tower"}
    projection = tensors.pop("visual_projection.weight", None)
    ignored: list[str] = []
    notes: list[str] = []
    if config.model_type in _CONTRASTIVE:
        backbone, moved = vision_tower(config, _without_prefix(tensors, "vision_model."), folder)
    else:
        tensors = _without_prefix(tensors, f"{config.model_type.partition('_')[0]}.")
        ignored = [name for name in tensors if name.startswith(_LEFT_OUT)]
        kept = {name: tensor for name, tensor in tensors.items() if name not in ignored}
        backbone, moved, notes = _plain_tower(config, kept, folder)
    weights = {f"backbone.vit.{name}": tensor for name, tensor in moved.items()}
    if projection is not None:
        embed_dim = len(projection)
        weights["image_projection.weight"] = projection
        found |= {"image_projection": asdict(Projection()), "embed_dim": embed_dim, "lengths": [embed_dim]}
    return Weights(origin, {"backbone": describe(backbone)} | found, weights, ignored=ignored, notes=notes)


def _staged_model(config: Any, tensors: dict[str, Tensor], folder: Path, origin: str) -> Weights:
    """Loaded by transformers itself, whose names of today are not those in the files."""
    mean, std, interpolation = _pixels(folder)
    side = getattr(config, "image_size", 224)
    canvas_hw = (side, side) if isinstance(side, int) else (side[0], side[1])
    step = next(step for step in (16, 8, 4, 2, 1) if not any(length % step for length in canvas_hw))
    backbone = TransformersBackbone(architecture_of(config), canvas_hw, step, mean, std, interpolation)
    model, found = type(backbone.net).from_pretrained(
        None, config=backbone.net.config, state_dict=tensors, output_loading_info=True, trust_remote_code=False
    )
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in found["missing_keys"]}
    weights = {f"backbone.net.{name}": tensor for name, tensor in own.items()}
    others = [name.removeprefix(f"{config.model_type}.") for name in found["unexpected_keys"]]
    ignored = [name for name in others if name.startswith(_LEFT_OUT)]
    unused = [name for name in others if name not in ignored]
    return Weights(origin, {"backbone": describe(backbone), "pool": "tower"}, weights, unused=unused, ignored=ignored)


def vision_tower(config: Any, tensors: dict[str, Tensor], folder: Path) -> tuple[NaFlexViT, dict[str, Tensor]]:
    """A vision tower of CLIP's or SigLIP's kind as timm's, and its tensors by timm's names."""
    is_clip = "embeddings.class_embedding" in tensors
    patch_size = config.patch_size
    table = tensors["embeddings.position_embedding.weight"]
    side = isqrt(len(table) - is_clip)
    mean, std, interpolation = _pixels(folder)
    backbone = NaFlexViT(
        width=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        patch_size=patch_size,
        mean=mean,
        std=std,
        interpolation=interpolation,
        options={
            "mlp_ratio": (config.intermediate_size + 0.5) / config.hidden_size,  # timm rounds down
            "norm_eps": config.layer_norm_eps,
            "act_layer": _activation(config, folder),
            "class_token": is_clip,
            "pre_norm": is_clip,
            "global_pool": "token" if is_clip else "map",
            "pos_embed_grid_size": [side, side],
            "pos_embed_interp_mode": "bicubic" if config.model_type != "siglip2_vision_model" else "bilinear",
            "pos_embed_use_grid_sample": False,
        },
    )
    return backbone, tensors_by_timm(tensors)


def tensors_by_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a vision tower of CLIP's or SigLIP's kind by timm's names."""
    is_clip = "embeddings.class_embedding" in tensors
    table = tensors["embeddings.position_embedding.weight"]
    side = isqrt(len(table) - is_clip)
    found = _renamed(tensors, _VISION)
    if is_clip:  # timm's class token has its position already
        found["embeds.cls_token"] = (found["embeds.cls_token"] + table[0]).reshape(1, 1, -1)
        table = table[1:]
    found["embeds.pos_embed"] = table.reshape(1, side, side, -1)
    kernel = found["embeds.proj.weight"]
    found["embeds.proj.weight"] = kernel.permute(0, 2, 3, 1).flatten(1) if kernel.ndim == 4 else kernel
    _fuse(found)
    if not is_clip:
        for kind in ("weight", "bias"):
            joined = found.pop(f"attn_pool.in_proj_{kind}")
            found[f"attn_pool.q.{kind}"], found[f"attn_pool.kv.{kind}"] = joined.tensor_split([len(joined) // 3])
    return found


def _plain_tower(
    config: Any, tensors: dict[str, Tensor], folder: Path
) -> tuple[NaFlexViT, dict[str, Tensor], list[str]]:
    """DINOv2, DINOv3 or ViT: a class token, registers, and a norm before the pooling."""
    if getattr(config, "use_swiglu_ffn", False) or getattr(config, "use_gated_mlp", False):
        raise ValueError(f"{folder}: found a gated MLP; expected one of the sizes with a plain MLP, or timm's model")
    turns = config.model_type == "dinov3_vit"
    found = _renamed(tensors, _PLAIN)
    mean, std, interpolation = _pixels(folder)
    registers = getattr(config, "num_register_tokens", 0)
    hidden = config.hidden_size * config.mlp_ratio if hasattr(config, "mlp_ratio") else config.intermediate_size
    options = {
        "mlp_ratio": (hidden + 0.5) / config.hidden_size,  # timm rounds down
        "norm_eps": config.layer_norm_eps,
        "act_layer": _activation(config, folder),
        "class_token": True,
        "reg_tokens": registers,
        "global_pool": "token",
        "init_values": getattr(config, "layerscale_value", None),
    }
    notes = []
    if turns:
        options |= {"pos_embed": "none", "attn_type": "rope", "rope_type": "dinov3", "rope_rotate_half": True}
        options |= {"rope_temperature": config.rope_theta}
        found = _renamed(found, [(r"blocks\.(\d+)\.ls(\d)\.gamma", r"blocks.\1.gamma_\2")])
        if not config.key_bias:
            notes.append("the keys have a bias of zeros, which training may move")
    else:
        table = found["embeds.pos_embed"][0]
        side = isqrt(len(table) - 1)
        options |= {"pos_embed_grid_size": [side, side], "pos_embed_use_grid_sample": False}
        found["embeds.cls_token"] = found["embeds.cls_token"] + table[:1]
        found["embeds.pos_embed"] = table[1:].reshape(1, side, side, -1)
    if not registers:
        found.pop("embeds.reg_token", None)
    found["embeds.proj.weight"] = found["embeds.proj.weight"].permute(0, 2, 3, 1).flatten(1)
    _fuse(found)
    backbone = NaFlexViT(
        width=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        patch_size=config.patch_size,
        mean=mean,
        std=std,
        interpolation=interpolation,
        options=options,
    )
    return backbone, found, notes


def _fuse(found: dict[str, Tensor]) -> None:
    """Queries, keys and values in one matrix; a bias that one of them lacks is zero."""
    for block in [name.removesuffix("q_proj.weight") for name in found if name.endswith("attn.q_proj.weight")]:
        found[f"{block}qkv.weight"] = torch.cat([found.pop(f"{block}{part}_proj.weight") for part in "qkv"])
        biases = [found.pop(f"{block}{part}_proj.bias", None) for part in "qkv"]
        some = next((bias for bias in biases if bias is not None), None)
        if some is not None:
            found[f"{block}qkv.bias"] = torch.cat([torch.zeros_like(some) if b is None else b for b in biases])


def _renamed(tensors: dict[str, Tensor], names: list[tuple[str, str]]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        for theirs, ours in names:
            name = re.sub(f"^{theirs}", ours, name)
        found[name] = tensor
    return found


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _pixels(folder: Path) -> tuple[list[float], list[float], Interpolation]:
    """Mean and standard deviation of the folder's image processor, and how it resizes."""
    reader: Any = transformers.AutoImageProcessor
    try:
        images = reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{folder}: found no image processor; expected preprocessor_config.json") from error
    number = int(images.resample)
    if number not in _RESAMPLE:
        raise ValueError(f"{folder / 'preprocessor_config.json'}: resample: found {number}; expected 2 or 3")
    factor = images.rescale_factor if images.do_rescale else 1
    if not isclose(factor, 1 / 255):
        raise ValueError(f"{folder}: its image processor multiplies pixels by {factor}; expected 1/255")
    if not images.do_normalize:
        return [0.0] * 3, [1.0] * 3, _RESAMPLE[number]
    return list(images.image_mean), list(images.image_std), _RESAMPLE[number]


def _activation(config: Any, folder: Path) -> str:
    """timm's name. Raises ValueError where it has none, or for images of other channels than three."""
    if config.num_channels != 3:
        raise ValueError(f"{folder / 'config.json'}: num_channels: found {config.num_channels}; expected 3")
    check_choice(f"{folder / 'config.json'}: hidden_act", config.hidden_act, _ACTIVATIONS)
    return _ACTIVATIONS[config.hidden_act]
