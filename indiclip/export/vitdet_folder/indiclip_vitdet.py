"""What the configurations of this folder build beside detectron2's own classes.

This file and the configurations lie in every folder that `indiclip export --to vitdet` writes. They need detectron2,
and timm as its ViT does; `densepose_rcnn.py` needs detectron2's DensePose project. None needs IndiCLIP.

Shape letters: B images, D width, H W rows and columns of patches.
"""

from pathlib import Path
from typing import Any

import detectron2
import torch.nn.functional as F
from detectron2 import modeling
from detectron2.config import LazyConfig, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import build_roi_heads
from torch import Tensor, nn

_STRIDES = {f"p{level}": 2**level for level in range(2, 6)}  # of the maps that regions are read from
_DENSEPOSE = {
    "MODEL.ROI_HEADS.NAME": "DensePoseROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": list(_STRIDES),
    "MODEL.ROI_HEADS.NUM_CLASSES": 1,
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,  # detectron2's default, 14, is that of heads without an FPN
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.NORM": "LN",
    "MODEL.ROI_DENSEPOSE_HEAD.NAME": "DensePoseV1ConvXHead",
    "INPUT.FORMAT": "RGB",
}


class ViT(modeling.ViT):  # type: ignore[misc]
    """detectron2's ViT; its positions are resampled as they were in training, and not always bicubically.

    Args:
        positions: `mode`, `antialias` and `align_corners` of torch's `interpolate`.
        **arguments: Of detectron2's ViT.
    """

    def __init__(self, positions: dict[str, Any], **arguments: Any) -> None:
        super().__init__(pretrain_use_cls_token=False, **arguments)
        self.positions = dict(positions)

    def forward(self, pixels_B3HW: Tensor) -> dict[str, Tensor]:
        x_BHWD = self.patch_embed(pixels_B3HW)
        if self.pos_embed is not None:
            x_BHWD = x_BHWD + self._positions(x_BHWD.shape[1], x_BHWD.shape[2])
        for block in self.blocks:
            x_BHWD = block(x_BHWD)
        return {self._out_features[0]: x_BHWD.permute(0, 3, 1, 2)}

    def _positions(self, H: int, W: int) -> Tensor:
        side = round(self.pos_embed.shape[1] ** 0.5)
        table_1HWD: Tensor = self.pos_embed.unflatten(1, (side, side))
        if (side, side) == (H, W):
            return table_1HWD
        return F.interpolate(table_1HWD.permute(0, 3, 1, 2), (H, W), **self.positions).permute(0, 2, 3, 1)


def base(name: str) -> Any:
    """One of the configurations that are installed with detectron2.

    Its `model_zoo.get_config` needs `pkg_resources`, which newer setuptools do not have.
    """
    return LazyConfig.load(str(Path(detectron2.__file__).parent / "model_zoo" / "configs" / name))


def densepose_roi_heads(channels: int) -> nn.Module:
    """Boxes and body surfaces of detectron2's DensePose project, on maps of so many channels."""
    maps = {name: ShapeSpec(channels=channels, stride=stride) for name, stride in _STRIDES.items()}
    heads: nn.Module = build_roi_heads(_densepose_settings(), maps)
    return heads


def densepose_mapper(dataset: str, image_size: int, is_train: bool) -> Any:
    """That project's reader of images and annotations; `dataset` names the symmetries by which images are flipped."""
    from densepose.data import DatasetMapper

    cfg = _densepose_settings()
    cfg.DATASETS.TRAIN = (dataset,)
    cfg.INPUT.MIN_SIZE_TRAIN = (image_size // 2, image_size)
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "range"
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST = image_size
    return DatasetMapper(cfg, is_train)


def _densepose_settings() -> Any:
    from densepose import add_densepose_config

    cfg = get_cfg()
    add_densepose_config(cfg)
    cfg.merge_from_list([word for setting in _DENSEPOSE.items() for word in setting])
    return cfg
