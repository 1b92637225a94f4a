"""What travels between data, backbone and heads.

Shape letters used in the whole project:
    B images, N patches (tokens) of the longest image in the batch, P numbers in a patch (patch_size ** 2 * 3),
    D token width, H W rows and columns of patches, E embedding length, T text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor


class Sample(TypedDict, total=False):
    """One example as a dataset gives it: NumPy arrays and plain values; only `image` and `key` must be there.

    Coordinates are absolute pixels of `image` as stored; boxes are (x1, y1, x2, y2) with x2, y2 exclusive.
    """

    image: Any  # uint8 (height, width, 3), RGB; or an `EncodedImage`, which is decoded as large as it is needed
    annotated_upright: bool  # coordinates are those of the image turned as its EXIF orientation says
    key: str  # unique in its dataset, stable between runs
    caption: str
    language: str  # of `caption`: a BCP-47 code such as hi or hi-Latn
    captions: dict[str, str]  # language -> text; `indiclip.datasets.languages` draws one of them for `caption`
    label: int  # class of the whole image, -1 where there is none
    boxes_xyxy: Any  # float32 (M, 4)
    classes: Any  # int64 (M,)
    crowd: Any  # bool (M,): the box covers a crowd, not one object
    masks: Any  # uint8 (M, height, width)
    points_xy: Any  # float32 (K, 2): one per object of the class that `count_class` names
    count_class: str
    count_label: int
    # DensePose: Q annotated people and S annotated points of all of them.
    dp_boxes_xyxy: Any  # float32 (Q, 4)
    dp_masks: Any  # uint8 (Q, height, width): 1 on the body
    dp_points_xy: Any  # float32 (S, 2)
    dp_person: Any  # int64 (S,): index of the person
    dp_part: Any  # int64 (S,): 1..24
    dp_uv: Any  # float32 (S, 2) in [0, 1]


class Images(TypedDict):
    """A batch of images of any size, as patches padded to the longest (NaFlex)."""

    patches_BNP: Tensor  # uint8 0..255; row, column, channel order inside a patch
    coords_BN2: Tensor  # int64 (row, column) of each patch
    valid_BN: Tensor  # bool, False on padding
    # Plain numbers stay on the host, so that reading them never waits for the GPU.
    sizes_hw: list[tuple[int, int]]  # the resized image in pixels
    scale: list[tuple[float, float]]  # resized / original (height, width)


class Quarantined(NamedTuple):
    """A sample that cannot be read."""

    task: str
    key: str  # the sample's
    shard: str  # the shard or file that it lies in
    reason: str


class Batch(TypedDict):
    """The examples of one task in one step. A TypedDict, because `pin_memory` leaves dataclasses untouched."""

    images: Images
    targets: dict[str, list[Any]]  # the fields of Sample, a list over the images each, in resized pixels
    keys: list[str]
    quarantined: NotRequired[list[Quarantined]]  # found unreadable while the step was put together


@dataclass
class Features:
    """What a backbone makes of `Images`.

    Attributes:
        tokens_BND: One vector per patch.
        coords_BN2: int64 (row, column) of each token.
        valid_BN: False on padding; None where every token of the batch is valid.
        grid_hw: Rows and columns of the largest image of the batch (on the host, so that no GPU is waited for).
        stride: Image pixels between neighbouring tokens.
    """

    tokens_BND: Tensor
    coords_BN2: Tensor
    valid_BN: Tensor | None
    grid_hw: tuple[int, int]
    stride: int

    def map(self) -> tuple[Tensor, Tensor]:
        """Lay the tokens out as an image for convolutional heads.

        Returns:
            `(map_BDHW, mask_BHW)`: zeros and False where an image has no patch. H and W are the largest of the
            batch.
        """
        B, N, D = self.tokens_BND.shape
        H, W = self.grid_hw
        if self.valid_BN is None and N == H * W:  # every image fills the grid, row by row
            full_BHW = torch.ones(B, H, W, dtype=torch.bool, device=self.tokens_BND.device)
            return self.tokens_BND.transpose(1, 2).reshape(B, D, H, W), full_BHW
        valid_BN = (
            torch.ones_like(self.coords_BN2[..., 0], dtype=torch.bool) if self.valid_BN is None else self.valid_BN
        )
        cell_BN = self.coords_BN2[..., 0] * W + self.coords_BN2[..., 1]
        cell_BN = torch.where(valid_BN, cell_BN, H * W)  # padding goes to a cell that is cut off below
        cells_BLD = self.tokens_BND.new_zeros(B, H * W + 1, D)
        cells_BLD = cells_BLD.scatter(1, cell_BN[..., None].expand(-1, -1, D), self.tokens_BND)
        mask_BL = torch.zeros(B, H * W + 1, dtype=torch.bool, device=cell_BN.device).scatter(1, cell_BN, valid_BN)
        return cells_BLD[:, :-1].transpose(1, 2).reshape(B, D, H, W), mask_BL[:, :-1].reshape(B, H, W)
