"""Dual encoders of other libraries come in: their embeddings are those of the library's own classes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import batch_images, noise

import indiclip

TEXTS = ["a photo of a kite", "मसाला डोसा", "a Photo, of: a kite!", "", "x" * 400]
TEXTS += ["लड\u095cका", "cafe\u0301 ", "a  kite &amp; a\tdrum"]


@pytest.mark.parametrize("kind", ["clip", "metaclip_2", "siglip", "siglip2"])
def test_transformers_embeddings_are_those_of_its_own_classes(folders, kind):
    encoder = indiclip.load(folders[kind])
    theirs = transformers.AutoModel.from_pretrained(folders[kind]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[kind])
    length = theirs.config.text_config.max_position_embeddings
    texts = [text.lower() for text in TEXTS] if kind == "siglip2" else TEXTS
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    p = encoder.backbone.patch_size
    images = batch_images([noise(4 * p, 4 * p, 1), noise(4 * p, 4 * p, 2)], p, 16)
    pixels = encoder.backbone.normalise(images)
    if kind == "siglip2":
        shapes = torch.tensor([[4, 4], [4, 4]])
        seen = {"pixel_values": pixels, "pixel_attention_mask": images["valid_BN"].long(), "spatial_shapes": shapes}
    else:
        seen = {"pixel_values": pixels.reshape(2, 4, 4, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 4 * p, 4 * p)}
    with torch.no_grad():
        image_BE = F.normalize(theirs.get_image_features(**seen).pooler_output, dim=-1)
        text_BE = F.normalize(theirs.get_text_features(**tokens).pooler_output, dim=-1)
        torch.testing.assert_close(encoder.embed_image(images), image_BE, atol=1e-5, rtol=0)
        torch.testing.assert_close(encoder.embed_text(TEXTS), text_BE, atol=1e-5, rtol=0)


def test_a_configuration_of_an_older_version_has_keys_that_nobody_reads(folders, tmp_path):
    """As the released ones of CLIP: of text generation, and what older versions wrote."""
    shutil.copytree(folders["clip"], tmp_path / "clip")
    file = Path(tmp_path / "clip" / "config.json")
    config = json.loads(file.read_text())
    config["text_config"] |= {"add_cross_attention": False, "bad_words_ids": None, "num_beams": 1, "top_p": 1.0}
    config["text_config"] |= {"id2label": {"0": "LABEL_0"}, "gradient_checkpointing": False, "torchscript": False}
    file.write_text(json.dumps(config | {"text_config_dict": None}))
    encoder = indiclip.load(tmp_path / "clip")
    assert encoder.to_config() == indiclip.load(folders["clip"]).to_config()
