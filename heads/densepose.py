"""DensePose: for every pixel of a person which of 24 body parts it shows, and where (U, V) on that part.

The head of DensePose R-CNN (Güler et al., CVPR 2018, arXiv:1802.00434; detectron2's DensePoseV1ConvXHead): a window
around each person (RoI), a few convolutions, one transposed convolution to a person mask (coarse), parts, U and V.
Four things differ, all because one map of patches feeds it instead of a pyramid:
    - each token first gives a fine map of `upscale` x `upscale` cells, so that parts smaller than a patch can be told
      apart; this is also where the width is reduced, once per image and not once per person;
    - a learned table is added to every window: where in the box a cell lies says much about the part;
    - the losses read the maps before the last, bilinear, doubling (an eighth of the time); the doubling has no
      parameters, and to a point between cells it gives the same value up to the kinks at cell centres;
    - U and V losses are means over points, not sums (see `chart_losses`).
The metric is `indiclip.tasks.surface_metric`; windows are laid into images by `indiclip.tasks.surface_charts`.

Shape letters: see `indiclip.types`; R windows of a batch, Q people of an image, S points of either, C channels,
K = 25 parts (0 is the background), h w cells of a window, k x k cells of a token on the fine map.
"""

import base64
import colorsys
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import roi_align

from indiclip.head import Frame, Head, Line, Losses, Measure, Panel, Picture, Prediction, Ratio, plain
from indiclip.tasks.surface_charts import (
    NUM_PARTS,
    Charts,
    People,
    chart_losses,
    part_masks,
    paste,
    points_of,
    read_cells,
)
from indiclip.tasks.surface_metric import SurfaceMetric
from indiclip.types import Batch, Features, Rows, in_float32, on_device, random_seeds, targets_of

if TYPE_CHECKING:
    from indiclip.datasets.base import SampleDataset
    from indiclip.encoder import Encoder

MAX_JITTER = 0.08  # all sides moved inwards leave (1 - 2 * 0.08) ** 2 = 0.706 of the box: IoU > 0.7, as in detectron2
_DRAWN_SIDE = 320  # pixels that a picture's longer side has at least


class DensePose(Head):
    """Body surfaces of people whose boxes are given.

    Training and evaluation use the ground-truth boxes of the batch (`dp_boxes_xyxy`); `surfaces` takes any boxes, e.g.
    a detector's.

    Args:
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
        **common: Of every `Head`.

    Raises:
        ValueError: A setting out of its range.
    """

    title = "DensePose"
    metric: SurfaceMetric

    required_fields = predict_fields = ("dp_boxes_xyxy",)
    no_flip = "a mirrored body needs the symmetry table, which is not part of IndiCLIP"
    embeds_images = embeds_text = False

    def __init__(
        self,
        roi_size: int = 28,
        channels: int = 512,
        num_convs: int = 8,
        upscale: int = 4,
        coarse_classes: int = 2,
        box_jitter: float = 0.0,
        coarse_weight: float = 5.0,
        part_weight: float = 1.0,
        uv_weight: float = 5.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.check_range(1, roi_size=roi_size, channels=channels, num_convs=num_convs, upscale=upscale)
        self.check_range(coarse_weight=coarse_weight, part_weight=part_weight, uv_weight=uv_weight)
        if coarse_classes not in (2, 15):
            found = f"heads.{self.name}.coarse_classes: {coarse_classes}"
            raise ValueError(f"{found}; expected 2 (person or not) or 15")
        self.check_range(0, MAX_JITTER, box_jitter=box_jitter)
        self.roi_size, self.channels, self.num_convs, self.upscale = roi_size, channels, num_convs, upscale
        self.coarse_classes, self.box_jitter = coarse_classes, box_jitter
        self.loss_weights = {"coarse": coarse_weight, "part": part_weight, "u": uv_weight, "v": uv_weight}

    def bind(self, encoder: "Encoder") -> None:
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
        maps_BCHW = in_float32(fine_BCHW)
        rois_R5 = torch.cat([image_R[:, None], windows_R4], 1).to(maps_BCHW.dtype)
        x_RChw = roi_align(maps_BCHW, rois_R5, self.roi_size, scale, sampling_ratio=2, aligned=True)
        x_RChw = x_RChw.to(fine_BCHW.dtype) + self.position_CHW
        x_RChw = x_RChw.contiguous(memory_format=torch.channels_last)
        for conv in self.convs:
            x_RChw = F.relu(conv(x_RChw))
        return Charts.split(in_float32(self.charts(x_RChw)), self.coarse_classes)

    def loss(self, features: Features, batch: Batch, encoder: "Encoder") -> Losses:
        """`coarse`, `part`, `u`, `v`; zero, with zero gradients, where nothing is annotated.

        A batch without people needs no special case: convolutions of no windows have gradients, zeros.
        """
        boxes, windows_R4, size_R2 = self._windows(batch)
        if self.training and self.box_jitter:
            windows_R4 = jitter(windows_R4, size_R2, self.box_jitter, _numbers(boxes, random_seeds(batch)))
        people = People.of(batch["targets"], windows_R4, size_R2, self.roi_size * 2)
        losses = chart_losses(self(features, windows_R4, boxes.image_R), people)
        return Losses({name: Ratio(self.loss_weights[name] * total, n) for name, (total, n) in losses.items()})

    def predict(self, features: Features, batch: Batch, encoder: "Encoder") -> list[Prediction]:
        """`surfaces` of the ground-truth boxes."""
        boxes, windows_R4, _ = self._windows(batch)
        return self.surfaces(features, torch.split(windows_R4, boxes.counts))

    def _windows(self, batch: Batch) -> tuple[Rows, Tensor, Tensor]:
        """The people's boxes, the same cut to their images (R, 4), and height and width of these (R, 2)."""
        boxes = self.target(batch, "dp_boxes_xyxy")
        size_R2 = on_device(batch["images"]["sizes_hw"], boxes.values.device)[boxes.image_R]
        return boxes, _inside(boxes.values.float(), size_R2), size_R2

    def surfaces(self, features: Features, boxes: Sequence[Tensor]) -> list[Prediction]:
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
        values_R = self(features, torch.cat([*boxes]), image_R).doubled().decode()
        names = ("boxes_xyxy", "scores", "mask_probs", "part", "uv")
        columns = (boxes, *(torch.split(value_R, counts) for value_R in values_R))
        return [dict(zip(names, of_image, strict=True)) for of_image in zip(*columns, strict=True)]

    def to_json(self, prediction: Prediction, frame: Frame) -> dict[str, Any]:
        """`people`, each with `score`, `bbox` (x, y, width, height), `parts` and `iuv_png`.

        A part has its `number` (1 to 24), `name` and `segmentation`, a mask of the original image's size in COCO's
        run-length code. `iuv_png` is a PNG in base64 of the person's window, stretched over the box: part, U and V
        times 255, as in DensePose's own results.
        """
        boxes_Q4 = frame.boxes(prediction["boxes_xyxy"].float())
        people = []
        for q, (x1, y1, x2, y2) in enumerate(boxes_Q4.tolist()):
            part_hw, uv_hw2 = prediction["part"][q], prediction["uv"][q].permute(1, 2, 0)
            iuv_hw3 = torch.cat([part_hw[..., None], (uv_hw2.float() * 255).round().to(torch.uint8)], 2)
            png = io.BytesIO()
            Image.fromarray(iuv_hw3.numpy()).save(png, "PNG")
            people.append(
                {
                    "score": plain(prediction["scores"][q]),
                    "bbox": plain([x1, y1, x2 - x1, y2 - y1]),
                    "parts": part_masks(part_hw, (x1, y1, x2, y2), frame.size_hw),
                    "iuv_png": base64.b64encode(png.getvalue()).decode(),
                }
            )
        return {"people": people}

    def update_metric(self, predictions: list[Prediction], features: Features, batch: Batch) -> None:
        for i, prediction in enumerate(predictions):
            self.metric.update(prediction, targets_of(batch, i))

    def measures(self, held_out: "SampleDataset") -> dict[str, Measure]:
        guess = 1 / NUM_PARTS
        return {
            "part_accuracy": Measure(
                "points with the right body part",
                "higher",
                trivial=guess,
                answer=f"guessing among {NUM_PARTS} parts",
                main=True,
            ),
            "mask_iou": Measure("overlap (IoU) with the person's mask", "higher"),
            "uv_error": Measure("distance in (U, V) where the part is right", "lower"),
            "uv_gps": Measure("AP of the surface in (U, V), mean over similarity 0.5 to 0.95", "higher"),
            "uv_gps_50": Measure("AP of the surface in (U, V) at similarity 0.5", "higher"),
            "uv_gps_75": Measure("AP of the surface in (U, V) at similarity 0.75", "higher"),
        }

    def visualize(self, image_HW3: np.ndarray, prediction: Prediction, target: Prediction) -> Picture:
        """Predicted surfaces beside the annotated points; a part's colour is darker where U is small and paler where V
        is large.
        """
        height, width, _ = image_HW3.shape
        part_HW, uv_HW2 = (value.cpu().numpy() for value in paste(prediction, (height, width)))
        left, on = image_HW3.copy(), part_HW > 0
        left[on] = 0.3 * left[on] + 0.7 * _shades(part_HW[on], uv_HW2[on])

        zoom = max(1, -(-_DRAWN_SIDE // max(height, width)))
        left, right = (half.repeat(zoom, 0).repeat(zoom, 1) for half in (left, image_HW3))
        panels = [Panel(left, "model: body parts")]
        count = len(prediction["part"])
        text = "1 person" if count == 1 else f"{count} people"
        xy_S2, person_S, part_S, uv_S2 = points_of(target, prediction["part"].device)
        if len(part_S):
            colours = _shades(part_S.cpu().numpy(), uv_S2.cpu().numpy())
            for (x, y), colour in zip((xy_S2 * zoom).long().tolist(), colours, strict=True):
                right[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = colour
            panels.append(Panel(right, "truth: annotated points"))
            found_S, _ = read_cells(prediction, xy_S2, person_S)
            text += f"; part right at {float((found_S == part_S).float().mean()):.0%} of {len(part_S)} points"
        return panels, [Line(text)]


def _numbers(boxes: Rows, seeds_B: list[int]) -> Tensor:
    """A number of each box: the image's, and one more for each box of it before."""
    numbers = [seed + place for seed, count in zip(seeds_B, boxes.counts, strict=True) for place in range(count)]
    return on_device(numbers, boxes.values.device).long()


def jitter(boxes_R4: Tensor, size_R2: Tensor, amount: float, number_R: Tensor) -> Tensor:
    """Move each side of each box by up to `amount` of the box's size, within its image of height and width `size_R2`.

    The moves are a low-discrepancy sequence (Roberts 2018, "The unreasonable effectiveness of quasirandom sequences";
    additive recurrence with powers of the root of x^5 = x + 1), a function of the box's number alone: it moves alike
    on whatever rank, in whatever micro-batch and after a resume.
    """
    # Fractions as whole numbers of 2 ** -24: exact at any step, on devices without float64 too.
    powers_4 = on_device([round(1.1673039782614187**-n * 2**24) for n in range(1, 5)], number_R.device)
    move_R4 = ((number_R[:, None] * powers_4 % 2**24).to(boxes_R4) / 2**23 - 1) * amount
    sides_R2 = boxes_R4[:, 2:] - boxes_R4[:, :2]
    return _inside(boxes_R4 + move_R4 * sides_R2.repeat(1, 2), size_R2)


def _inside(boxes_R4: Tensor, size_R2: Tensor) -> Tensor:
    """Boxes cut to their images (height, width); what an augmentation pushed out of one keeps one pixel."""
    size_R2 = size_R2.flip(-1).to(boxes_R4.dtype)
    low_R2 = torch.minimum(boxes_R4[:, :2].clamp(min=0), size_R2 - 1)
    return torch.cat([low_R2, torch.maximum(torch.minimum(boxes_R4[:, 2:], size_R2), low_R2 + 1)], 1)


def _extend(fine_BCHW: Tensor, mask_BHW: Tensor, upscale: int) -> Tensor:
    """Repeat each image's last row and column into the padding, as RoIAlign does at the edge of a map; what a window
    at the edge reads is then the same whatever lies beside the image in the batch.
    """
    axes = zip(fine_BCHW.shape[2:], (2, 1), strict=True)
    last = [(size, mask_BHW.any(other).sum(1, keepdim=True) * upscale - 1) for size, other in axes]
    rows_BH, columns_BW = (torch.minimum(torch.arange(size, device=end_B1.device), end_B1) for size, end_B1 in last)
    image_B11 = torch.arange(len(mask_BHW), device=mask_BHW.device)[:, None, None]
    return fine_BCHW.permute(0, 2, 3, 1)[image_B11, rows_BH[:, :, None], columns_BW[:, None]].permute(0, 3, 1, 2)


def _shades(part_S: np.ndarray, uv_S2: np.ndarray) -> np.ndarray:
    """Colours (S, 3) of 0..255: neighbouring part numbers far apart in hue, darker for small U, paler for large V."""
    hues = [colorsys.hsv_to_rgb(part * 0.381966 % 1, 1.0, 1.0) for part in range(NUM_PARTS + 1)]
    colour_S3 = np.array(hues)[part_S] * (0.45 + 0.55 * uv_S2[:, :1])
    return np.asarray(255 * (colour_S3 + (1 - colour_S3) * 0.5 * uv_S2[:, 1:]))
