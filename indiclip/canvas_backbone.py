"""Backbones that read whole images of one size, on a canvas.

Shape letters: see `indiclip.types`.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from indiclip.backbone import Backbone
from indiclip.names import check_range
from indiclip.types import Features, Images, on_device


class CanvasBackbone(Backbone):
    """A backbone that reads whole images of one size; a smaller one lies in the canvas's upper left corner."""

    canvas_hw: tuple[int, int]

    def _set_canvas(self, canvas_hw: Sequence[int], patch_size: int) -> None:
        """Keep the size of the canvas and of the patches in which images travel here."""
        check_range(
            {"model.encoder.backbone.patch_size": patch_size, "model.encoder.backbone.canvas_hw": min(canvas_hw)}, 1
        )
        if any(side % patch_size for side in canvas_hw):
            raise ValueError(
                f"model.encoder.backbone.canvas_hw: {list(canvas_hw)} must be multiples of patch_size {patch_size}"
            )
        self.canvas_hw = (int(canvas_hw[0]), int(canvas_hw[1]))
        self.patch_size = patch_size
        self.max_tokens = canvas_hw[0] * canvas_hw[1] // patch_size**2

    def _whole_grid(self, tokens_BND: Tensor, grid_hw: tuple[int, int], prefix_BKD: Tensor | None = None) -> Features:
        """Features of the tokens of all of the canvas, row by row."""
        rows_H, columns_W = (torch.arange(size, device=tokens_BND.device) for size in grid_hw)
        coords_BN2 = torch.cartesian_prod(rows_H, columns_W).expand(tokens_BND.shape[0], -1, -1)
        return Features(tokens_BND, coords_BN2, None, grid_hw, self.stride, prefix_BKD)

    @abstractmethod
    def read_pixels(self, pixels: Tensor) -> Features:
        """Features of normalised pixels (B, 3, height, width) that fill the canvas."""

    def _canvas(self, images: Images) -> Tensor:
        """Patches -> (B, 3, height, width), zeros (the mean colour) outside the images."""
        p = self.patch_size
        grid_hw = (self.canvas_hw[0] // p, self.canvas_hw[1] // p)
        cells = Features(self.normalise(images), images["coords_BN2"], images["valid_BN"], grid_hw, p)
        map_BPHW, _ = cells.map()
        B, _, H, W = map_BPHW.shape
        return map_BPHW.reshape(B, p, p, 3, H, W).permute(0, 3, 4, 1, 5, 2).reshape(B, 3, H * p, W * p)

    def forward(self, images: Images) -> Features:
        features = self.read_pixels(self._canvas(images))
        if any(size != self.canvas_hw for size in images["sizes_hw"]):
            sizes_B2 = on_device(images["sizes_hw"], features.coords_BN2.device)
            features.valid_BN = (features.coords_BN2 * self.stride < sizes_B2[:, None]).all(-1)
        return features
