"""Images of which some tokens are hidden behind a learned patch, for masked image modelling with any backbone.

Shape letters: see `indiclip.types`; H W rows and columns of an image's tokens, k patches along the side of a token,
R tokens that a loss is of.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from indiclip.backbone import Backbone
from indiclip.tasks.block_masks import predicted_tokens
from indiclip.types import Images, moved


def patches_per_side(backbone: Backbone, key: str, otherwise: str = "") -> int:
    """k.

    Raises:
        ValueError: It is no whole number; names the YAML's `key`, and what would do `otherwise`. Or the canvas has a
            part of a token at an edge, which some models round up and others down.
    """
    per_side, apart = divmod(backbone.stride, backbone.patch_size)
    if apart or not per_side:
        raise ValueError(
            f"{key}: the backbone's tokens are {backbone.stride} pixels apart, and its images come in patches of "
            f"{backbone.patch_size}; expected a multiple{otherwise}"
        )
    if any(side % backbone.stride for side in backbone.canvas_hw or ()):
        raise ValueError(
            f"{key}: model.encoder.backbone.canvas_hw is {list(backbone.canvas_hw or ())}, and the backbone's tokens "
            f"are {backbone.stride} pixels apart; expected multiples of {backbone.stride}{otherwise}"
        )
    return per_side


def patches_of_tokens(images: Images, backbone: Backbone) -> list[np.ndarray]:
    """Which patches lie in each token, int64 (H, W, k, k) of each image: places among all B * N patches.

    Where an image ends within a token, its last patches are there more than once. An image some of whose patches were
    dropped is a single row, as the host does not know where the others lie.
    """
    longest, k = images["patches_BNP"].shape[1], backbone.stride // backbone.patch_size
    found = []
    for image, (count, size_hw) in enumerate(zip(images["num_patches"], images["sizes_hw"], strict=True)):
        whole = [side // backbone.patch_size for side in size_hw]
        grid = whole if whole[0] * whole[1] == count else [1, count]
        row_Hk, column_Wk = (np.minimum(np.arange(-(-n // k) * k), n - 1).reshape(-1, k) for n in grid)
        found.append(image * longest + row_Hk[:, None, :, None] * grid[1] + column_Wk[None, :, None, :])
    return found


def with_hidden_tokens(
    images: Images,
    masks: Sequence[np.ndarray],
    patches: Sequence[np.ndarray],
    patch_P: Tensor,
    backbone: Backbone,
    visible_weight: float = 0.0,
) -> tuple[Images, Tensor, Tensor]:
    """The images with one learned patch in place of those of hidden tokens.

    Hidden are pixels, not embeddings of patches: behind a linear patch embedding a learned patch is as good as a
    learned embedding (the [MASK] of BEiT, arXiv:2106.08254), and it goes into every backbone, convolutional ones too.

    Args:
        images: uint8 patches.
        masks: bool (H, W) of each image, its hidden tokens.
        patches: As of `patches_of_tokens`.
        patch_P: In the backbone's normalised pixels, such as zeros, the mean colour.
        backbone: Whose normalisation is undone on the learned patch.
        visible_weight: As of `predicted_tokens`.

    Returns:
        Images whose patches are floating-point numbers of the range 0..255; `rows_R` and `weights_R` of
        `predicted_tokens`, on the device.
    """
    patches_BNP, longest, columns = images["patches_BNP"], images["patches_BNP"].shape[1], None
    hidden_BN = np.zeros(patches_BNP.shape[:2], bool)
    for of_HWkk, mask_HW in zip(patches, masks, strict=True):
        hidden_BN.flat[of_HWkk[mask_HW].ravel()] = True
    if backbone.canvas_hw is not None:
        rows, columns = (side // backbone.stride for side in backbone.canvas_hw)
        longest = rows * columns
    found = hidden_BN, *predicted_tokens(masks, longest, columns, visible_weight)
    on_device_BN, rows_R, weights_R = (moved(of, patches_BNP.device) for of in found)
    hidden_P = patch_P * backbone.std_P + backbone.mean_P
    patches_BNP = torch.where(on_device_BN[..., None], hidden_P, patches_BNP.to(hidden_P.dtype))
    return {**images, "patches_BNP": patches_BNP}, rows_R, weights_R
