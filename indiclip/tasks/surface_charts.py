"""DensePose charts: what is said of the windows around people, what is true of them, the losses between the two, and
the windows laid into their image.

Frames: image pixels, with (0, 0) the corner of the first pixel; and a window's own, (0, 0) its upper left corner and
(1, 1) its lower right. Cell i of n is centred at (i + 0.5) / n of its window. (detectron2 puts point i / n there, which
is half a cell off.)

Shape letters: see `indiclip.types`; R windows of a batch, S points of a batch or an image, C channels, K = 25 parts (0
is the background), h w cells of a window; Q people of an image.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as rle
from torch import Tensor

from indiclip.ratios import Ratio
from indiclip.types import Rows, on_device

NUM_PARTS = 24
# Of the parts 1 to 24; right and left are the person's, and what has two numbers has two halves.
PART_NAMES = (
    *("torso", "torso", "right hand", "left hand", "left foot", "right foot"),
    *("right upper leg", "left upper leg") * 2,
    *("right lower leg", "left lower leg") * 2,
    *("left upper arm", "right upper arm") * 2,
    *("left lower arm", "right lower arm") * 2,
    *("head", "head"),
)


class Charts(NamedTuple):
    """What the network says of R windows: logits of the mask (R, 2 or 15, h, w) and of the parts (R, K, h, w), and U
    and V for every part (R, K, h, w), unbounded.
    """

    coarse_logits: Tensor
    part_logits: Tensor
    u: Tensor
    v: Tensor

    @classmethod
    def split(cls, maps_RChw: Tensor, coarse_classes: int) -> "Charts":
        return cls(*torch.split(maps_RChw, [coarse_classes, *[NUM_PARTS + 1] * 3], dim=1))

    def doubled(self) -> "Charts":
        """Twice the cells a side, bilinear."""
        return Charts(*(F.interpolate(m, scale_factor=2, mode="bilinear", align_corners=False) for m in self))

    def decode(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores (R,), mask probabilities (R, h, w), parts (R, h, w) uint8 and (U, V) of those (R, 2, h, w)."""
        mask_probs = 1 - self.coarse_logits.softmax(1)[:, 0]
        on_Rhw = self.coarse_logits.argmax(1) > 0
        # The mask alone says what is background: points are annotated on bodies, so part 0 was never a target.
        part_R1hw = self.part_logits[:, 1:].argmax(1, keepdim=True) + 1
        uv = torch.cat([self.u.gather(1, part_R1hw), self.v.gather(1, part_R1hw)], 1).clamp(0, 1)
        scores = (mask_probs * on_Rhw).sum((1, 2)) / on_Rhw.sum((1, 2)).clamp(min=1)
        return scores, mask_probs, (part_R1hw[:, 0] * on_Rhw).to(torch.uint8), uv * on_Rhw[:, None]


class People(NamedTuple):
    """The annotations of a batch, relative to R windows.

    Attributes:
        coarse_Rhw: Mask class of each cell, -1 where unknown.
        person_S: Window of each point.
        xy_S2: Its place in the window; outside of [0, 1] where a jittered window does not hold it.
        part_S: 1..24.
        uv_S2: In [0, 1].
    """

    coarse_Rhw: Tensor
    person_S: Tensor
    xy_S2: Tensor
    part_S: Tensor
    uv_S2: Tensor

    @classmethod
    def of(cls, targets: dict[str, Any], windows_R4: Tensor, size_R2: Tensor, size: int) -> "People":
        """Collect a batch, given one window per person.

        Args:
            targets: The batch's.
            windows_R4: In pixels.
            size_R2: Height and width of each one's image.
            size: Number of cells along the side of a window.
        """
        masks = targets.get("dp_masks")
        if masks is None:
            coarse_Rhw = torch.full((len(windows_R4), size, size), -1, device=windows_R4.device)
        else:
            known_R11 = on_device(masks.known, windows_R4.device)[masks.image_R, None, None]
            coarse_Rhw = torch.where(known_R11, coarse_targets(masks.values, windows_R4, size, size_R2), -1)
        values = {name: rows.values for name, rows in targets.items() if isinstance(rows, Rows)}
        xy_S2, person_S, part_S, uv_S2 = points_of(values, windows_R4.device)
        return cls(coarse_Rhw, person_S, to_window(xy_S2, windows_R4[person_S]), part_S, uv_S2)


def chart_losses(charts: Charts, people: People) -> dict[str, Ratio]:
    """The four losses of detectron2's DensePoseChartLoss, without their weights, as sums to be divided.

    `coarse`: mean cross-entropy of the mask classes over all annotated cells. `part`: mean cross-entropy of the part
    over the points. `u`, `v`: smooth L1 of the annotated part's U and V over the points. Maps are read at points
    bilinearly; points outside of their window do not count.

    detectron2 sums u and v over the points (times 0.01), so that their share grows with the number of people and of
    points in the batch, while the other two are means. Here all are means: the balance of the tasks of a step must not
    depend on how crowded its images are. The weight 5 is 0.01 times 500 points, about five people of COCO DensePose.
    """
    coarse = F.cross_entropy(charts.coarse_logits, people.coarse_Rhw, ignore_index=-1, reduction="sum")
    inside_S = ((people.xy_S2 >= 0) & (people.xy_S2 <= 1)).all(1).float()
    num_points = inside_S.sum()
    values_SC = read_at(torch.cat([charts.part_logits, charts.u, charts.v], 1), people.person_S, people.xy_S2)
    logits_SK, u_SK, v_SK = torch.split(values_SC, NUM_PARTS + 1, dim=1)
    part_S1 = people.part_S[:, None]
    own_uv_S2 = torch.cat([u_SK.gather(1, part_S1), v_SK.gather(1, part_S1)], 1)
    part_loss_S = F.cross_entropy(logits_SK, people.part_S, reduction="none")
    uv_loss_S2 = F.smooth_l1_loss(own_uv_S2, people.uv_S2, reduction="none")
    of_points = {"part": part_loss_S, "u": uv_loss_S2[:, 0], "v": uv_loss_S2[:, 1]}
    losses = {name: Ratio((loss_S * inside_S).sum(), num_points) for name, loss_S in of_points.items()}
    return {"coarse": Ratio(coarse, (people.coarse_Rhw >= 0).sum()), **losses}


def to_window(xy_S2: Tensor, boxes_S4: Tensor) -> Tensor:
    """Image pixels -> the window's frame, in which the box is [0, 1] x [0, 1]."""
    return (xy_S2 - boxes_S4[:, :2]) / (boxes_S4[:, 2:] - boxes_S4[:, :2])


def read_at(maps_RChw: Tensor, person_S: Tensor, xy_S2: Tensor) -> Tensor:
    """Maps at points of their windows, (S, C): bilinear between the centres of cells, constant beyond the outer ones.

    Rows of a table are gathered, because `grid_sample` would need the same number of points in every window.
    """
    h, w = maps_RChw.shape[-2:]
    table = maps_RChw.permute(0, 2, 3, 1).flatten(0, 2)  # no copy in channels-last memory
    x_S, y_S = (xy_S2[:, 0] * w - 0.5).clamp(0, w - 1), (xy_S2[:, 1] * h - 0.5).clamp(0, h - 1)
    left_S, top_S = x_S.long(), y_S.long()
    right_S, bottom_S = (left_S + 1).clamp(max=w - 1), (top_S + 1).clamp(max=h - 1)
    dx_S1, dy_S1 = (x_S - left_S)[:, None], (y_S - top_S)[:, None]

    def rows(y_S: Tensor, x_S: Tensor) -> Tensor:
        return table.index_select(0, (person_S * h + y_S) * w + x_S)

    upper_SC = rows(top_S, left_S) * (1 - dx_S1) + rows(top_S, right_S) * dx_S1
    lower_SC = rows(bottom_S, left_S) * (1 - dx_S1) + rows(bottom_S, right_S) * dx_S1
    return upper_SC * (1 - dy_S1) + lower_SC * dy_S1


def coarse_targets(masks_RHW: Tensor, boxes_R4: Tensor, size: int, size_R2: Tensor) -> Tensor:
    """int64 (R, size, size): the mask's class at the pixel under each cell's centre.

    Args:
        masks_RHW: One for each box; may be padded.
        boxes_R4: In pixels.
        size: Number of cells along a side.
        size_R2: Height and width of each one's image.
    """
    centres_w = (torch.arange(size, device=boxes_R4.device) + 0.5) / size
    low_R2, sides_R2 = boxes_R4[:, :2, None], (boxes_R4[:, 2:] - boxes_R4[:, :2])[..., None]
    pixels_R2w = (low_R2 + sides_R2 * centres_w).long().clamp(min=0)
    x_Rw, y_Rw = torch.minimum(pixels_R2w, size_R2.flip(-1)[..., None] - 1).unbind(1)
    person_R11 = torch.arange(len(boxes_R4), device=boxes_R4.device)[:, None, None]
    return masks_RHW[person_R11, y_Rw[:, :, None], x_Rw[:, None]].long()


def points_of(target: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Place (S, 2), person (S,), part (S,) and (U, V) (S, 2) of the points; S is 0 where there are none."""
    values = [target.get(name) for name in ("dp_points_xy", "dp_person", "dp_part", "dp_uv")]
    if any(value is None for value in values):
        values = [torch.zeros(0, *shape) for shape in ((2,), (), (), (2,))]
    xy_S2, person_S, part_S, uv_S2 = (value.to(device, non_blocking=True) for value in values if value is not None)
    return xy_S2.float(), person_S.long(), part_S.long(), uv_S2.float()


def read_cells(prediction: dict[str, Any], xy_S2: Tensor, person_S: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted part (S,) and (U, V) (S, 2) of the cell that each point of an image lies in."""
    part_Qhw = prediction["part"]
    h, w = part_Qhw.shape[-2:]
    place_S2 = to_window(xy_S2, prediction["boxes_xyxy"][person_S])
    x_S, y_S = (place_S2[:, 0] * w).long().clamp(0, w - 1), (place_S2[:, 1] * h).long().clamp(0, h - 1)
    return part_Qhw[person_S, y_S, x_S].long(), prediction["uv"][person_S, :, y_S, x_S]


def paste(prediction: dict[str, Any], size_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Lay the windows of an image into it; where people overlap, the higher score lies on top.

    Returns:
        part uint8 (H, W), 0 off people, and uv (H, W, 2). A pixel takes the cell under its centre.
    """
    height, width = size_hw
    parts_Qhw, uv_Qhw2 = prediction["part"], prediction["uv"].permute(0, 2, 3, 1)
    part_HW, uv_HW2 = parts_Qhw.new_zeros(height, width), uv_Qhw2.new_zeros(height, width, 2)
    for q in prediction["scores"].argsort().tolist():
        x1, y1, x2, y2 = prediction["boxes_xyxy"][q].tolist()
        rows, y_H = _pixels(y1, y2, height, parts_Qhw.shape[1])
        columns, x_W = _pixels(x1, x2, width, parts_Qhw.shape[2])
        cells = (q, y_H[:, None], x_W)
        on_HW = parts_Qhw[cells] > 0
        part_HW[rows, columns][on_HW] = parts_Qhw[cells][on_HW]
        uv_HW2[rows, columns][on_HW] = uv_Qhw2[cells][on_HW]
    return part_HW, uv_HW2


def part_masks(
    part_hw: Tensor, box_xyxy: tuple[float, float, float, float], size_hw: tuple[int, int]
) -> list[dict[str, Any]]:
    """The parts of one person in an image of this size, see `DensePose.to_json`; pixels as of `paste`."""
    x1, y1, x2, y2 = box_xyxy
    rows, y_H = _pixels(y1, y2, size_hw[0], part_hw.shape[0])
    columns, x_W = _pixels(x1, x2, size_hw[1], part_hw.shape[1])
    part_HW, found = part_hw[y_H[:, None], x_W].numpy(), []
    for number in np.unique(part_HW[part_HW > 0]).tolist():
        mask_HW = np.zeros(size_hw, np.uint8, order="F")
        mask_HW[rows, columns] = part_HW == number
        code = rle.encode(mask_HW)
        segmentation = {"size": code["size"], "counts": code["counts"].decode()}
        found.append({"number": number, "name": PART_NAMES[number - 1], "segmentation": segmentation})
    return found


def _pixels(low: float, high: float, size: int, num_cells: int) -> tuple[slice, Tensor]:
    """The pixels between two sides of a window along one axis of an image, and the cell of the window under each."""
    pixels = slice(max(0, round(low)), min(size, round(high)))
    centres = torch.arange(size)[pixels] + 0.5
    return pixels, ((centres - low) / (high - low) * num_cells).long().clamp(0, num_cells - 1)
