"""ViTDet's Mask R-CNN on the encoder of this folder. A LazyConfig of detectron2."""

from .common import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]
