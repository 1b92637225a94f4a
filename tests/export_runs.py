"""Three small encoders and their runs, all tensors random: portable, the quickstart's shape, and CLIP's."""

import json

import pytest
import torch
from foreign_models import letter_tokenizer
from helpers import ARCHITECTURE

from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.pooling import Projection
from indiclip.text import TextTower
from indiclip.tokenizers import ByteTokenizer, FastTokenizer

TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 80}
SIGLIP_OPTIONS = {
    "global_pool": "map",
    "pos_embed_grid_size": [4, 4],
    "pos_embed_interp_mode": "bilinear",
    "pos_embed_use_grid_sample": False,
}
CLIP_OPTIONS = {"class_token": True, "pre_norm": True, "global_pool": "token", "norm_eps": 1e-5}
CLIP_OPTIONS |= {"pos_embed_grid_size": [4, 4]}


def vit(patch_size=8, depth=2, **options):
    return NaFlexViT(width=32, depth=depth, num_heads=2, patch_size=patch_size, options=options)


def gemma_tokenizer():
    """Letters and bytes, as SigLIP 2 reads them."""
    import transformers

    found = letter_tokenizer(transformers.Siglip2Tokenizer)
    serialized = found.backend_tokenizer.to_str()
    return FastTokenizer(context_length=64, serialized=serialized, pad_token="<pad>", clean="nothing")


def siglip_text(tokenizer=None):
    return TextTower(tokenizer or gemma_tokenizer(), {"model_type": "siglip_text_model", **TEXT}, pad="context")


def portable(**options):
    """As conf/portable.yaml."""
    projections = {"image_projection": Projection("none"), "text_projection": Projection(bias=True)}
    backbone = vit(16, **SIGLIP_OPTIONS | options)
    return filled(Encoder(backbone, siglip_text(), 32, [16], "tower", "last", **projections))


def quickstart():
    """As conf/quickstart.yaml."""
    return filled(Encoder(vit(), TextTower(ByteTokenizer(), ARCHITECTURE), 64, [16], "mean", batch_norm=True))


def clip(tokenizer=None):
    """A class token behind a norm, and CLIP's text tower."""
    text = TextTower(tokenizer or ByteTokenizer(64), {"model_type": "clip_text_model", "hidden_act": "gelu", **TEXT})
    return filled(Encoder(vit(**CLIP_OPTIONS), text, 24, [16], "tower", "eos"))


def filled(encoder):
    """All tensors random, running statistics too."""
    torch.manual_seed(0)
    for name, tensor in encoder.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    encoder.initial_logits = {"logit_scale": 2.5, "logit_bias": -3.0}
    return encoder.eval().requires_grad_(False)


def save_run(encoder, folder, name="last", **entries):
    """A run's folder with one checkpoint."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    weights = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    weights |= {
        f"heads.contrastive.criterion.{key}": torch.tensor(value) for key, value in encoder.initial_logits.items()
    }
    checkpoint = {"encoder": encoder.to_config(), "state_dict": weights, "global_step": 7, **entries}
    torch.save(checkpoint, folder / "checkpoints" / f"{name}.ckpt")
    source = {
        "task": "contrastive",
        "dataset": {"class_path": "a.Captions", "init_args": {"file": "/home/me/fair.csv"}},
    }
    (folder / "config.yaml").write_text(json.dumps({"data": {"train": [source]}}))
    metrics = {"val/contrastive/zero_shot": 0.75, "val/contrastive/zero_shot/hi": 0.5}
    (folder / "metrics.json").write_text(json.dumps({"step": 7, "metrics": metrics}))
    return str(folder)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    made = {"portable": portable(), "quickstart": quickstart(), "clip": clip()}
    return {name: save_run(encoder, root / name) for name, encoder in made.items()}
