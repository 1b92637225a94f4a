"""The way to ONNX: ONNX Runtime gives the encoder's numbers at any size."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
import torch
from export_runs import CLIP_OPTIONS, SIGLIP_OPTIONS, TEXT, filled, siglip_text, vit
from helpers import ARCHITECTURE
from PIL import Image

from indiclip.encoder import Encoder
from indiclip.export.exporter import export
from indiclip.export.source import Source
from indiclip.export.target import find_target
from indiclip.pooling import Projection
from indiclip.text import TextTower
from indiclip.timm_backbone import TimmBackbone
from indiclip.tokenizers import ByteTokenizer

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
CLIP_TEXT = {"model_type": "clip_text_model", "hidden_act": "gelu", **TEXT}
NAMES, PROMPTS = ["a kite", "मसाला डोसा", "a drum"], ["a photo of {}", "{}"]


def siglip():
    """A table that is resized, the tower's own pool, a text tower that reads padding."""
    projections = {"image_projection": Projection("none"), "text_projection": Projection(bias=True)}
    return Encoder(vit(16, depth=1, **SIGLIP_OPTIONS), siglip_text(), 32, [16], "tower", "last", **projections)


def clip():
    """A class token, a table that is sampled, a text tower that reads its own end."""
    return Encoder(vit(depth=1, **CLIP_OPTIONS), TextTower(ByteTokenizer(64), CLIP_TEXT), 24, [16], "tower", "eos")


def fixed():
    """timm's model of one size, a text tower of BERT's kind."""
    text = TextTower(ByteTokenizer(), ARCHITECTURE)
    return Encoder(TimmBackbone("test_convnext", (64, 96)), text, 16, [16], "mean", batch_norm=False)


def exported(encoder, out, **options):
    return export(Source(filled(encoder), "it", "its weights", None), "onnx", out, options=options)


@pytest.mark.parametrize("kind", [pytest.param(clip, marks=pytest.mark.slow), fixed])
def test_both_towers_agree_at_every_size(kind, tmp_path):
    encoder = kind()
    record = exported(encoder, tmp_path / "out")
    assert record["within_bound"]
    compared = [case for case, row in record["image"].items() if "cannot" not in row]
    assert compared == ([*record["image"]] if kind is clip else ["own grid"])
    assert all(row["embedding"]["difference"] < 1e-5 for row in record["text"].values())


@pytest.mark.slow
def test_classes_and_8_bit_weights(tmp_path):
    """Also of a list as Windows saves it, with a byte order mark."""
    names, prompts = tmp_path / "names.txt", tmp_path / "prompts.txt"
    names.write_text("\ufeff" + "\r\n".join(NAMES), "utf-8")
    prompts.write_text("\n".join(PROMPTS))
    out, encoder = tmp_path / "out", siglip()
    record = exported(encoder, out, classes=names, templates=prompts, int8=True)
    assert record["within_bound"]
    assert not any("cannot" in case for case in record["image"].values())
    assert record["int8"].keys() == {"image", "text", "classes", "images"}
    assert 0.5 < record["int8"]["image"]["cosine"] < 1
    assert 0 < record["int8"]["classes"]["difference"] < 1
    session = onnxruntime.InferenceSession(out / "classes.onnx", providers=["CPUExecutionProvider"])
    pixels = torch.randint(0, 256, (3, 3, 48, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    _, probabilities = session.run(None, {"pixels": pixels.numpy()})
    assert out.joinpath("classes.txt").read_text("utf-8").splitlines() == NAMES
    for row, one in zip(probabilities, encoder.zero_shot(list(pixels), NAMES, PROMPTS), strict=True):
        np.testing.assert_allclose(row, [one[name] for name in NAMES], atol=1e-5)
    assert json.loads((out / "parity.json").read_text("utf-8"))["int8"]["images"] == "noise"
    card = (out / "README.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    Image.new("RGB", (90, 60)).save(tmp_path / "photo.jpg")
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {})
    assert said.getvalue().startswith("[[")


@pytest.mark.parametrize(("options", "words"), [({"templates": "t"}, "needs --classes"), ({"classes": "gone"}, "gone")])
def test_mistakes_in_options(options, words, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        find_target("onnx", {name: tmp_path / value for name, value in options.items()})


def test_other_targets_have_no_such_options(tmp_path):
    with pytest.raises(ValueError, match="--int8: timm has no such option"):
        find_target("timm", {"int8": True})
