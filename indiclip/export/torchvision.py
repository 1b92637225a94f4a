"""The way to torchvision's detectors: a folder that opens with torch, torchvision, timm and safetensors alone.

It holds `model.safetensors` (the tower's weights), `config.json` (the tower's timm arguments, pixel mean and deviation)
and `torchvision_backbone.py`, which reads them; see there.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from indiclip.backbone import NaFlexViT, TimmBackbone
from indiclip.encoder import Encoder
from indiclip.export import torchvision_backbone
from indiclip.export.torchvision_backbone import PyramidBackbone, build_tower, load
from indiclip.patches import stack
from indiclip.types import Images

__all__ = ["TOLERANCE", "as_torchvision", "check_parity", "load", "write", "write_detector"]

TOLERANCE = 1e-6  # largest difference of a feature, relative to the largest feature
_POOLING = ("attn_pool.", "fc_norm.", "head.", "norm_head.", "final_conv.")  # weights that no feature map comes from


def write(encoder: Encoder, folder: Path) -> None:
    """Write the backbone of an encoder into a new or empty folder, and check that it gives the same features.

    Raises:
        FileExistsError: The folder holds something.
        ValueError: A backbone that torchvision cannot have without a loss.
    """
    config, weights = described(encoder)
    with _new_folder(folder) as part:
        fill_folder(part, config, weights)
        parity = check_parity(encoder, load(part))
        worst = max(parity, key=lambda case: parity[case])
        if not parity[worst] <= TOLERANCE:
            raise ValueError(
                f"torchvision: the features differ by {parity[worst]:.1e} ({worst}); expected at most {TOLERANCE:.0e}"
            )


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
    with _new_folder(folder) as part:
        fill_folder(part, config | {"detector": spec}, weights)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside it, which takes its place when all is written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: the folder is not empty")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield part
        part.chmod(0o755)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def fill_folder(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(torchvision_backbone.__file__, folder / "torchvision_backbone.py")


def check_parity(encoder: Encoder, backbone: PyramidBackbone) -> dict[str, float]:
    """Largest difference between the encoder's features and the tower's, relative to the largest feature, by case.

    The cases are batches of noise: at the model's own grid, smaller, larger, not square, and of mixed sizes, padded.
    """
    own, p = encoder.backbone, encoder.backbone.patch_size
    if own.canvas_hw is not None:  # no image is larger than the canvas
        rows, columns = (side // p for side in own.canvas_hw)
    else:
        rows = columns = _grid_side(own)
    small = (max(rows // 2, 1), max(columns // 2, 1))
    cases = {"own grid": [(rows, columns)], "smaller": [small], "not square": [(small[0], columns)]}
    if own.canvas_hw is None:
        cases["larger"] = [(rows + 3, columns + 3)]
    cases["padded batch of mixed sizes"] = [*cases["not square"], *cases["smaller"], (rows, small[1])]
    was_training = encoder.training
    encoder.eval(), backbone.eval()
    try:
        return {case: _difference(encoder, backbone, grids) for case, grids in cases.items()}
    finally:
        encoder.train(was_training)


@torch.no_grad()
def _difference(encoder: Encoder, backbone: PyramidBackbone, grids: list[tuple[int, int]]) -> float:
    """Of one batch of images with so many rows and columns of patches."""
    p = encoder.backbone.patch_size
    noise = torch.Generator().manual_seed(len(grids))
    pixels = [torch.randint(256, (3, H * p, W * p), generator=noise, dtype=torch.uint8) for H, W in grids]
    features = encoder.features(_on_device(pixels, encoder))
    map_BDHW, mask_BHW = features.map()

    theirs_BDHW, their_mask_BHW = read_pixels(backbone, pixels)

    H, W = (min(a, b) for a, b in zip(mask_BHW.shape[1:], their_mask_BHW.shape[1:], strict=True))
    mask_BHW, their_mask_BHW = mask_BHW[:, :H, :W].cpu(), their_mask_BHW[:, :H, :W].cpu()
    if not torch.equal(mask_BHW, their_mask_BHW):
        return float("inf")
    ours_BDHW = map_BDHW[..., :H, :W].cpu().float() * mask_BHW[:, None]
    apart = (ours_BDHW - theirs_BDHW[..., :H, :W].cpu().float()).abs().max()
    return float(apart / ours_BDHW.abs().max())


def read_pixels(backbone: PyramidBackbone, pixels: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Map and mask of the tower's features of uint8 images, normalised and padded as torchvision does it."""
    mean_311, std_311 = (torch.tensor(numbers)[:, None, None] for numbers in (backbone.image_mean, backbone.image_std))
    height, width = (max(image.shape[side] for image in pixels) for side in (1, 2))
    batch_B3HW = torch.zeros(len(pixels), 3, height, width)
    for row, image in enumerate(pixels):
        batch_B3HW[row, :, : image.shape[1], : image.shape[2]] = (image / 255 - mean_311) / std_311
    return backbone.features(batch_B3HW.to(next(backbone.parameters()).device))


def _on_device(pixels: list[Tensor], encoder: Encoder) -> Images:
    preprocessing = encoder.backbone.preprocessing
    images = stack([preprocessing.cut(image, (image.shape[1], image.shape[2])) for image in pixels])
    return cast(Images, {k: v.to(encoder.device) if isinstance(v, Tensor) else v for k, v in images.items()})


def _grid_side(backbone: Any) -> int:
    """Rows of the table of positions; 16 where there is none."""
    table = getattr(backbone.vit.embeds, "pos_embed", None)
    return int(table.shape[1]) if table is not None and table.ndim == 4 else 16


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
    mean, std = ((buffer[:3] / 255).tolist() for buffer in (backbone.mean_P, backbone.std_P))
    config = {"format": "indiclip-torchvision", "version": 1, "tower": tower}
    config |= {"image_mean": mean, "image_std": std, "patch_size": backbone.patch_size}
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


def _stages(encoder: Encoder, backbone: TimmBackbone) -> dict[str, Any]:
    """The timm arguments of a model with stages."""
    own = backbone.to_config()
    assert backbone.canvas_hw is not None
    arguments = {"model_name": own["name"], "num_classes": 0} | (own["options"] or {})
    last = own["feature_index"] % len(backbone.net.feature_info)
    grid = (backbone.canvas_hw[0] // backbone.patch_size, backbone.canvas_hw[1] // backbone.patch_size)
    was_training = encoder.training
    encoder.eval()
    try:
        # Where pooling is the encoder's own, what only the model's pooling needs may be gone from the last stage.
        for normed in (True, False):
            tower = {"kind": "stages", "arguments": arguments, "last": last, "normed": normed}
            tower |= {"width": _map_width(encoder, grid), "canvas_hw": list(backbone.canvas_hw)}
            if _is_same(encoder, backbone, tower, grid):
                return tower
    finally:
        encoder.train(was_training)
    raise ValueError(f"torchvision: {own['name']} gives other features in timm than in the encoder")


@torch.no_grad()
def _map_width(encoder: Encoder, grid: tuple[int, int]) -> int:
    p = encoder.backbone.patch_size
    pixels = torch.zeros(3, grid[0] * p, grid[1] * p, dtype=torch.uint8)
    return encoder.features(_on_device([pixels], encoder)).tokens_BND.shape[-1]


def _is_same(encoder: Encoder, backbone: TimmBackbone, tower: dict[str, Any], grid: tuple[int, int]) -> bool:
    try:
        weights = _weights_for(tower, nn.ModuleDict({"net": backbone.net}))
    except ValueError:
        return False
    module = build_tower(tower)
    module.load_state_dict(weights)
    mean, std = ((buffer[:3] / 255).tolist() for buffer in (backbone.mean_P, backbone.std_P))
    try:
        return _difference(encoder, PyramidBackbone(module.eval(), mean, std, 32), [grid]) <= TOLERANCE
    except RuntimeError:  # maps of other sizes
        return False
