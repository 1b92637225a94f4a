"""The command: help without waiting, one line per mistake, a run's folder, resume, load and the README's lines."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from unittest.mock import Mock

import pytest
import torch
import yaml
from experiments import ROOT, config, fit
from PIL import Image
from processes import as_ranks, as_they_end, forked, holding, in_processes, two_ranks, wait_until

import indiclip
from indiclip import json_lines
from indiclip.cli import lightning, main
from indiclip.generated.mela import Mela
from indiclip.training.cli import run
from indiclip.training.record import read_history

WEIGHTLESS = {"class_path": "heads.contrastive.Contrastive", "init_args": {"weight": 0.0}}
ELSEWHERE = {"class_path": "indiclip.training.fault_tolerance.checkpoints.Checkpoints", "init_args": {"dirpath": "x"}}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--help", indiclip.__version__),
        ("--version", indiclip.__version__),
        ("shards --help", "indiclip shards pack photos/"),
        *((f"shards {command} --help", f"example: indiclip shards {command}") for command in ("index", "check")),
        *((f"shards {command} --help", f"example: indiclip shards {command}") for command in ("pack", "stats")),
        ("tokenizer --help", "indiclip tokenizer report tokenizers/india clip"),
        ("tokenizer report --help", "example: indiclip tokenizer report"),
        ("bench --help", "indiclip bench import photos/edibles"),
        ("export --help", "indiclip export runs/portable --to timm OUT"),
        ("embed --help", "indiclip embed photos/ --model runs/mela"),
        *((f"bench {command} --help", f"example: indiclip bench {command}") for command in ("cards", "import")),
    ],
)
def test_help_and_version_import_nothing_heavy(words, expected):
    code = (
        "import sys, atexit; from indiclip.cli import main; "
        "atexit.register(lambda: print([m for m in sys.modules if m in ('torch', 'numpy', 'rich')])); "
        f"main({words.split()!r})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    assert expected in out


def test_unknown_command_is_said_with_the_nearest(capsys):
    assert main(["fti"]) == 2
    assert "no command 'fti'; nearest is 'fit'" in capsys.readouterr().err


def test_lightning_says_whose_the_other_words_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning", "login"])
    assert lightning() == 2
    assert "belongs to the package lightning-sdk, which is not installed" in capsys.readouterr().err


def test_a_flag_for_one_item_of_a_list_is_told_where_items_are_changed(tmp_path, capsys):
    assert fit(tmp_path, config(), "--data.train[0].batch_size", "8") == 2
    assert "data.train: items of a list are changed in a --config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer__max_stpes": 3}, "trainer.max_stpes: no such option; nearest is 'trainer.max_steps'"),
        ({"data__train__0__batchsize": 3}, r"data.train\[0\].batchsize: .* nearest is 'batch_size'"),
        ({"model__encoder__backbone__init_args__witdh": 3}, "backbone.witdh: .*nearest is 'width'"),
        ({"model__heads__0__init_args": {"wieght": 2}}, "heads.contrastive.Contrastive has no .*nearest is 'weight'"),
        ({"model__heads__0__class_path": "heads.contrastive.Contrastiv"}, "nearest is 'Contrastive'"),
        ({"model__heads__0__class_path": "heads.contrstive.Contrastive"}, "nearest is '(heads.)?contrastive'"),
        ({"data__train__0__task": "contrastve"}, r"data.train\[0\].task: .*'contrastve'; nearest is 'contrastive'"),
        ({"data__num_workers": -1}, "data.num_workers: found -1; expected 0 or more"),
        ({"modl": {"lr": 1}}, "modl: no such option; nearest is 'model'"),
        ({"trainer__accelerator": "tpu"}, "torch_xla"),
        ({"data__train__0__batch_tokens": 64}, "needs one of batch_size and batch_tokens; found both"),
        ({"data__train": []}, "contrastive reads the task 'contrastive', for which data.train has no source"),
        ({"data__train__0__max_tokens": 100}, r"data.train\[0\].max_tokens: 100 is over the backbone's budget.*64"),
        ({"data__train__0__batch_size": "${nope.x}"}, "nope.x"),
        ({"trainer__max_steps": "many"}, "trainer.max_steps: .*int.* many"),
        ({"data__train__0__dataset__init_args__layout": "singel"}, "layout.*'singel'.*'single'"),
        ({"model__heads": [{"class_path": "heads.contrastive.Contrastive"}] * 2}, "more than once"),
        ({"model__heads": [WEIGHTLESS]}, r"model.heads: weight is 0 of all \(contrastive\), which trains nothing"),
        ({"model__encoder__lengths": [0]}, "encoder.lengths: found 0; expected a whole number from 1 to"),
        ({"model__encoder__backbone__init_args__max_tokens": 0}, "backbone.max_tokens: found 0; expected a whole num"),
        ({"data__train__0__max_tokens": 0}, "max_tokens of task 'contrastive': found 0; expected 1 or more"),
        ({"trainer__callbacks": ELSEWHERE}, "the dirpath of Checkpoints is .*x, where --ckpt_path last would not look"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_training(changes, message, tmp_path, capsys):
    assert fit(tmp_path, config(**changes)) == 2
    error = capsys.readouterr().err.strip()
    lines = [line for line in error.splitlines() if line.startswith("indiclip: ")]
    assert len(lines) == 1, error
    assert re.search(message, lines[0]), lines[0]
    assert "usage:" not in error


def test_missing_and_malformed_files_are_named(tmp_path, capsys):
    assert run(["fit"]) == 2
    assert "fit.data.train; does a --config FILE give them?" in capsys.readouterr().err
    assert run(["fit", "--config", str(tmp_path / "quikstart.yaml")]) == 2
    assert "no file" in capsys.readouterr().err
    (tmp_path / "broken.yaml").write_text("model: [")
    assert run(["fit", "--config", str(tmp_path / "broken.yaml")]) == 2
    assert "broken.yaml: not a YAML file" in capsys.readouterr().err


def test_flip_of_densepose_points_is_refused(tmp_path, capsys):
    tree = config()
    small = {"roi_size": 7, "channels": 8, "num_convs": 1}
    tree["model"]["heads"] = [{"class_path": "heads.densepose.DensePose", "init_args": small}]
    for part in ("train", "val"):
        tree["data"][part][0]["task"] = "densepose"
        tree["data"][part][0]["dataset"]["init_args"] |= {"layout": "mixed", "people": 1.0}
    tree["data"]["train"][0]["augment"] = [{"class_path": "torchvision.transforms.v2.RandomHorizontalFlip"}]
    assert fit(tmp_path, tree) == 2
    assert "a mirrored body needs the symmetry table" in capsys.readouterr().err


def test_two_runs_get_two_folders_and_a_resume_goes_on_in_its_own(tmp_path):
    tree = config()
    assert fit(tmp_path, tree) == 0
    assert fit(tmp_path, tree) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["experiment", "experiment-2"]
    folder = tmp_path / "runs" / "experiment"
    last = folder / "checkpoints" / "last.ckpt"
    assert fit(tmp_path, config(trainer__max_steps=4), "--ckpt_path", str(last)) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert json.loads((folder / "metrics.json").read_text())["step"] == 4
    assert torch.load(last, weights_only=True)["global_step"] == 4
    history = read_history(folder)
    assert [row["step"] for row in history if "train/loss" in row] == [1, 2, 3, 4]
    seconds = [row["seconds"] for row in history if "seconds" in row]
    assert seconds == sorted(seconds)

    # Nothing is left to train: what the folder holds stays.
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".json", ".jsonl", ".html")}
    assert fit(tmp_path, config(trainer__max_steps=4), "--ckpt_path", str(last)) == 0
    assert before == {name: (folder / name).read_bytes() for name in before}

    # A name makes it another run, also one that only scores; a run's folder is its newest checkpoint.
    assert fit(tmp_path, config(trainer__max_steps=4), "--ckpt_path", str(folder), "--name", "scored") == 0
    assert json.loads((tmp_path / "runs" / "scored" / "metrics.json").read_text())["step"] == 4
    assert fit(tmp_path, config(trainer__max_steps=5), "--ckpt_path", str(last), "--name", "branch") == 0
    assert before == {name: (folder / name).read_bytes() for name in before}
    assert json.loads((tmp_path / "runs" / "branch" / "metrics.json").read_text())["step"] == 5


def test_validate_and_test_score_a_run_and_leave_its_own_files_as_they_are(tmp_path, capsys):
    assert fit(tmp_path, config()) == 0
    folder = tmp_path / "runs" / "experiment"
    saved = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    trained = json.loads(saved["metrics.json"])
    scores, before = trained["metrics"], sorted(folder.rglob("*"))
    for command in ("validate", "test"):
        capsys.readouterr()
        flags = ["--ckpt_path", str(folder / "checkpoints" / "last.ckpt"), "--runs", str(tmp_path / "runs")]
        assert run([command, "--config", str(folder / "config.yaml"), *flags]) == 0
        shown = capsys.readouterr().out
        assert "on held-out data" in shown
        assert "Image-text matching:" in shown
        assert f"{scores['val/contrastive/zero_shot']:.3g}" in shown
        assert "val/contrastive" not in shown  # Lightning's own table
        assert str(folder / command) in shown.replace("\n", "")
        found = json.loads((folder / command / "metrics.json").read_text())
        assert found["metrics"] == {name: value for name, value in scores.items() if name.startswith("val/")}
        assert found.keys() == trained.keys() | {"checkpoint", "trained_seconds"}
        assert 0 < found["trained_seconds"] <= trained["seconds"]
        assert (found["step"], found["weights"]) == (2, "the trained weights")
        assert found["checkpoint"].endswith("last.ckpt")
        assert list(found["data"]) == ["data.val[0]"]
        report = (folder / command / "report.html").read_text()
        assert f"experiment: {command}" in report
        assert "in 2 steps (1 s) on 8 of 12 samples of Mela" in re.sub(r"\(\d+ s\)", "(1 s)", report)
        assert "data:image/webp;base64," in report
    with pytest.warns(UserWarning, match="no --ckpt_path"):
        assert run(["validate", "--config", str(tmp_path / "experiment.yaml"), "--runs", str(tmp_path / "other")]) == 0
    assert {name: (folder / name).read_bytes() for name in saved} == saved
    new = [folder / command / name for command in ("validate", "test") for name in ("", "metrics.json", "report.html")]
    assert sorted({*folder.rglob("*")} - {*before}) == sorted(new)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["experiment"]
    initial = json.loads((tmp_path / "other" / "experiment" / "validate" / "metrics.json").read_text())
    assert (initial["step"], initial["weights"], initial["checkpoint"]) == (0, "the initial weights", None)


def test_two_ranks_leave_the_scores_of_one(tmp_path):
    assert fit(tmp_path, config()) == 0
    folder = tmp_path / "runs" / "experiment"
    checkpoint = folder / "checkpoints" / "last.ckpt"
    words = ["validate", "--config", str(folder / "config.yaml"), "--ckpt_path", str(checkpoint)]

    def scores():
        return json.loads((folder / "validate" / "metrics.json").read_text())["metrics"]

    assert run(words) == 0
    alone = scores()
    (folder / "validate" / "metrics.json").unlink()
    done = as_ranks(lambda: run([*words, "--trainer.devices", "2"]), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert scores() == pytest.approx(alone, abs=1e-5)
    assert done.stdout.count("scores and report") == 1


def test_a_run_that_cannot_be_written_to_is_scored(tmp_path, capsys):
    assert fit(tmp_path, config()) == 0
    folder = tmp_path / "runs" / "experiment"
    flags = ["--config", str(folder / "config.yaml"), "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]

    def refuse(file, content):
        raise OSError(errno.EROFS, "Read-only file system", str(file))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "write_whole", refuse)
        with pytest.warns(UserWarning, match="Read-only file system; the scores"):
            assert run(["validate", *flags]) == 0
    assert "zero-shot accuracy" in " ".join(capsys.readouterr().out.split())
    full = OSError(errno.ENOSPC, "No space left on device", str(folder / "validate" / "report.html"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "write_whole", Mock(side_effect=full))
        assert run(["validate", *flags]) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_training_takes_subnormal_numbers_for_zero(tmp_path):
    """Four tasks trained to the end of the quickstart were 1.6 times slower with them."""

    def halved():
        return (torch.full((1000, 1000), 1e-40) * 0.5).max().item()

    def work():
        torch.set_flush_denormal(False)  # a run in this process before the fork may have
        before = halved()
        status = fit(tmp_path, config())
        print(before > 0, halved())
        return status

    done = in_processes([work], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True 0.0"


def test_predict_writes_what_the_heads_find(tmp_path, capsys):
    """Twelve scenes; the embeddings are those that `indiclip.load` gives."""
    assert fit(tmp_path, config()) == 0
    folder = tmp_path / "runs" / "experiment"
    flags = ["--ckpt_path", str(folder / "checkpoints" / "last.ckpt"), "--runs", str(tmp_path / "runs")]
    assert run(["predict", "--config", str(folder / "config.yaml"), *flags]) == 0
    assert str(folder / "predictions") in capsys.readouterr().out.replace("\n", "")
    scenes = Mela(12, 32, "single")
    files = [folder / "predictions" / "images" / "contrastive" / f"{scenes.key(i)}.json" for i in range(12)]
    found = [json.loads(file.read_text())["heads"]["contrastive"]["embedding"] for file in files]
    expected = indiclip.load(folder).embed_image([scenes[i]["image"] for i in range(12)])
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_of_a_runs_own_config_the_last_checkpoint_is_read(command, tmp_path, monkeypatch, capsys):
    assert fit(tmp_path, config()) == 0
    folder, elsewhere = tmp_path / "runs" / "experiment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    words = [command, "--config", "../runs/experiment/config.yaml"]
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "no --ckpt_path")
        assert run(words) == 0
    assert "checkpoint ../runs/experiment/checkpoints/2.ckpt" in capsys.readouterr().out
    assert (folder / ("predictions" if command == "predict" else command)).is_dir()
    assert not list(elsewhere.iterdir())
    assert run([*words, "--data.val", "null"]) == 2
    assert capsys.readouterr().err.startswith("indiclip: data.val: found no source; ")
    for file in (folder / "checkpoints").iterdir():
        file.unlink()
    assert run(words) == 2
    assert "no checkpoint ../runs/experiment/checkpoints" in capsys.readouterr().err


def test_predict_of_a_config_of_no_run_needs_a_checkpoint(tmp_path, capsys):
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(config()))
    assert run(["predict", "--config", str(tmp_path / "experiment.yaml"), "--runs", str(tmp_path / "runs")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("indiclip: --ckpt_path: found none")
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_mistake_leaves_no_folder(tmp_path, capsys):
    assert fit(tmp_path, config(data__train__0__task="contrastve")) == 2
    assert fit(tmp_path, config(trainer__accelerator="gpu")) == (0 if torch.cuda.is_available() else 2)
    assert fit(tmp_path, config(), "--ckpt_path", str(tmp_path / "none.ckpt")) == 2
    assert list((tmp_path / "runs").iterdir()) == [] or torch.cuda.is_available()
    assert "none.ckpt" in capsys.readouterr().err


def test_a_source_without_what_a_head_needs_is_refused(tmp_path, capsys):
    tree = config()
    tree["model"]["heads"].append({"class_path": "heads.densepose.DensePose", "init_args": {"task": "contrastive"}})
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (40, 40)).save(images / "a.png")
    (tmp_path / "names.tsv").write_text("file\ten\na.png\tkite\n")
    table = {"images": str(images), "table": str(tmp_path / "names.tsv")}
    for part in ("train", "val"):
        tree["data"][part][0]["dataset"] = {"class_path": "indiclip.datasets.captions.CaptionTable", "init_args": table}
    assert fit(tmp_path, tree) == 2
    assert re.search(
        r"data.train\[0\]: densepose needs dp_boxes_xyxy, which the samples of CaptionTable do not have; they have "
        ".*caption",
        capsys.readouterr().err,
    )


def test_the_users_own_logger_and_bar_count(tmp_path):
    tree = config(trainer__logger=False)
    tree["trainer"]["callbacks"] = [{"class_path": "lightning.pytorch.callbacks.RichProgressBar"}]
    assert fit(tmp_path, tree) == 0
    names = {path.name for path in (tmp_path / "runs" / "experiment").iterdir()}
    assert "report.html" in names
    assert not any("tfevents" in name for name in names)


def test_checkpoints_are_in_the_runs_folder_whatever_the_logger(tmp_path, capsys):
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "logs")}}
    tree = config(trainer__logger=logger)
    tree["trainer"]["callbacks"] = [{"class_path": "indiclip.training.fault_tolerance.checkpoints.Checkpoints"}]
    for _ in range(2):
        assert fit(tmp_path, tree, "--ckpt_path", "last") == 0
    assert (tmp_path / "runs" / "experiment" / "checkpoints" / "2.ckpt").is_file()
    assert "going on from" in capsys.readouterr().out


@pytest.mark.parametrize("trial", ["true", "false"])
def test_what_the_optimizer_does_not_know_is_one_line_in_a_trial_too(trial, tmp_path, capsys):
    """Lightning's teardown fails on top of it in a `fast_dev_run`, as no loader was read."""
    words = ["--model.lr_scale", "{encoder.backbon: 0.1}", "--trainer.fast_dev_run", trial]
    assert fit(tmp_path, config(), *words) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("indiclip: model.lr_scale: no parameter lies")


@pytest.mark.parametrize("launcher", [pytest.param("lightning", marks=pytest.mark.slow), "torchrun"])
def test_two_processes_train_all_four_tasks(launcher, tmp_path):
    """Through the command, by either launcher; held-out numbers are of all seven scenes, more on one rank."""
    tree = config(trainer__max_steps=3)
    small = {
        "heads.detection.Detection": {"num_classes": 17, "out_channels": 16, "num_convs": 1, "scales": [1.0]},
        "heads.densepose.DensePose": {"roi_size": 7, "channels": 8, "num_convs": 1},
        "heads.counting.Counting": {"channels": 8},
    }
    tree["model"]["heads"] += [
        {"class_path": name, "init_args": {"task": "scenes"} | arguments} for name, arguments in small.items()
    ]
    for part in ("train", "val"):  # a rank's few samples of a step are not in all of them, nor in those of the other's
        tree["data"][part][0]["dataset"]["init_args"]["languages"] = ["en", "hi", "ta", "te"]
    for part, scenes in (("train", 12), ("val", 7)):
        source = json.loads(json.dumps(tree["data"][part][0]))
        source["dataset"]["init_args"] |= {"layout": "mixed", "people": 1.0, "num_scenes": scenes}
        tree["data"][part].append(source | {"task": "scenes"})
    done, folder = two_ranks(tmp_path, tree, started_by=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    by_language = {name for name in metrics if name.startswith("val/contrastive/image_to_text_r1/")}
    assert by_language == {f"val/contrastive/image_to_text_r1/{name}" for name in ("en", "hi", "ta", "te")}
    for name in ("contrastive/zero_shot", "detection/ap", "densepose/part_accuracy", "counting/mae"):
        assert f"val/{name}" in metrics
    assert [row["step"] for row in read_history(folder) if "train/loss" in row] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["experiment"]


def test_the_readmes_lines_run(tmp_path, monkeypatch):
    """README's five lines, with the run and picture they name put in place."""
    block = next(b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "load(" in b)
    assert len([line for line in block.splitlines() if line.strip()]) <= 6
    (tmp_path / "runs").mkdir()
    tree = config(model__encoder__embed_dim=128, model__encoder__lengths=[64])
    assert fit(tmp_path, tree, "--name", "quickstart") == 0
    Image.new("RGB", (50, 30), "orange").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["images"].shape[1] == 64


def test_load_does_not_import_lightning(tmp_path):
    assert fit(tmp_path, config()) == 0
    code = "import sys, indiclip; indiclip.load(sys.argv[1]); print('lightning' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "runs" / "experiment")], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "False"


def test_load_says_what_is_wrong_and_imports_no_foreign_code(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such run, checkpoint or folder"):
        indiclip.load(tmp_path / "nothing")
    (tmp_path / "x.ckpt").write_bytes(b"junk")
    with pytest.raises(ValueError, match="x.ckpt: not a readable checkpoint"):
        indiclip.load(tmp_path / "x.ckpt")
    spec = {"backbone": {"class_path": "evil.Backbone", "init_args": {}}, "text": {}}
    torch.save({"encoder": spec, "state_dict": {}}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="names evil.Backbone; pass trust_code=True"):
        indiclip.load(tmp_path / "evil.ckpt")
    torch.save({"encoder": {"backbone": 3, "text": {}}, "state_dict": {}}, tmp_path / "three.ckpt")
    with pytest.raises(ValueError, match="three.ckpt: backbone: found 3; expected Backbone"):
        indiclip.load(tmp_path / "three.ckpt")
    backbone = {"class_path": "indiclip.backbone.NaFlexViT", "init_args": {"size": "tiny", "patch_size": []}}
    torch.save({"encoder": {"backbone": backbone, "text": {}}, "state_dict": {}}, tmp_path / "patch.ckpt")
    with pytest.raises(ValueError, match="patch.ckpt: its encoder cannot be built [^\n]+$"):
        indiclip.load(tmp_path / "patch.ckpt")
    (tmp_path / "empty.ckpt").touch()
    with pytest.raises(ValueError, match="empty.ckpt: not a readable checkpoint"):
        indiclip.load(tmp_path / "empty.ckpt")


@pytest.mark.parametrize(
    ("class_path", "arguments", "message"),
    [
        (
            "indiclip.training.config_errors._import",
            {"class_path": "canary.Thing"},
            "names indiclip.training.config_errors._import",
        ),
        ("indiclip.checkpoint.load", {"path": "inner.ckpt", "trust_code": True}, "names indiclip.checkpoint.load"),
        ("indiclip.text.describe", {"part": 1}, "names indiclip.text.describe"),
        ("indiclip.text.importlib", {}, "names indiclip.text.importlib"),
        ("indiclip.tokenizers.FastTokenizer", {"source": "someone/theirs"}, "asks for source 'someone/theirs'"),
        ("indiclip.timm_backbone.TimmBackbone", {"name": "x", "pretrained": True}, "asks for pretrained True"),
    ],
)
def test_a_checkpoint_calls_nothing_but_parts_of_an_encoder(class_path, arguments, message, tmp_path, monkeypatch):
    """Each would import a module, unpickle or fetch something; the canary would leave a file."""
    (tmp_path / "canary.py").write_text("open('sung', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = {"backbone": {"class_path": class_path, "init_args": arguments}, "text": {}}
    torch.save({"encoder": spec, "state_dict": {}}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=message):
        indiclip.load(tmp_path / "evil.ckpt")
    assert not (tmp_path / "sung").exists()


def test_ctrl_c_ends_a_run_without_a_traceback(tmp_path):
    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it
        return fit(tmp_path, config(trainer__max_steps=100_000))

    history, error = tmp_path / "runs" / "experiment" / "history.jsonl", tmp_path / "err"
    with forked(work, tmp_path) as process:
        wait_until(lambda: history.is_file() and "step" in history.read_text())
        os.kill(process, signal.SIGINT)
        assert dict(as_they_end([process])) == {process: 130}, error.read_text()
    assert "Traceback" not in error.read_text()


def test_one_process_trains_in_a_folder(tmp_path, capsys):
    """A requeued job may start before the old one is gone."""
    assert fit(tmp_path, config()) == 0
    tree = config(trainer__max_steps=4)
    with holding(tmp_path / "runs" / "experiment", tmp_path / "other") as other:  # which is killed
        assert fit(tmp_path, tree, "--ckpt_path", "last") == 2
    assert f"experiment: another process (pid {other} on " in capsys.readouterr().err
    assert fit(tmp_path, tree, "--ckpt_path", "last") == 0


def test_last_without_a_checkpoint_starts_and_a_torn_one_is_refused(tmp_path, capsys):
    assert fit(tmp_path, config(), "--ckpt_path", "last") == 0
    assert "no checkpoint of experiment in" in capsys.readouterr().out
    folder = tmp_path / "runs" / "experiment" / "checkpoints"
    tree = config(trainer__max_steps=4)
    tree["trainer"]["callbacks"] = [
        {
            "class_path": "indiclip.training.fault_tolerance.checkpoints.Checkpoints",
            "init_args": {"every_n_train_steps": 1, "save_top_k": -1},
        }
    ]
    assert fit(tmp_path, tree, "--ckpt_path", str(folder / "last.ckpt")) == 0
    assert {file.name for file in folder.glob("*.ckpt")} == {"2.ckpt", "3.ckpt", "4.ckpt", "last.ckpt"}
    assert (folder / "last.ckpt").resolve() == folder / "4.ckpt"
    (folder / "4.ckpt").write_bytes(b"torn")
    capsys.readouterr()
    assert fit(tmp_path, tree, "--ckpt_path", str(folder / "last.ckpt")) == 2
    error = capsys.readouterr().err
    assert "last.ckpt: torn: 4 bytes," in error
    assert f"the newest good one there is {folder / '3.ckpt'}" in error
    tree["trainer"]["max_steps"] = 5
    assert fit(tmp_path, tree, "--ckpt_path", "last") == 0
    shown = capsys.readouterr()
    assert "passed over" in shown.err
    assert "4.ckpt: torn" in shown.err
    assert f"going on from {folder / '3.ckpt'}: step 3" in shown.out
    for file in folder.glob("?.ckpt"):
        file.write_bytes(b"torn")
    assert fit(tmp_path, tree, "--ckpt_path", "last") == 2
    assert "--ckpt_path last: no checkpoint is whole: " in capsys.readouterr().err


def test_a_run_that_was_killed_before_its_first_checkpoint_leaves_its_folder_to_the_next(tmp_path, capsys):
    folder = tmp_path / "runs" / "experiment"
    folder.mkdir(parents=True)
    (folder / "history.jsonl").write_text('{"step": 1}\n')
    assert fit(tmp_path, config(), "--ckpt_path", "last") == 0
    assert f"starting from the beginning in {folder}" in capsys.readouterr().out
    assert [row["seconds"] >= 0 for row in json_lines.read(folder / "history.jsonl") if row["step"] == 1] == [True]
    assert [path.name for path in folder.parent.iterdir()] == ["experiment"]


def test_sources_that_take_turns_are_all_checked(tmp_path, capsys):
    tree = config()
    source = tree["data"]["train"][0]
    del source["batch_size"]
    source |= {"batch_tokens": 64, "batch_multiple": 2}
    tree["data"]["train"].append(json.loads(json.dumps(source)) | {"weight": 0.5})
    assert fit(tmp_path, tree) == 0
    assert "64 tokens" in capsys.readouterr().out
    del source["batch_tokens"]
    assert fit(tmp_path, tree) == 2
    assert "needs one of batch_size and batch_tokens" in capsys.readouterr().err
