"""Tensors of one shape made to fit a model of another: position tables and patch embeddings."""

import torch.nn.functional as F
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed_nhwc
from torch import Tensor

_TEXT_TABLES = ("position_embedding.weight", "position_embeddings.weight")


def fit_tensor(name: str, source: Tensor, target: Tensor, origin: str) -> tuple[Tensor, str]:
    """A tensor with the shape of the target, and what was done in a few words; nothing where they agree.

    Args:
        name: By our names.
        source: Of the pretrained model.
        target: Of the encoder.
        origin: Of the pretrained model, for messages.

    Raises:
        ValueError: No conversion is known, or these are the whole numbers of a quantised model.
    """
    if source.is_floating_point() != target.is_floating_point():
        raise ValueError(f"{origin}: {name}: found {source.dtype}; expected {target.dtype}")
    source = source.to(target.dtype)
    if source.shape == target.shape:
        return source, ""
    if source.numel() == target.numel() == 1:
        return source.reshape(target.shape), ""
    if name.endswith("embeds.pos_embed") and source.ndim == target.ndim == 4 and source.shape[3] == target.shape[3]:
        H, W = target.shape[1:3]
        note = f"position table resampled from {source.shape[1]}x{source.shape[2]} to {H}x{W}"
        return resample_abs_pos_embed_nhwc(source, [H, W]), note
    if name.endswith("embeds.proj.weight") and source.ndim == target.ndim == 2 and len(source) == len(target):
        old, new = (round((tensor.shape[1] // 3) ** 0.5) for tensor in (source, target))
        kernel = source.reshape(-1, old, old, 3).permute(0, 3, 1, 2)
        resized: Tensor = resample_patch_embed(kernel, [new, new])
        return resized.permute(0, 2, 3, 1).flatten(1), f"patches resampled from {old} to {new} pixels"
    if name.startswith("text.") and name.endswith(_TEXT_TABLES) and source.shape[1:] == target.shape[1:]:
        if len(target) < len(source):
            return source[: len(target)], f"text positions cut from {len(source)} to {len(target)}"
        longer = F.interpolate(source.T[None], size=len(target), mode="linear", align_corners=True)[0].T
        return longer, f"text positions stretched from {len(source)} to {len(target)}"
    raise ValueError(
        f"{origin}: {name}: found shape {tuple(source.shape)}, expected "
        f"{tuple(target.shape)}, the encoder's; only position tables and patches of one width are converted"
    )
