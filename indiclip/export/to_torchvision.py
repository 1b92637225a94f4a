"""To torchvision's detectors: the backbone with a feature pyramid, see `indiclip.export.torchvision`."""

from pathlib import Path

import torch
from torch import Tensor

from indiclip.encoder import Encoder
from indiclip.export import target
from indiclip.export.target import Loss, Reloaded
from indiclip.export.torchvision import TOLERANCE, described, fill_folder, load, read_pixels
from indiclip.patches import unpatchify
from indiclip.types import Images


class Target(target.Target):
    """See the module."""

    bound = TOLERANCE
    libraries = ("torchvision", "timm")
    usage = """\
import sys
sys.path.insert(0, "{out}")
from torchvision_backbone import build_detector, load  # of this folder; needs torchvision, timm and safetensors
from torchvision.models.detection import FasterRCNN  # or FCOS, MaskRCNN, KeypointRCNN
detector = build_detector(FasterRCNN, load("{out}"), num_classes=91)"""

    def check(self, encoder: Encoder) -> list[Loss]:
        try:
            described(encoder)
        except ValueError as error:
            return [Loss(str(error).removeprefix("torchvision: "))]
        return []

    def write(self, encoder: Encoder, folder: Path, place: Path) -> None:
        config, weights = described(encoder)
        fill_folder(folder, config, weights)

    def reload(self, encoder: Encoder, folder: Path) -> Reloaded:
        backbone = load(folder).eval()

        def theirs(images: Images) -> dict[str, Tensor]:
            pixels = [torch.from_numpy(unpatchify(images, i)).permute(2, 0, 1) for i in range(len(images["sizes_hw"]))]
            map_BDHW, mask_BHW = read_pixels(backbone, pixels)
            return {"features": _valid(map_BDHW, mask_BHW)}

        def ours(images: Images) -> dict[str, Tensor]:
            return {"features": _valid(*encoder.features(images).map())}

        return Reloaded(theirs, ours=ours, notes=["Text and the encoder's pooling do not travel."])


def _valid(map_BDHW: Tensor, mask_BHW: Tensor) -> Tensor:
    """The vectors (M, D) where there are images."""
    return map_BDHW.permute(0, 2, 3, 1)[mask_BHW]
