"""LoRA: adapters train, base weights do not; a run with them loads again, and merged it is the same encoder."""

import pytest
import torch
from experiments import config, fit
from helpers import ARCHITECTURE, caption_batch, noise, tiny_encoder
from test_gradients import BACKBONES, TEXTS, without_gradient

import indiclip
from heads.contrastive import Contrastive
from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.lora import LoRA
from indiclip.module import MultiTask
from indiclip.pretrained.init_from import InitFrom
from indiclip.text import TextTower
from indiclip.timm_backbone import TimmBackbone
from indiclip.tokenizers import ByteTokenizer

TEXTS_TO_READ = ["a kite", "पतंग"]


def stirred(encoder):
    """Adapters begin at zero, where any mistake is invisible."""
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return encoder.eval()


def test_adapters_change_nothing_at_the_start_and_alone_are_trained():
    plain, adapted = tiny_encoder().eval(), tiny_encoder(lora=LoRA(r=4)).eval()
    with torch.no_grad():
        assert torch.equal(plain.embed_text(TEXTS_TO_READ), adapted.embed_text(TEXTS_TO_READ))
    module = MultiTask(adapted, [Contrastive()])
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    for tower in ("encoder.backbone.", "encoder.text."):
        assert {"lora_" in name for name in trained if name.startswith(tower)} == {True}
    assert {"encoder.image_projection.weight", "encoder.text_pool.pool.latent"} <= trained


@pytest.mark.parametrize("towers", [["image"], ["text"], ["image", "text"]])
def test_merged_is_the_same_encoder_without_adapters(towers):
    encoder = stirred(tiny_encoder(lora=LoRA(r=4, towers=towers)))
    merged, plain = encoder.merged(), tiny_encoder().eval()
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert merged.to_config() == plain.to_config()
    image = noise(24, 32)
    with torch.no_grad():
        torch.testing.assert_close(merged.embed_image(image), encoder.embed_image(image), atol=1e-6, rtol=0)
        texts = encoder.embed_text(TEXTS_TO_READ)
        torch.testing.assert_close(merged.embed_text(TEXTS_TO_READ), texts, atol=1e-6, rtol=0)
        assert torch.equal(texts, plain.embed_text(TEXTS_TO_READ)) == (towers == ["image"])


VITS = [name for name in BACKBONES if name.startswith(("naflex", "vit", "swin"))]  # the others' blocks are convolutions


@pytest.mark.parametrize("family", [*VITS, *TEXTS])
def test_every_familys_adapters_count_and_merge(family):
    torch.manual_seed(0)
    lora = LoRA(r=2, towers=["text" if family in TEXTS else "image"])
    architecture = {"model_type": family} | TEXTS[family] if family in TEXTS else ARCHITECTURE
    backbone = BACKBONES.get(family, lambda: NaFlexViT(width=32, depth=1, num_heads=2, patch_size=8))()
    encoder = Encoder(backbone, TextTower(ByteTokenizer(), architecture), 32, (16,), pool="mean", lora=lora).eval()

    def embedded(model):
        if family in TEXTS:
            return model.embed_text(TEXTS_TO_READ)
        return model.embed_image([noise(*(backbone.canvas_hw or (24, 32)), seed) for seed in range(2)])

    with torch.no_grad():
        before, after = embedded(encoder), embedded(stirred(encoder))
        torch.testing.assert_close(embedded(encoder.merged()), after, atol=1e-6, rtol=0)
    assert (before - after).abs().max() > 1e-3
    (embedded(encoder) * torch.randn(2, 32)).sum().backward()
    assert [name for name in without_gradient(encoder) if "lora_" in name] == []


def eva():
    return NaFlexViT(name="eva02_tiny_patch14_224", options={"depth": 2})


def swin_2():
    return TimmBackbone("swinv2_tiny_window8_256", (64, 64), options={"depths": [1, 1, 1, 1]})


def beit():
    return TimmBackbone("beit_base_patch16_224", (64, 64), options={"depth": 2, "embed_dim": 48, "num_heads": 2})


@pytest.mark.parametrize("make", [eva, swin_2, beit])
def test_adapters_that_a_model_reads_past_are_refused(make):
    text = TextTower(ByteTokenizer(), ARCHITECTURE)
    message = r"the image tower reads the weights of qkv past their adapters .*; expected some of \[.*fc1, fc2"
    encoder = Encoder(make(), text, 32, (16,), lora=LoRA(r=2))
    with pytest.raises(ValueError, match=message) as said:
        MultiTask(encoder, [Contrastive()])
    assert "\n" not in str(said.value)
    encoder = Encoder(make(), text, 32, (16,), lora=LoRA(r=2, towers=["image"], targets=["proj", "fc1", "fc2"]))
    encoder.check_adapters()
    assert encoder.backbone.training


def test_what_begins_with_a_run_of_adapters_has_them_in_its_weights(tmp_path):
    first = stirred(tiny_encoder(lora=LoRA(r=4, alpha=3.0)))
    weights = {f"encoder.{name}": tensor for name, tensor in first.state_dict().items()}
    torch.save({"encoder": first.to_config(), "state_dict": weights}, tmp_path / "run.ckpt")
    source = InitFrom(str(tmp_path / "run.ckpt"))
    with torch.no_grad():
        for lora in (None, LoRA(r=2)):
            encoder = Encoder(init_from=[source], lora=lora).eval()
            torch.testing.assert_close(
                encoder.embed_text(TEXTS_TO_READ), first.embed_text(TEXTS_TO_READ), atol=1e-6, rtol=0
            )
            assert "LoRA's adapters are added to the weights" in encoder.initialised[0]


def test_freezing_all_adapters_of_a_tower_is_refused_and_some_of_them_is_not():
    encoder = tiny_encoder(lora=LoRA(r=2))
    message = "model.freeze: freezes all of LoRA's adapters in the image tower, .*; expected either without image"
    with pytest.raises(ValueError, match=message):
        MultiTask(encoder, [Contrastive()], freeze=["image"])
    module = MultiTask(tiny_encoder(lora=LoRA(r=2, towers=["image"])), [Contrastive()], freeze=["text"])
    module.log = module.log_dict = lambda *_, **__: None
    module.training_step({"contrastive": caption_batch(["a", "b", "c"])}, 0).backward()
    assert without_gradient(module) == []


def test_a_run_with_adapters_goes_on_and_loads_without_running_its_tower(tmp_path, monkeypatch):
    tree = config()
    tree["model"]["encoder"]["lora"] = {"r": 4, "towers": ["image"]}
    assert fit(tmp_path, tree) == 0
    assert fit(tmp_path, tree, "--ckpt_path", "last", "--trainer.max_steps", "3") == 0
    folder = tmp_path / "runs" / "experiment"
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["encoder"]["lora"]["r"] == 4
    monkeypatch.delattr(NaFlexViT, "forward")
    loaded = indiclip.load(folder)
    assert torch.equal(
        loaded.state_dict()["backbone.vit.blocks.0.attn.qkv.lora_B.default.weight"],
        saved["state_dict"]["encoder.backbone.vit.blocks.0.attn.qkv.lora_B.default.weight"],
    )


def test_a_target_that_no_layer_has_is_said():
    with pytest.raises(ValueError, match="encoder.lora.targets: no linear layer 'qkw'; nearest is 'qkv'"):
        tiny_encoder(lora=LoRA(targets=["qkw"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"towers": []}, "model.encoder.lora.towers: found none; expected one at least"),
        ({"targets": []}, "model.encoder.lora.targets: found none"),
        ({"r": 100_000}, "model.encoder.lora.r: found 100000; expected 1 to 32"),
        ({"alpha": 0}, "model.encoder.lora.alpha: found 0; expected above 0"),
        ({"dropout": 1}, "encoder.lora.dropout: found 1; expected 0 to below 1"),
    ],
)
def test_adapters_that_would_do_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_encoder(lora=LoRA(**options))
