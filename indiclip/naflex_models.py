"""timm's NaFlexVit, from scratch or by the name of a model."""

from dataclasses import fields
from typing import Any, cast

import timm
from timm.models import is_model_in_modules
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

from indiclip.names import check_choice, check_range, did_you_mean
from indiclip.timm_errors import check_timm_name, making

# (width, depth, heads) of the sizes in the ViT, DeiT and "Getting ViT in Shape" (SoViT) papers.
SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "so400m": (1152, 27, 16),
    "huge": (1280, 32, 16),
}


def new_naflex(
    size: str | None,
    width: int | None,
    depth: int | None,
    num_heads: int | None,
    patch_size: int,
    options: dict[str, Any],
) -> NaFlexVit:
    """A NaFlexVit from scratch, without a classifier; arguments as of `indiclip.backbone.NaFlexViT`.

    Raises:
        ValueError: A size or an option that is not there, or widths that do not go together.
    """
    if size is not None:
        check_choice("model.encoder.backbone.size", size, SIZES)
    of_size = SIZES[size] if size else (None, None, None)
    width, depth, num_heads = width or of_size[0], depth or of_size[1], num_heads or of_size[2]
    if not (width and depth and num_heads):
        raise ValueError("model.encoder.backbone: give `size`, `name`, or all of `width`, `depth` and `num_heads`")
    check_range({"model.encoder.backbone.patch_size": patch_size}, 1)
    if width % num_heads:
        raise ValueError(f"model.encoder.backbone.num_heads: {num_heads} does not divide the width {width}")
    # Grid sampling reads the position table at each token without waiting for the GPU. timm's plain start (normal,
    # 0.02) is made for wide models and learns several times slower in narrow ones than Xavier's, which big_vision uses.
    ours = {"pos_embed_use_grid_sample": True, "weight_init": "jax", "global_pool": "", "fc_norm": False}
    sizes = {"patch_size": patch_size, "embed_dim": width, "depth": depth, "num_heads": num_heads, "num_classes": 0}
    known = {option.name for option in fields(NaFlexVitCfg)} - sizes.keys() | {"img_size"}
    for option in options:
        if option not in known:
            raise ValueError(
                f"model.encoder.backbone.options: timm's NaFlexVit has no {option!r}{did_you_mean(option, known)}"
            )
    with making("timm's NaFlexVit", options):
        return NaFlexVit(**cast(Any, sizes | ours | options))


def named_naflex(name: str, pretrained: bool, options: dict[str, Any]) -> NaFlexVit:
    """A timm ViT as a NaFlexVit (timm converts the weights), without its classifier.

    Raises:
        ValueError: It is none, or none with these options.
    """
    check_timm_name(name)
    ours = {} if is_model_in_modules(name, ["naflexvit"]) else {"use_naflex": True}
    try:
        with making(name, options):
            model = timm.create_model(name, pretrained=pretrained, num_classes=0, **(ours | options))
    except ValueError as error:
        if options:
            named_naflex(name, False, {})  # is it one without them?
        elif isinstance(error.__cause__, TypeError):
            kind = "no plain ViT; use indiclip.timm_backbone.TimmBackbone"
            raise ValueError(f"model.encoder.backbone.name: {name!r} is {kind}") from error
        raise
    if not isinstance(model, NaFlexVit):
        raise ValueError(
            f"model.encoder.backbone.name: {name!r} is a {type(model).__name__}; use "
            "indiclip.timm_backbone.TimmBackbone"
        )
    if model.attn_pool is not None and is_model_in_modules(name, ["eva"]):
        model.pool_include_prefix = True  # Perception Encoder's pool attends to the class token, which timm leaves out
    return model
