"""ViTDet's Cascade Mask R-CNN on the encoder of this folder. A LazyConfig of detectron2."""

from .common import base, dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model.roi_heads = base("common/models/cascade_rcnn.py").model.roi_heads
model.roi_heads.mask_head.conv_norm = "LN"
for _head in model.roi_heads.box_heads:
    _head.conv_dims, _head.fc_dims, _head.conv_norm = [256] * 4, [1024], "LN"
