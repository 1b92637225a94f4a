"""Depth: how far what each place of the image shows is from the viewer.

Shape letters: see `indiclip.types`; C channels, R images with a truth. H and W are rows and columns of tokens, or of
cells where the name says so: each token is `upsample` cells wide and high.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanSquaredError, MetricCollection, R2Score

from indiclip.head import Head, Losses, Measure, Panel, Picture, Prediction, Ratio
from indiclip.types import Batch, Features, in_float32, on_device

if TYPE_CHECKING:
    from indiclip.datasets.base import SampleDataset
    from indiclip.encoder import Encoder


class Depth(Head):
    """The depth of every cell, from convolutions over the tokens; the loss is the mean absolute error.

    Args:
        channels: Width of its layers.
        num_layers: 3x3 convolutions between the tokens and the depth.
        upsample: Cells along each side of a token.
        **common: Of every `Head`.
    """

    title = "Depth"
    required_fields = ("depth",)
    embeds_images = embeds_text = False

    def __init__(
        self,
        channels: int = 96,
        num_layers: int = 2,
        upsample: int = 2,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.check_range(1, channels=channels, upsample=upsample)
        self.channels, self.num_layers, self.upsample = channels, num_layers, upsample

    def bind(self, encoder: "Encoder") -> None:
        self.tokens = nn.Conv2d(encoder.backbone.width, self.channels, 1)
        self.layers = nn.ModuleList(
            nn.Conv2d(self.channels, self.channels, 3, padding=1) for _ in range(self.num_layers)
        )
        self.depth = nn.Conv2d(self.channels, self.upsample**2, 1)
        rmse = MeanSquaredError(squared=False)
        # r2 is the share of the variance that is explained; always answering the mean has 0.
        self.metric = MetricCollection({"mae": MeanAbsoluteError(), "rmse": rmse, "r2": R2Score()})

    def forward(self, features: Features) -> Tensor:
        """Depth (B, H, W) of every cell, float32; meaningless where an image has no patch."""
        x_BDHW, mask_BHW = features.map()
        mask_B1HW = mask_BHW[:, None]
        x_BCHW = self.tokens(x_BDHW)
        for layer in self.layers:
            # Padding stays zero, so that an image's depth does not depend on what else is in the batch.
            x_BCHW = x_BCHW + layer(F.gelu(x_BCHW) * mask_B1HW)
        return F.pixel_shuffle(in_float32(self.depth(F.gelu(x_BCHW))), self.upsample)[:, 0]

    def loss(self, features: Features, batch: Batch, encoder: "Encoder") -> Losses:
        depth_BHW = self(features)
        truth_BHW, known_BHW = self._truth(features, batch)
        error_BHW = (depth_BHW - truth_BHW).abs() * known_BHW
        return Losses({"l1": Ratio(error_BHW.sum(), known_BHW.sum())})

    def predict(self, features: Features, batch: Batch, encoder: "Encoder") -> list[Prediction]:
        """`depth`: float32 (rows, columns) of cells, each `stride / upsample` pixels wide and high."""
        sizes_hw = batch["images"]["sizes_hw"]
        cell = features.stride / self.upsample
        return [
            {"depth": depth_HW[: round(height / cell), : round(width / cell)]}
            for depth_HW, (height, width) in zip(self(features), sizes_hw, strict=True)
        ]

    def update_metric(self, predictions: list[Prediction], features: Features, batch: Batch) -> None:
        truth_BHW, known_BHW = self._truth(features, batch)
        for prediction, truth_HW, known_HW in zip(predictions, truth_BHW, known_BHW, strict=True):
            rows, columns = prediction["depth"].shape
            known_HW = known_HW[:rows, :columns]
            if known_HW.any():
                self.metric.update(prediction["depth"][known_HW], truth_HW[:rows, :columns][known_HW])

    def measures(self, held_out: "SampleDataset") -> dict[str, Measure]:
        explained = "share of the variance of depth that is explained (R²)"
        return {
            "r2": Measure(explained, "higher", trivial=0.0, answer="always the mean depth", main=True),
            "mae": Measure("mean error of the depth", "lower", "as the depth's"),
            "rmse": Measure("root mean square error of the depth", "lower", "as the depth's"),
        }

    def visualize(self, image_HW3: np.ndarray, prediction: Prediction, target: Prediction) -> Picture:
        """The image, and the depth of the model and the true one in the same colours."""
        height, width = image_HW3.shape[:2]
        depth_HW = prediction["depth"].float()
        maps = {"model": F.interpolate(depth_HW[None, None], (height, width), mode="bilinear")[0, 0]}
        if "depth" in target:
            maps["truth"] = target["depth"].float()
        near = min(map_HW.min() for map_HW in maps.values())
        far = max(map_HW.max() for map_HW in maps.values())
        panels = [Panel(image_HW3, "image")]
        for name, map_HW in maps.items():
            colours = colormaps["magma_r"](((map_HW - near) / (far - near).clamp(min=1e-6)).numpy())
            pixels = (colours[..., :3] * 255).astype(np.uint8)
            panels.append(Panel(pixels, f"{name}: depth {map_HW.min():.2f} to {map_HW.max():.2f}"))
        return panels, "bright is near, dark is far"

    def _truth(self, features: Features, batch: Batch) -> tuple[Tensor, Tensor]:
        """The depth (B, H, W) at the centre of each cell, and where it is known."""
        truth = self.target(batch, "depth", every=False)
        device, sizes_hw = features.tokens.device, batch["images"]["sizes_hw"]
        rows, columns = (
            ((torch.arange(length * self.upsample, device=device) + 0.5) * features.stride / self.upsample).long()
            for length in features.grid_hw
        )
        size_B2 = on_device(sizes_hw, device)
        inside_BHW = (rows[None, :, None] < size_B2[:, :1, None]) & (columns[None, None] < size_B2[:, 1:, None])
        known_BHW = inside_BHW & on_device(truth.known, device)[:, None, None]
        height, width = truth.values.shape[1:]
        cells_RHW = truth.values[:, rows.clamp(max=height - 1)][:, :, columns.clamp(max=width - 1)]
        truth_BHW = cells_RHW.new_zeros(len(sizes_hw), len(rows), len(columns)).index_copy(0, truth.image_R, cells_RHW)
        known_BHW &= truth_BHW.isfinite()  # else an augmentation shows there what was not in the image
        return truth_BHW.nan_to_num(), known_BHW
