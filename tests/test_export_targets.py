"""Every arrow from three small runs is within its bound or refused, and opens as the other library's users open it."""

import json
import re
import shutil
import sys
from functools import cache

import numpy as np
import pytest
import timm
import torch
import transformers
from export_runs import CLIP_OPTIONS, clip, filled, portable, runs, siglip_text, vit  # noqa: F401
from helpers import ARCHITECTURE, batch_images, noise
from PIL import Image
from safetensors.torch import load_file

import indiclip
from indiclip.backbone import NaFlexViT
from indiclip.config_files import SHIPPED
from indiclip.encoder import Encoder
from indiclip.evals.models.embedder import load_embedder
from indiclip.export.exporter import Refused, export
from indiclip.export.parity import measure
from indiclip.export.source import open_source
from indiclip.export.target import find_target
from indiclip.pooling import Projection
from indiclip.pretrained.init_from import InitFrom
from indiclip.text import TextTower
from indiclip.timm_backbone import TimmBackbone
from indiclip.tokenizers import ByteTokenizer, FastTokenizer, SiglipTokenizer

TARGETS = ("timm", "siglip", "siglip2", "open_clip", "torchvision")
IMAGES_ONLY = ("timm", "torchvision")
LOSSLESS = {"portable": {*TARGETS}, "quickstart": {*IMAGES_ONLY}, "clip": {*IMAGES_ONLY, "open_clip"}}
REASONS = {
    ("quickstart", "siglip"): "pool: found 'mean'",
    ("quickstart", "siglip2"): "backbone.patch_size: found 8",
    ("quickstart", "open_clip"): "found 'bert', which OpenCLIP seeks on the hub",
    ("clip", "siglip"): "SigLIP has no place for embeds.cls_token",
    ("clip", "siglip2"): "expected siglip_text_model",
}


@pytest.fixture(scope="session")
def exported(runs, tmp_path_factory):  # noqa: F811
    root = tmp_path_factory.mktemp("exported")

    @cache
    def folder(run, target):
        out = root / f"{run}-{target}"
        export(open_source(runs[run], "auto", None), target, out)
        return out

    return folder


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("run", LOSSLESS)
def test_every_arrow_is_within_its_bound_or_refused(runs, exported, tmp_path, run, target):  # noqa: F811
    if target in LOSSLESS[run]:
        record = json.loads((exported(run, target) / "parity.json").read_text())
        assert record["within_bound"]
        assert record["largest_difference"] <= record["bound"] <= 1e-5
        assert ("text" in record) == (target not in IMAGES_ONLY)
    else:
        with pytest.raises(Refused, match=REASONS[run, target]):
            export(open_source(runs[run], "auto", None), target, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["siglip", "siglip2"])
def test_out_and_in_again_is_bit_equal(runs, exported, target):  # noqa: F811
    ours, theirs = indiclip.load(runs["portable"]), indiclip.load(exported("portable", target))
    own, back = ours.state_dict(), theirs.state_dict()
    table = "text.model.embeddings.position_embedding.weight"  # of which 64 rows are read
    own[table] = own[table][:64]
    assert own.keys() == back.keys()
    assert all(torch.equal(own[name], back[name]) for name in own)
    assert theirs.initial_logits == {"logit_scale": 2.5, "logit_bias": -3.0}
    pictures = [noise(64, 64, 1)] + [noise(48, 80, 2)] * (target == "siglip2")
    assert torch.equal(ours.embed_image(pictures), theirs.embed_image(pictures))
    texts = ["a kite", "मसाला डोसा", "", "x y " * 60]
    assert torch.equal(ours.embed_text(texts), theirs.embed_text(texts))


@pytest.mark.parametrize("run", ["portable", "clip"])
def test_an_open_clip_folder_comes_in_again_bit_equal(runs, exported, run):  # noqa: F811
    ours, theirs = indiclip.load(runs[run]), indiclip.load(exported(run, "open_clip"))
    own, back = ours.state_dict(), theirs.state_dict()
    table = "text.model.embeddings.position_embedding.weight"
    own[table] = own[table][:64]
    assert own.keys() == back.keys()
    assert all(torch.equal(own[name], back[name]) for name in own)
    side, texts = 4 * ours.backbone.patch_size, ["a kite", "मसाला डोसा", "", "x y " * 60]
    assert torch.equal(ours.embed_image(noise(side, side)), theirs.embed_image(noise(side, side)))
    assert torch.equal(ours.embed_text(texts), theirs.embed_text(texts))


@pytest.mark.parametrize("run", LOSSLESS)
def test_a_timm_folder_comes_in_again_bit_equal(runs, exported, run):  # noqa: F811
    ours = indiclip.load(runs[run])
    text = TextTower(ByteTokenizer(), ARCHITECTURE)
    width = ours.backbone.width
    theirs = Encoder(text=text, embed_dim=width, lengths=[width], init_from=[InitFrom(str(exported(run, "timm")))])
    own, back = ours.backbone.state_dict(), theirs.backbone.state_dict()
    assert own.keys() == back.keys()
    assert all(torch.equal(own[name], back[name]) for name in own)
    images = batch_images([noise(64, 48, 1), noise(32, 32, 2)], ours.backbone.patch_size, 64)
    with torch.no_grad():
        ours_out, theirs_out = ours.features(images), theirs.eval().features(images)
    assert torch.equal(ours_out.tokens_BND, theirs_out.tokens_BND)


@pytest.mark.parametrize("run", ["portable", "clip"])
def test_timm_and_transformers_open_the_timm_folder(exported, run):
    folder = exported(run, "timm")
    name = f"local-dir:{folder}"
    model = timm.create_model(name, pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    assert config["crop_pct"] == 1.0
    assert config["interpolation"] == "bilinear"
    pixels = timm.data.create_transform(**config)(Image.fromarray(noise(*config["input_size"][1:]))).unsqueeze(0)
    with torch.no_grad():
        maps = timm.create_model(name, pretrained=True, features_only=True, out_indices=(0, 1)).eval()(pixels)
        last, intermediates = model.forward_intermediates(pixels)
        tokens = model.forward_features(pixels)
        wrapped = transformers.AutoModel.from_pretrained(folder).eval()(pixels)
    torch.testing.assert_close(last, tokens)
    torch.testing.assert_close(maps[-1], intermediates[-1])
    torch.testing.assert_close(wrapped.last_hidden_state, tokens)


@pytest.mark.parametrize("target", ["siglip", "siglip2"])
def test_transformers_pipeline_finds_what_our_encoder_finds(runs, exported, target):  # noqa: F811
    ours, folder = indiclip.load(runs["portable"]), str(exported("portable", target))
    picture, classes = Image.fromarray(noise(64, 64, 3)), ["a kite", "a drum", "मसाला डोसा"]
    with torch.no_grad():
        logits = ours.embed_image(picture) @ ours.embed_text(classes).T * np.exp(2.5) - 3.0
        if target == "siglip":
            found = transformers.pipeline("zero-shot-image-classification", model=folder)(
                picture, candidate_labels=classes, hypothesis_template="{}"
            )
            theirs = torch.tensor([{row["label"]: row["score"] for row in found}[name] for name in classes])
        else:
            processor = transformers.AutoProcessor.from_pretrained(folder)
            inputs = processor(images=[picture], text=classes, max_num_patches=16, return_tensors="pt")
            theirs = transformers.AutoModel.from_pretrained(folder).eval()(**inputs).logits_per_image[0].sigmoid()
    torch.testing.assert_close(theirs, logits[0].sigmoid(), atol=1e-5, rtol=0)


def test_llava_sees_by_the_siglip_tower(runs, exported):  # noqa: F811
    ours, folder = indiclip.load(runs["portable"]), exported("portable", "siglip")
    tower = transformers.SiglipVisionModel.from_pretrained(folder)
    language = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config = transformers.LlavaConfig(
        vision_config=tower.config,
        text_config=language,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=16,
    )
    llava = transformers.LlavaModel(config).eval()
    missing = llava.vision_tower.load_state_dict(tower.state_dict())
    assert not missing.missing_keys
    images = batch_images([noise(64, 64, 4)], 16, 16)
    pixels = find_pixels(ours, images)
    with torch.no_grad():
        seen = llava.vision_tower(pixels).last_hidden_state
        projected = llava.get_image_features(pixels).pooler_output
        torch.testing.assert_close(seen, ours.features(images).tokens_BND, atol=1e-5, rtol=0)
    assert torch.cat(list(projected)).reshape(16, 16).isfinite().all()


def find_pixels(encoder, images):
    from indiclip.export.to_timm import as_pixels

    return as_pixels(encoder.backbone.normalise(images), images)


@pytest.mark.parametrize("run", ["portable", "clip"])
def test_open_clip_opens_its_folder(runs, exported, run):  # noqa: F811
    import open_clip

    ours, name = indiclip.load(runs[run]), f"local-dir:{exported(run, 'open_clip')}"
    model, _, transform = open_clip.create_model_and_transforms(name, require_pretrained=True)
    tokenizer = open_clip.get_tokenizer(name)
    side = 4 * ours.backbone.patch_size
    picture, texts = Image.fromarray(noise(side, side, 5)), ["a kite", "मसाला डोसा"]
    with torch.no_grad():
        image = model.eval().encode_image(transform(picture).unsqueeze(0), normalize=True)
        text = model.encode_text(tokenizer(texts), normalize=True)
        torch.testing.assert_close(image, ours.embed_image(picture), atol=1e-5, rtol=0)
        torch.testing.assert_close(text, ours.embed_text(texts), atol=1e-5, rtol=0)
    assert model.logit_scale.item() == 2.5


@pytest.mark.parametrize("target", TARGETS)
def test_the_cards_lines_load_the_folder(exported, tmp_path, monkeypatch, target):
    folder = exported("portable", target)
    picture = Image.fromarray(noise(90, 120))
    picture.save(tmp_path / "photo.jpg")
    (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    given, shown = {
        "timm": ("image", "embedding"),
        "torchvision": ("image", "detector"),
        "open_clip": ("picture", "image"),
    }.get(target, ("image", "model"))
    names = {given: picture}
    exec(lines_of_card(folder), names)
    assert names[shown] is not None


def lines_of_card(folder):
    card = (folder / "README.md").read_text("utf-8")
    assert f"library_name: {find_target(json.loads((folder / 'parity.json').read_text())['to']).library_name}" in card
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def test_an_open_clip_folder_may_be_moved(exported, tmp_path, monkeypatch):
    """By the lines of its card, and as a model of ours and of the benchmark."""
    moved = shutil.copytree(exported("portable", "open_clip"), tmp_path / "portable-open_clip")
    exported("portable", "open_clip").rename(tmp_path / "gone")
    monkeypatch.chdir(tmp_path)
    try:
        picture = Image.fromarray(noise(64, 64, 5))
        found = {"picture": picture}
        exec(lines_of_card(moved), found)
        theirs = load_embedder(str(moved))
        pixels = theirs.collate([theirs.prepare(noise(64, 64, 5), theirs.views(["native"])[0])])
        expected = indiclip.load(moved).embed_image(picture)
        for image_BE in (found["image"], theirs.embed_images(pixels)):
            torch.testing.assert_close(image_BE, expected, atol=1e-5, rtol=0)
    finally:
        (tmp_path / "gone").rename(exported("portable", "open_clip"))


def proved(encoder, target, tmp_path):
    way = find_target(target)
    assert way.check(encoder) == []
    way.write(encoder, tmp_path, tmp_path)
    return measure(way, encoder, way.reload(encoder, tmp_path))


def test_towers_of_fixed_size_leave_by_their_names(tmp_path):
    text = clip().text
    backbone = TimmBackbone("test_convnext", (64, 96))
    encoder = filled(Encoder(backbone, text, 16, [16], "tower", "eos", image_projection=Projection("mlp", True, 32)))
    for name in "abc":
        (tmp_path / name).mkdir()
    record = proved(encoder, "open_clip", tmp_path / "a")
    assert record["within_bound"]
    config = json.loads((tmp_path / "a" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["vision_cfg"]["timm_model_name"] == "test_convnext"
    record = proved(encoder, "timm", tmp_path / "b")
    assert record["within_bound"]
    assert "an MLP" in record["notes"][0]
    swin = {"img_size": 64, "window_size": 2, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", (64, 64), options=swin)
    assert proved(filled(Encoder(backbone, text, 16, [16], "mean", "eos")), "timm", tmp_path / "c")["within_bound"]
    earlier = Encoder(TimmBackbone("test_convnext", feature_index=1), text, 16, [16], "mean", "eos")
    assert "feature_index: found 1" in find_target("timm").check(earlier)[0].reason


@pytest.mark.parametrize("kind", ["bytes", "siglip"])
def test_tokenizers_leave_with_the_same_ids(tmp_path, spiece, kind):
    tokenizer = ByteTokenizer(64) if kind == "bytes" else SiglipTokenizer(spiece, 64)
    encoder = portable()
    encoder.text = siglip_text(tokenizer)
    record = proved(filled(encoder), "siglip", tmp_path)
    assert all(row["embedding"]["difference"] < 1e-5 for row in record["text"].values())


def test_a_tokenizer_that_transformers_would_read_otherwise_is_refused(spiece):
    encoder = portable()
    encoder.text = siglip_text(ByteTokenizer(64))
    (loss,) = find_target("siglip2").check(encoder)
    assert "opens that of a SigLIP 2 folder as Gemma's" in loss.reason
    encoder.text = siglip_text(FastTokenizer(str(SHIPPED / "tokenizers" / "mela.json"), 64))
    assert len(find_target("siglip2").check(encoder)) == 1
    assert find_target("siglip").check(encoder) == []
    portable_file = str(SHIPPED / "tokenizers" / "portable.json")
    encoder.text = siglip_text(FastTokenizer(portable_file, 64, clean="nothing"))
    assert find_target("siglip2").check(encoder) == []
    encoder.text = siglip_text(FastTokenizer(portable_file, 64, pad_token="<eos>", clean="nothing"))
    assert len(find_target("siglip2").check(encoder)) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reg_tokens": 2}, "no place for embeds.reg_token"),
        ({"qk_norm": True}, "no place for blocks.0.attn.q_norm.weight"),
        ({"init_values": 0.1}, "no place for blocks.0.ls1.gamma"),
        ({"attn_pool_num_heads": 4}, r"heads: found \['2', '4'\]"),
        ({"attn_pool_mlp_ratio": 2.0}, "width of the MLP"),
        ({"act_layer": "relu"}, "Block with ReLU"),
        ({"rope_type": "axial"}, "rotary positions"),
        ({"pos_embed_grid_size": [4, 6]}, "square grid"),
        ({"pos_embed": "factorized"}, "square grid"),
    ],
)
def test_what_siglip_does_not_have_is_named(options, words):
    reasons = "; ".join(loss.reason for loss in find_target("siglip").check(portable(**options)))
    assert words.replace("\\", "") in reasons


def test_two_activations_of_which_one_is_quick_go_by_timm(tmp_path):
    """OpenCLIP's `quick_gelu` is of both of its own towers."""
    options = CLIP_OPTIONS | {"act_layer": "quick_gelu"}
    encoder = filled(Encoder(vit(**options), clip().text, 24, [16], "tower", "eos"))
    record = proved(encoder, "open_clip", tmp_path)
    assert record["within_bound"]
    assert (tmp_path / "timm" / "config.json").is_file()


@pytest.mark.parametrize(
    ("kind", "target"),
    [("siglip", "siglip"), ("siglip2", "siglip2"), ("clip", "open_clip"), ("metaclip_2", "open_clip")],
)
def test_a_model_that_came_in_leaves_as_it_was(folders, tmp_path, kind, target):
    record = export(open_source(folders[kind], "auto", None), target, tmp_path / "out", allow_loss=True)
    assert record["within_bound"]
    assert all("zero-shot pipeline pads" in loss for loss in record["losses"])  # the small folders' context is short
    if kind == target:
        theirs, back = (load_file(f"{folder}/model.safetensors") for folder in (folders[kind], tmp_path / "out"))
        assert theirs.keys() == back.keys()
        assert all(torch.equal(theirs[name].flatten(), back[name].flatten()) for name in theirs)


def test_an_epsilon_that_timm_cannot_set_is_refused():
    for backbone in (vit(norm_eps=1e-4), NaFlexViT(name="test_vit", options={"norm_eps": 1e-4, "img_size": 32})):
        encoder = Encoder(backbone, clip().text, 16, [16], "mean", "eos")
        (loss,) = find_target("timm").check(encoder)
        assert "options.norm_eps: found 0.0001; timm" in loss.reason
