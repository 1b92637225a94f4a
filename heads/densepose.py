"""DensePose charts: for every pixel of a person which of 24 body parts it shows, and where (U, V) on that part.

The head of DensePose R-CNN (Güler et al., CVPR 2018, arXiv:1802.00434; detectron2's DensePoseV1ConvXHead): a window
around each person (RoI), a few convolutions, one transposed convolution to a person mask (coarse), parts, U and V.
Four things differ, all because one map of patches feeds it instead of a pyramid:
    - each token first gives a fine map of `upscale` x `upscale` cells, so that parts smaller than a patch can be told
      apart; this is also where the width is reduced, once per image and not once per person;
    - a learned table is added to every window: where in the box a cell lies says much about the part;
    - the losses read the maps before the last, bilinear, doubling (an eighth of the time); the doubling has no
      parameters, and to a point between cells it gives the same value up to the kinks at cell centres;
    - U and V losses are means over points, not sums (see `chart_losses`).

Frames: image pixels, with (0, 0) the corner of the first pixel; and a window's own, (0, 0) its upper left corner and
(1, 1) its lower right. Cell i of n is centred at (i + 0.5) / n of its window. (detectron2 puts point i / n there, which
is half a cell off.)

Shape letters: see `indiclip.types`; R windows of a batch, Q people of an image, S points of either, C channels,
K = 25 parts (0 is the background), h w cells of a window, k x k cells of a token on the fine map.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics
from PIL import Image
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import roi_align

from indiclip.head import Head, Losses
from indiclip.types import Batch, Features, Rows, on_device, targets_of

if TYPE_CHECKING:
    from indiclip.encoder import Encoder

NUM_PARTS = 24
KAPPA = 0.255  # of the geodesic point similarity, in the paper's section 3
MAX_JITTER = 0.08  # all sides moved inwards leave (1 - 2 * 0.08) ** 2 = 0.706 of the box: IoU > 0.7, as in detectron2


class DensePose(Head):
    """Body surfaces of people whose boxes are given.

    Training and evaluation use the ground-truth boxes of the batch (`dp_boxes_xyxy`); `surfaces` takes any boxes, e.g.
    a detector's.

    Args:
        task: Which batch it reads.
        weight: Factor of its losses.
        roi_size: Side in cells of a person's window (28 in detectron2; 14 for small images). Losses are taken at
            twice, predictions given at four times this.
        channels: Width of the convolutions (512 in detectron2).
        num_convs: How many 3x3 convolutions (8 in detectron2).
        upscale: Cells per side that a token gives on the fine map. At patch 8, 2 did better than 1, 4 and 8: cells of 4
            pixels, which is 4 at patch 16.
        coarse_classes: 2 for person or not, or 15 for DensePose's coarse parts; then `dp_masks` holds 0..14.
        box_jitter: In training each side of a box moves by up to this part of the box's size, at most 0.08.
        coarse_weight: Factor of the mask loss (detectron2: 5).
        part_weight: Factor of the part loss (detectron2: 1).
        uv_weight: Factor of the U and the V loss, means over the points.
        name: See `Head`.

    Raises:
        ValueError: A setting out of its range.
    """

    step: Tensor

    required_fields = predict_fields = ("dp_boxes_xyxy",)
    no_flip = "a mirrored body needs the symmetry table, which is not part of IndiCLIP"
    embeds_images = embeds_text = False

    def __init__(
        self,
        task: str = "densepose",
        weight: float = 1.0,
        roi_size: int = 28,
        channels: int = 512,
        num_convs: int = 8,
        upscale: int = 4,
        coarse_classes: int = 2,
        box_jitter: float = 0.0,
        coarse_weight: float = 5.0,
        part_weight: float = 1.0,
        uv_weight: float = 5.0,
        name: str | None = None,
    ) -> None:
        super().__init__(task, weight, name)
        if coarse_classes not in (2, 15):
            raise ValueError(f"heads.densepose.coarse_classes: {coarse_classes}; expected 2 (person or not) or 15")
        if not 0 <= box_jitter <= MAX_JITTER:
            raise ValueError(f"heads.densepose.box_jitter: {box_jitter}; expected 0 to {MAX_JITTER} (IoU above 0.7)")
        if min(roi_size, channels, num_convs, upscale) < 1:
            raise ValueError("heads.densepose: roi_size, channels, num_convs and upscale must be at least 1")
        self.roi_size, self.channels, self.num_convs, self.upscale = roi_size, channels, num_convs, upscale
        self.coarse_classes, self.box_jitter = coarse_classes, box_jitter
        self.loss_weights = {"coarse": coarse_weight, "part": part_weight, "u": uv_weight, "v": uv_weight}
        # Saved with the weights: the jitter of step n is the same after a resume. On the device, so never waited for.
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def bind(self, encoder: Encoder) -> None:
        self.fine = nn.ConvTranspose2d(encoder.backbone.width, self.channels, self.upscale, stride=self.upscale)
        self.norm = LayerNorm2d(self.channels)  # over channels alone: no cell sees another one's statistics
        self.position_CHW = nn.Parameter(torch.zeros(self.channels, self.roi_size, self.roi_size))
        convs = [nn.Conv2d(self.channels, self.channels, 3, padding=1) for _ in range(self.num_convs)]
        self.convs = nn.ModuleList(convs)
        self.charts = nn.ConvTranspose2d(self.channels, self.coarse_classes + 3 * (NUM_PARTS + 1), 4, 2, padding=1)
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.charts.weight, std=0.01)  # classes start undecided,
        is_uv = torch.arange(self.charts.out_channels) >= self.coarse_classes + NUM_PARTS + 1
        self.charts.bias = nn.Parameter(0.5 * is_uv)  # U and V in the middle of their range
        self.metric = SurfaceMetric()

    def forward(self, features: Features, windows_R4: Tensor, image_R: Tensor) -> Charts:
        """Maps of windows, in pixels of the images that `image_R` numbers."""
        map_BDHW, mask_BHW = features.map()
        fine_BCHW = F.relu(self.norm(self.fine(map_BDHW)))
        if features.valid_BN is not None:
            fine_BCHW = _extend(fine_BCHW, mask_BHW, self.upscale)
        scale = self.upscale / features.stride
        # In float32: pixel coordinates in bfloat16 would be off by whole patches.
        rois_R5 = torch.cat([image_R[:, None], windows_R4], 1)
        x_RChw = roi_align(fine_BCHW.float(), rois_R5, self.roi_size, scale, sampling_ratio=2, aligned=True)
        x_RChw = x_RChw.to(fine_BCHW.dtype) + self.position_CHW
        x_RChw = x_RChw.contiguous(memory_format=torch.channels_last)
        for conv in self.convs:
            x_RChw = F.relu(conv(x_RChw))
        return Charts.split(self.charts(x_RChw).float(), self.coarse_classes)

    def loss(self, features: Features, batch: Batch, encoder: Encoder) -> Losses:
        """`coarse`, `part`, `u`, `v`; zero, with zero gradients, where nothing is annotated.

        A batch without people needs no special case: convolutions of no windows have gradients, zeros.
        """
        boxes = self.target(batch, "dp_boxes_xyxy")
        size_R2 = on_device(batch["images"]["sizes_hw"], boxes.values.device)[boxes.image_R]
        windows_R4 = _inside(boxes.values.float(), size_R2)
        if self.training and self.box_jitter:
            windows_R4 = jitter(windows_R4, size_R2, self.box_jitter, self.step)
            self.step += 1
        people = People.of(batch["targets"], windows_R4, size_R2, self.roi_size * 2)
        losses = chart_losses(self(features, windows_R4, boxes.image_R), people)
        return Losses({name: self.loss_weights[name] * loss for name, loss in losses.items()})

    def predict(self, features: Features, batch: Batch, encoder: Encoder) -> list[dict[str, Any]]:
        """`surfaces` of the ground-truth boxes."""
        boxes = self.target(batch, "dp_boxes_xyxy")
        size_R2 = on_device(batch["images"]["sizes_hw"], boxes.values.device)[boxes.image_R]
        windows_R4 = _inside(boxes.values.float(), size_R2)
        return self.surfaces(features, list(torch.split(windows_R4, boxes.counts)))

    def surfaces(self, features: Features, boxes: list[Tensor]) -> list[dict[str, Any]]:
        """The surface of each person.

        Args:
            boxes: Per image (Q, 4) in the resized image's pixels.

        Returns:
            Per image `boxes_xyxy` (Q, 4); `scores` (Q,), mean probability of the cells that are on the person, 0 where
            none is; and over the window, of 4 `roi_size` cells a side, `mask_probs` (Q, h, w), `part` uint8 (Q, h, w)
            with 0 off the person, `uv` (Q, 2, h, w) in [0, 1] of that part. `paste` lays them into the image.
        """
        counts = [len(boxes_Q4) for boxes_Q4 in boxes]
        image_R = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(boxes[0].device)
        charts = self(features, torch.cat(boxes), image_R).doubled()
        decoded = [torch.split(value, counts) for value in charts.decode()]
        names = ("scores", "mask_probs", "part", "uv")
        return [
            {"boxes_xyxy": boxes_Q4} | dict(zip(names, values, strict=True))
            for boxes_Q4, *values in zip(boxes, *decoded, strict=True)
        ]

    def update_metric(self, predictions: list[dict[str, Any]], features: Features, batch: Batch) -> None:
        assert isinstance(self.metric, SurfaceMetric)
        for i, prediction in enumerate(predictions):
            self.metric.update(prediction, targets_of(batch, i))

    def visualize(
        self, image_HW3: np.ndarray, prediction: dict[str, Any], target: dict[str, Any], class_names: Sequence[str] = ()
    ) -> tuple[np.ndarray, str]:
        """Predicted surfaces on the left, annotated points on the right; a part's colour is darker where U is small
        and paler where V is large.
        """
        zoom = max(1, -(-320 // max(image_HW3.shape[:2])))
        part_HW, uv_HW2 = paste(prediction, (image_HW3.shape[0], image_HW3.shape[1]))
        big = np.array(Image.fromarray(image_HW3).resize((image_HW3.shape[1] * zoom, image_HW3.shape[0] * zoom)))
        right = big.copy()
        part, uv = (value.cpu().numpy().repeat(zoom, 0).repeat(zoom, 1) for value in (part_HW, uv_HW2))
        on = part > 0
        big[on] = 0.3 * big[on] + 0.7 * _shades(part[on], uv[on])
        count = len(prediction["part"])
        text = "1 person" if count == 1 else f"{count} people"
        xy_S2, person_S, part_S, uv_S2 = _points(target, prediction["part"].device)
        if len(part_S):
            colours = _shades(part_S.cpu().numpy(), uv_S2.cpu().numpy())
            for (x, y), colour in zip((xy_S2 * zoom).long().tolist(), colours, strict=True):
                right[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = colour
            found_S, _ = _read(prediction, xy_S2, person_S)
            text += f"; part right at {float((found_S == part_S).float().mean()):.0%} of {len(part_S)} points"
        return np.concatenate([big, right], axis=1), text


@dataclass
class Charts:
    """What the network says of R windows: logits of the mask (R, 2 or 15, h, w) and of the parts (R, K, h, w), and U
    and V for every part (R, K, h, w), unbounded.
    """

    coarse_logits: Tensor
    part_logits: Tensor
    u: Tensor
    v: Tensor

    @classmethod
    def split(cls, maps_RChw: Tensor, coarse_classes: int) -> Charts:
        return cls(*torch.split(maps_RChw, [coarse_classes, *[NUM_PARTS + 1] * 3], dim=1))

    def doubled(self) -> Charts:
        """Twice the cells a side, bilinear."""
        maps = (self.coarse_logits, self.part_logits, self.u, self.v)
        return Charts(*(F.interpolate(m, scale_factor=2, mode="bilinear", align_corners=False) for m in maps))

    def decode(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores (R,), mask probabilities (R, h, w), parts (R, h, w) uint8 and (U, V) of those (R, 2, h, w)."""
        mask_probs = 1 - self.coarse_logits.softmax(1)[:, 0]
        on_Rhw = self.coarse_logits.argmax(1) > 0
        # The mask alone says what is background: points are annotated on bodies, so part 0 was never a target.
        part_R1hw = self.part_logits[:, 1:].argmax(1, keepdim=True) + 1
        uv = torch.cat([self.u.gather(1, part_R1hw), self.v.gather(1, part_R1hw)], 1).clamp(0, 1)
        scores = (mask_probs * on_Rhw).sum((1, 2)) / on_Rhw.sum((1, 2)).clamp(min=1)
        return scores, mask_probs, (part_R1hw[:, 0] * on_Rhw).to(torch.uint8), uv * on_Rhw[:, None]


@dataclass
class People:
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
    def of(cls, targets: dict[str, Any], windows_R4: Tensor, size_R2: Tensor, size: int) -> People:
        """Collect a batch, given one window per person.

        Args:
            targets: The batch's.
            windows_R4: In pixels.
            size_R2: Height and width of each one's image.
            size: Number of cells along the side of a window.
        """
        masks = targets.get("dp_masks")
        coarse_Rhw = coarse_targets(None if masks is None else masks.values, windows_R4, size, size_R2)
        if masks is not None and not all(masks.known):
            known_R = on_device(masks.known, coarse_Rhw.device)[masks.image_R]
            coarse_Rhw = torch.where(known_R[:, None, None], coarse_Rhw, -1)
        values = {name: rows.values for name, rows in targets.items() if isinstance(rows, Rows)}
        xy_S2, person_S, part_S, uv_S2 = _points(values, windows_R4.device)
        return cls(coarse_Rhw, person_S, to_window(xy_S2, windows_R4[person_S]), part_S, uv_S2)


def chart_losses(charts: Charts, people: People) -> dict[str, Tensor]:
    """The four losses of detectron2's DensePoseChartLoss, without their weights.

    `coarse`: mean cross-entropy of the mask classes over all annotated cells. `part`: mean cross-entropy of the part
    over the points. `u`, `v`: smooth L1 of the annotated part's U and V over the points. Maps are read at points
    bilinearly; points outside of their window do not count.

    detectron2 sums u and v over the points (times 0.01), so that their share grows with the number of people and of
    points in the batch, while the other two are means. Here all are means: the balance of the tasks of a step must not
    depend on how crowded its images are. The weight 5 is 0.01 times 500 points, about five people of COCO DensePose.
    """
    coarse = F.cross_entropy(charts.coarse_logits, people.coarse_Rhw, ignore_index=-1, reduction="sum")
    inside_S = ((people.xy_S2 >= 0) & (people.xy_S2 <= 1)).all(1).float()
    num_points = inside_S.sum().clamp(min=1)
    values_SC = read_at(torch.cat([charts.part_logits, charts.u, charts.v], 1), people.person_S, people.xy_S2)
    logits_SK, u_SK, v_SK = torch.split(values_SC, NUM_PARTS + 1, dim=1)
    part_S = F.cross_entropy(logits_SK, people.part_S, reduction="none")
    losses = {
        "coarse": coarse / (people.coarse_Rhw >= 0).sum().clamp(min=1),
        "part": (part_S * inside_S).sum() / num_points,
    }
    for name, values_SK, target_S in (("u", u_SK, people.uv_S2[:, 0]), ("v", v_SK, people.uv_S2[:, 1])):
        own_S = values_SK.gather(1, people.part_S[:, None])[:, 0]
        losses[name] = (F.smooth_l1_loss(own_S, target_S, reduction="none") * inside_S).sum() / num_points
    return losses


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


def coarse_targets(masks_RHW: Tensor | None, boxes_R4: Tensor, size: int, size_R2: Tensor) -> Tensor:
    """int64 (R, size, size): the mask's class at the pixel under each cell's centre; -1 all over without masks.

    Args:
        masks_RHW: One for each box; may be padded.
        boxes_R4: In pixels.
        size: Number of cells along a side.
        size_R2: Height and width of each one's image.
    """
    if masks_RHW is None:
        return torch.full((len(boxes_R4), size, size), -1, device=boxes_R4.device)
    centres_w = (torch.arange(size, device=boxes_R4.device) + 0.5) / size
    low_R2, sides_R2 = boxes_R4[:, :2, None], (boxes_R4[:, 2:] - boxes_R4[:, :2])[..., None]
    pixels_R2w = (low_R2 + sides_R2 * centres_w).long().clamp(min=0)
    x_Rw, y_Rw = torch.minimum(pixels_R2w, size_R2.flip(-1)[..., None] - 1).unbind(1)
    person_R11 = torch.arange(len(boxes_R4), device=boxes_R4.device)[:, None, None]
    return masks_RHW[person_R11, y_Rw[:, :, None], x_Rw[:, None]].long()


def jitter(boxes_R4: Tensor, size_R2: Tensor, amount: float, step: Tensor) -> Tensor:
    """Move each side of each box by up to `amount` of the box's size, within its image of height and width `size_R2`.

    The moves are a low-discrepancy sequence (Roberts 2018, "The unreasonable effectiveness of quasirandom sequences";
    additive recurrence with powers of the root of x^5 = x + 1), a function of the step and the box's number: a resumed
    run moves as the uninterrupted one would, which global random numbers do not give.
    """
    # Fractions as whole numbers of 2 ** -24: exact at any step, on devices without float64 too.
    powers_4 = on_device([round(1.1673039782614187**-n * 2**24) for n in range(1, 5)], step.device)
    number_R = torch.arange(len(boxes_R4), device=step.device) + step * 1009
    move_R4 = ((number_R[:, None] * powers_4 % 2**24).to(boxes_R4) / 2**23 - 1) * amount
    sides_R2 = boxes_R4[:, 2:] - boxes_R4[:, :2]
    return _inside(boxes_R4 + move_R4 * sides_R2.repeat(1, 2), size_R2)


def paste(prediction: dict[str, Any], size_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Lay the windows of an image into it; where people overlap, the higher score lies on top.

    Returns:
        part uint8 (H, W), 0 off people, and uv (H, W, 2). A pixel takes the cell under its centre.
    """
    height, width = size_hw
    part_HW = torch.zeros(height, width, dtype=torch.uint8, device=prediction["part"].device)
    uv_HW2 = torch.zeros(height, width, 2, device=part_HW.device)
    h, w = prediction["part"].shape[-2:]
    for q in prediction["scores"].argsort().tolist():
        x1, y1, x2, y2 = prediction["boxes_xyxy"][q].tolist()
        columns = torch.arange(max(0, round(x1)), min(width, round(x2)), device=part_HW.device)
        rows = torch.arange(max(0, round(y1)), min(height, round(y2)), device=part_HW.device)
        x = ((columns + 0.5 - x1) / (x2 - x1) * w).long().clamp(0, w - 1)
        y = ((rows + 0.5 - y1) / (y2 - y1) * h).long().clamp(0, h - 1)[:, None]
        found = prediction["part"][q][y, x]
        window = (rows[:, None], columns)
        part_HW[window] = torch.where(found > 0, found, part_HW[window])
        uv = prediction["uv"][q][:, y, x].permute(1, 2, 0)
        uv_HW2[window] = torch.where(found[..., None] > 0, uv, uv_HW2[window])
    return part_HW, uv_HW2


class SurfaceMetric(torchmetrics.Metric):
    """How well surfaces fit the annotated points, with the ground-truth boxes: one prediction per annotated person.

    The predicted part, U and V at a point are those of the window's cell that it lies in: what is scored is what
    `predict` hands out. `compute` gives
        part_accuracy: share of the points whose part is right; a point off the predicted person is wrong.
        uv_error: mean distance in (U, V) over the points whose part is right; 1 where there is none.
        mask_iou: mean over people of the overlap of predicted and annotated mask, cell by cell of the window.
        uv_gps: average precision over the thresholds 0.50, 0.55, ... 0.95, and uv_gps_50, uv_gps_75 at one, of the
            similarity mean_points exp(-d^2 / (2 kappa^2)) of a person; d is the distance in (U, V), and infinite where
            the part is wrong. GPS proper takes the distance along the body's surface, from tables that the user would
            have to download, so that numbers here are not comparable to published ones. People without points are
            left out. Precision is interpolated at 101 recalls, as COCO's evaluation does.
    """

    full_state_update = False
    counts: Tensor
    totals: Tensor
    gps_Q: list[Tensor]
    scores_Q: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state(
            "counts", default=torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum"
        )  # points, right, masks
        self.add_state(
            "totals", default=torch.zeros(2), dist_reduce_fx="sum"
        )  # distances of right points, mask overlaps
        self.add_state("gps_Q", default=[], dist_reduce_fx="cat")
        self.add_state("scores_Q", default=[], dist_reduce_fx="cat")

    def update(self, prediction: dict[str, Any], target: dict[str, Any]) -> None:
        """Add an image: one dict of `DensePose.predict` and the image's targets, the same people in both."""
        boxes_Q4 = prediction["boxes_xyxy"]
        xy_S2, person_S, part_S, uv_S2 = _points(target, boxes_Q4.device)
        found_S, found_uv_S2 = _read(prediction, xy_S2, person_S)
        right_S = found_S == part_S
        distance_S = (found_uv_S2 - uv_S2).norm(dim=1)
        similarity_S = right_S * torch.exp(-(distance_S**2) / (2 * KAPPA**2))
        points_Q = torch.zeros_like(boxes_Q4[:, 0]).index_add(0, person_S, torch.ones_like(similarity_S))
        gps_Q = torch.zeros_like(points_Q).index_add(0, person_S, similarity_S) / points_Q.clamp(min=1)
        iou_Q = _mask_iou(prediction["part"], target.get("dp_masks"), boxes_Q4)
        self.counts += torch.tensor([len(part_S), 0, len(iou_Q)], device=self.counts.device)
        self.counts[1] += right_S.sum()
        self.totals += torch.stack([(distance_S * right_S).sum(), iou_Q.sum()])
        # Also where empty: every rank must bring a tensor to be gathered.
        self.gps_Q.append(gps_Q[points_Q > 0])
        self.scores_Q.append(prediction["scores"][points_Q > 0])

    def compute(self) -> dict[str, Tensor]:
        (num_points, right, num_masks), (distances, overlaps) = self.counts, self.totals
        result = {
            "part_accuracy": right / num_points.clamp(min=1),
            "uv_error": torch.where(right > 0, distances / right.clamp(min=1), 1.0),
            "mask_iou": overlaps / num_masks.clamp(min=1),
        }
        gps_Q, scores_Q = (torch.cat(v) if isinstance(v, list) else v for v in (self.gps_Q, self.scores_Q))
        precision_L = average_precision(gps_Q, scores_Q, torch.arange(50, 100, 5) / 100).to(gps_Q.device)
        result |= {"uv_gps": precision_L.mean(), "uv_gps_50": precision_L[0], "uv_gps_75": precision_L[5]}
        return result


def average_precision(similarity_Q: Tensor, scores_Q: Tensor, thresholds_L: Tensor) -> Tensor:
    """AP of Q predictions for Q people at each threshold, (L,) on the CPU, as COCO computes it.

    Ranked by score, a prediction is right where its similarity reaches the threshold. The precision at a recall is the
    best at that recall or any higher one; their mean is over the recalls 0, 0.01, ... 1.
    """
    Q = len(similarity_Q)
    if Q == 0:
        return torch.zeros(len(thresholds_L))
    ranked_Q = similarity_Q[scores_Q.argsort(descending=True, stable=True)].cpu().double()
    # A hair below, so that a similarity of 0.55 in float32 reaches 0.55.
    right_LQ = (ranked_Q >= thresholds_L.double()[:, None] - 1e-6).double().cumsum(1)
    precision_LQ = right_LQ / torch.arange(1, Q + 1)
    best_LQ = precision_LQ.flip(1).cummax(1).values.flip(1)
    recalls_LN = (torch.arange(101).double() / 100 - 1e-9).repeat(len(thresholds_L), 1)
    place_LN = torch.searchsorted(right_LQ / Q, recalls_LN)
    return F.pad(best_LQ, (0, 1)).gather(1, place_LN).mean(1).float()  # a recall never reached has precision 0


def _mask_iou(part_Qhw: Tensor, masks_QHW: Tensor | None, boxes_Q4: Tensor) -> Tensor:
    """Overlap of each person's predicted and annotated mask, (Q,), or (0,) without masks."""
    if masks_QHW is None or not len(boxes_Q4):
        return boxes_Q4.new_zeros(0)
    size_Q2 = torch.tensor([masks_QHW.shape[1:]] * len(boxes_Q4), device=boxes_Q4.device)
    truth_Qhw = coarse_targets(masks_QHW, boxes_Q4, part_Qhw.shape[-1], size_Q2) > 0
    both, either = truth_Qhw & (part_Qhw > 0), truth_Qhw | (part_Qhw > 0)
    return both.sum((1, 2)) / either.sum((1, 2)).clamp(min=1)


def _read(prediction: dict[str, Any], xy_S2: Tensor, person_S: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted part (S,) and (U, V) (S, 2) of the cell that each point of an image lies in."""
    part_Qhw = prediction["part"]
    h, w = part_Qhw.shape[-2:]
    place_S2 = to_window(xy_S2, prediction["boxes_xyxy"][person_S])
    x_S, y_S = (place_S2[:, 0] * w).long().clamp(0, w - 1), (place_S2[:, 1] * h).long().clamp(0, h - 1)
    return part_Qhw[person_S, y_S, x_S].long(), prediction["uv"][person_S, :, y_S, x_S]


def _points(target: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Place (S, 2), person (S,), part (S,) and (U, V) (S, 2) of the points; S is 0 where there are none."""
    values = [target.get(name) for name in ("dp_points_xy", "dp_person", "dp_part", "dp_uv")]
    if any(value is None for value in values):
        values = [torch.zeros(0, *shape) for shape in ((2,), (), (), (2,))]
    xy_S2, person_S, part_S, uv_S2 = (value.to(device, non_blocking=True) for value in values if value is not None)
    return xy_S2.float(), person_S.long(), part_S.long(), uv_S2.float()


def _inside(boxes_R4: Tensor, size_R2: Tensor) -> Tensor:
    """Boxes cut to their images (height, width); what an augmentation pushed out of one keeps one pixel."""
    size_R2 = size_R2.flip(-1).to(boxes_R4.dtype)
    low_R2 = torch.minimum(boxes_R4[:, :2].clamp(min=0), size_R2 - 1)
    return torch.cat([low_R2, torch.maximum(torch.minimum(boxes_R4[:, 2:], size_R2), low_R2 + 1)], 1)


def _extend(fine_BCHW: Tensor, mask_BHW: Tensor, upscale: int) -> Tensor:
    """Repeat each image's last row and column into the padding, as RoIAlign does at the edge of a map; what a window
    at the edge reads is then the same whatever lies beside the image in the batch.
    """
    B, _, H, W = fine_BCHW.shape
    device = fine_BCHW.device
    last_B1 = mask_BHW.any(2).sum(1, keepdim=True) * upscale - 1, mask_BHW.any(1).sum(1, keepdim=True) * upscale - 1
    rows_BH = torch.minimum(torch.arange(H, device=device), last_B1[0])
    columns_BW = torch.minimum(torch.arange(W, device=device), last_B1[1])
    image_B11 = torch.arange(B, device=device)[:, None, None]
    return fine_BCHW.permute(0, 2, 3, 1)[image_B11, rows_BH[:, :, None], columns_BW[:, None]].permute(0, 3, 1, 2)


def _shades(part_S: np.ndarray, uv_S2: np.ndarray) -> np.ndarray:
    """Colours (S, 3) of 0..255: neighbouring part numbers far apart in hue, darker for small U, paler for large V."""
    hues = [colorsys.hsv_to_rgb(part * 0.381966 % 1, 1.0, 1.0) for part in range(NUM_PARTS + 1)]
    colour_S3 = np.array(hues)[part_S] * (0.45 + 0.55 * uv_S2[:, :1])
    return np.asarray(255 * (colour_S3 + (1 - colour_S3) * 0.5 * uv_S2[:, 1:]))
