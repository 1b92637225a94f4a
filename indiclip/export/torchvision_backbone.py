"""A vision encoder that IndiCLIP trained, as the backbone of torchvision's detectors.

This file lies in every folder that `indiclip export --to torchvision` writes. It needs torch, torchvision, timm and
safetensors, not IndiCLIP:

    from torchvision.models.detection import FasterRCNN
    from torchvision_backbone import build_detector, load

    detector = build_detector(FasterRCNN, load("FOLDER"), num_classes=91)  # or FCOS, MaskRCNN, KeypointRCNN

torchvision pads the images of a batch with zeros at the bottom and on the right. What is zero there in all channels
counts as padding here: no patch of it is seen by others, and its features are zero.

Shape letters: B images, N patches, P numbers in a patch, D width, H W rows and columns.
"""

import difflib
import inspect
import json
import math
from collections import OrderedDict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import LayerNorm, LayerNorm2d, RmsNorm  # type: ignore[attr-defined]
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

NUM_LEVELS = 4  # and one more by max-pooling, as in torchvision's own detectors with five
FINEST_STRIDE = 4  # pixels
RPN_ANCHOR = 8  # side of an anchor in strides: 32 to 512 pixels at strides 4 to 64, which are torchvision's

_OF_TRANSFORM = {"size_divisible", "fixed_size"}  # options that the detectors hand on to their transform


class PyramidBackbone(nn.Module):
    """Pixels -> maps of several strides, what torchvision's detectors take for a backbone.

    Args:
        tower: See `NaFlexTower` and `StageTower`.
        image_mean: Of the pixels in 0..1, per channel.
        image_std: The same.
        out_channels: Of every map.
        scales: Sizes of the maps relative to the tower's last one, each half of the one before; None is four of them
            from a stride of 4 pixels on, or 7 for patches of 14.
        stages: Make the pyramid of the tower's own stages instead, for those that have several (ConvNeXt, Swin).
    """

    def __init__(
        self,
        tower: "NaFlexTower | StageTower",
        image_mean: list[float],
        image_std: list[float],
        out_channels: int = 256,
        scales: list[float] | None = None,
        stages: bool = False,
    ) -> None:
        super().__init__()
        self.tower = tower
        self.image_mean, self.image_std = image_mean, image_std
        if stages and (scales or not isinstance(tower, StageTower) or len(tower.strides) < 2):
            raise ValueError("stages: expected a tower with several stages, and no `scales`")
        self.stages = stages
        self.pyramid = (
            StagePyramid(tower.widths, tower.strides, out_channels)
            if isinstance(tower, StageTower) and stages
            else Pyramid(tower.width, tower.stride, out_channels, scales)
        )
        self.out_channels, self.strides = out_channels, self.pyramid.strides

    def features(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """The tower's last map (B, D, H, W) and where it is no padding (B, H, W)."""
        maps, mask_BHW = self.tower(pixels_B3HW)
        return maps[-1], mask_BHW

    def forward(self, pixels_B3HW: Tensor) -> "OrderedDict[str, Tensor]":
        maps, _ = self.tower(pixels_B3HW)
        levels: OrderedDict[str, Tensor] = self.pyramid(maps if self.stages else maps[-1])
        return levels


class NaFlexTower(nn.Module):
    """timm's NaFlexVit on a padded batch of images of any size."""

    def __init__(self, vit: NaFlexVit) -> None:
        super().__init__()
        self.vit = vit
        self.width, self.stride = int(vit.embed_dim), int(vit.embeds.patch_size[0])

    def forward(self, pixels_B3HW: Tensor) -> tuple[list[Tensor], Tensor]:
        p = self.stride
        pixels_B3HW = pad_to(pixels_B3HW, p, p)
        B, _, height, width = pixels_B3HW.shape
        H, W = height // p, width // p
        mask_BHW = unpadded(pixels_B3HW, p)
        patches = pixels_B3HW.reshape(B, 3, H, p, W, p).permute(0, 2, 4, 3, 5, 1)  # row, column, channel in a patch
        patches_BNP, valid_BN = patches.reshape(B, H * W, p * p * 3), mask_BHW.flatten(1)
        rows_H, columns_W = (torch.arange(n, device=pixels_B3HW.device) for n in (H, W))
        coords_BN2 = torch.cartesian_prod(rows_H, columns_W).expand(B, -1, -1)
        if bool(valid_BN.all()):
            map_BND = self._tokens(patches_BNP, coords_BN2, None)
        else:
            # As timm wants them: each image's own patches first, row by row, and coordinates that span these alone.
            longest = int(valid_BN.sum(1).max())
            order_BN1 = (~valid_BN).int().argsort(dim=1, stable=True)[:, :longest, None]
            patches_BNP, coords_BN2 = (x.take_along_dim(order_BN1, 1) for x in (patches_BNP, coords_BN2))
            valid_BN = valid_BN.take_along_dim(order_BN1[..., 0], 1)
            tokens_BND = self._tokens(patches_BNP, coords_BN2 * valid_BN[..., None], valid_BN)
            tokens_BND = torch.where(valid_BN[..., None], tokens_BND, 0)
            map_BND = tokens_BND.new_zeros(B, H * W, tokens_BND.shape[-1])
            map_BND = map_BND.scatter(1, order_BN1.expand_as(tokens_BND), tokens_BND)
        return [map_BND.transpose(1, 2).reshape(B, -1, H, W)], mask_BHW

    def _tokens(self, patches_BNP: Tensor, coords_BN2: Tensor, valid_BN: Tensor | None) -> Tensor:
        out: Any = self.vit.forward_features(patches_BNP, coords_BN2, valid_BN)
        tokens_BND: Tensor = out["patches"][:, self.vit.num_prefix_tokens :]
        return tokens_BND


class StageTower(nn.Module):
    """A timm model of one canvas size (ConvNeXt, Swin, ...); smaller images lie in its upper left corner.

    Args:
        net: The timm model.
        last: Which of its stages gives the last map.
        normed: Whether that is the map after all that the model has before its pooling: a norm, a wider convolution.
        width: Of the last map.
        canvas_hw: What batches are padded to. Larger ones go in as they are, where the model takes any size.
        norm_behind: Whether that map also gets the norms which the model has behind its pooling.
    """

    def __init__(
        self, net: Any, last: int, normed: bool, width: int, canvas_hw: tuple[int, int], norm_behind: bool = False
    ) -> None:
        super().__init__()
        self.net, self.last, self.normed, self.canvas_hw = net, last, normed, canvas_hw
        self.norm_behind = norm_behind
        stages = net.feature_info[: last + 1]
        self.widths = [*(int(stage["num_chs"]) for stage in stages[:-1]), width]
        self.strides = [int(stage["reduction"]) for stage in stages]
        self.width, self.stride = width, self.strides[-1]

    def forward(self, pixels_B3HW: Tensor) -> tuple[list[Tensor], Tensor]:
        height, width = pixels_B3HW.shape[-2:]
        least_hw = [max(own, side) for own, side in zip(self.canvas_hw, (height, width), strict=True)]
        canvas = F.pad(pixels_B3HW, (0, least_hw[1] - width, 0, least_hw[0] - height))
        canvas = pad_to(canvas, self.stride, self.stride)
        try:
            final, maps = self.net.forward_intermediates(canvas, indices=list(range(self.last + 1)))
        except AssertionError as error:
            expected = "x".join(map(str, self.canvas_hw))
            raise ValueError(
                f"found a batch of {height}x{width} pixels; expected at most {expected}, the one size of this model "
                "(min_size, max_size)"
            ) from error
        if self.normed:
            maps[-1] = self._as_map(final, maps[-1].shape[-2:])
        if self.norm_behind:
            maps[-1] = self._normalised(maps[-1])
        mask_BHW = unpadded(pad_to(pixels_B3HW, self.stride, self.stride), self.stride)
        # torchvision reads a map's stride off its size, so it gets none of what was added.
        maps = [
            each[..., : -(-height // stride), : -(-width // stride)]
            for each, stride in zip(maps, self.strides, strict=True)
        ]
        maps[-1] = torch.where(mask_BHW[:, None], maps[-1], 0)
        return maps, mask_BHW

    def _as_map(self, final: Tensor, size_hw: Any) -> Tensor:
        if final.ndim == 3:  # tokens
            tokens_BDN = final[:, self.net.num_prefix_tokens :].transpose(1, 2)
            return tokens_BDN.reshape(*tokens_BDN.shape[:2], *size_hw)
        return final if getattr(self.net, "output_fmt", "NCHW") == "NCHW" else final.permute(0, 3, 1, 2)

    def _normalised(self, map_BDHW: Tensor) -> Tensor:
        for norm in (getattr(self.net, "fc_norm", None), getattr(getattr(self.net, "head", None), "norm", None)):
            if isinstance(norm, LayerNorm2d):
                map_BDHW = norm(map_BDHW)
            elif isinstance(norm, nn.LayerNorm | RmsNorm):
                map_BDHW = norm(map_BDHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return map_BDHW


class Pyramid(nn.Module):
    """torchvision's FeaturePyramidNetwork on one map, resized as in ViTDet (arXiv:2203.16527, section 3)."""

    def __init__(self, width: int, stride: int, out_channels: int, scales: list[float] | None = None) -> None:
        super().__init__()
        if scales is None:
            finest = max(2**k for k in range(6) if stride % 2**k == 0 and stride // 2**k >= min(FINEST_STRIDE, stride))
            scales = [finest / 2**level for level in range(NUM_LEVELS)]
        whole = all((stride / scale).is_integer() for scale in scales)
        halving = all(finer == 2 * coarser for finer, coarser in pairwise(scales))
        if not scales or not whole or not halving or not math.log2(scales[0]).is_integer():
            raise ValueError(
                f"scales: found {scales}; expected powers of two, each half of the one before, by which the stride of "
                f"{stride} pixels can be divided"
            )
        self.strides = [int(stride / scale) for scale in [*scales, scales[-1] / 2]]
        self.resize = nn.ModuleList(_resize(width, scale) for scale in scales)
        widths = [width // int(max(scale, 1)) for scale in scales]
        self.fpn = FeaturePyramidNetwork(widths, out_channels, LastLevelMaxPool(), LayerNorm2d)

    def forward(self, map_BDHW: Tensor) -> "OrderedDict[str, Tensor]":
        """`0`, `1`, ... from fine to coarse, and `pool`."""
        resized = OrderedDict((str(level), resize(map_BDHW)) for level, resize in enumerate(self.resize))
        return OrderedDict(self.fpn(resized))


class StagePyramid(nn.Module):
    """torchvision's FeaturePyramidNetwork on the stages of a model."""

    def __init__(self, widths: list[int], strides: list[int], out_channels: int) -> None:
        super().__init__()
        self.strides = [*strides, 2 * strides[-1]]
        self.fpn = FeaturePyramidNetwork(widths, out_channels, LastLevelMaxPool(), LayerNorm2d)

    def forward(self, maps: list[Tensor]) -> "OrderedDict[str, Tensor]":
        """As `Pyramid`."""
        return OrderedDict(self.fpn(OrderedDict((str(level), each) for level, each in enumerate(maps))))


def _resize(width: int, scale: float) -> nn.Module:
    if scale < 1:
        return nn.MaxPool2d(round(1 / scale), ceil_mode=True)
    layers: list[nn.Module] = []
    for step in range(int(math.log2(scale))):
        layers += [LayerNorm2d(width), nn.GELU()] if step else []
        layers.append(nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2))
        width //= 2
    return nn.Sequential(*layers)


def pad_to(pixels_B3HW: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros at the bottom and on the right, up to multiples of these."""
    height, width = pixels_B3HW.shape[-2:]
    return F.pad(pixels_B3HW, (0, -width % columns, 0, -height % rows))


def unpadded(pixels_B3HW: Tensor, stride: int) -> Tensor:
    """Which cells (B, H, W) of `stride` pixels hold anything of their image, told by the zeros around it.

    An image of uint8 values is zero nowhere where the mean is no multiple of 1/255. An image that ends in rows or
    columns of the mean colour loses those; the first cell is always there.
    """
    used_BHW = F.max_pool2d((pixels_B3HW != 0).any(1, keepdim=True).float(), stride)[:, 0] > 0
    used_BHW[:, 0, 0] = True
    rows_BH = used_BHW.any(2).int().flip(1).cummax(1).values.flip(1).bool()
    columns_BW = used_BHW.any(1).int().flip(1).cummax(1).values.flip(1).bool()
    return rows_BH[:, :, None] & columns_BW[:, None]


def build_detector(kind: type[nn.Module], backbone: Any, num_classes: int, **options: Any) -> nn.Module:
    """A detector of torchvision with the anchors, the RoI pooling and the pixel statistics of the backbone.

    Args:
        kind: `FasterRCNN`, `MaskRCNN`, `KeypointRCNN` or `FCOS` of `torchvision.models.detection`.
        backbone: A `PyramidBackbone`, or what has its `strides`, `out_channels`, `image_mean` and `image_std`.
        num_classes: Those of the R-CNNs count the background, which is class 0; FCOS has none.
        **options: More arguments of `kind`, such as `min_size` and `max_size`; they win over those here. And
            `num_convs`, of the towers of FCOS.

    Raises:
        ValueError: An option that `kind` does not have; torchvision itself would say nothing.
    """
    names = {name for base in kind.__mro__ for name in inspect.signature(base).parameters}
    known = (names | _OF_TRANSFORM | ({"num_convs"} if kind is FCOS else set())) - {"self", "kwargs", "args"}
    for name in options.keys() - known:
        nearest = difflib.get_close_matches(name, known, 1, 0.0)[0]
        raise ValueError(f"{kind.__name__}: no option {name!r}; nearest is {nearest!r}")
    strides = backbone.strides
    # The coarsest stride divides each batch, so that torchvision reads the exact strides off the maps' sizes.
    ours: dict[str, Any] = {"image_mean": backbone.image_mean, "image_std": backbone.image_std}
    ours["size_divisible"] = strides[-1]
    if "rpn_anchor_generator" in names:
        sizes = tuple((RPN_ANCHOR * stride,) for stride in strides)
        ours["rpn_anchor_generator"] = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(strides))
    else:
        ours["anchor_generator"] = AnchorGenerator(tuple((stride,) for stride in strides), ((1.0,),) * len(strides))
        if "num_convs" in options:
            ours["head"] = FCOSHead(backbone.out_channels, 1, num_classes, options.pop("num_convs"))
    for name, size in (("box_roi_pool", 7), ("mask_roi_pool", 14), ("keypoint_roi_pool", 14)):
        if name in names:
            ours[name] = roi_align(strides[:-1], size)
    return kind(backbone, num_classes=num_classes, **(ours | options))


def roi_align(strides: list[int], output_size: int) -> MultiScaleRoIAlign:
    """torchvision's, told the strides: it would take them for powers of two, and 14 for 16."""
    align = MultiScaleRoIAlign([str(level) for level in range(len(strides))], output_size, sampling_ratio=2)
    align.scales = [1 / stride for stride in strides]
    align.map_levels = initLevelMapper(round(math.log2(strides[0])), round(math.log2(strides[-1])))
    return align


def build_tower(config: dict[str, Any]) -> "NaFlexTower | StageTower":
    """A tower of random weights from the `tower` of a folder's config.json."""
    arguments = dict(config["arguments"])
    if config["kind"] == "NaFlexVit":
        name = arguments.pop("name", None)
        if (eps := arguments.pop("norm_eps", None)) is not None:
            arguments["norm_layer"] = partial(LayerNorm, eps=eps)
        vit: Any = timm.create_model(name, use_naflex=True, **arguments) if name else NaFlexVit(**arguments)
        return NaFlexTower(vit)
    net: Any = timm.create_model(**arguments)
    norm_behind = config.get("norm_behind", False)
    if not config["normed"]:
        net.prune_intermediate_layers([config["last"]], prune_head=True)
    elif not norm_behind:
        net.reset_classifier(0, "")
    net.to(memory_format=torch.channels_last)  # the same kernels as in training, to the last bits
    return StageTower(net, config["last"], config["normed"], config["width"], tuple(config["canvas_hw"]), norm_behind)


def load(
    folder: str | Path, out_channels: int = 256, scales: list[float] | None = None, stages: bool = False
) -> PyramidBackbone:
    """The backbone of a folder: trained weights, and a new feature pyramid for the detector to train.

    Raises:
        FileNotFoundError: No such folder, or a file of it is missing.
        ValueError: Another kind of folder, or weights that are not those of its config.
    """
    config = _read_config(Path(folder))
    tower = build_tower(config["tower"])
    _load_weights(tower, Path(folder))
    return PyramidBackbone(tower, config["image_mean"], config["image_std"], out_channels, scales, stages)


def load_detector(folder: str | Path) -> nn.Module:
    """The trained detector of a folder that `tools/finetune_torchvision.py` wrote, in evaluation mode.

    `config.json` names its classes, in the order of its labels: from 0 on with FCOS, from 1 on with the R-CNNs.

    Raises:
        FileNotFoundError, ValueError: As `load`; and a folder of a backbone alone.
    """
    config = _read_config(Path(folder))
    if "detector" not in config:
        raise ValueError(f"{folder}: holds a backbone and no detector; load() opens it")
    spec, tower = config["detector"], build_tower(config["tower"])
    mean, std = config["image_mean"], config["image_std"]
    backbone = PyramidBackbone(tower, mean, std, spec["out_channels"], spec["scales"])
    detector = build_detector(getattr(detection, spec["kind"]), backbone, spec["num_classes"], **spec["options"])
    _load_weights(detector, Path(folder))
    return detector.eval()


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    config: dict[str, Any] = json.loads(file.read_text())
    if config.get("format") != "indiclip-torchvision" or config.get("version") != 1:
        found = f"{config.get('format')} {config.get('version')}"
        raise ValueError(f"{file}: found the format {found}; expected indiclip-torchvision 1")
    return config


def _load_weights(module: nn.Module, folder: Path) -> None:
    try:
        module.load_state_dict(load_file(folder / "model.safetensors"))
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}: the weights are not those of config.json's model: {reason}") from error
