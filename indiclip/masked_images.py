"""Images of which some patches are hidden behind a learned one, for masked image modelling with any backbone.

Shape letters: see `indiclip.types`.
"""

import torch
from torch import Tensor

from indiclip.backbone import Backbone
from indiclip.types import Images


def masked(images: Images, masked_BN: Tensor, patch_P: Tensor, backbone: Backbone) -> Images:
    """The images with one learned patch in place of those that are masked.

    Hidden are pixels, not embeddings of patches: behind a linear patch embedding a learned patch is as good as a
    learned embedding (the [MASK] of BEiT, arXiv:2106.08254), and it goes into every backbone, convolutional ones too.

    Args:
        images: uint8 patches.
        masked_BN: Which are hidden; padding may be marked too, without effect.
        patch_P: In the backbone's normalised pixels, such as zeros, the mean colour.
        backbone: Whose normalisation is undone on the learned patch.

    Returns:
        Images whose patches are floating-point numbers of the range 0..255.
    """
    hidden_P = patch_P * backbone.std_P + backbone.mean_P
    patches_BNP = torch.where(masked_BN[..., None], hidden_P, images["patches_BNP"].to(hidden_P.dtype))
    return {**images, "patches_BNP": patches_BNP}
