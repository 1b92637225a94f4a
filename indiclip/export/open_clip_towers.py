"""Towers by OpenCLIP's names: its own ViT of CLIP's shape, and its TextTransformer of CLIP's or SigLIP's."""

from typing import Any

import torch
from torch import Tensor, nn

from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.export.fold import linear_projection
from indiclip.export.renaming import renamed
from indiclip.export.siglip_towers import activation
from indiclip.export.target import Loss

_BLOCKS = r"transformer.resblocks.\1."
_VISION = [
    (r"embeds\.proj\.weight", "conv1.weight"),
    (r"embeds\.pos_embed", "positional_embedding"),
    (r"embeds\.cls_token", "class_embedding"),
    (r"norm_pre\.", "ln_pre."),
    (r"norm\.", "ln_post."),
    (r"blocks\.(\d+)\.norm([12])", rf"{_BLOCKS}ln_\2"),
    (r"blocks\.(\d+)\.attn\.qkv\.", f"{_BLOCKS}attn.in_proj_"),
    (r"blocks\.(\d+)\.attn\.proj", f"{_BLOCKS}attn.out_proj"),
    (r"blocks\.(\d+)\.mlp\.fc1", f"{_BLOCKS}mlp.c_fc"),
    (r"blocks\.(\d+)\.mlp\.fc2", f"{_BLOCKS}mlp.c_proj"),
]
_TEXT = [
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"final_layer_norm", "ln_final"),
    (r"encoder\.layers\.(\d+)\.layer_norm([12])", rf"{_BLOCKS}ln_\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj", f"{_BLOCKS}attn.out_proj"),
    (r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.", rf"{_BLOCKS}attn.\2_proj_"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1", f"{_BLOCKS}mlp.c_fc"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2", f"{_BLOCKS}mlp.c_proj"),
]
# Text towers of transformers that it has -> where it takes their vector from.
_POOLS = {"clip_text_model": "eos", "metaclip_2_text_model": "eos"}
_POOLS |= {"siglip_text_model": "last", "siglip2_text_model": "last"}


def is_clip_vision(encoder: Encoder) -> bool:
    """Whether OpenCLIP's own ViT is the image side: a class token, a norm before the blocks, one matrix behind."""
    backbone = encoder.backbone
    if not isinstance(backbone, NaFlexViT) or encoder.image_pool.kind != "tower":
        return False
    vit: Any = backbone.vit
    names = vit.state_dict()
    block_kinds = {type(block).__name__ for block in vit.blocks}
    norms = [vit.norm_pre, vit.norm, *(norm for block in vit.blocks for norm in (block.norm1, block.norm2))]
    projection = linear_projection(encoder.image_projection, backbone.width)
    return (
        vit.global_pool == "token"
        and {"embeds.cls_token", "embeds.pos_embed", "norm_pre.weight", "norm.weight"} <= names.keys()
        and len(renamed(names, _VISION)) == len(names)
        and vit.rope is None
        and block_kinds == {"Block"}
        and len({norm.eps for norm in norms}) == 1
        and projection is not None
        and projection[1] is None
        and _vision_activation(vit) is not None
        and _is_quick(_vision_activation(vit)) == _is_quick(encoder.text.model.config.to_dict().get("hidden_act"))
    )


def vision_tower(encoder: Encoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`vision_cfg` without the image's size, and the tensors."""
    assert isinstance(encoder.backbone, NaFlexViT)
    vit: Any = encoder.backbone.vit
    own, p = vit.state_dict(), encoder.backbone.patch_size
    found = {theirs: own[ours] for ours, theirs in renamed(own, _VISION).items()}
    found["conv1.weight"] = found["conv1.weight"].reshape(-1, p, p, 3).permute(0, 3, 1, 2)
    found["class_embedding"] = found["class_embedding"].flatten()  # has its position already
    table_ND = found["positional_embedding"].flatten(0, 2)
    found["positional_embedding"] = torch.cat([torch.zeros_like(table_ND[:1]), table_ND])
    projection = linear_projection(encoder.image_projection, encoder.backbone.width)
    assert projection is not None
    found["proj"] = projection[0].T
    block = vit.blocks[0]
    config = {
        "layers": len(vit.blocks),
        "width": vit.embed_dim,
        "head_width": vit.embed_dim // block.attn.num_heads,
        "mlp_ratio": _mlp_ratio(block.mlp.fc1.out_features, vit.embed_dim),
        "patch_size": p,
        "norm_kwargs": {"eps": vit.norm.eps},
    }
    return config | _activation_arguments(_vision_activation(vit)), found


def text_losses(encoder: Encoder) -> list[Loss]:
    """Why the text side is none of OpenCLIP's."""
    text, losses = encoder.text, []
    config = text.model.config
    if config.model_type not in _POOLS:
        return [
            Loss(
                f"text.architecture.model_type: found {config.model_type!r}, which OpenCLIP seeks on the hub, not in "
                f"the folder; expected {' or '.join(_POOLS)}"
            )
        ]
    expected = _POOLS[config.model_type]
    if encoder.text_pool.kind != expected:
        losses.append(Loss(f"text_pool: found {encoder.text_pool.kind!r}; OpenCLIP takes {expected!r} of such a tower"))
    if expected == "last" and text.pad != "context":
        losses.append(Loss("text.pad: found 'longest'; OpenCLIP reads padding as it reads words (pad: context)"))
    if _end_id(encoder) is None and expected == "eos":
        losses.append(Loss("text.tokenizer: texts end in different tokens; OpenCLIP looks for one end token"))
    if linear_projection(encoder.text_projection, text.width) is None:
        losses.append(Loss("text_projection: found an mlp; OpenCLIP has one matrix"))
    if config.hidden_act not in ("gelu", "quick_gelu", "gelu_pytorch_tanh"):
        losses.append(Loss(f"text.architecture.hidden_act: OpenCLIP has no {config.hidden_act!r}"))
    return losses


def text_tower(encoder: Encoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`text_cfg` with `quick_gelu`, which is of the whole model, and the tensors."""
    text, config = encoder.text, encoder.text.model.config
    own, context = text.model.state_dict(), text.tokenizer.context_length
    found = {theirs: own[ours] for ours, theirs in renamed(own, _TEXT).items()}
    found["positional_embedding"] = found["positional_embedding"][:context]
    for name in [name for name in found if ".attn.q_proj_" in name]:
        three = [found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        found[name.replace("q_proj", "in_proj")] = torch.cat(three)
    projection = linear_projection(encoder.text_projection, text.width)
    assert projection is not None
    weight_ED, bias_E = projection
    kind = "none" if isinstance(encoder.text_projection, nn.Identity) else "linear"
    if bias_E is not None:
        found |= {"text_projection.weight": weight_ED, "text_projection.bias": bias_E}
    elif kind == "linear":
        found["text_projection"] = weight_ED.T
    cfg = {
        "context_length": context,
        "vocab_size": config.vocab_size,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "layers": config.num_hidden_layers,
        "mlp_ratio": _mlp_ratio(config.intermediate_size, config.hidden_size),
        "pool_type": _POOLS[config.model_type],
        "no_causal_mask": _POOLS[config.model_type] == "last",
        "pad_id": text.tokenizer.pad_id,
        "eos_id": _end_id(encoder),
        "proj_type": kind,
        "proj_bias": bias_E is not None,
        "norm_kwargs": {"eps": config.layer_norm_eps},
        "quick_gelu": _is_quick(config.hidden_act),
    }
    return cfg | _activation_arguments(config.hidden_act), found


def _end_id(encoder: Encoder) -> int | None:
    ends = {row[-1] for row in encoder.text.tokenizer.encode(["a", "1 2", "पतंग"]) if row}
    return ends.pop() if len(ends) == 1 else None


def _vision_activation(vit: Any) -> str | None:
    found = {activation(block.mlp.act) for block in vit.blocks}
    return found.pop() if len(found) == 1 else None


def _activation_arguments(name: str | None) -> dict[str, Any]:
    return {"act_kwargs": {"approximate": "tanh"}} if name == "gelu_pytorch_tanh" else {}


def _is_quick(name: object) -> bool:
    return name == "quick_gelu"


def _mlp_ratio(hidden: int, width: int) -> float:
    return (hidden + 0.5) / width  # OpenCLIP rounds down
