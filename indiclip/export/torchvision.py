"""The way to torchvision's detectors: a folder that opens with torch, torchvision, timm and safetensors alone.

It holds `model.safetensors` (the tower's weights), `config.json` (the tower's timm arguments, pixel mean and deviation)
and `torchvision_backbone.py`, which reads them; see there.
"""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.export import torchvision_backbone
from indiclip.export.new_folder import new_folder
from indiclip.export.parity import noise, own_grid
from indiclip.export.torchvision_backbone import PyramidBackbone, build_tower
from indiclip.patches import unpatchify
from indiclip.timm_backbone import TimmBackbone
from indiclip.types import Images

TOLERANCE = 1e-6  # largest difference of a feature, relative to the largest feature
_POOLING = ("attn_pool.", "fc_norm.", "head.", "norm_head.", "final_conv.")  # weights that no feature map comes from


def write_detector(encoder: Encoder, detector: nn.Module, spec: dict[str, Any], folder: Path) -> None:
    """Write a trained detector, which `torchvision_backbone.load_detector` opens, into a new or empty folder.

    Args:
        encoder: Whose backbone it has.
        detector: Made by `build_detector` from `as_torchvision`.
        spec: `kind`, `num_classes`, `out_channels`, `scales` and `options` it was made with, and names of `classes`.
        folder: Where to.

    Raises:
        FileExistsError: The folder holds something.
    """
    config, _ = described(encoder)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in detector.state_dict().items()}
    with new_folder(folder) as part:
        fill_folder(part, config | {"detector": spec}, weights)


def fill_folder(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(torchvision_backbone.__file__, folder / "torchvision_backbone.py")


def features_of(backbone: PyramidBackbone, images: Images) -> Tensor:
    """The tower's vectors (M, D) where there are images, of pixels normalised and padded as torchvision does it."""
    mean_311, std_311 = (torch.tensor(numbers)[:, None, None] for numbers in (backbone.image_mean, backbone.image_std))
    height, width = (max(sides) for sides in zip(*images["sizes_hw"], strict=True))
    batch_B3HW = torch.zeros(len(images["sizes_hw"]), 3, height, width)
    for row, (h, w) in enumerate(images["sizes_hw"]):
        pixels_3HW = torch.from_numpy(unpatchify(images, row)).permute(2, 0, 1)
        batch_B3HW[row, :, :h, :w] = (pixels_3HW / 255 - mean_311) / std_311
    return valid_vectors(*backbone.features(batch_B3HW))


def valid_vectors(map_BDHW: Tensor, mask_BHW: Tensor) -> Tensor:
    """The vectors (M, D) where there are images."""
    return map_BDHW.permute(0, 2, 3, 1)[mask_BHW]


def as_torchvision(encoder: Encoder, out_channels: int = 256, scales: list[float] | None = None) -> PyramidBackbone:
    """A copy of the encoder's backbone with a new pyramid, without a folder."""
    config, weights = described(encoder)
    tower = build_tower(config["tower"])
    tower.load_state_dict(weights)
    return PyramidBackbone(tower, config["image_mean"], config["image_std"], out_channels, scales)


def described(encoder: Encoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json, and the weights by the tower's names."""
    backbone = encoder.backbone
    if isinstance(backbone, NaFlexViT):
        tower, module = _naflex(backbone), nn.ModuleDict({"vit": backbone.vit})
    elif isinstance(backbone, TimmBackbone):
        tower, module = _stages(encoder, backbone), nn.ModuleDict({"net": backbone.net})
    else:
        found = type(backbone).__name__
        raise ValueError(f"torchvision: the backbone is a {found}; expected NaFlexViT or TimmBackbone")
    config = {"format": "indiclip-torchvision", "version": 1, "tower": tower, "patch_size": backbone.patch_size}
    config |= {"image_mean": list(backbone.mean), "image_std": list(backbone.std)}
    config["interpolation"] = backbone.interpolation  # of the run; torchvision's own detectors resize bilinearly
    return config, _weights_for(tower, module)


def _weights_for(tower: dict[str, Any], module: nn.Module) -> dict[str, Tensor]:
    """The weights that the described tower has; of the others only poolings and classifiers are left out."""
    expected = build_tower(tower).state_dict()
    found = module.state_dict()
    left = [name for name in found.keys() - expected.keys() if not name.split(".", 1)[1].startswith(_POOLING)]
    if lost := sorted(expected.keys() - found.keys()) + sorted(left):
        raise ValueError(f"torchvision: timm's model and the backbone do not have the same weights, such as {lost[0]}")
    return {name: found[name].detach().cpu().contiguous() for name in expected}


def _naflex(backbone: NaFlexViT) -> dict[str, Any]:
    """The timm arguments of a NaFlexVit that ends in its features."""
    own, vit = backbone.to_config(), backbone.vit
    arguments: dict[str, Any] = dict(own["options"] or {})
    if own["name"] is None:
        heads = int(cast(Any, vit.blocks[0]).attn.num_heads)
        arguments |= {"patch_size": backbone.patch_size, "embed_dim": vit.embed_dim, "depth": len(vit.blocks)}
        arguments |= {"num_heads": heads, "pos_embed_use_grid_sample": vit.embeds.pos_embed_use_grid_sample}
    else:
        arguments["name"] = own["name"]
    arguments |= {"num_classes": 0, "global_pool": "", "fc_norm": False}
    arguments["final_norm"] = not isinstance(vit.norm, nn.Identity)
    return {"kind": "NaFlexVit", "arguments": arguments}


@torch.no_grad()
def _stages(encoder: Encoder, backbone: TimmBackbone) -> dict[str, Any]:
    """The timm arguments of a model with stages."""
    own = backbone.to_config()
    assert backbone.canvas_hw is not None
    arguments = {"model_name": own["name"], "num_classes": 0} | (own["options"] or {})
    images = noise([own_grid(encoder)], backbone.patch_size)
    was_training = encoder.training
    encoder.eval()
    try:
        map_BDHW, mask_BHW = encoder.features(images).map()
    finally:
        encoder.train(was_training)
    own_MD = valid_vectors(map_BDHW, mask_BHW)
    # Where pooling is the encoder's own, what only the model's pooling needs may be gone from the last stage, and the
    # norm behind it comes first.
    for normed, norm_behind in ((True, False), (True, True), (False, False)):
        tower = {
            "kind": "stages",
            "arguments": arguments,
            "last": backbone.stage_index,
            "normed": normed,
            "norm_behind": norm_behind,
        }
        tower |= {"width": own_MD.shape[-1], "canvas_hw": list(backbone.canvas_hw)}
        if _gives(tower, backbone, images, own_MD):
            return tower
    raise ValueError(f"torchvision: {own['name']} gives other features in timm than in the encoder")


def _gives(tower: dict[str, Any], backbone: TimmBackbone, images: Images, own_MD: Tensor) -> bool:
    """Whether the described tower has the same features."""
    try:
        weights = _weights_for(tower, nn.ModuleDict({"net": backbone.net}))
    except ValueError:
        return False
    module = build_tower(tower)
    module.load_state_dict(weights)
    their_MD = features_of(PyramidBackbone(module.eval(), list(backbone.mean), list(backbone.std), 32), images)
    if their_MD.shape != own_MD.shape:
        return False
    return bool((their_MD - own_MD).abs().max() <= TOLERANCE * own_MD.abs().max())
