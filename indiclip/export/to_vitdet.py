"""To detectron2's ViTDet: the backbone under detectron2's names, and configurations of detectors around it.

detectron2 reads `model.pth`, tensors alone; it reads no safetensors. The configurations lie in `vitdet_folder`.

Shape letters: see `indiclip.types`.
"""

import io
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.export import target
from indiclip.export.parity import grids, noise
from indiclip.export.renaming import renamed
from indiclip.export.siglip_towers import activation
from indiclip.export.target import Loss, Reloaded
from indiclip.patches import patchify, stack, unpatchify
from indiclip.pretrained.convert import fit_tensor
from indiclip.types import Features, Images

_STRIDES = (8, 16)  # whose pyramids have strides of 4 to 64 pixels
_LIKE_PATCHES = 16  # what others are resampled to
_PREFIX = "backbone.net."
_CODE = "indiclip_vitdet"  # module of the folder
_MIXED = "mixed sizes, padded"

# timm's name of a tensor -> detectron2's. What none of them matches has no place there.
_NAMES = [
    (r"embeds\.proj\.", "patch_embed.proj."),
    (r"embeds\.pos_embed$", "pos_embed"),
    (r"blocks\.(\d+)\.(norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.", r"blocks.\1.\2."),
]
_SCALED = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}  # LayerScale -> the layer before it, which takes it in
_BEHIND = ("norm.", "attn_pool.", "fc_norm.", "head.")  # the last block, at which detectron2's ViT ends


class Target(target.Target):
    """See the module."""

    library_name = "detectron2"
    bound = 1e-5
    libraries = ("detectron2", "timm")
    usage = """\
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
config = LazyConfig.load("{out}/mask_rcnn.py")  # or cascade_mask_rcnn.py, densepose_rcnn.py
model = instantiate(config.model)
DetectionCheckpointer(model).load(config.train.init_checkpoint)"""

    def check(self, encoder: Encoder) -> list[Loss]:
        backbone = encoder.backbone
        if not isinstance(backbone, NaFlexViT):
            return [Loss(f"backbone: found {type(backbone).__name__}; detectron2 has a plain ViT (NaFlexViT)")]
        vit: Any = backbone.vit
        placed = renamed(vit.state_dict(), [*_NAMES, (r".*\.ls[12]\.gamma$", "")])
        unplaced = [name for name in vit.state_dict() if name not in placed and not name.startswith(_BEHIND)]
        losses = []
        if unplaced:
            losses.append(Loss(f"backbone: detectron2's ViT has no place for {', '.join(unplaced[:3])}"))
        if vit.rope is not None:
            losses.append(Loss("backbone.options.rope_type: detectron2's ViT has no rotary positions"))
        table = vit.embeds.pos_embed
        if table is not None and table.shape[1] != table.shape[2]:
            found = list(table.shape[1:3])
            losses.append(Loss(f"backbone.options.pos_embed_grid_size: found {found}; detectron2's is square"))
        if table is not None and vit.embeds.pos_embed_ar_preserving:
            losses.append(Loss("backbone.options.pos_embed_ar_preserving: detectron2 stretches positions", True))
        if backbone.patch_size not in _STRIDES:
            losses.append(
                Loss(
                    f"backbone.patch_size: found {backbone.patch_size}; detectron2's strides are powers of two, so "
                    f"patches are resampled to {_LIKE_PATCHES} pixels",
                    True,
                )
            )
        return losses + _block_losses(vit)

    def write(self, encoder: Encoder, folder: Path, place: Path) -> None:
        _require_detectron2("--to vitdet")
        for file in Path(__file__).with_name("vitdet_folder").glob("*.py"):
            shutil.copyfile(file, folder / file.name)
        backbone = cast(NaFlexViT, encoder.backbone)
        folder.joinpath("config.json").write_text(json.dumps(_config(backbone), indent=2) + "\n")
        final = {"final_norm": {name: w.detach().cpu() for name, w in backbone.vit.norm.state_dict().items()}}
        weights = io.BytesIO()  # torch.save into a file would hide that the disk is full
        torch.save({"model": _tensors(backbone)} | final, weights)
        folder.joinpath("model.pth").write_bytes(weights.getbuffer())

    @torch.no_grad()
    def reload(self, encoder: Encoder, folder: Path) -> Reloaded:
        model = _load(folder)

        def theirs(images: Images) -> dict[str, Tensor]:
            return {"features": _rows(model.backbone.net(_pixels(model, images))["last_feat"])}

        def ours(images: Images) -> dict[str, Tensor]:
            map_BDHW, _ = _before_norm(encoder, _on_canvas(encoder, images)).map()
            return {"features": _rows(map_BDHW)}

        mixed = noise(grids(encoder)[_MIXED], encoder.backbone.patch_size)
        alone_BDHW, mask_BHW = _before_norm(encoder, mixed).map()
        difference_MD = (theirs(mixed)["features"] - _rows(alone_BDHW))[mask_BHW.flatten()]
        beside = difference_MD.abs().max() / alone_BDHW.abs().max()
        depth = len(cast(NaFlexViT, encoder.backbone).vit.blocks)
        whole = {round(quarter * depth / 4) - 1 for quarter in (1, 2, 3, 4)}  # blocks without windows, as in ViTDet
        windowed = ",".join(str(block) for block in range(depth) if block not in whole)
        notes = [
            "detectron2's ViT lacks the final norm: features before it are compared. The pyramid has norms of its own.",
            "Text and the encoder's pooling do not travel.",
            f"detectron2 pads images to a square, and its ViT takes the padding for a part of the image. `{_MIXED}` "
            "compares with our encoder on the padded images; on each image alone they are "
            f"{beside:.2g} of the largest feature apart.",
            "All patches see each other, as in training.",
        ]
        if windowed:
            notes[-1] += (
                " Windows save memory on large images and give other features: model.backbone.net.window_size=14 "
                f"model.backbone.net.window_block_indexes=[{windowed}]."
            )
        return Reloaded(theirs, ours=ours, notes=notes, measured={"padding": {"difference": float(beside)}})


def _block_losses(vit: Any) -> list[Loss]:
    """What tensors do not show."""
    losses = []
    for what, found, expected in (
        ("block", {type(block).__name__ for block in vit.blocks}, "Block"),
        ("attention", {type(block.attn).__name__ for block in vit.blocks}, "Attention"),
        ("MLP", {type(block.mlp).__name__ for block in vit.blocks}, "Mlp"),
        ("norm", {type(norm).__name__ for block in vit.blocks for norm in (block.norm1, block.norm2)}, "LayerNorm"),
    ):
        if found != {expected}:
            losses.append(Loss(f"backbone: {what}: found {', '.join(sorted(found))}; detectron2's ViT has {expected}"))
    if not losses and activation(vit.blocks[0].mlp.act) is None:
        losses.append(Loss(f"backbone.options.act_layer: found {type(vit.blocks[0].mlp.act).__name__}; expected GELU"))
    return losses


def _config(backbone: NaFlexViT) -> dict[str, Any]:
    """config.json."""
    vit: Any = backbone.vit
    embeds, block = vit.embeds, vit.blocks[0]
    hidden = block.mlp.fc1.out_features
    ratio = hidden / vit.embed_dim
    p = backbone.patch_size if backbone.patch_size in _STRIDES else _LIKE_PATCHES
    side = 0 if embeds.pos_embed is None else embeds.pos_embed.shape[1]
    described = {
        "patch_size": p,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": ratio if int(ratio * vit.embed_dim) == hidden else (hidden + 0.5) / vit.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None,
        "norm_eps": block.norm1.eps,
        "activation": "gelu_tanh" if (name := activation(block.mlp.act)) == "gelu_pytorch_tanh" else name,
        "use_abs_pos": side > 0,
        "pretrain_img_size": side * p,
    }
    positions = {
        "mode": embeds.pos_embed_interp_mode,
        "antialias": embeds.pos_embed_antialias and not embeds.pos_embed_use_grid_sample,
        "align_corners": embeds.pos_embed_align_corners,
    }
    return {
        "format": "indiclip-vitdet",
        "version": 1,
        "vit": described,
        "positions": positions,
        "grid_sample": embeds.pos_embed_use_grid_sample,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "interpolation": backbone.interpolation,
    }


def _tensors(backbone: NaFlexViT) -> dict[str, Tensor]:
    """By detectron2's names."""
    own = {name: tensor.detach().cpu() for name, tensor in backbone.vit.state_dict().items()}
    for name in [name for name in own if name.endswith(tuple(_SCALED))]:
        block, _, scale = name.rpartition(".ls")
        layer, gamma_D = f"{block}.{_SCALED[f'ls{scale}']}", own[name]
        own[f"{layer}.weight"] = own[f"{layer}.weight"] * gamma_D[:, None]
        if f"{layer}.bias" in own:
            own[f"{layer}.bias"] = own[f"{layer}.bias"] * gamma_D
    found = {theirs: own[ours] for ours, theirs in renamed(own, _NAMES).items()}
    kernel = found["patch_embed.proj.weight"]
    p = backbone.patch_size if backbone.patch_size in _STRIDES else _LIKE_PATCHES
    kernel, _ = fit_tensor("embeds.proj.weight", kernel, kernel.new_empty(len(kernel), 3 * p * p), "the run")
    found["patch_embed.proj.weight"] = kernel.reshape(-1, p, p, 3).permute(0, 3, 1, 2)
    if "pos_embed" in found:
        found["pos_embed"] = found["pos_embed"].flatten(1, 2)
    for name in [name for name in found if name.endswith(("proj.weight", "fc1.weight", "fc2.weight"))]:
        found.setdefault(name.replace("weight", "bias"), torch.zeros(len(found[name])))
    return {f"{_PREFIX}{name}": tensor.float().contiguous() for name, tensor in found.items()}


def _require_detectron2(what: str) -> None:
    if find_spec("detectron2") is None:
        raise ValueError(f"{what}: needs detectron2, which is built from its source: README.md says how")


def _load(folder: Path) -> Any:
    """Mask R-CNN by detectron2, with the weights of the folder in its backbone.

    Raises:
        ValueError: The names are not those of its ViT.
    """
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import LazyConfig, instantiate

    with _alone():
        config = LazyConfig.load(str(folder / "mask_rcnn.py"))
        model = instantiate(config.model).eval()
        DetectionCheckpointer(model).load(config.train.init_checkpoint)
    there = torch.load(config.train.init_checkpoint, weights_only=True)["model"].keys()
    expected = {name for name in model.state_dict() if name.startswith(_PREFIX)}
    for name in sorted(there ^ expected):
        raise ValueError(f"--to vitdet: detectron2's ViT {'has' if name in expected else 'lacks'} {name}")
    return model


@contextmanager
def _alone() -> Iterator[None]:
    """Without the code of another such folder, and without warnings of the heads, which are to be trained."""
    path = list(sys.path)
    sys.modules.pop(_CODE, None)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        sys.path[:] = path
        sys.modules.pop(_CODE, None)


def _pixels(model: Any, images: Images) -> Tensor:
    """Normalised and padded as detectron2 does it, though to no larger square than the images need.

    Patches of another size than the model's are resized, so that there are as many.
    """
    from detectron2.structures import ImageList

    p = model.backbone.net.patch_embed.proj.stride[0]
    whole = []
    for index, (height, width) in enumerate(images["sizes_hw"]):
        pixels = torch.from_numpy(unpatchify(images, index)).permute(2, 0, 1).float()
        own = round((images["patches_BNP"].shape[-1] / 3) ** 0.5)
        if own != p:
            size = (height // own * p, width // own * p)
            pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
        whole.append((pixels - model.pixel_mean) / model.pixel_std)
    batch: Tensor = ImageList.from_tensors(whole, size_divisibility=p).tensor
    return batch


def _on_canvas(encoder: Encoder, images: Images) -> Images:
    """Images of one size, with the mean colour to the right and below."""
    backbone = encoder.backbone
    height, width = (max(sizes) for sizes in zip(*images["sizes_hw"], strict=True))
    prepared = []
    for index, (h, w) in enumerate(images["sizes_hw"]):
        canvas = 255 * torch.tensor(backbone.mean)[:, None, None].repeat(1, height, width)
        canvas[:, :h, :w] = torch.from_numpy(unpatchify(images, index)).permute(2, 0, 1)
        patches = patchify(canvas, backbone.patch_size)
        prepared.append({"patches": patches, "size_hw": (height, width), "scale": (1.0, 1.0)})
    return stack(prepared)


def _rows(map_BDHW: Tensor) -> Tensor:
    """A vector for each patch, (B * H * W, D)."""
    return map_BDHW.permute(0, 2, 3, 1).flatten(0, 2)


def _before_norm(encoder: Encoder, images: Images) -> Features:
    """The encoder's features without its final norm."""
    norm = cast(nn.Module, encoder.backbone.vit.norm)  # type: ignore[union-attr]
    seen: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        features = encoder.features(images)
    finally:
        hook.remove()
    return replace(features, tokens=seen[0].reshape(features.tokens.shape))
