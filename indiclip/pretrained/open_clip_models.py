"""Dual encoders of OpenCLIP: folders, and its architectures with a file of weights."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from indiclip.names import did_you_mean
from indiclip.pretrained.open_clip_images import image_weights
from indiclip.pretrained.open_clip_source import OpenClipSource, find_open_clip
from indiclip.pretrained.open_clip_texts import text_weights
from indiclip.pretrained.weights import Weights, read_tensors, state_dict

# Key of its configurations -> the value that means nothing special; the keys of its three dataclasses.
_MODEL: dict[str, Any] = {
    "embed_dim": None,
    "vision_cfg": {},
    "text_cfg": {},
    "quick_gelu": False,
    "custom_text": False,
}
_MODEL |= {"init_logit_scale": None, "init_logit_bias": None, "nonscalar_logit_scale": False, "multimodal_cfg": None}
_BLOCK: dict[str, Any] = {
    "ls_init_value": None,
    "act_kwargs": None,
    "norm_kwargs": None,
    "block_type": None,
    "qk_norm": False,
}
_BLOCK |= {"scaled_cosine_attn": False, "scale_heads": False, "scale_attn_inner": False, "scale_attn": False}
_BLOCK |= {"scale_fc": False, "mlp_ratio": 4.0, "output_tokens": False, "final_ln_after_pool": False}
VISION: dict[str, Any] = _BLOCK | {"layers": 12, "width": 768, "head_width": 64, "patch_size": 16, "image_size": 224}
VISION |= {"patch_dropout": 0.0, "attentional_pool": False, "attn_pooler_queries": 256, "attn_pooler_heads": 8}
VISION |= {"no_ln_pre": False, "pos_embed_type": "learnable", "pool_type": "tok", "timm_model_name": None}
VISION |= {"timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear", "timm_proj_bias": False}
VISION |= {"timm_drop": 0.0, "timm_drop_path": None}
TEXT: dict[str, Any] = _BLOCK | {"layers": 12, "width": 512, "heads": 8, "context_length": 77, "vocab_size": 49408}
TEXT |= {"hf_tokenizer_name": None, "tokenizer_mode": None, "tokenizer_kwargs": None, "embed_cls": False, "pad_id": 0}
TEXT |= {"eos_id": 2, "no_causal_mask": False, "pool_type": "argmax", "proj_bias": False, "proj_type": "linear"}
TEXT |= {"hf_model_name": None, "hf_model_pretrained": True, "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"}
# What no tower of ours computes.
_REFUSED: tuple[str, ...] = (
    "multimodal_cfg",
    "attentional_pool",
    "embed_cls",
    "block_type",
    "qk_norm",
    "scaled_cosine_attn",
)
_REFUSED += ("scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
_OF_OPENAI = ("input_resolution", "context_length", "vocab_size")
_LOGITS = ("logit_scale", "logit_bias")
_COUNTERS = ("attn_mask", "transformer.embeddings.position_ids", *_OF_OPENAI)


def read_open_clip(what: str) -> Weights:
    """A model as `find_open_clip` finds it; see `indiclip.pretrained.read.read_weights`."""
    source = find_open_clip(what)
    model = checked(source.model, _MODEL, source.origin)
    source = source._replace(
        model=model
        | {
            "vision_cfg": checked(model["vision_cfg"], VISION, f"{source.origin}: vision_cfg"),
            "text_cfg": checked(model["text_cfg"], TEXT, f"{source.origin}: text_cfg"),
        }
    )
    tensors = state_dict(read_tensors(source.file))
    if all(name in tensors for name in _OF_OPENAI) and not model["quick_gelu"]:
        raise ValueError(f"{source.origin}: OpenAI's weights need quick_gelu; expected an architecture ...-quickgelu")
    return open_clip_weights(source, tensors)


def checked(config: Mapping[str, Any], known: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A configuration with what it leaves out. Raises ValueError for a key that is unknown or that we cannot follow."""
    for key, value in config.items():
        if key not in known:
            near = did_you_mean(key, known)
            raise ValueError(f"{where}.{key}: found {value!r}, which no OpenCLIP until 3.3 has{near}")
        if key in _REFUSED and value != known[key] and value != "default":
            raise ValueError(f"{where}.{key}: found {value!r}; no tower of ours computes that, expected {known[key]!r}")
    return {**known, **config}


def open_clip_weights(source: OpenClipSource, tensors: dict[str, Tensor]) -> Weights:
    """An OpenCLIP model's tensors as an encoder's.

    Args:
        source: With a whole configuration.
        tensors: By OpenCLIP's names.
    """
    ignored = [name for name in tensors if name.removeprefix("text.") in _COUNTERS]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    image = image_weights(source, inside(tensors, "visual."))
    own = ("visual.", "text.", *_LOGITS)
    is_custom = any(name.startswith("text.") for name in tensors)
    words = inside(tensors, "text.") if is_custom else {n: t for n, t in tensors.items() if not n.startswith(own)}
    text = text_weights(source, words)
    outside = [name for name in tensors if is_custom and not name.startswith(own)]
    embed_dim = source.model["embed_dim"]
    return Weights(
        source.origin,
        image.config | text.config | {"embed_dim": embed_dim, "lengths": [embed_dim], "batch_norm": False},
        image.tensors | text.tensors | {name: tensors[name] for name in _LOGITS if name in tensors},
        unused=[*image.unused, *text.unused, *outside],
        ignored=[*image.ignored, *text.ignored, *ignored],
        notes=[*source.notes, *image.notes, *text.notes],
    )


def inside(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those below a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
