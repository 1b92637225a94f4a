"""Dual encoders and text towers of transformers: folders with `config.json` and safetensors."""

import re
from dataclasses import asdict
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import normalizers
from torch import Tensor

from indiclip.backbone import NaFlexViT
from indiclip.names import check_choice
from indiclip.pooling import Projection
from indiclip.preprocessing import Interpolation
from indiclip.pretrained.model_names import read_config
from indiclip.pretrained.weights import Weights, read_tensors
from indiclip.text import FastTokenizer, SiglipTokenizer, TextTower, Tokenizer, describe

MODEL_TYPES = ("clip", "siglip", "siglip2", "metaclip_2")

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
_PROJECTIONS = {"visual_projection": "image_projection", "text_projection": "text_projection"}
_KNOWN = ("vision_model.", "text_model.", "logit_", "visual_projection.", "text_projection.")
_RESAMPLE: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def read_transformers(what: str) -> Weights:
    """A folder of CLIP, MetaCLIP 2, SigLIP or SigLIP 2; see `indiclip.pretrained.read.read_weights`."""
    folder = Path(what)
    kind = read_config(folder / "config.json").get("model_type")
    check_choice(f"{folder / 'config.json'}: model_type", kind, MODEL_TYPES)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    tensors = read_tensors(folder / "model.safetensors")
    is_siglip = kind in ("siglip", "siglip2")
    backbone, image = _vision_tower(config.vision_config, _inside(tensors, "vision_model."), folder)
    text, words = _text_tower(config.text_config, _inside(tensors, "text_model."), folder, pads=is_siglip)
    moved = {f"backbone.vit.{name}": tensor for name, tensor in image.items()}
    moved |= {f"text.model.{name}": tensor for name, tensor in words.items() if not name.startswith("head.")}
    projections = {"text_model.head": "text_projection"} if is_siglip else _PROJECTIONS
    for theirs, ours in projections.items():
        moved |= {f"{ours}.{name}": tensor for name, tensor in _inside(tensors, f"{theirs}.").items()}
    moved |= {name: tensors[name] for name in ("logit_scale", "logit_bias") if name in tensors}
    embed_dim = config.text_config.projection_size if is_siglip else config.projection_dim
    return Weights(
        what,
        {
            "backbone": describe(backbone),
            "text": describe(text),
            "pool": "tower",
            "text_pool": "last" if is_siglip else "eos",
            "embed_dim": embed_dim,
            "lengths": [embed_dim],
            "batch_norm": False,
            "image_projection": asdict(Projection("none" if is_siglip else "linear")),
            "text_projection": asdict(Projection(bias=is_siglip)),
        },
        moved,
        unused=[name for name in tensors if not name.startswith(_KNOWN)],
    )


def _inside(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _vision_tower(config: Any, tensors: dict[str, Tensor], folder: Path) -> tuple[NaFlexViT, dict[str, Tensor]]:
    """A vision tower of CLIP's or SigLIP's kind as timm's, and its tensors by timm's names."""
    is_clip = "embeddings.class_embedding" in tensors
    patch_size = config.patch_size
    table = tensors["embeddings.position_embedding.weight"]
    side = isqrt(len(table) - is_clip)
    reader: Any = transformers.AutoImageProcessor
    images = reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    backbone = NaFlexViT(
        width=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        patch_size=patch_size,
        mean=images.image_mean,
        std=images.image_std,
        interpolation=_RESAMPLE[int(images.resample)],
        options={
            "mlp_ratio": (config.intermediate_size + 0.5) / config.hidden_size,  # timm rounds down
            "norm_eps": config.layer_norm_eps,
            "act_layer": _ACTIVATIONS[config.hidden_act],
            "class_token": is_clip,
            "pre_norm": is_clip,
            "global_pool": "token" if is_clip else "map",
            "pos_embed_grid_size": [side, side],
            "pos_embed_interp_mode": "bicubic" if config.model_type != "siglip2_vision_model" else "bilinear",
            "pos_embed_use_grid_sample": False,
        },
    )
    found = {}
    for name, tensor in tensors.items():
        for theirs, ours in _VISION:
            name = re.sub(f"^{theirs}", ours, name)
        found[name] = tensor
    if is_clip:  # timm's class token has its position already
        found["embeds.cls_token"] = (found["embeds.cls_token"] + table[0]).reshape(1, 1, -1)
        table = table[1:]
    found["embeds.pos_embed"] = table.reshape(1, side, side, -1)
    kernel = found["embeds.proj.weight"]
    found["embeds.proj.weight"] = kernel.permute(0, 2, 3, 1).flatten(1) if kernel.ndim == 4 else kernel
    for block in [name.removesuffix("attn.q_proj.weight") for name in found if name.endswith("attn.q_proj.weight")]:
        for kind in ("weight", "bias"):
            three = [found.pop(f"{block}attn.{part}_proj.{kind}") for part in "qkv"]
            found[f"{block}attn.qkv.{kind}"] = torch.cat(three)
    if not is_clip:
        for kind in ("weight", "bias"):
            joined = found.pop(f"attn_pool.in_proj_{kind}")
            found[f"attn_pool.q.{kind}"], found[f"attn_pool.kv.{kind}"] = joined.tensor_split([len(joined) // 3])
    return backbone, found


def _text_tower(
    config: Any, tensors: dict[str, Tensor], folder: Path, pads: bool
) -> tuple[TextTower, dict[str, Tensor]]:
    tokenizer = read_tokenizer(folder, config.max_position_embeddings)
    architecture = config.to_diff_dict() | {"model_type": config.model_type}
    return TextTower(tokenizer, architecture, pad="context" if pads else "longest"), tensors


def read_tokenizer(folder: Path, context_length: int) -> Tokenizer:
    """The tokenizer of a folder of transformers, cut to a number of tokens."""
    found: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if found.padding_side != "right":
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: padding_side: found {found.padding_side!r}, expected 'right'"
        )
    if isinstance(found, transformers.SiglipTokenizer):
        return SiglipTokenizer(found.vocab_file, context_length)
    rust = RustTokenizer.from_str(found.backend_tokenizer.to_str())
    if type(found).__name__.startswith("Gemma"):
        # SigLIP 2 was trained on lower-case text. Its folders of one size name Gemma's tokenizer, which keeps capitals.
        rust.normalizer = normalizers.Sequence(
            [normalizers.Lowercase(), *([rust.normalizer] if rust.normalizer else [])]
        )
    return FastTokenizer(context_length=context_length, serialized=rust.to_str(), pad_token=found.pad_token)
