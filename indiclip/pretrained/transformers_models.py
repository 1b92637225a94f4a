"""Dual encoders and text towers of transformers: folders with `config.json` and safetensors."""

from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from indiclip.names import did_you_mean
from indiclip.pooling import Projection
from indiclip.pretrained.hub import HUB, hub_folder
from indiclip.pretrained.model_names import read_config
from indiclip.pretrained.transformers_files import read_tokenizer, read_transformers_tensors
from indiclip.pretrained.transformers_images import IMAGE_TYPES, read_image_model, vision_tower
from indiclip.pretrained.transformers_texts import read_text_model
from indiclip.pretrained.weights import Weights
from indiclip.text import TextTower, architecture_of, describe

MODEL_TYPES = ("clip", "siglip", "siglip2", "metaclip_2")

_PROJECTIONS = {"visual_projection": "image_projection", "text_projection": "text_projection"}
_KNOWN = ("vision_model.", "text_model.", "logit_", "visual_projection.", "text_projection.")


def read_transformers(what: str) -> Weights:
    """A folder or `hf-hub:OWNER/NAME` of a dual encoder, a text or an image model alone.

    Raises:
        FileNotFoundError: It lacks a file, or there is no network where one is asked for.
        ValueError: It is of a kind that this version of transformers does not know, or that is none of the three.
    """
    folder, origin = Path(what), what
    if what.startswith(HUB):
        origin = f"transformers:{what}"
        folder = hub_folder(what.removeprefix(HUB), origin)
    file = folder / "config.json"
    said = read_config(file)
    kind = said.get("model_type")
    if kind in MODEL_TYPES:
        return _dual(folder, origin)
    if kind in IMAGE_TYPES:
        return read_image_model(folder, origin)
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        near = did_you_mean(str(kind), transformers.CONFIG_MAPPING)
        written = f" (the folder was written by {version})" if (version := said.get("transformers_version")) else ""
        raise ValueError(f"{file}: model_type: transformers {transformers.__version__} has no {kind!r}{near}{written}")
    if "vocab_size" not in signature(transformers.CONFIG_MAPPING[kind]).parameters:
        known = ", ".join((*MODEL_TYPES, *IMAGE_TYPES))
        raise ValueError(f"{file}: model_type: found {kind!r}; expected one of {known}, or a text model alone")
    return read_text_model(folder, origin)


def _dual(folder: Path, what: str) -> Weights:
    """CLIP, MetaCLIP 2, SigLIP or SigLIP 2."""
    config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    tensors = read_transformers_tensors(folder)
    is_siglip = config.model_type in ("siglip", "siglip2")
    backbone, image = vision_tower(config.vision_config, _inside(tensors, "vision_model."), folder)
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


def _text_tower(
    config: Any, tensors: dict[str, Tensor], folder: Path, pads: bool
) -> tuple[TextTower, dict[str, Tensor]]:
    tokenizer = read_tokenizer(folder, config.max_position_embeddings)
    return TextTower(tokenizer, architecture_of(config), pad="context" if pads else "longest"), tensors
