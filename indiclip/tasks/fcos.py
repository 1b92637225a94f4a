"""FCOS on a simple feature pyramid: layers, which cell answers for which box, and the losses.

From one map of the backbone ViTDet's pyramid (Li et al., arXiv:2203.16527, section 3) makes a few scales; at every
cell of every scale FCOS (Tian et al., arXiv:2006.09214) answers with class scores, the distances to the four sides of
a box, and how central the cell is in it. What differs from torchvision's FCOS: an image gives the same answer
whatever lies beside it in the batch (norms are over channels alone, cells outside an image are zero before every
convolution and count nowhere), and nothing waits for the GPU in training.

Shape letters: see `indiclip.types`; A cells of all scales, C classes, R boxes of a batch, M boxes of an image.
"""

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d  # type: ignore[attr-defined]
from torch import Tensor, nn
from torchvision import ops

from indiclip.ratios import Ratio
from indiclip.types import in_float32, on_device

_PRIOR = 0.01  # first score of every class, so that the many empty cells do not swamp the first steps (focal loss)
_TINY = 1e-7  # no division by zero


class Pyramid(nn.Module):
    """ViTDet's simple feature pyramid: every scale straight from the backbone's one map."""

    def __init__(self, width: int, out_channels: int, scales: list[float]) -> None:
        super().__init__()
        self.scales = scales
        self.resize = nn.ModuleList(_resize(width, scale) for scale in scales)
        self.project = nn.ModuleList(
            Masked(
                [
                    ConvNorm(max(width // int(max(scale, 1)), 1), out_channels, kernel_size=1),
                    ConvNorm(out_channels, out_channels, kernel_size=3),
                ]
            )
            for scale in scales
        )

    def forward(self, map_BDHW: Tensor, mask_BHW: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A `(map, mask)` per scale."""
        levels = []
        for scale, resize, project in zip(self.scales, self.resize, self.project, strict=True):
            padding = -torch.inf if scale < 1 else 0.0  # must not win the maximum
            map_BDhw = resize(torch.where(mask_BHW[:, None], map_BDHW, padding))
            rows_h, columns_w = ((torch.arange(n, device=mask_BHW.device) / scale).long() for n in map_BDhw.shape[2:])
            mask_Bhw = mask_BHW[:, rows_h[:, None], columns_w]
            # `masked_fill` would leave the channels-last layout, and with it the fast convolutions.
            map_BDhw = torch.where(mask_Bhw[:, None], map_BDhw, 0)
            levels.append((project(map_BDhw, mask_Bhw), mask_Bhw))
        return levels


class FCOSHead(nn.Module):
    """FCOS' two towers of convolutions, shared by all scales: one for classes, one for boxes and centerness."""

    def __init__(self, channels: int, num_convs: int, num_classes: int) -> None:
        super().__init__()
        self.class_tower = Masked(ConvNorm(channels, channels, 3, act=True) for _ in range(num_convs))
        self.box_tower = Masked(ConvNorm(channels, channels, 3, act=True) for _ in range(num_convs))
        self.class_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.ltrb = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        for layer in (self.class_logits, self.ltrb, self.centerness):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(cast(Tensor, layer.bias))
        nn.init.constant_(cast(Tensor, self.class_logits.bias), -math.log((1 - _PRIOR) / _PRIOR))

    def forward(self, map_BDHW: Tensor, mask_BHW: Tensor) -> "FCOSOutputs":
        boxes_BDHW = self.box_tower(map_BDHW, mask_BHW)
        return FCOSOutputs(
            logits_BAC=_cells(self.class_logits(self.class_tower(map_BDHW, mask_BHW))),
            ltrb_BA4=_cells(self.ltrb(boxes_BDHW)).clamp(max=6).exp(),
            centerness_BA=_cells(self.centerness(boxes_BDHW))[..., 0],
            valid_BA=mask_BHW.flatten(1),
        )


class ConvNorm(nn.Module):
    """Convolution, norm over channels and, if asked, ReLU; zero outside the images."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, act: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = LayerNorm2d(out_channels)
        self.act = act

    def forward(self, map_BDHW: Tensor, mask_BHW: Tensor) -> Tensor:
        map_BDHW = self.norm(self.conv(map_BDHW)) * mask_BHW[:, None]
        return F.relu(map_BDHW) if self.act else map_BDHW


class Masked(nn.ModuleList):
    """Layers one after the other, each of which gets the mask."""

    def forward(self, map_BDHW: Tensor, mask_BHW: Tensor) -> Tensor:
        for layer in self:
            map_BDHW = layer(map_BDHW, mask_BHW)
        return map_BDHW


class FCOSOutputs(NamedTuple):
    """What the towers say, in float32.

    Attributes:
        logits_BAC: Of the classes.
        ltrb_BA4: Distances from the cell's centre to the box's left, top, right, bottom, in strides; positive.
        centerness_BA: Its logit.
        valid_BA: False for cells outside the image.
    """

    logits_BAC: Tensor
    ltrb_BA4: Tensor
    centerness_BA: Tensor
    valid_BA: Tensor


class Locations(NamedTuple):
    """The cells of all scales.

    Attributes:
        centres_A2: (x, y) in pixels.
        strides_A: Side of a cell in pixels; not whole where a scale above 1 divides an odd stride.
        reach_A2: The least and the most distance to a box's furthest side that the cell answers for, in strides.
    """

    centres_A2: Tensor
    strides_A: Tensor
    reach_A2: Tensor

    def ltrb(self, boxes_XA4: Tensor) -> Tensor:
        """Distances (X, A, 4) from every cell's centre to a box's sides, in strides; positive inside.

        Args:
            boxes_XA4: A box for each cell, or (X, 1, 4), one for all of them.
        """
        low_XA2, high_XA2 = self.centres_A2 - boxes_XA4[..., :2], boxes_XA4[..., 2:] - self.centres_A2
        return torch.cat([low_XA2, high_XA2], -1) / self.strides_A[:, None]

    def boxes(self, ltrb_A4: Tensor) -> Tensor:
        """The inverse: one box (x1, y1, x2, y2) per cell."""
        reach_A4 = ltrb_A4 * self.strides_A[:, None]
        return torch.cat([self.centres_A2 - reach_A4[:, :2], self.centres_A2 + reach_A4[:, 2:]], -1)


def make_locations(
    sizes_hw: list[tuple[int, int]], strides: list[float], reach: float, device: torch.device
) -> Locations:
    """The locations of maps of these sizes and strides, finest first."""
    centres, of_cells = [], []
    for level, (size_hw, stride) in enumerate(zip(sizes_hw, strides, strict=True)):
        y_H, x_W = ((torch.arange(n, device=device) + 0.5) * stride for n in size_hw)
        centres.append(torch.cartesian_prod(y_H, x_W).flip(-1))
        least = reach * strides[level - 1] / stride if level else 0.0
        most = reach if level < len(strides) - 1 else math.inf
        of_cells.append(on_device([stride, least, most], device).expand(len(centres[-1]), 3))
    numbers_A3 = torch.cat(of_cells)
    return Locations(torch.cat(centres), numbers_A3[:, 0], numbers_A3[:, 1:])


def assign(
    locations: Locations, boxes_R4: Tensor, classes_R: Tensor, crowd_R: Tensor, index_BM: Tensor, radius: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Which box every cell of each image answers for: the smallest whose centre is near and whose size suits.

    Args:
        locations: The cells, the same for all images.
        boxes_R4: The boxes of all images.
        classes_R: -1 for those that are background.
        crowd_R: Whether each is a crowd.
        index_BM: The boxes of each image, R where there is none, see `Rows`.
        radius: How near, in strides.

    Returns:
        `(classes_BA, ltrb_BA4, ignored_BA)`: class, -1 for background; distances to the box's sides (1 for background);
        whether the cell lies in a crowd and so is neither.
    """
    ltrb_RA4 = locations.ltrb(boxes_R4[:, None])
    inside_RA = (ltrb_RA4.amin(-1) > 0) & (classes_R >= 0)[:, None]
    off_centre_RA = (ltrb_RA4[..., :2] - ltrb_RA4[..., 2:]).abs().amax(-1) / 2
    furthest_RA = ltrb_RA4.amax(-1)
    suits_RA = (furthest_RA > locations.reach_A2[:, 0]) & (furthest_RA <= locations.reach_A2[:, 1])
    match_RA = inside_RA & suits_RA & (off_centre_RA < radius) & ~crowd_R[:, None]
    area_R1 = (boxes_R4[:, 2:] - boxes_R4[:, :2]).prod(-1, keepdim=True)
    # One row more, for images with fewer boxes than the most; and one box, so that there is a smallest one without any.
    area_RA = F.pad(torch.where(match_RA, area_R1, torch.inf), (0, 0, 0, 1), value=torch.inf)
    index_BM = F.pad(index_BM, (0, 1), value=len(boxes_R4))
    least_BA, place_BA = area_RA[index_BM].min(1)
    positive_BA, box_BA = least_BA < torch.inf, index_BM.gather(1, place_BA)
    classes_BA = torch.where(positive_BA, F.pad(classes_R, (0, 1))[box_BA], -1)
    ltrb_BA4 = locations.ltrb(F.pad(boxes_R4, (0, 0, 0, 1))[box_BA])
    in_crowd_RA = F.pad(inside_RA & crowd_R[:, None], (0, 0, 0, 1))
    ignored_BA = in_crowd_RA[index_BM].any(1) & ~positive_BA
    return classes_BA, torch.where(positive_BA[..., None], ltrb_BA4, 1.0), ignored_BA


def fcos_losses(outputs: FCOSOutputs, classes_BA: Tensor, ltrb_BA4: Tensor, ignored_BA: Tensor) -> dict[str, Ratio]:
    """Focal loss of the classes, generalised IoU of the boxes and cross-entropy of the centerness (FCOS, section 3).

    All are sums over the batch, to be divided by the number of positive cells. Every cell takes part with a weight of
    0 or 1, so that no index has to be known on the host and every parameter gets a gradient, if only zero.
    """
    positive_BA = (classes_BA >= 0) & outputs.valid_BA
    counted_BA = outputs.valid_BA & ~ignored_BA
    num_positive = positive_BA.sum()
    classes_C = torch.arange(outputs.logits_BAC.shape[-1], device=classes_BA.device)
    one_hot_BAC = (classes_BA[..., None] == classes_C).to(outputs.logits_BAC.dtype)  # F.one_hot reads them on a CPU
    focal_BAC = ops.sigmoid_focal_loss(outputs.logits_BAC, one_hot_BAC)
    box_BA = giou_loss(outputs.ltrb_BA4, ltrb_BA4)
    across_BA22 = ltrb_BA4.reshape(*ltrb_BA4.shape[:2], 2, 2)  # (left, top), (right, bottom)
    centerness_BA = (across_BA22.amin(-2) / across_BA22.amax(-2)).prod(-1).sqrt()
    cross_entropy_BA = F.binary_cross_entropy_with_logits(outputs.centerness_BA, centerness_BA, reduction="none")
    return {
        "classification": Ratio((focal_BAC.sum(-1) * counted_BA).sum(), num_positive),
        "box": Ratio((box_BA * positive_BA).sum(), num_positive),
        "centerness": Ratio((cross_entropy_BA * positive_BA).sum(), num_positive),
    }


def giou_loss(ltrb_BA4: Tensor, gt_ltrb_BA4: Tensor) -> Tensor:
    """1 less the generalised IoU (Rezatofighi et al., arXiv:1902.09630) of boxes around the same point, (B, A).

    In strides: overlap is the same at any place and size. torchvision's indexes by a mask and so waits for the GPU.
    """
    # In this order, gradients too are torchvision's to the last bit.
    around_BA = _area(torch.maximum(ltrb_BA4, gt_ltrb_BA4))
    both_BA = _area(torch.minimum(ltrb_BA4, gt_ltrb_BA4))
    either_BA = _area(ltrb_BA4) + _area(gt_ltrb_BA4) - both_BA
    return 1 - (both_BA / (either_BA + _TINY) - (around_BA - either_BA) / (around_BA + _TINY))


def _area(ltrb_BA4: Tensor) -> Tensor:
    left, top, right, bottom = ltrb_BA4.unbind(-1)
    return (left + right) * (top + bottom)  # `prod` would wait for the GPU on the way back


def _cells(map_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C) in float32: box arithmetic in bfloat16 would be off by pixels."""
    return in_float32(map_BCHW.permute(0, 2, 3, 1).flatten(1, 2))


def _resize(width: int, scale: float) -> nn.Module:
    """From the backbone's map to one scale of the pyramid (ViTDet, section 3: transposed convolution, max-pooling)."""
    if scale < 1:
        return nn.MaxPool2d(round(1 / scale), ceil_mode=True)
    layers: list[nn.Module] = []
    for step in range(int(math.log2(scale))):
        layers += [LayerNorm2d(width), nn.GELU()] if step else []
        layers.append(nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2))
        width //= 2
    return nn.Sequential(*layers)
