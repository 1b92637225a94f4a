"""LoRA: adapters train, base weights do not; a run with them loads again, and merged it is the same encoder."""

import pytest
import torch
from helpers import noise, tiny_encoder
from test_cli import config, fit

import indiclip
from heads.contrastive import Contrastive
from indiclip.lora import LoRA
from indiclip.module import MultiTask

TEXTS = ["a kite", "पतंग"]


def stirred(encoder):
    """Adapters begin at zero, where any mistake is invisible."""
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return encoder.eval()


def test_adapters_change_nothing_at_the_start_and_alone_are_trained():
    plain, adapted = tiny_encoder().eval(), tiny_encoder(lora=LoRA(r=4)).eval()
    with torch.no_grad():
        assert torch.equal(plain.embed_text(TEXTS), adapted.embed_text(TEXTS))
    module = MultiTask(adapted, [Contrastive()])
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    for tower in ("encoder.backbone.", "encoder.text."):
        assert {"lora_" in name for name in trained if name.startswith(tower)} == {True}
    assert {"encoder.image_projection.weight", "encoder.text_pool.pool.latent"} <= trained


@pytest.mark.parametrize("towers", [["image"], ["text"], ["image", "text"]])
def test_merged_is_the_same_encoder_without_adapters(towers):
    encoder = stirred(tiny_encoder(lora=LoRA(r=4, towers=towers)))
    merged = encoder.merged()
    assert merged.state_dict().keys() == tiny_encoder().state_dict().keys()
    assert merged.to_config() == tiny_encoder().to_config()
    with torch.no_grad():
        image = noise(24, 32)
        torch.testing.assert_close(merged.embed_image(image), encoder.embed_image(image), atol=1e-6, rtol=0)
        torch.testing.assert_close(merged.embed_text(TEXTS), encoder.embed_text(TEXTS), atol=1e-6, rtol=0)
        assert not torch.equal(encoder.embed_text(TEXTS), tiny_encoder().eval().embed_text(TEXTS)) or towers == [
            "image"
        ]


def test_a_run_with_adapters_goes_on_and_loads(tmp_path):
    tree = config()
    tree["model"]["encoder"]["lora"] = {"r": 4, "towers": ["image"]}
    assert fit(tmp_path, tree) == 0
    assert fit(tmp_path, tree, "--ckpt_path", "last", "--trainer.max_steps", "3") == 0
    folder = tmp_path / "runs" / "experiment"
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["encoder"]["lora"]["r"] == 4
    loaded = indiclip.load(folder)
    assert torch.equal(
        loaded.state_dict()["backbone.vit.blocks.0.attn.qkv.lora_B.default.weight"],
        saved["state_dict"]["encoder.backbone.vit.blocks.0.attn.qkv.lora_B.default.weight"],
    )


def test_a_target_that_no_layer_has_is_said():
    with pytest.raises(ValueError, match="encoder.lora.targets: no linear layer 'qkw'; nearest is 'qkv'"):
        tiny_encoder(lora=LoRA(targets=["qkw"]))
