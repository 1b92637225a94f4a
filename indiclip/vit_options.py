"""Which options of timm's NaFlexVit run here: it builds with others, and fails in the first step or later."""

from collections.abc import Collection, Mapping
from typing import Any

from timm.models.naflexvit import NaFlexVitCfg

from indiclip.names import check_choice, check_range, did_you_mean

_NORMS = ("layernorm", "layernormfp32", "rmsnorm", "rmsnormfp32", "simplenorm", "simplenormfp32")
_ALLOWED: dict[str, Collection[Any]] = {
    "embed_proj_type": ("linear",),  # images come as patches
    "patchify_channels_last": (True,),  # in which the channels are last
    "in_chans": (3,),
    "pos_embed": ("learned", "factorized", "none", ""),
    "pos_embed_interp_mode": ("bilinear", "bicubic", "nearest"),
    "rope_type": ("", "none", "axial", "mixed", "dinov3", "mrope"),
    "rope_grid_indexing": ("ij", "xy"),
    "attn_type": ("standard", "eva", "rope"),
    "global_pool": ("", "avg", "avgmax", "max", "token", "map"),
    "weight_init": ("", "jax", "jax_nlhb", "moco"),
    "norm_layer": _NORMS,
    "embed_norm_layer": _NORMS,
    "input_norm_layer": _NORMS,
    "patch_drop_rate": (0, None),  # heads read every patch
}
# Of NaFlexVit, but set by arguments of the backbone, or no plain values.
_NOT_OPTIONS = {"patch_size", "embed_dim", "depth", "num_heads", "mlp_layer", "block_fn"}
_OTHERS = ("in_chans", "img_size", "norm_eps")


def check_vit_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option with a value that cannot run, naming what can."""
    for key, value in options.items():
        where = f"backbone.options.{key}"
        if key in _ALLOWED and (isinstance(value, str) or "norm_layer" not in key):
            if value not in _ALLOWED[key]:
                check_choice(where, str(value), map(repr, _ALLOWED[key]))
        elif key.endswith("_rate"):
            check_range({where: value}, 0, 1)


def check_option_names(options: Mapping[str, Any]) -> None:
    """Raise ValueError with the nearest name for an option that NaFlexVit does not have."""
    known = {*NaFlexVitCfg.__dataclass_fields__, *_OTHERS} - _NOT_OPTIONS
    for key in options:
        if key not in known:
            raise ValueError(f"backbone.options: timm's NaFlexVit takes no {key!r} here{did_you_mean(key, known)}")
