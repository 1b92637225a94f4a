"""DensePose R-CNN on the encoder of this folder. A LazyConfig of detectron2, which needs its project DensePose.

`PYTHONPATH=detectron2/projects/DensePose`, and what that imports: av, opencv-python and scipy. Its data sets lie where
`DETECTRON2_DATASETS` says.
"""

from densepose.evaluation import DensePoseCOCOEvaluator
from detectron2.config import LazyCall as L

from .common import dataloader, image_size, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

_TRAIN, _TEST = "densepose_coco_2014_train", "densepose_coco_2014_minival"

model.roi_heads = L("indiclip_vitdet.densepose_roi_heads")(channels=256)
dataloader.train.dataset.names, dataloader.test.dataset.names = _TRAIN, _TEST
for _part in (dataloader.train, dataloader.test):
    _part.mapper = L("indiclip_vitdet.densepose_mapper")(
        dataset=_TRAIN, image_size=image_size, is_train=_part is dataloader.train
    )
dataloader.evaluator = L(DensePoseCOCOEvaluator)(dataset_name=_TEST, distributed=True)
