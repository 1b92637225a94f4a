"""To torchvision's detectors: the backbone with a feature pyramid, see `indiclip.export.torchvision`."""

from pathlib import Path

from torch import Tensor

from indiclip.encoder import Encoder
from indiclip.export import target
from indiclip.export.target import Loss, Reloaded
from indiclip.export.torchvision import TOLERANCE, described, features_of, fill_folder, valid_vectors
from indiclip.export.torchvision_backbone import load
from indiclip.types import Images


class Target(target.Target):
    """See the module."""

    library_name = "torchvision"
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
            return {"features": features_of(backbone, images)}

        def ours(images: Images) -> dict[str, Tensor]:
            return {"features": valid_vectors(*encoder.features(images).map())}

        notes, interpolation = ["text and the encoder's pooling do not travel"], encoder.backbone.interpolation
        if interpolation != "bilinear":
            notes.append(f"torchvision's detectors resize images bilinearly; the run was trained on {interpolation}")
        return Reloaded(theirs, ours=ours, notes=notes, reads_smaller=True)
