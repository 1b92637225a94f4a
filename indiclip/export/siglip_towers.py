"""Towers of SigLIP's kind by transformers' names: what does not fit, and tensors and configurations of what does."""

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.export.fold import linear_projection
from indiclip.export.renaming import renamed
from indiclip.export.target import Loss
from indiclip.pretrained.weights import check_tensors

CONTEXT = 64  # tokens to which transformers' zero-shot pipeline and SigLIP 2's processor pad a text
ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "GELUTanhApprox": "gelu_pytorch_tanh"}
ACTIVATIONS |= {"QuickGELU": "quick_gelu"}

# timm's name of a tensor -> transformers'. What none of them matches has no place in SigLIP.
_VISION = [
    (r"embeds\.proj", "embeddings.patch_embedding"),
    (r"embeds\.pos_embed", "embeddings.position_embedding.weight"),
    (r"norm\.", "post_layernorm."),
    (r"blocks\.(\d+)\.norm([12])", r"encoder.layers.\1.layer_norm\2"),
    (r"blocks\.(\d+)\.attn\.proj", r"encoder.layers.\1.self_attn.out_proj"),
    (r"blocks\.(\d+)\.attn\.qkv", r"encoder.layers.\1.self_attn.qkv"),
    (r"blocks\.(\d+)\.mlp\.fc", r"encoder.layers.\1.mlp.fc"),
    (r"attn_pool\.latent", "head.probe"),
    (r"attn_pool\.proj", "head.attention.out_proj"),
    (r"attn_pool\.norm", "head.layernorm"),
    (r"attn_pool\.mlp", "head.mlp"),
    (r"attn_pool\.(q|kv)\.", r"head.attention.\1."),
]


def vision_losses(encoder: Encoder) -> list[Loss]:
    """Why the image side is no tower of SigLIP's kind."""
    backbone = encoder.backbone
    if not isinstance(backbone, NaFlexViT):
        return [Loss(f"backbone: found {type(backbone).__name__}; SigLIP has a plain ViT (NaFlexViT)")]
    vit: Any = backbone.vit
    losses = []
    if encoder.image_pool.kind != "tower" or vit.global_pool != "map":
        kind = vit.global_pool if encoder.image_pool.kind == "tower" else encoder.image_pool.kind
        losses.append(
            Loss(f"pool: found {kind!r}; SigLIP pools by attention of its own (pool: tower, options.global_pool: map)")
        )
    if not isinstance(encoder.image_projection, nn.Identity):
        losses.append(
            Loss("image_projection: found one (batch norm becomes one, too); SigLIP has none (image_projection: none)")
        )
    table = vit.embeds.pos_embed
    if table is None or table.shape[1] != table.shape[2]:
        losses.append(Loss("backbone.options.pos_embed: SigLIP learns positions on a square grid"))
    if vit.rope is not None:
        losses.append(Loss("backbone.options.rope_type: SigLIP has no rotary positions"))
    names = _vision_names(vit)
    unplaced = [name for name in names if name not in renamed(names, _VISION)]
    if unplaced:
        losses.append(Loss(f"backbone: SigLIP has no place for {', '.join(unplaced[:3])}"))
    return losses or _block_losses(vit)


def _block_losses(vit: Any) -> list[Loss]:
    """What tensors do not show: heads, widths, activations and epsilons are one for all blocks and the pool."""
    losses = []
    pool, first = vit.attn_pool, vit.blocks[0]
    parts = [*vit.blocks, pool]
    for what, found in {
        "heads": {part.num_heads for part in [*(block.attn for block in vit.blocks), pool]},
        "width of the MLP": {part.mlp.fc1.out_features for part in parts},
        "activation": {activation(part.mlp.act) for part in parts},
        "epsilon": {norm.eps for norm in [*(block.norm1 for block in vit.blocks), vit.norm, pool.norm]},
    }.items():
        if len(found) > 1:
            losses.append(
                Loss(f"backbone: {what}: found {sorted(map(str, found))}; SigLIP has one for blocks and pool")
            )
    if type(first).__name__ != "Block" or activation(first.mlp.act) is None:
        losses.append(Loss(f"backbone: SigLIP has no {type(first).__name__} with {type(first.mlp.act).__name__}"))
    return losses


def text_losses(encoder: Encoder) -> list[Loss]:
    """Why the text side is none of SigLIP's."""
    text, losses = encoder.text, []
    kind = text.model.config.model_type
    if kind not in ("siglip_text_model", "siglip2_text_model"):
        return [Loss(f"text.architecture.model_type: found {kind!r}; expected siglip_text_model")]
    if text.pad != "context":
        losses.append(Loss("text.pad: found 'longest'; SigLIP reads padding as it reads words (pad: context)"))
    if encoder.text_pool.kind != "last":
        losses.append(Loss(f"text_pool: found {encoder.text_pool.kind!r}; SigLIP takes the last position"))
    if linear_projection(encoder.text_projection, text.width) is None:
        losses.append(Loss("text_projection: found an mlp; SigLIP has one matrix"))
    if encoder.embed_dim != encoder.backbone.pooled_width and isinstance(encoder.image_projection, nn.Identity):
        losses.append(
            Loss(f"embed_dim: found {encoder.embed_dim}; expected the tower's {encoder.backbone.pooled_width}")
        )
    context = text.tokenizer.context_length
    if context != CONTEXT:
        losses.append(
            Loss(
                f"text.tokenizer.context_length: found {context}; the zero-shot pipeline pads texts to {CONTEXT}", True
            )
        )
    return losses


def activation(module: nn.Module) -> str | None:
    """transformers' name of an activation; None for one that it has not."""
    name = ACTIVATIONS.get(type(module).__name__)
    return "gelu_pytorch_tanh" if getattr(module, "approximate", "none") == "tanh" else name


def vision_config(encoder: Encoder) -> dict[str, Any]:
    """Fields that SigLIP and SigLIP 2 share."""
    vit: Any = cast(NaFlexViT, encoder.backbone).vit
    return {
        "hidden_size": vit.embed_dim,
        "intermediate_size": vit.blocks[0].mlp.fc1.out_features,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": vit.blocks[0].attn.num_heads,
        "patch_size": encoder.backbone.patch_size,
        "hidden_act": activation(vit.blocks[0].mlp.act),
        "layer_norm_eps": vit.norm.eps,
    }


def text_config(encoder: Encoder) -> dict[str, Any]:
    """The text tower's own, with as many positions as texts have tokens."""
    config: dict[str, Any] = encoder.text.model.config.to_diff_dict()
    for name in ("transformers_version", "architectures", "model_type", "dtype"):
        config.pop(name, None)
    tokenizer = encoder.text.tokenizer
    special = {f"{name}_token_id": None for name in ("bos", "eos")} | {"pad_token_id": tokenizer.pad_id}
    lengths = {"max_position_embeddings": tokenizer.context_length, "projection_size": encoder.embed_dim}
    return config | special | lengths


def write_model(encoder: Encoder, folder: Path, config: Any, processor: Any, conv: bool) -> None:
    """Configuration, processor and weights.

    Args:
        encoder: What is exported.
        folder: Where to.
        config: transformers' configuration of the whole model.
        processor: Its processor.
        conv: Whether the patch embedding is a convolution, as in SigLIP, and no matrix, as in SigLIP 2.
    """
    config.architectures = [type(config).__name__.replace("Config", "Model")]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    tensors = {f"vision_model.{name}": tensor for name, tensor in _vision_tensors(encoder, conv).items()}
    tensors |= {f"text_model.{name}": tensor for name, tensor in _text_tensors(encoder).items()}
    for name, initial in {"logit_scale": 0.0, "logit_bias": 0.0}.items():
        tensors[name] = torch.tensor([encoder.initial_logits.get(name, initial)])
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(check_tensors(whole, str(folder)), folder / "model.safetensors", {"format": "pt"})


def logit_notes(encoder: Encoder) -> list[str]:
    """What to know of the probabilities that the other library gives."""
    if "logit_bias" in encoder.initial_logits:
        return []
    return ["the run's loss has no bias: rank by the logits, its sigmoid is no probability"]


def _vision_names(vit: Any) -> list[str]:
    return [name for name in vit.state_dict() if not name.startswith(("head.", "fc_norm."))]


def _vision_tensors(encoder: Encoder, conv: bool) -> dict[str, Tensor]:
    vit: Any = cast(NaFlexViT, encoder.backbone).vit
    own, p = vit.state_dict(), encoder.backbone.patch_size
    found = {theirs: own[ours] for ours, theirs in renamed(_vision_names(vit), _VISION).items()}
    found["embeddings.position_embedding.weight"] = own["embeds.pos_embed"].flatten(0, 2)
    if conv:
        kernel = own["embeds.proj.weight"].reshape(-1, p, p, 3)
        found["embeddings.patch_embedding.weight"] = kernel.permute(0, 3, 1, 2)
    for name in [name for name in found if ".self_attn.qkv." in name]:
        for part, tensor in zip("qkv", found.pop(name).chunk(3), strict=True):
            found[name.replace("qkv", f"{part}_proj")] = tensor
    for kind in ("weight", "bias"):
        pair = [found.pop(f"head.attention.{part}.{kind}") for part in ("q", "kv")]
        found[f"head.attention.in_proj_{kind}"] = torch.cat(pair)
    return found


def _text_tensors(encoder: Encoder) -> dict[str, Tensor]:
    found = {name: tensor for name, tensor in encoder.text.model.state_dict().items() if not name.startswith("head.")}
    table = "embeddings.position_embedding.weight"
    found[table] = found[table][: encoder.text.tokenizer.context_length]
    projection = linear_projection(encoder.text_projection, encoder.text.width)
    assert projection is not None
    found["head.weight"], bias_E = projection
    found["head.bias"] = torch.zeros(encoder.embed_dim) if bias_E is None else bias_E
    return found


def text_embedder(model: Any, tokenizer: Any) -> Any:
    """Strings -> unit-length embeddings by transformers' own tokenizer and tower."""

    def embed(texts: list[str]) -> Tensor:
        length = model.config.text_config.max_position_embeddings
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return F.normalize(model.get_text_features(input_ids=tokens["input_ids"]).pooler_output, dim=-1)

    return embed
