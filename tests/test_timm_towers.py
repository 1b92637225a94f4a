"""timm's image models come in: tokens and pooled vectors are those of its own classes, whatever the mechanism.

`tools/survey_timm.py` does the same with every name.
"""

import argparse
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import ARCHITECTURE, noise
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.models import save_for_hf

from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.pretrained.build import build
from indiclip.pretrained.init_from import InitFrom
from indiclip.pretrained.read import read_weights
from indiclip.pretrained.timm_models import image_tower
from indiclip.text import TextTower
from indiclip.timm_backbone import TimmBackbone
from indiclip.tokenizers import ByteTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import survey_timm

SMALL = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 64}
VITS = {
    "class token": ("vit_tiny_patch16_224", SMALL),
    "position of the class token": ("vit_base_patch16_clip_quickgelu_224", SMALL),
    "registers": ("test_vit2", {}),
    "registers with positions": ("vit_so150m_patch16_reg4_gap_384", SMALL | {"num_heads": 2}),
    "mean, norm behind it": ("vit_medium_patch16_gap_240", SMALL),
    "map pooling": ("vit_so400m_patch14_siglip_224", SMALL | {"img_size": 56}),
    "quickgelu": ("vit_base_patch32_clip_quickgelu_224", SMALL),
    "eva": ("eva02_tiny_patch14_224", SMALL | {"img_size": 56}),
    "axial rotary": ("vit_small_patch16_rope_224", SMALL),
    "mixed rotary": ("vit_small_patch16_rope_mixed_ape_224", SMALL),
    "dinov3": ("vit_small_patch16_dinov3", SMALL),
    "perception encoder": ("vit_pe_core_tiny_patch16_384", SMALL | {"attn_pool_num_heads": 2}),
    "another table": ("vit_base_patch16_radio_v3", SMALL),
    "naflex, map": ("naflexvit_base_patch16_siglip", {"depth": 1, "embed_dim": 32, "num_heads": 2}),
    "naflex, factorised": ("naflexvit_base_patch16_parfac_gap", {"depth": 1, "embed_dim": 32, "num_heads": 2}),
}
OTHERS = {
    "beit": ("beit_base_patch16_224", SMALL),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL),
    "relative positions": ("test_vit_relpos", {}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4, "depths": (1, 1, 1, 1)}),
    "swin v2": ("swinv2_tiny_window8_256", {"img_size": 64, "window_size": 4, "depths": (1, 1, 1, 1)}),
    "convnext": ("test_convnext", {}),
    "resnet": ("test_resnet", {}),
    "efficientnet": ("test_efficientnet", {}),
    "mobilenet": ("mobilenetv3_small_050", {}),
    "focalnet": ("focalnet_tiny_srf", {}),
    "fastvit": ("fastvit_t8", {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 64)}),
    "hiera": ("hiera_tiny_224", {"stages": (1, 1, 1, 1), "embed_dim": 16}),
    "levit": ("levit_128s", {"depth": (1, 1, 1)}),
    "maxvit": ("test_maxvit", {}),
}


def random_model(name, options):
    with survey_timm.NoInitialisation():
        model = timm.create_model(name, **options)
    survey_timm.randomise(model, 0)
    return model.eval()


def side(options, model):
    size = options.get("img_size") or model.pretrained_cfg["input_size"][-1]
    return (size, size)


def read(name, options, model=None):
    """The tower of a model's weights, filled strictly."""
    model = model or random_model(name, options)
    weights = image_tower(name, name, model.state_dict(), options, {})
    backbone = build({"backbone": weights.config["backbone"]}, name)["backbone"]
    backbone.load_state_dict({key.removeprefix("backbone."): tensor for key, tensor in weights.tensors.items()})
    return backbone.eval(), model, weights


@pytest.mark.parametrize("mechanism", VITS)
def test_vits_of_any_size_equal_timms_own(mechanism):
    name, options = VITS[mechanism]
    backbone, model, weights = read(name, options)
    assert isinstance(backbone, NaFlexViT)
    assert all(key.startswith(("head.", "fc.")) for key in weights.ignored)
    found = survey_timm.compare(backbone, model, side(options, model))
    assert found["result"] == "equal", found


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_equal_timms_own_and_leave_no_parameter_without_gradient(family):
    name, options = OTHERS[family]
    backbone, model, _ = read(name, options)
    assert isinstance(backbone, TimmBackbone)
    found = survey_timm.compare(backbone, model, side(options, model))
    assert found["result"] == "equal", found
    assert survey_timm.without_gradient(backbone.float()) == {"unused_tower": [], "unused_mean": []}


def test_what_has_no_map_is_refused_in_a_line():
    name = "crossvit_tiny_240"
    with pytest.raises(ValueError, match="crossvit_tiny_240 gives list; expected one map, or one row") as raised:
        image_tower(name, name, timm.create_model(name).state_dict(), {}, {})
    assert "\n" not in str(raised.value)


def test_at_another_size_positions_are_those_of_timms_dynamic_size():
    name, options = VITS["class token"]
    backbone, model, _ = read(name, options)
    dynamic = timm.create_model(name, dynamic_img_size=True, **options).eval()
    dynamic.load_state_dict(model.state_dict())
    for height, width in ((48, 96), (128, 112)):
        picture = noise(height, width)
        images = backbone.preprocessing.batch([picture], height * width // 256)
        pixels = (torch.from_numpy(picture).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
        with torch.no_grad():
            expected = dynamic.forward_features(pixels)
            features = backbone(images)
        torch.testing.assert_close(features.tokens_BND, expected[:, 1:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features.prefix_BKD, expected[:, :1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", [("swin", 128), ("beit", 96)])
def test_weights_of_another_size_are_converted_as_timm_does(case):
    """Oracle: timm's own model of the new size, filled by timm from the old one's tensors."""
    family, larger_side = case
    name, options = OTHERS[family]
    model = random_model(name, options)
    larger = options | {"img_size": larger_side}
    backbone, _, weights = read(name, larger, model)
    assert any("resampled" in note for note in weights.notes)
    overlay = {"state_dict": model.state_dict()}
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **larger).eval()
    found = survey_timm.compare(backbone, theirs, side(larger, theirs))
    assert found["result"] == "equal", found


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels_become_three(channels):
    name, options = OTHERS["resnet"]
    model = random_model(name, options | {"in_chans": channels})
    weights = image_tower(name, name, model.state_dict(), options, {})
    assert f"conv1.0.weight converted from {channels} to 3 channels" in " ".join(weights.notes)
    assert weights.tensors["backbone.net.conv1.0.weight"].shape[1] == 3


def texts():
    return TextTower(ByteTokenizer(), ARCHITECTURE)


def test_a_folder_brings_its_arguments_and_pixels(tmp_path):
    model = random_model(*VITS["class token"])
    pixels = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear"}
    model.pretrained_cfg.update(pixels)
    save_for_hf(model, str(tmp_path), model_args=dict(SMALL), safe_serialization=True)
    encoder = Encoder(text=texts(), init_from=[InitFrom(str(tmp_path))]).eval()
    assert (encoder.backbone.mean, encoder.backbone.std) == (pixels["mean"], pixels["std"])
    assert encoder.backbone.interpolation == "bilinear"
    assert survey_timm.compare(encoder.backbone, model, (64, 64))["result"] == "equal"
    assert "2 left out (head.bias, head.weight)" in encoder.initialised[0]


@pytest.mark.parametrize(
    "options", [{"pretrained": True}, {"checkpoint_path": "/etc/passwd"}, {"pretrained_cfg": {"hf_hub_id": "evil/x"}}]
)
def test_a_folder_reaches_no_network_and_no_other_file(tmp_path, options):
    save_for_hf(random_model("test_vit", {}), str(tmp_path), model_args=options, safe_serialization=True)
    with pytest.raises(ValueError, match=f"backbone.options.{next(iter(options))}: found .* expected a plain option"):
        read_weights(str(tmp_path))


@pytest.mark.parametrize("kind", ["safetensors", "plain", "wrapped", "averaged"])
def test_files_of_every_kind_are_read(tmp_path, kind):
    model, other = random_model("test_vit", {}), timm.create_model("test_vit")
    tensors = model.state_dict()
    file = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pth")
    if kind == "safetensors":
        save_file(tensors, file)
    elif kind == "averaged":
        options = argparse.Namespace(lr=0.1)
        torch.save({"state_dict": other.state_dict(), "state_dict_ema": tensors, "args": options, "epoch": 3}, file)
    else:
        torch.save(tensors if kind == "plain" else {"model": {f"module.{k}": v for k, v in tensors.items()}}, file)
    weights = read_weights(f"timm:test_vit:{file}")
    assert torch.equal(weights.tensors["backbone.vit.blocks.0.attn.qkv.bias"], tensors["blocks.0.attn.qkv.bias"])


def test_strict_and_allowed(tmp_path):
    tensors = random_model("test_vit", {}).state_dict()
    lacking = {name: tensor for name, tensor in tensors.items() if name != "norm.weight"} | {"odd": torch.zeros(2)}
    file = tmp_path / "x.safetensors"
    save_file(lacking, file)
    name = f"timm:test_vit:{file}"
    for allowed, words in (
        (["*odd"], "1 tensors stay initial: backbone.*norm.weight"),
        (["*.norm.weight"], "are unused"),
    ):
        with pytest.raises(ValueError, match=words):
            Encoder(text=texts(), init_from=[InitFrom(name, allow=allowed)])
    encoder = Encoder(text=texts(), init_from=[InitFrom(name, allow=["*odd", "*.norm.weight"])])
    assert "1 stay initial" in encoder.initialised[0]


@pytest.mark.parametrize("mechanism", ["mean, norm behind it", "class token"])
def test_the_final_norm_comes_along_when_the_encoder_pools(tmp_path, mechanism):
    name, options = VITS[mechanism]
    model = random_model(name, options)
    save_for_hf(model, str(tmp_path), model_args=dict(options), safe_serialization=True)
    encoder = Encoder(text=texts(), pool="mean", init_from=[InitFrom(str(tmp_path), allow=["image_pool*"])]).eval()
    picture = noise(64, 64)
    pixels = encoder.backbone.normalise(encoder.backbone.preprocessing.batch([picture], 16))
    pixels = pixels.reshape(1, 4, 4, 16, 16, 3).permute(0, 5, 1, 3, 2, 4).reshape(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.fc_norm(model.forward_features(pixels))[:, model.num_prefix_tokens :]
        tokens = encoder.backbone(encoder.backbone.preprocessing.batch([picture], 16)).tokens_BND
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


def test_a_name_without_a_network_says_which_file_to_bring(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("vit_base_patch16_clip_224.openai", "timm:vit_base_patch16_clip_224.openai"):
        with pytest.raises(
            FileNotFoundError, match=r"download model\.safetensors of .* and write timm:vit_base"
        ) as raised:
            read_weights(name)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="openia'; nearest is 'vit_base_patch16_clip_224.openai'"):
        read_weights("timm:vit_base_patch16_clip_224.openia")
    with pytest.raises(ValueError, match="test_vit4 has no weights on the hub"):
        read_weights("timm:test_vit4")


@pytest.mark.parametrize("name", ["selecsls42", "hrnet_w18_small", "inception_next_atto", "mobilenetv3_small_050"])
def test_what_a_model_calls_its_head_may_be_a_part_of_its_features(name):
    """Without its pooling the maps are those with it, and every weight that is left learns."""
    torch.manual_seed(0)
    backbone = TimmBackbone(name, (64, 64), 32).eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = backbone.read_pixels(pixels).tokens_BND
    backbone.remove_pool()
    after = backbone.read_pixels(pixels).tokens_BND
    if name != "mobilenetv3_small_050":  # whose last convolution is behind its pooling
        torch.testing.assert_close(after, before)
    after.square().sum().backward()
    assert [path for path, weight in backbone.named_parameters() if weight.grad is None] == []
