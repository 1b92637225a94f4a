"""Every parameter that is trained gets a gradient, whatever the towers are: DDP waits for all of them."""

import pytest
import torch
from experiments import config
from helpers import batch_images, noise
from processes import two_ranks

from indiclip.backbone import NaFlexViT
from indiclip.text import TextTower
from indiclip.timm_backbone import TimmBackbone
from indiclip.tokenizers import ByteTokenizer

VIT = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
SWIN = {"img_size": 64, "depths": [1, 1, 1, 1], "embed_dim": 16, "num_heads": [1, 1, 2, 2]}
BACKBONES = {
    "naflex": lambda: NaFlexViT(**VIT),
    "naflex, prefix tokens": lambda: NaFlexViT(**VIT, options={"class_token": True, "reg_tokens": 2}),
    "naflex, rope": lambda: NaFlexViT(**VIT, options={"rope_type": "axial", "pos_embed": "none"}),
    "naflex by name": lambda: NaFlexViT(name="vit_tiny_patch16_224", options={"depth": 2}),
    "vit": lambda: TimmBackbone("vit_tiny_patch16_224", (64, 64), options={"img_size": 64, "depth": 2}),
    "swin": lambda: TimmBackbone("swin_tiny_patch4_window7_224", (64, 64), options=SWIN),
    "swin, its third stage": lambda: TimmBackbone(
        "swin_tiny_patch4_window7_224", (64, 64), feature_index=2, options=SWIN
    ),
    "focalnet": lambda: TimmBackbone("focalnet_tiny_srf", (64, 64)),
    "convnext": lambda: TimmBackbone(
        "convnext_atto", (64, 64), options={"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 32]}
    ),
    "resnet": lambda: TimmBackbone("resnet18", (64, 64), options={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}),
    "efficientnet": lambda: TimmBackbone("efficientnet_b0", (64, 64)),
    "fastvit": lambda: TimmBackbone("fastvit_t8", (64, 64)),
    "hiera": lambda: TimmBackbone("hiera_tiny_224", (224, 224)),
}
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 300, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
TEXTS = {
    "bert": SMALL,
    "xlm-roberta": SMALL,
    "clip_text_model": SMALL,
    "siglip_text_model": SMALL,
    "siglip2_text_model": SMALL,
    "t5": T5,
    "mt5": T5,
    "gemma": SMALL | {"num_key_value_heads": 1, "head_dim": 16},
    "modernbert": SMALL | {"cls_token_id": 1, "sep_token_id": 2},
    "m2m_100": {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
}


def without_gradient(module):
    return [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("family", BACKBONES)
def test_every_parameter_of_a_backbone_gets_a_gradient(family):
    torch.manual_seed(0)
    backbone = BACKBONES[family]()
    backbone.remove_pool()
    height, width = backbone.canvas_hw or (3 * backbone.patch_size, 2 * backbone.patch_size)
    images = [noise(height, width, seed) for seed in range(2)]
    features = backbone(batch_images(images, backbone.patch_size, backbone.max_tokens, backbone.canvas_hw))
    features.tokens_BND.square().sum().backward()
    assert without_gradient(backbone) == []


@pytest.mark.parametrize("family", TEXTS)
def test_every_parameter_of_a_text_tower_gets_a_gradient(family):
    torch.manual_seed(0)
    tower = TextTower(ByteTokenizer(), {"model_type": family} | TEXTS[family])
    tower(*tower.tokenizer(["kite", "पतंग"])).square().sum().backward()
    assert without_gradient(tower) == []


def test_such_towers_train_on_two_ranks_also_where_a_part_is_frozen_or_adapted(tmp_path):
    tree = config()
    encoder = tree["model"]["encoder"]
    encoder["backbone"] = {
        "class_path": "indiclip.timm_backbone.TimmBackbone",
        "init_args": {"name": "swin_tiny_patch4_window7_224", "canvas_hw": [64, 64], "patch_size": 8, "options": SWIN},
    }
    encoder["text"]["architecture"] = {"model_type": "siglip_text_model"} | SMALL
    encoder["lora"] = {"r": 2, "towers": ["text"]}
    tree["model"]["freeze"] = ["encoder.backbone.net.patch_embed", "encoder.text.model.embeddings"]
    tree["trainer"]["callbacks"] = [
        {"class_path": "indiclip.training.callbacks.TaskGradients", "init_args": {"every_n_steps": 1}}
    ]
    done, folder = two_ranks(tmp_path, tree)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "frozen: encoder.backbone.net.patch_embed, encoder.text.model.embeddings; " in done.stdout
    assert "train/contrastive/backbone_grad_norm" in (folder / "history.jsonl").read_text()
