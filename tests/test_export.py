"""What leaves: folded, proved, whole or not at all, with a line for what cannot."""

import errno
import json
import os
import stat
import sys
import types
from pathlib import Path

import pytest
import torch
from export_runs import filled, portable, quickstart, runs, save_run, vit  # noqa: F401
from helpers import ARCHITECTURE, noise

import indiclip
from indiclip.cli import main
from indiclip.encoder import Encoder
from indiclip.export import exporter, parity, to_timm
from indiclip.export.card import plain
from indiclip.export.fold import cut_length, fold_batch_norm
from indiclip.export.source import open_source
from indiclip.export.target import find_target, target_names
from indiclip.pooling import Projection
from indiclip.pretrained.build import build
from indiclip.pretrained.init_from import fill
from indiclip.pretrained.weights import Weights
from indiclip.text import TextTower
from indiclip.tokenizers import ByteTokenizer

TEXTS = ["a kite", "मसाला डोसा", ""]


def rebuilt(weights):
    encoder = Encoder(**build(weights.config, weights.origin))
    fill(encoder, weights)
    return encoder.eval()


def embedded(encoder, length=None):
    with torch.no_grad():
        pictures = [noise(48, 64, 1), noise(32, 32, 2)]
        return torch.cat([encoder.embed_image(pictures, length), encoder.embed_text(TEXTS, length)])


PROJECTIONS = [Projection(), Projection(bias=True), Projection("mlp", hidden=40), Projection("mlp", True, 40, True)]


@pytest.mark.parametrize("projection", [*PROJECTIONS, Projection("none"), Projection("none", bias=True)], ids=str)
def test_batch_norm_is_folded_into_the_projection_and_a_length_cut_off_exactly(projection):
    text = TextTower(ByteTokenizer(), ARCHITECTURE)
    both = {"image_projection": projection, "text_projection": projection}
    encoder = filled(Encoder(vit(), text, 32, [16], "mean", batch_norm=True, **both))
    weights = Weights("it", encoder.to_config(), dict(encoder.state_dict()))
    folded = fold_batch_norm(weights)
    assert not any("pool.norm" in name for name in folded.tensors)
    torch.testing.assert_close(embedded(rebuilt(folded)), embedded(encoder), atol=1e-6, rtol=0)
    short = rebuilt(cut_length(folded, 16))
    assert (short.embed_dim, short.lengths) == (16, [16])
    torch.testing.assert_close(embedded(short), embedded(encoder, 16), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"--length: found 20; expected one of 16, 32, which were trained"):
        cut_length(folded, 20)


def test_a_target_is_found_by_its_file():
    assert {"timm", "siglip", "siglip2", "open_clip"} <= {*target_names()}
    command_help = (Path(indiclip.__file__).parent / "commands" / "commands.yaml").read_text().partition("--to: ")[2]
    assert not [name for name in target_names() if name not in command_help.partition("\n")[0]]
    for name in target_names():
        assert find_target(name).bound <= 1e-5
    with pytest.raises(ValueError, match="--to: found 'open-clip'; nearest is 'open_clip'"):
        find_target("open-clip")


def test_a_card_names_data_scores_licence_and_how_to_load(runs, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "new" / "out"
    assert main(["export", runs["portable"], "--to", "timm", str(out), "--licence", "CC0"]) == 0
    said = capsys.readouterr().out
    assert f"weights: {runs['portable']}/checkpoints/last.ckpt, step 7" in said
    assert "within the bound of 1e-06" in said
    card = (out / "README.md").read_text()
    for words in (
        "timm.create_model",
        "Captions (file fair.csv)",
        "zero_shot | 0.75",
        "CC0",
        "last.ckpt, step 7",
        "Of the run, on held-out data, after step ",
    ):
        assert words in card
    assert "/home/me" not in card
    assert "zero_shot/hi" not in card
    record = json.loads((out / "parity.json").read_text())
    assert record["within_bound"]
    assert record["largest_difference"] <= record["bound"] == 1e-6
    assert {"own grid", "smaller", "larger", "not square", "mixed sizes, padded"} == record["image"].keys()
    assert {"timm", "torch"} <= record["versions"].keys()


def test_a_card_of_a_broken_run_is_one_line(tmp_path, capsys):
    run, out = Path(save_run(portable(), tmp_path / "run")), tmp_path / "out"
    shards = {"urls": ["/home/me/fairs/a.tar", "https://me:word@host.in/b.tar?sig=abc"]}
    train = [{"task": "contrastive", "dataset": {"class_path": "a.Shards", "init_args": shards}}]
    whole = json.dumps({"data": {"train": train}})
    metrics = (run / "metrics.json").read_text()
    for config, scores, words in (
        ("{a: [", metrics, f'in "{run / "config.yaml"}", line 1, column 6)'),
        (json.dumps({"data": {"train": ["fair.csv"]}}), metrics, "config.yaml: found a str, expected an object"),
        (json.dumps({"data": [1]}), metrics, "config.yaml: found a list, expected an object"),
        (json.dumps({"data": {"train": [{"dataset": "fair"}]}}), metrics, "config.yaml: found a str, expected"),
        (whole, '{"step"', "metrics.json: broken JSON"),
        (whole, "[]", "metrics.json: found a list, expected an object"),
    ):
        (run / "config.yaml").write_text(config)
        (run / "metrics.json").write_text(scores)
        assert main(["export", str(run), "--to", "torchvision", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
        assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    (run / "metrics.json").unlink()
    assert main(["export", str(run), "--to", "torchvision", str(out)]) == 0
    assert "- contrastive: Shards (urls a.tar, b.tar)\n" in (out / "README.md").read_text()
    assert str(tmp_path) not in (out / "parity.json").read_text()


def test_reasons_are_a_line_each_with_who_could(runs, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    assert main(["export", runs["quickstart"], "--to", "siglip", str(out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("indiclip export: --to siglip: pool: found 'mean'; SigLIP pools by attention")
    assert any("image_projection: found one (batch norm becomes one, too)" in line for line in lines)
    assert any("text.architecture.model_type: found 'bert'; expected siglip_text_model" in line for line in lines)
    assert lines[-1].endswith("can take it")
    assert "timm" in lines[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_difference_of_degree_is_refused_or_measured(tmp_path, capsys):
    """Grid sampling instead of SigLIP 2's smooth resampling: off, but of the same kind."""
    run = save_run(portable(pos_embed_use_grid_sample=True), tmp_path / "run")
    out = tmp_path / "out"
    words = ["export", run, "--to", "siglip2", str(out)]
    assert main(words) == 2
    assert "pos_embed_use_grid_sample: found True; SigLIP 2 has False (--allow-loss)" in capsys.readouterr().err
    assert main([*words, "--allow-loss"]) == 0
    assert "MORE THAN the bound" in capsys.readouterr().out
    record = json.loads((out / "parity.json").read_text())
    assert not record["within_bound"]
    assert record["image"]["smaller"]["embedding"]["difference"] > 1e-4
    assert record["image"]["own grid"]["embedding"]["difference"] < 1e-5
    assert len(record["losses"]) == 1


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")


def full_disk_without_a_name(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def far_off(*_):
    return {"within_bound": False, "largest_difference": float("nan"), "bound": 1e-6, "losses": [], "notes": []}


@pytest.mark.parametrize(
    ("place", "name", "fault", "words"),
    [
        (to_timm, "save_file", full_disk, "model.safetensors: No space left on device"),
        (to_timm, "save_file", full_disk_without_a_name, "{out}: No space left on device"),
        (exporter, "measure", far_off, "--to timm: differs by nan; expected at most 1e-06"),
    ],
)
def test_nothing_is_left_where_it_fails(runs, tmp_path, monkeypatch, capsys, place, name, fault, words):  # noqa: F811
    monkeypatch.setattr(place, name, fault)
    assert main(["export", runs["portable"], "--to", "timm", str(tmp_path / "out")]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert words.format(out=tmp_path / "out") in line
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(runs, tmp_path, capsys):  # noqa: F811
    (tmp_path / "note").write_text("mine")
    assert main(["export", runs["portable"], "--to", "timm", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is there already and holds something; expected a new or empty folder" in line
    assert [file.name for file in tmp_path.iterdir()] == ["note"]


def test_a_link_to_an_empty_folder_is_that_folder(runs, tmp_path):  # noqa: F811
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    assert main(["export", runs["portable"], "--to", "torchvision", str(tmp_path / "out")]) == 0
    assert (tmp_path / "disk" / "model.safetensors").is_file()
    assert (tmp_path / "out").is_symlink()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["disk", "out"]


def test_which_weights_of_a_run(tmp_path):
    last, best = portable(), quickstart()
    run = save_run(best, tmp_path / "run", "epoch=3")
    state = {"monitor": "val/x", "best_model_path": "/elsewhere/checkpoints/epoch=3.ckpt"}
    save_run(last, tmp_path / "run", callbacks={"ModelCheckpoint{}": state})
    assert open_source(run, "auto", None).encoder.embed_dim == last.embed_dim
    opened = open_source(run, "best", None)
    assert opened.encoder.embed_dim == best.embed_dim
    assert opened.chosen.endswith("epoch=3.ckpt, step 7")
    with pytest.raises(ValueError, match=r"last.ckpt: has no averaged weights .*; expected last"):
        open_source(run, "ema", None)
    with pytest.raises(ValueError, match="kept no best checkpoint"):
        open_source(str(tmp_path / "run" / "checkpoints" / "epoch=3.ckpt"), "best", None)


def test_a_checkpoint_beside_its_config_is_of_that_run(tmp_path):
    save_run(portable(), tmp_path / "run")
    flat = tmp_path / "run" / "last.ckpt"
    (tmp_path / "run" / "checkpoints" / "last.ckpt").rename(flat)
    assert open_source(str(flat), "auto", None).run == open_source(str(flat.parent), "auto", None).run == flat.parent


def test_the_home_folder_is_known_also_where_no_shell_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_run(portable(), tmp_path / "run")
    assert open_source("~/run", "auto", None).run == tmp_path / "run"
    assert indiclip.load("~/run").embed_dim == 32


@pytest.mark.parametrize(
    ("weights", "length", "step", "words"),
    [
        ("auto", None, 7, "after step 7:"),
        ("auto", 32, 7, "after step 7:"),  # the full one
        ("auto", 16, 7, "which are cut to a length of 16:"),
        ("auto", None, 9, "after step 9; not of this folder's weights, which are of another step:"),
        ("last", None, 7, "which are not the averages that were scored:"),
    ],
)
def test_a_card_says_whether_its_weights_were_scored(tmp_path, weights, length, step, words):
    averages = {"num_updates": 3, "state_dict": {}}
    run = save_run(portable(), tmp_path / "run", **({"averages": averages} if weights == "last" else {}))
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"step": step, "metrics": {"val/a/b": 0.5}}))
    exporter.export(open_source(run, weights, length), "timm", tmp_path / "out")
    assert words in (tmp_path / "out" / "README.md").read_text()


def test_a_card_has_no_folders_of_the_machine():
    said = plain({"images": "/home/anna/photos/", "urls": ["https://me:word@host.in/a/b.tar?sig=abc"], "depth": 3})
    assert said == "images photos, urls b.tar, depth 3"


def test_a_folder_has_the_users_own_permissions(runs, tmp_path):  # noqa: F811
    before = os.umask(0o077)
    try:
        assert main(["export", runs["portable"], "--to", "torchvision", str(tmp_path / "out")]) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


def test_a_library_that_another_distribution_brings_has_a_version(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_of_a_test", types.SimpleNamespace(__version__="1.2"))
    assert parity.version_of("onnxruntime_of_a_test") == "1.2"
    assert parity.version_of("nobody-has-this") == "unknown"
    assert torch.__version__.startswith(parity.version_of("torch"))


def test_a_shorter_embedding_leaves(runs, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    assert main(["export", runs["clip"], "--to", "open_clip", "--length", "16", str(out)]) == 0
    config = json.loads((out / "open_clip_config.json").read_text())
    assert config["model_cfg"]["embed_dim"] == 16
    assert indiclip.load(runs["clip"]).lengths == [16, 24]
