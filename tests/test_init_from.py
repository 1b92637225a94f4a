"""An encoder begins with pretrained weights: strict, counted, and never with anything else than it says."""

import copy
import re
from pathlib import Path

import pytest
import torch
from experiments import config, fit
from helpers import ARCHITECTURE, noise, tiny_encoder

import indiclip
from indiclip import encoder as encoder_module
from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.export.source import open_source
from indiclip.pretrained.convert import fit_tensor
from indiclip.pretrained.init_from import InitFrom
from indiclip.text import TextTower
from indiclip.tokenizers import ByteTokenizer
from indiclip.training.cli import run


def save(encoder, file, heads=()):
    weights = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    torch.save({"encoder": encoder.to_config(), "state_dict": weights | dict(heads)}, file)
    return str(file)


@pytest.fixture
def checkpoint(tmp_path):
    logits = {"heads.contrastive.criterion.logit_scale": torch.tensor([3.0])}
    return save(tiny_encoder(seed=7), tmp_path / "run.ckpt", logits)


def tower(**options):
    return NaFlexViT(**{"width": 32, "depth": 1, "num_heads": 2, "patch_size": 8} | options)


def texts():
    return TextTower(ByteTokenizer(), ARCHITECTURE)


def test_what_is_left_out_comes_along(checkpoint):
    encoder = Encoder(init_from=[InitFrom(checkpoint)])
    assert encoder.to_config() == tiny_encoder().to_config()
    assert encoder.initial_logits == {"logit_scale": 3.0}
    picture = noise(24, 40)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder.eval().embed_image(picture), tiny_encoder(seed=7).eval().embed_image(picture)
        )
    (line,) = encoder.initialised
    assert line.startswith(
        f"{len(encoder.state_dict()) + 1} tensors (image, text, projections, logit_scale) from {checkpoint}"
    )


def test_what_cannot_be_loaded_is_said_in_words_of_who_loads(tmp_path):
    encoder = tiny_encoder()
    lacking = save(encoder, tmp_path / "lacking.ckpt")
    checkpoint = torch.load(lacking)
    del checkpoint["state_dict"]["encoder.backbone.vit.norm.weight"]
    torch.save(checkpoint, lacking)
    wrong = save(encoder, tmp_path / "wrong.ckpt", {"heads.a.logit_scale": torch.tensor([3.0, 2.0])})
    for file, words in (
        (lacking, "1 tensors stay initial: backbone.vit.norm.weight"),
        (wrong, "logit_scale: found 2 numbers; expected one"),
    ):
        with pytest.raises(ValueError, match=re.escape(file)) as caught:
            indiclip.load(file)
        assert words in str(caught.value)
        assert "init_from" not in str(caught.value)
        assert "allow" not in str(caught.value)


def test_patches_that_are_not_square_are_one_line(tmp_path):
    file = save(tiny_encoder(), tmp_path / "run.ckpt")
    checkpoint = torch.load(file)
    checkpoint["state_dict"]["encoder.backbone.vit.embeds.proj.weight"] = torch.zeros(32, 8 * 16 * 3)
    torch.save(checkpoint, file)
    with pytest.raises(ValueError, match=r"run.ckpt: backbone.vit.embeds.proj.weight does not fit") as caught:
        indiclip.load(file)
    assert "\n" not in str(caught.value)


def test_the_temperature_is_that_of_the_one_contrastive_loss(tmp_path):
    first = {"heads.a.criterion.logit_scale": torch.tensor([3.0]), "heads.a.criterion.logit_bias": torch.tensor([-9.0])}
    second = {"heads.b.criterion.logit_scale": torch.tensor([1.0])}
    for heads, expected in ((first, {"logit_scale": 3.0, "logit_bias": -9.0}), (first | second, {})):
        assert indiclip.load(save(tiny_encoder(), tmp_path / "run.ckpt", heads)).initial_logits == expected


def test_a_text_towers_positions_are_cut_for_a_shorter_context():
    table = torch.arange(8.0)[:, None].repeat(1, 3)
    name = "text.model.embeddings.position_embedding.weight"
    cut, said = fit_tensor(name, table, torch.zeros(4, 3), "it")
    assert (cut[:, 0].tolist(), said) == ([0, 1, 2, 3], "text positions cut from 8 to 4")


def test_the_last_source_of_a_part_wins(checkpoint, tmp_path):
    other = save(tiny_encoder(seed=8), tmp_path / "other.ckpt")
    encoder = Encoder(init_from=[InitFrom(checkpoint), InitFrom(other, ["image"])])
    image = ("backbone.", "image_pool.")
    first, second, own = tiny_encoder(seed=7).state_dict(), tiny_encoder(seed=8).state_dict(), encoder.state_dict()
    for name, tensor in own.items():
        assert torch.equal(tensor, (second if name.startswith(image) else first)[name])
    assert [line.partition(" from ")[0] for line in encoder.initialised] == [
        f"{sum(not name.startswith(image) for name in own) + 1} tensors (text, projections, logit_scale)",
        f"{sum(name.startswith(image) for name in own)} tensors (image)",
    ]
    assert Encoder(init_from=[InitFrom(other), InitFrom(checkpoint)]).initialised[0] == (
        f"nothing from {other}: later weights have all of its parts"
    )
    alone = Encoder(text=texts(), init_from=[InitFrom(checkpoint, ["image"])])
    assert [line.partition(":")[0] for line in alone.initialised[1:]] == [
        f"{sum(name.startswith(('text.', 'text_pool.')) for name in alone.state_dict())} tensors (text) stay initial",
        "2 tensors (projections) stay initial",
    ]


def test_what_stays_initial_or_unused_is_an_error_unless_it_is_allowed(checkpoint):
    deeper = {"backbone": tower(depth=2), "text": texts(), "embed_dim": 64, "lengths": [16, 32]}
    with pytest.raises(
        ValueError, match=r"run.ckpt: 12 tensors stay initial: backbone.vit.blocks.1.norm1.weight, .*allow"
    ):
        Encoder(**deeper, init_from=[InitFrom(checkpoint)])
    encoder = Encoder(**deeper, init_from=[InitFrom(checkpoint, allow=["backbone.vit.blocks.1.*", "text.modle.*"])])
    assert "`allow` matches nothing by text.modle.*" in encoder.initialised[0]
    assert "12 stay initial (backbone.vit.blocks.1.norm1.weight" in encoder.initialised[0]
    with pytest.raises(ValueError, match=r"pool: found mean, the source has attention \(`allow: \[image_pool\*\]`\)"):
        Encoder(tower(), texts(), 64, [16, 32], pool="mean", init_from=[InitFrom(checkpoint, allow=["image_pool.*"])])
    mean = save(tiny_encoder(pool="mean"), f"{checkpoint}.mean.ckpt")
    with pytest.raises(ValueError, match="11 tensors stay initial: image_pool.pool.latent"):
        Encoder(pool="attention", init_from=[InitFrom(mean)])
    assert Encoder(pool="attention", init_from=[InitFrom(mean, allow=["image_pool*"])]).image_pool.kind == "attention"
    with pytest.raises(ValueError, match="tensors are unused: image_pool.pool.latent"):
        Encoder(tower(), texts(), 64, [16, 32], pool="mean", init_from=[InitFrom(checkpoint)])


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        (lambda: tower(num_heads=4), r"backbone.vit.blocks.0.attn.num_heads: found 4, the source has 2"),
        (lambda: tower(options={"norm_eps": 1e-3}), r"norm1.eps: found 0.001, the source has 1e-06"),
        (lambda: tower(options={"act_layer": "quick_gelu"}), "QuickGELU, the source has GELU"),
        (lambda: tower(mean=[0.48, 0.46, 0.41]), "mean"),
        (lambda: tower(width=64), r"found shape \(1, 16, 16, 32\), expected \(1, 16, 16, 64\)"),
    ],
)
def test_equal_shapes_do_not_hide_another_computation(checkpoint, backbone, words):
    with pytest.raises(ValueError, match=words):
        Encoder(backbone(), texts(), 64, [16, 32], init_from=[InitFrom(checkpoint)])


def test_position_tables_and_patches_are_resampled_with_a_word(checkpoint):
    options = {"pos_embed_grid_size": [8, 8]}
    encoder = Encoder(tower(patch_size=16, options=options), texts(), 64, [16, 32], init_from=[InitFrom(checkpoint)])
    assert "position table resampled from 16x16 to 8x8" in encoder.initialised[0]
    assert "patches resampled from 8 to 16 pixels" in encoder.initialised[0]
    # Oracle: timm's own resampling of both.
    from timm.layers import resample_abs_pos_embed_nhwc, resample_patch_embed

    source, own = tiny_encoder(seed=7).backbone.vit, encoder.backbone.vit
    torch.testing.assert_close(own.embeds.pos_embed, resample_abs_pos_embed_nhwc(source.embeds.pos_embed, [8, 8]))
    kernel = source.embeds.proj.weight.reshape(32, 8, 8, 3).permute(0, 3, 1, 2)
    expected = resample_patch_embed(kernel, [16, 16]).permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(own.embeds.proj.weight, expected)


def test_a_source_without_the_part_is_said(checkpoint):
    with pytest.raises(ValueError, match=r"init_from\[0\].parts: found 'images'; nearest is 'image'"):
        Encoder(init_from=[InitFrom(checkpoint, ["images"])])
    with pytest.raises(ValueError, match=r"init_from\[0\].parts: found none; expected some of image, text"):
        Encoder(init_from=[InitFrom(checkpoint, [])])
    with pytest.raises(
        ValueError, match="model.encoder.backbone: name one, or weights in init_from that have the part image"
    ):
        Encoder(init_from=[InitFrom(checkpoint, ["text"])])


def test_weights_that_are_not_finite_are_said(tmp_path):
    encoder = tiny_encoder()
    encoder.image_projection.weight.data[0, 0] = torch.nan
    file = save(encoder, tmp_path / "nan.ckpt")
    with pytest.raises(ValueError, match="nan.ckpt: image_projection.weight has values that are not finite"):
        indiclip.load(file)


def test_weights_in_half_precision_are_read_as_single(tmp_path, checkpoint):
    half = tiny_encoder(seed=7).half()
    loaded = indiclip.load(save(half, tmp_path / "half.ckpt"))
    assert loaded.image_projection.weight.dtype == torch.float32
    torch.testing.assert_close(loaded.image_projection.weight, half.image_projection.weight.float())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config.update(attention_sinks=4), "its encoder has 'attention_sinks'.* newer IndiCLIP"),
        (lambda config: config["backbone"]["init_args"].update(windows=4), "NaFlexViT has no 'windows'.* newer"),
        (lambda config: config["image_projection"].update(rank=4), "Projection has no 'rank'.* newer"),
        (lambda config: config.update(pool="slots"), "encoder.pool: found 'slots'"),
        (lambda config: config.update(embed_dim="wide"), "newer.ckpt: .*('wide'|'str')"),
        (lambda config: config["image_projection"].update(kind=None), "None"),
        (lambda config: config["text"].update(init_args=None), "expected the name of a class and its arguments"),
    ],
)
def test_a_checkpoint_of_a_newer_version_is_one_line(tmp_path, change, words):
    encoder = tiny_encoder()
    change(config := copy.deepcopy(encoder.to_config()))
    encoder.to_config = lambda: config
    file = save(encoder, tmp_path / "newer.ckpt")
    for read in (indiclip.load, lambda name: open_source(name, "auto", None)):
        with pytest.raises(ValueError, match=words) as caught:
            read(file)
        assert "newer.ckpt" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=words):
        Encoder(init_from=[InitFrom(file)])


def test_a_truncated_checkpoint_is_one_line(checkpoint):
    content = Path(checkpoint).read_bytes()
    for size in (0, 5000, len(content) - 100):
        Path(checkpoint).write_bytes(content[:size])
        with pytest.raises(ValueError, match="run.ckpt: not a readable checkpoint"):
            indiclip.load(checkpoint)


HOSTILE = [
    (("backbone", "options"), {"checkpoint_path": "/etc/passwd"}, "backbone.options.checkpoint_path"),
    (("backbone", "options"), {"pretrained_cfg": {"hf_hub_id": "evil/model"}}, "backbone.options.pretrained_cfg"),
    (("backbone", "options"), {"pretrained_cfg_overlay": {"file": "x"}}, "backbone.options.pretrained_cfg_overlay"),
    (("backbone", "options"), {"cache_dir": "x"}, "backbone.options.cache_dir"),
    (("backbone", "init_args"), {"name": "hf-hub:evil/model"}, "timm has no model 'hf-hub:evil/model'"),
    (("backbone", "init_args"), {"name": "local-dir:/tmp"}, "timm has no model 'local-dir:/tmp'"),
    (("backbone", "pretrained"), True, "asks for pretrained"),
    (("text", "pretrained"), "evil/model", "asks for pretrained"),
    (("text", "architecture"), {"attn_implementation": "evil/kernel"}, "text.architecture.attn_implementation"),
    (("text", "architecture"), {"_attn_implementation": "evil/kernel"}, "text.architecture._attn_implementation"),
    (("text", "architecture"), {"auto_map": {"AutoModel": "evil/model--x.Y"}}, "text.architecture.auto_map"),
    (
        ("text", "architecture"),
        {"quantization_config": {"quant_method": "awq"}},
        "text.architecture.quantization_config",
    ),
    (("text", "architecture"), {"model_type": "evil"}, "transformers has no 'evil'"),
    (
        ("text", "architecture"),
        {"model_type": "timm_wrapper", "architecture": "x"},
        "found timm_wrapper; expected a text",
    ),
    (
        ("text", "architecture"),
        {"model_type": "t5gemma", "encoder": {"_attn_implementation": "evil/kernel"}},
        "text.architecture.encoder: found",
    ),
    (("text", "architecture"), "model_type: bert", "text.architecture: found .*; expected a configuration"),
    (
        ("text", "tokenizer"),
        {"class_path": "indiclip.tokenizers.FastTokenizer", "init_args": {"source": "evil/model"}},
        "source",
    ),
]


@pytest.mark.parametrize(("place", "value", "words"), HOSTILE)
def test_a_checkpoint_reaches_no_network_and_no_code(tmp_path, monkeypatch, place, value, words):
    def reached(*_, **__):
        raise AssertionError("the network was reached")

    monkeypatch.setattr("socket.socket.connect", reached)
    config = copy.deepcopy(tiny_encoder().to_config())
    arguments = config[place[0]]["init_args"]
    if place[1] == "init_args":
        config[place[0]]["init_args"] = value
    elif place[1] in ("options", "architecture") and "model_type" not in value:
        arguments[place[1]] = (arguments[place[1]] or {}) | value
    else:
        arguments[place[1]] = value
    torch.save({"encoder": config, "state_dict": {}}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=words):
        indiclip.load(tmp_path / "evil.ckpt")


def test_zero_shot_names_the_nearest_class_first(checkpoint, monkeypatch):
    """By hand: a softmax over the scaled cosines with the mean of each class's prompts."""
    encoder = indiclip.load(checkpoint)
    pictures = [noise(24, 24, seed) for seed in range(3)]
    classes, templates = ["kite", "drum", "पतंग"], ["a photo of a {}", "{}"]
    rows = encoder.zero_shot(pictures, classes, templates)
    image_BE = encoder.embed_image(pictures)
    for row, image_E in zip(rows, image_BE, strict=True):
        logits = []
        for name in classes:
            mean_E = encoder.embed_text([template.format(name) for template in templates]).mean(0)
            logits.append(20.085536923 * (image_E @ (mean_E / mean_E.norm())))  # e ** 3
        expected = torch.stack(logits).softmax(0)
        assert list(row) == [classes[i] for i in expected.argsort(descending=True)]
        torch.testing.assert_close(torch.tensor([row[name] for name in classes]), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="at least one class"):
        encoder.zero_shot(pictures, [])
    monkeypatch.setattr(encoder_module, "_PROMPTS", 4)  # of the six, which are then embedded in two parts
    for row, whole in zip(encoder.zero_shot(pictures, classes, templates), rows, strict=True):
        assert row == pytest.approx(whole, abs=1e-5)


def test_a_run_begins_with_weights_and_needs_them_no_more(tmp_path, capsys):
    """Through the command: with the whole of another run, then on, and scored, after that is gone."""
    source = save(
        tiny_encoder(seed=7), tmp_path / "source.ckpt", {"heads.c.criterion.logit_scale": torch.tensor([3.0])}
    )
    tree = config(model__encoder={"init_from": [{"weights": source}]})
    tree["model"]["heads"][0]["init_args"] = {"loss": "softmax"}
    assert fit(tmp_path, tree) == 0
    assert re.search(
        r"init_from: \d+ tensors \(image, text, projections, logit_scale\) from .*source.ckpt", capsys.readouterr().out
    )
    Path(source).unlink()
    folder = tmp_path / "runs" / "experiment"
    words = ["--config", str(folder / "config.yaml"), "--ckpt_path", str(folder)]
    assert run(["validate", *words]) == 0
    assert run(["fit", *words, "--trainer.max_steps", "4"]) == 0
    assert indiclip.load(folder).to_config() == tiny_encoder().to_config()
    # A checkpoint in torch's format before 1.6, which cannot be mapped into memory, is read as any other.
    old = torch.load(folder / "checkpoints" / "4.ckpt", weights_only=True)
    torch.save(old, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    capsys.readouterr()
    assert fit(tmp_path, tree, "--ckpt_path", str(tmp_path / "old.ckpt"), "--trainer.max_steps", "4") == 0
    assert "no step is left: 4 are done" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["text", "nothing", "pickle", "truncated", "foreign"])
def test_what_is_no_checkpoint_is_said_alike_with_and_without_initial_weights(content, checkpoint, tmp_path, capsys):
    """With them it is read once before the trainer does, for the architecture."""
    file = tmp_path / "x.ckpt"
    if content in ("pickle", "foreign"):
        torch.save(torch.nn.Linear(2, 2) if content == "pickle" else {"epoch": 3}, file)
    else:
        data = {"text": b"file\ten\n", "nothing": b"", "truncated": Path(checkpoint).read_bytes()[:-100]}
        file.write_bytes(data[content])
    for encoder in ({"init_from": [{"weights": checkpoint}]}, None):
        tree = config(model__encoder=encoder) if encoder else config()
        assert fit(tmp_path, tree, "--ckpt_path", str(file)) == 2
        (line,) = [one for one in capsys.readouterr().err.splitlines() if not one.startswith("warning: ")]
        if content == "foreign":
            assert "x.ckpt is no checkpoint of IndiCLIP; expected the entry '" in line
        else:
            assert re.search(r"^indiclip: .*x.ckpt: not a readable checkpoint \((another kind|it holds torch)", line)
