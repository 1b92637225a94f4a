"""The way to ONNX: ONNX Runtime gives the encoder's numbers at any size."""

import json

import numpy as np
import pytest
import torch
from export_runs import runs  # noqa: F401

from indiclip.export.exporter import export
from indiclip.export.source import open_source
from indiclip.export.target import find_target

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def exported(run, out, **options):
    return export(open_source(run, "auto", None), "onnx", out, options=options)


@pytest.mark.parametrize("kind", ["portable", "clip"])  # resized table, map pool, SigLIP; class token, CLIP
def test_both_towers_agree_at_every_size(kind, runs, tmp_path):  # noqa: F811
    record = exported(runs[kind], tmp_path / "out")
    assert record["within_bound"]
    assert not any("cannot" in case for case in record["image"].values())
    assert record["text"]["difference"] < 1e-5


def test_classes_and_8_bit_weights(runs, tmp_path):  # noqa: F811
    names, prompts = tmp_path / "names.txt", tmp_path / "prompts.txt"
    names.write_text("a kite\nमसाला डोसा\na drum\n", "utf-8")
    prompts.write_text("a photo of {}\n{}\n")
    out = tmp_path / "out"
    record = exported(runs["quickstart"], out, classes=names, templates=prompts, int8=True)
    assert record["within_bound"]
    assert 0.5 < record["int8"]["image"]["cosine"] < 1
    session = onnxruntime.InferenceSession(out / "classes.onnx", providers=["CPUExecutionProvider"])
    pixels = torch.randint(0, 256, (3, 3, 24, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    _, probabilities = session.run(None, {"pixels": pixels.numpy()})
    encoder = open_source(runs["quickstart"], "auto", None).encoder
    classes = out.joinpath("classes.txt").read_text("utf-8").splitlines()
    expected = encoder.zero_shot(list(pixels), classes, ("a photo of {}", "{}"))
    for row, one in zip(probabilities, expected, strict=True):
        np.testing.assert_allclose(row, [one[name] for name in classes], atol=1e-5)
    assert json.loads((out / "parity.json").read_text("utf-8"))["int8"]["images"] == "noise"


@pytest.mark.parametrize(("options", "words"), [({"templates": "t"}, "needs --classes"), ({"classes": "gone"}, "gone")])
def test_mistakes_in_options(options, words, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        find_target("onnx", {name: tmp_path / value for name, value in options.items()})


def test_other_targets_have_no_such_options(tmp_path):
    with pytest.raises(ValueError, match="--int8: timm has no such option"):
        find_target("timm", {"int8": True})
