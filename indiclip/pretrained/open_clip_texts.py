"""OpenCLIP's text towers as transformers' models."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from indiclip.names import check_choice
from indiclip.pooling import Projection
from indiclip.pretrained.open_clip_source import OpenClipSource
from indiclip.pretrained.open_clip_tokenizers import open_clip_tokenizer
from indiclip.pretrained.weights import Weights
from indiclip.text import TextTower, architecture_of, describe
from indiclip.tokenizers import Tokenizer

_NAMES = [
    (r"token_embedding", "embeddings.token_embedding"),
    (r"positional_embedding$", "embeddings.position_embedding.weight"),
    (r"ln_final", "final_layer_norm"),
    (r"transformer\.resblocks\.(\d+)\.ln_(\d)", r"encoder.layers.\1.layer_norm\2"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj", r"encoder.layers.\1.self_attn.out_proj"),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"encoder.layers.\1.self_attn.in_proj."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc", r"encoder.layers.\1.mlp.fc1"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj", r"encoder.layers.\1.mlp.fc2"),
    (r"transformer\.resblocks\.(\d+)\.ls_(\d)", r"encoder.layers.\1.ls_\2"),
]
_POOLS = {"first": "class", "last": "last", "argmax": "eos", "eos": "eos"}
_HF_POOLS = {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "class", "cls_pooler": "pooler"}
TEXT_FOLDER = "text"  # beside open_clip_config.json, for the configuration of a text tower that has only a name


def text_weights(source: OpenClipSource, tensors: dict[str, Tensor]) -> Weights:
    """The tower, its pooling and projection.

    Args:
        source: With a whole configuration.
        tensors: Of the tower, by OpenCLIP's names.

    Raises:
        FileNotFoundError: Its tokenizer or configuration is not to be found.
        ValueError: It does something that ours cannot.
    """
    config = source.model["text_cfg"]
    if config["hf_model_name"]:
        return _of_transformers(source, tensors)
    origin = f"{source.origin}: text_cfg"
    check_choice(f"{origin}.pool_type", config["pool_type"], _POOLS)
    check_choice(f"{origin}.proj_type", config["proj_type"], ("linear", "none"))
    tokenizer = open_clip_tokenizer(source, config["context_length"])
    _check_end(tokenizer, config, origin)
    # Without a causal mask the padding is read, too, and the last position is that of the longest text.
    pads = config["no_causal_mask"] or config["pool_type"] == "last"
    architecture = {
        "model_type": "siglip_text_model" if config["no_causal_mask"] else "clip_text_model",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["width"],
        "intermediate_size": int(config["width"] * config["mlp_ratio"]),
        "num_hidden_layers": config["layers"],
        "num_attention_heads": config["heads"],
        "max_position_embeddings": len(tensors.get("positional_embedding", ())) or config["context_length"],
        "hidden_act": activation(source, config)[1],
        "layer_norm_eps": norm_eps(config, origin),
        "bos_token_id": None,  # the defaults are ids of CLIP's vocabulary, about which transformers warns
        "eos_token_id": None if config["no_causal_mask"] else tokenizer.encode(["a"])[0][-1],
    }
    tower = TextTower(tokenizer, architecture, pad="context" if pads else "longest")
    kind = Projection("none") if config["proj_type"] == "none" else Projection(bias=config["proj_bias"])
    notes = ["layer scales of the text are part of its matrices"] if any(".ls_" in name for name in tensors) else []
    return Weights(
        source.origin,
        {"text": describe(tower), "text_pool": _POOLS[config["pool_type"]], "text_projection": asdict(kind)},
        transformer_tensors(tensors),
        notes=notes,
    )


def activation(source: OpenClipSource, config: dict[str, Any]) -> tuple[str, str]:
    """timm's name of a tower's activation, and transformers'."""
    kwargs = config["act_kwargs"] or {}
    if source.model["quick_gelu"] and not kwargs:
        return "quick_gelu", "quick_gelu"
    if kwargs not in ({}, {"approximate": "none"}, {"approximate": "tanh"}) or source.model["quick_gelu"]:
        raise ValueError(f"{source.origin}: act_kwargs: found {kwargs}; expected approximate: tanh, or none")
    return ("gelu_tanh", "gelu_pytorch_tanh") if kwargs.get("approximate") == "tanh" else ("gelu", "gelu")


def norm_eps(config: dict[str, Any], origin: str) -> float:
    """Of all the norms of a tower."""
    kwargs = config["norm_kwargs"] or {}
    if kwargs.keys() - {"eps"}:
        raise ValueError(f"{origin}.norm_kwargs: found {kwargs}; expected eps alone")
    return float(kwargs.get("eps", 1e-5))


def _check_end(tokenizer: Tokenizer, config: dict[str, Any], origin: str) -> None:
    """Raise ValueError where the token that is pooled is not the one that ends our texts."""
    if _POOLS[config["pool_type"]] != "eos":
        return
    expected = config["eos_id"] if config["pool_type"] == "eos" else tokenizer.vocab_size - 1
    found = tokenizer.encode(["a"])[0][-1]
    if found != expected:
        raise ValueError(
            f"{origin}.pool_type: {config['pool_type']} pools the token {expected}, and the tokenizer ends a text with "
            f"{found}"
        )


def transformer_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of OpenCLIP's or OpenAI's text tower by our names: those of transformers' CLIP and SigLIP, which agree."""
    moved = {}
    for name, tensor in _renamed(tensors).items():
        if name == "text_projection":  # a matrix without a module
            moved["text_projection.weight"] = tensor.T
        else:
            moved[name if name.startswith("text_projection.") else f"text.model.{name}"] = tensor
    return moved


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        for theirs, ours in _NAMES:
            name = re.sub(f"^{theirs}", ours, name)
        found[name] = tensor
    for name in [name for name in found if ".self_attn.in_proj." in name]:
        for part, tensor in zip("qkv", found.pop(name).chunk(3), strict=True):
            found[name.replace("in_proj", f"{part}_proj")] = tensor
    for name in [name for name in found if ".ls_" in name]:
        layer, number = name.removesuffix(".gamma").rsplit(".ls_", 1)
        scale, matrix = found.pop(name), "self_attn.out_proj" if number == "1" else "mlp.fc2"
        found[f"{layer}.{matrix}.weight"] = found[f"{layer}.{matrix}.weight"] * scale[:, None]
        found[f"{layer}.{matrix}.bias"] = found[f"{layer}.{matrix}.bias"] * scale
    return found


def _of_transformers(source: OpenClipSource, tensors: dict[str, Tensor]) -> Weights:
    """OpenCLIP's `HFTextEncoder`."""
    config, origin = source.model["text_cfg"], f"{source.origin}: text_cfg"
    theirs = _text_config(source, config["hf_model_name"])
    pooler = config["hf_pooler_type"] or ("cls_pooler" if theirs.model_type in ("bert", "m2m_100") else "mean_pooler")
    check_choice(f"{origin}.hf_pooler_type", pooler, _HF_POOLS)
    pool = _HF_POOLS[pooler]
    if pool == "pooler" and not any(name.startswith("transformer.pooler.") for name in tensors):
        pool = "class"
    tower = TextTower(open_clip_tokenizer(source, config["context_length"]), architecture_of(theirs))
    kind: Any = config["hf_proj_type"] or "none"
    embed_dim = source.model["embed_dim"]
    check_choice(f"{origin}.hf_proj_type", kind, ("linear", "mlp", "none"))
    projection = Projection(kind)
    if kind == "mlp":
        projection = Projection("mlp", hidden=(tower.width + embed_dim) // 2)
    return Weights(
        source.origin,
        {"text": describe(tower), "text_pool": pool, "text_projection": asdict(projection)},
        hf_tensors(tensors),
    )


def hf_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of OpenCLIP's `HFTextEncoder` by our names."""
    names = {"transformer.pooler.": "text_pool.", "transformer.": "text.model.", "proj.": "text_projection."}
    moved = {}
    for name, tensor in tensors.items():
        theirs = next((prefix for prefix in names if name.startswith(prefix)), "")
        moved[names.get(theirs, "") + name.removeprefix(theirs)] = tensor
    return moved


def _text_config(source: OpenClipSource, name: str) -> Any:
    """OpenCLIP's folders only name the text tower; its configuration lies beside them or in the hub's local cache."""
    beside = source.folder and source.folder / TEXT_FOLDER
    where = beside if beside and (beside / "config.json").is_file() else name
    try:
        return transformers.AutoConfig.from_pretrained(Path(where), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        put = f"save its config.json as {beside}/config.json" if beside else "bring the hub's cache here"
        raise FileNotFoundError(
            f"{source.origin}: its text tower is {name} of the hub, and not in the local cache; where there is a "
            f"network, run `hf download {name} config.json`, and {put}"
        ) from error
