"""To timm: the backbone under an architecture's name, its pooling, and a linear projection as the classifier.

The folder is of the kind that `timm.models.push_to_hf_hub` writes, so transformers' TimmWrapper opens it too.

Shape letters: see `indiclip.types`.
"""

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.naflexvit import NaFlexVitCfg
from torch import Tensor, nn

from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.export import target
from indiclip.export.fold import linear_projection
from indiclip.export.parity import own_grid
from indiclip.export.target import Loss, Reloaded, stretching_note
from indiclip.timm_backbone import TimmBackbone
from indiclip.types import Images

# Epsilon of the norms -> an architecture that has it, which no argument of timm's sets.
_BASES = {1e-6: "vit_base_patch16_siglip_224", 1e-5: "vit_base_patch16_clip_224"}
# What those architectures set otherwise than timm's NaFlexVitCfg; always written.
_ALWAYS = ("act_layer", "class_token", "pre_norm", "pos_embed_grid_size", "mlp_ratio")
_TRAINING = ("weight_init", "fix_init", "norm_eps")


class TimmModel(NamedTuple):
    """What timm builds and loads.

    Attributes:
        name: Of the architecture.
        args: Of `timm.create_model`.
        tensors: By timm's names.
        num_classes: Length of the embedding, where the projection travels as the classifier; else 0.
        notes: What does not travel.
    """

    name: str
    args: dict[str, Any]
    tensors: dict[str, Tensor]
    num_classes: int
    notes: list[str]


class Target(target.Target):
    """See the module."""

    library_name = "timm"
    bound = 1e-6
    libraries = ("timm", "transformers")
    usage = """\
import timm
model = timm.create_model("local-dir:{out}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
embedding = model(transform(image).unsqueeze(0))  # of a PIL image; not of unit length
maps = timm.create_model("local-dir:{out}", pretrained=True, features_only=True, out_indices=(-1,))"""

    def check(self, encoder: Encoder) -> list[Loss]:
        backbone = encoder.backbone
        if isinstance(backbone, TimmBackbone):
            if not backbone.is_last_stage:
                found = backbone.to_config()["feature_index"]
                return [
                    Loss(f"backbone.feature_index: found {found}; timm needs all stages, and those behind it are gone")
                ]
        elif not isinstance(backbone, NaFlexViT):
            return [Loss(f"backbone: found {type(backbone).__name__}; expected NaFlexViT or TimmBackbone")]
        try:
            describe(encoder)
        except (ValueError, TypeError, AssertionError) as error:  # timm raises all of them
            return [Loss(f"backbone: {error}")]
        return []

    def write(self, encoder: Encoder, folder: Path, place: Path) -> None:
        described = describe(encoder)
        write_config(described, encoder, folder)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in described.tensors.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    def reload(self, encoder: Encoder, folder: Path) -> Reloaded:
        theirs: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
        theirs.eval()
        backbone = encoder.backbone
        pools = pools_by_itself(encoder)

        def ours(images: Images) -> dict[str, Tensor]:
            features = encoder.features(images)
            tokens_BKD = features.tokens_BND
            if features.prefix_BKD is not None:
                tokens_BKD = torch.cat([features.prefix_BKD, tokens_BKD], 1)
            found = {"tokens": _valid(tokens_BKD, images)}
            if pools and encoder.image_pool.kind == "tower":
                found["pooled"] = backbone.pool(features)
            if pools:
                found["embedding"] = encoder.embed_features(features)
            return found

        def image(images: Images) -> dict[str, Tensor]:
            tokens, forward_head = _forward(theirs, backbone, images)
            if tokens.ndim == 4:  # a map
                channels_first = getattr(theirs, "output_fmt", "NCHW") == "NCHW"
                tokens = (tokens.permute(0, 2, 3, 1) if channels_first else tokens).flatten(1, 2)
            found = {"tokens": _valid(tokens, images)}
            if pools and encoder.image_pool.kind == "tower":
                found["pooled"] = forward_head(pre_logits=True)
            if pools and (theirs.num_classes or isinstance(encoder.image_projection, nn.Identity)):
                found["embedding"] = F.normalize(forward_head(), dim=-1)
            return found

        height, width = (side * backbone.patch_size for side in own_grid(encoder))
        return Reloaded(image, ours=ours, notes=[*describe(encoder).notes, stretching_note(height, width)])


def write_config(model: TimmModel, encoder: Encoder, folder: Path) -> None:
    """`config.json`, by which timm builds the model."""
    backbone = encoder.backbone
    H, W = own_grid(encoder)
    any_size = isinstance(backbone, NaFlexViT)
    own = timm.get_pretrained_cfg(model.name)
    pretrained = {
        "custom_load": False,
        "input_size": [3, H * backbone.patch_size, W * backbone.patch_size],
        "fixed_input_size": not any_size and bool(own and own.fixed_input_size),
        "interpolation": backbone.interpolation,
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "num_classes": model.num_classes,
    }
    pretrained["classifier"] = "head" if any_size else own.classifier if own else None
    pretrained["first_conv"] = "embeds.proj" if any_size else own.first_conv if own else None
    config = {
        "architecture": model.name,
        "num_classes": model.num_classes,
        "num_features": backbone.pooled_width,
        "pretrained_cfg": pretrained,
        "model_args": model.args,
    }
    folder.joinpath("config.json").write_text(json.dumps(config, indent=2) + "\n")


def describe(encoder: Encoder, classifier: bool = True) -> TimmModel:
    """The image side as a model of timm.

    Args:
        encoder: What `check` let pass.
        classifier: Whether a linear projection goes along.

    Raises:
        ValueError: timm has no such model.
    """
    backbone, pooling = encoder.backbone, encoder.image_pool.kind
    notes = []
    if isinstance(backbone, NaFlexViT):
        name, args = _naflex(backbone, pooling)
        tensors = dict(backbone.vit.state_dict())
    else:
        assert isinstance(backbone, TimmBackbone)
        config = backbone.to_config()
        name, args = config["name"].split(".")[0], dict(config["options"] or {})
        args |= {} if pooling == "tower" else {"global_pool": ""}
        tensors = dict(backbone.net.state_dict())
    projection = linear_projection(encoder.image_projection, backbone.pooled_width)
    if not pools_by_itself(encoder):
        notes.append(f"pool {pooling} and the projection are not in it: timm has no such pooling")
        projection = None
    elif projection is None:
        notes.append("the projection, an MLP, is not in it")
    num_classes = 0
    if classifier and projection is not None and not isinstance(encoder.image_projection, nn.Identity):
        num_classes = encoder.embed_dim
    with torch.device("meta"):
        empty: Any = timm.create_model(name, num_classes=num_classes, **args)
    if num_classes:
        assert projection is not None
        weight_ED, bias_E = projection
        head = next(path for path, module in empty.named_modules() if module is empty.get_classifier())
        tensors[f"{head}.weight"] = weight_ED.reshape(empty.state_dict()[f"{head}.weight"].shape)
        tensors[f"{head}.bias"] = torch.zeros(len(weight_ED)) if bias_E is None else bias_E
    _check_same(name, empty.state_dict(), tensors)
    if isinstance(backbone, NaFlexViT) and _eps(empty) != _eps(backbone.vit):
        raise ValueError(f"options.norm_eps: found {_eps(backbone.vit)}; timm's {name} has {_eps(empty)}")
    return TimmModel(name, args, tensors, num_classes, notes)


def _check_same(name: str, theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    """Raise ValueError unless the tensors have the same names and shapes."""
    for key in sorted(theirs.keys() ^ ours.keys()):
        raise ValueError(f"timm's {name} {'has' if key in theirs else 'lacks'} {key}, unlike the run's")
    for key, tensor in theirs.items():
        if tensor.shape != ours[key].shape:
            raise ValueError(f"timm's {name} has {key} of {tuple(tensor.shape)}; the run's is {tuple(ours[key].shape)}")


def pools_by_itself(encoder: Encoder) -> bool:
    """Whether timm pools as the encoder does."""
    any_size = isinstance(encoder.backbone, NaFlexViT)
    return encoder.image_pool.kind == "tower" or (encoder.image_pool.kind == "mean" and any_size)


def _naflex(backbone: NaFlexViT, pooling: str) -> tuple[str, dict[str, Any]]:
    """Architecture and arguments of a NaFlexViT that pools as the encoder does."""
    vit: Any = backbone.vit
    config = backbone.to_config()
    given = {key: value for key, value in config["options"].items() if key not in _TRAINING and value is not None}
    pool = {"tower": vit.global_pool, "mean": "avg"}.get(pooling, "")
    always = {"use_naflex": True, "global_pool": pool, "fc_norm": not isinstance(vit.fc_norm, nn.Identity)}
    if pooling == "mean":
        always["pool_include_prefix"] = False
    # Grid sampling, as in training, never smooths; timm does where it resamples the table for whole images.
    if vit.embeds.pos_embed_use_grid_sample:
        always |= {"pos_embed_antialias": False, "pos_embed_use_grid_sample": True}
    if config["name"] is not None:
        name = config["name"].split(".")[0]
        if name.startswith("naflexvit"):
            del always["use_naflex"]
        return name, given | always
    shape = {"embed_dim": vit.embed_dim, "depth": len(vit.blocks), "num_heads": vit.blocks[0].attn.num_heads}
    defaults = {field.name: field.default for field in fields(NaFlexVitCfg) if field.default is not MISSING}
    written = {key: defaults[key] for key in _ALWAYS} | {"act_layer": "gelu", "patch_size": backbone.patch_size}
    eps = _eps(vit)
    if eps not in _BASES:
        raise ValueError(f"options.norm_eps: found {eps}; timm has {' and '.join(map(str, _BASES))}")
    return _BASES[eps], written | shape | given | always


def _eps(vit: Any) -> float:
    return float(vit.blocks[0].norm1.eps)


def _forward(theirs: Any, backbone: NaFlexViT | TimmBackbone | Any, images: Images) -> tuple[Tensor, Any]:
    """Tokens, and what gives the head's output for them; images of one size go in as pixels, others as patches."""
    if len(set(images["sizes_hw"])) == 1:
        tokens = theirs.forward_features(as_pixels(backbone.normalise(images), images))
        return tokens, lambda **options: theirs.forward_head(tokens, **options)
    valid_BN = images["valid_BN"]
    out = theirs.forward_features(backbone.normalise(images), images["coords_BN2"], valid_BN)
    return out["patches"], lambda **options: theirs.forward_head(out["patches"], patch_valid=valid_BN, **options)


def as_pixels(patches_BNP: Tensor, images: Images) -> Tensor:
    """Patches of images of one size -> (B, 3, height, width)."""
    height, width = images["sizes_hw"][0]
    B, _, P = patches_BNP.shape
    p = round((P // 3) ** 0.5)
    cells = patches_BNP.reshape(B, height // p, width // p, p, p, 3)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(B, 3, height, width)


def _valid(tokens_BKD: Tensor, images: Images) -> Tensor:
    """Tokens that are no padding, one below the other."""
    num_prefix = tokens_BKD.shape[1] - images["valid_BN"].shape[1]
    if len(set(images["sizes_hw"])) == 1:
        return tokens_BKD.flatten(0, 1)
    valid_BN = F.pad(images["valid_BN"], (num_prefix, 0), value=True)
    return tokens_BKD[valid_BN]
