"""Image models of transformers with stages: equal to transformers' own classes, all tensors random."""

import pytest
import torch
import transformers
from helpers import batch_images, noise
from test_pretrained_text import random_tensors

from indiclip.pretrained.build import build
from indiclip.pretrained.read import read_weights
from indiclip.transformers_backbone import KINDS, TransformersBackbone

TWO = {"depths": [1, 2], "num_heads": [2, 4], "embed_dim": 16, "image_size": 32}
SIZES = {
    "swin": TWO | {"window_size": 4},
    "swinv2": TWO | {"window_size": 4},
    "focalnet": {"depths": [1, 2], "embed_dim": 16, "image_size": 32, "focal_levels": [2, 2], "focal_windows": [3, 3]},
    "convnext": {"depths": [1, 2], "hidden_sizes": [8, 16], "num_stages": 2},
    "convnextv2": {"depths": [1, 2], "hidden_sizes": [8, 16], "num_stages": 2},
    "resnet": {"depths": [1, 2], "hidden_sizes": [8, 16], "embedding_size": 8},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_comes_in_equal_and_is_rebuilt(kind, tmp_path):
    config = transformers.CONFIG_MAPPING[kind](**SIZES[kind])
    whole = random_tensors(transformers.AutoModelForImageClassification.from_config(config)).eval()
    whole.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    weights = read_weights(str(tmp_path))
    assert set(weights.ignored) <= {"classifier.weight", "classifier.bias", "classifier.1.weight", "classifier.1.bias"}
    backbone = build(weights.config, "x")["backbone"].eval()
    backbone.load_state_dict({name.removeprefix("backbone."): value for name, value in weights.tensors.items()})
    side = backbone.canvas_hw[0]
    images = batch_images([noise(side, side, 1), noise(side, side, 2)], backbone.patch_size, backbone.max_tokens)
    with torch.no_grad():
        pixels = torch.stack([torch.from_numpy(noise(side, side, seed)) for seed in (1, 2)]) / 255
        mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
        out = getattr(whole, whole.base_model_prefix)(((pixels - mean) / std).permute(0, 3, 1, 2))
        features = backbone(images)
        assert features.tokens_BND.shape[1:] == (features.grid_hw[0] * features.grid_hw[1], backbone.width)
        torch.testing.assert_close(backbone.pool(features), out.pooler_output.flatten(1), atol=1e-5, rtol=1e-5)
        theirs = out.last_hidden_state
        theirs = theirs if theirs.ndim == 3 else theirs.flatten(2).transpose(1, 2)
        torch.testing.assert_close(features.tokens_BND, theirs, atol=1e-5, rtol=1e-5)
    backbone.remove_pool()
    backbone.train()
    backbone(images).tokens_BND.square().mean().backward()
    assert [name for name, value in backbone.named_parameters() if value.grad is None] == []


def test_another_kind_is_refused_in_a_line():
    with pytest.raises(ValueError, match=r"backbone.architecture.model_type: found 'swim'; nearest is 'swin'"):
        TransformersBackbone({"model_type": "swim"}, (32, 32), 8)
