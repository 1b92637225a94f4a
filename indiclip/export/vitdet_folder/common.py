"""What the configurations of this folder share: the trained ViT in ViTDet's detector, data, optimizer and schedule.

A LazyConfig of detectron2. ViTDet: arXiv:2203.16527.
"""

import json
import sys
from functools import partial
from pathlib import Path

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler
from timm.layers import get_act_layer  # type: ignore[attr-defined]
from torch import nn

__all__ = ["base", "dataloader", "image_size", "lr_multiplier", "model", "optimizer", "train"]

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER))

from indiclip_vitdet import ViT, base  # noqa: E402

_config = json.loads((FOLDER / "config.json").read_text())
_vit = dict(_config["vit"])
_norm = partial(nn.LayerNorm, eps=_vit.pop("norm_eps"))
_activation = get_act_layer(_vit.pop("activation"))
image_size = 64 * _vit["patch_size"]  # 4,096 patches, as in ViTDet: all of them see each other, in every block

model = base("common/models/mask_rcnn_vitdet.py").model
model.input_format = "RGB"
model.pixel_mean, model.pixel_std = ([255 * value for value in _config[name]] for name in ("mean", "std"))
model.backbone.net = L(ViT)(
    positions=_config["positions"],
    norm_layer=_norm,
    act_layer=_activation,
    drop_path_rate=0.1,
    img_size=image_size,
    out_feature="last_feat",
    **_vit,
)
model.backbone.square_pad = image_size
if _vit["patch_size"] == 8:  # strides of 4, 8 and 16 pixels from the ViT's 8, and 32 and 64 behind them
    model.backbone.scale_factors = (2.0, 1.0, 0.5)
    model.backbone.top_block = L(LastLevelP6P7)(in_channels=256, out_channels=256, in_feature="p4")

dataloader = base("common/data/coco.py").dataloader
dataloader.train.total_batch_size = 16
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.recompute_boxes = True  # of the masks that cropping leaves
dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(horizontal=True),
    L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=image_size, target_width=image_size),
    L(T.FixedSizeCrop)(crop_size=(image_size, image_size), pad=False),
]
dataloader.test.mapper.augmentations = [L(T.ResizeShortestEdge)(short_edge_length=image_size, max_size=image_size)]

optimizer = base("common/optim.py").AdamW
optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, num_layers=_vit["depth"], lr_decay_rate=0.8)
optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}

train = base("common/train.py").train
train.init_checkpoint = str(FOLDER / "model.pth")
train.amp.enabled = True
train.ddp.fp16_compression = True

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.01), warmup_length=0.01, warmup_factor=0.001
)
