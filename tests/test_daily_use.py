"""What people do with a run every day, through the command: it works, or one line says why not."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
import yaml
from experiments import ROOT, config, fit
from PIL import Image

import indiclip
from indiclip import json_lines
from indiclip.training.cli import run
from indiclip.training.record import read_history

CHECKPOINTS = "indiclip.training.fault_tolerance.checkpoints.Checkpoints"
LIGHTNING = "lightning.pytorch.callbacks"


def part(class_path, **arguments):
    return {"class_path": class_path, "init_args": arguments}


def one_line(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The current directory, in which nothing may appear."""
    folder = tmp_path / "current"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "logger",
    [False, [], part("lightning.pytorch.loggers.CSVLogger", save_dir="logs"), part("trouble.OwnLogger")],
    ids=["none", "no one", "csv", "own"],
)
def test_whatever_the_logger_all_lies_in_the_runs_folder(logger, tmp_path, elsewhere):
    assert fit(tmp_path, config(trainer__logger=logger)) == 0
    folder = tmp_path / "runs" / "experiment"
    names = {"config.yaml", "history.jsonl", "metrics.json", "report.html", "checkpoints"}
    assert names <= {file.name for file in folder.iterdir()}
    if logger and "save_dir" in logger["init_args"]:
        assert (folder / "logs" / "lightning_logs" / "version_0" / "metrics.csv").is_file()


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_a_trial_leaves_nothing(command, tmp_path, elsewhere):
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(config(trainer__fast_dev_run=True)))
    for flags in ([], ["--ckpt_path", "last"]) if command == "fit" else ([],):
        assert run([command, "--config", str(file), "--runs", str(tmp_path / "runs"), *flags]) == 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_early_stopping_goes_on_from_a_checkpoint_before_the_epochs_end(tmp_path):
    """Patience 2, and a score that never changes: stops after three validations, however the run was cut."""
    score = "val/contrastive/image_to_text_r5"
    stop = part(f"{LIGHTNING}.EarlyStopping", monitor=score, mode="max", patience=2, min_delta=2.0)
    of_training = part(f"{LIGHTNING}.EarlyStopping", monitor="train/loss", patience=99)
    tree = config(trainer__max_steps=20, trainer__callbacks=[stop, of_training, part(CHECKPOINTS, save_top_k=-1)])
    for name, steps in (("whole", "20"), ("cut", "2")):
        assert fit(tmp_path, tree, "--name", name, "--trainer.max_steps", steps) == 0
    for steps in ("4", "20"):
        assert fit(tmp_path, tree, "--name", "cut", "--ckpt_path", "last", "--trainer.max_steps", steps) == 0
    for name in ("whole", "cut"):
        assert json.loads((tmp_path / "runs" / name / "metrics.json").read_text())["step"] == 6


@pytest.mark.parametrize("average", ["WeightAveraging", "EMAWeightAveraging"])
def test_averaged_weights_with_batch_norm_are_saved_scored_and_loaded(average, tmp_path):
    tree = config(model__encoder__batch_norm=True, model__encoder__pool="mean", trainer__max_steps=4)
    tree["trainer"]["callbacks"] = [part(f"{LIGHTNING}.{average}")]
    assert fit(tmp_path, tree) == 0
    assert fit(tmp_path, tree, "--ckpt_path", "last", "--trainer.max_steps", "6") == 0
    folder = tmp_path / "runs" / "experiment"
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    name = "encoder.image_projection.weight"
    averaged, raw = checkpoint["state_dict"][name], checkpoint["current_model_state"][name]
    assert not torch.equal(averaged, raw)
    assert torch.equal(indiclip.load(folder).image_projection.weight, averaged)


@pytest.mark.slow
def test_stochastic_weight_averaging_by_epochs(tmp_path, capsys):
    tree = config(model__encoder__batch_norm=True, model__encoder__pool="mean")
    tree["trainer"]["callbacks"] = [part(f"{LIGHTNING}.StochasticWeightAveraging", swa_lrs=0.01, swa_epoch_start=1)]
    assert fit(tmp_path, tree) == 2
    assert "StochasticWeightAveraging begins by epochs; expected trainer.max_epochs" in one_line(capsys)
    tree["trainer"] |= {"max_steps": -1, "max_epochs": 3}
    assert fit(tmp_path, tree) == 0
    assert fit(tmp_path, tree, "--ckpt_path", str(tmp_path / "runs" / "experiment"), "--trainer.max_epochs", "4") == 0


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"overfit_batches": 1}, [1, 2, 3, 4]),
        ({"check_val_every_n_epoch": 2, "max_steps": 6}, [4, 6]),
        ({"max_time": "00:00:00:02", "max_steps": 10**6, "val_check_interval": 10**6}, None),
        ({"limit_train_batches": 1}, [1, 2, 3, 4]),
    ],
    ids=["overfit_batches", "every second epoch", "max_time", "limit_train_batches"],
)
def test_the_last_step_is_scored(options, steps, tmp_path):
    tree = config()
    if "max_time" in options:
        tree["data"]["steps_per_epoch"] = 10**6
    tree["trainer"] |= {"max_steps": 4} | options
    assert fit(tmp_path, tree) == 0
    folder = tmp_path / "runs" / "experiment"
    scored = [row["step"] for row in read_history(folder) if "val/contrastive/image_to_text_r1" in row]
    assert scored == (steps or scored)
    assert scored[-1] == json.loads((folder / "metrics.json").read_text())["step"]


def test_overfitting_sees_the_same_batch_in_each_step(tmp_path):
    tree = config(trainer__overfit_batches=1, trainer__max_steps=3)
    tree["trainer"]["callbacks"] = [part("trouble.Diary", folder=str(tmp_path / "diary"))]
    assert fit(tmp_path, tree) == 0
    (file,) = (tmp_path / "diary").glob("keys-*.jsonl")
    keys = [json.loads(line)["keys"] for line in file.read_text().splitlines()]
    assert len(keys) == 3
    assert keys[0] == keys[1] == keys[2]


@pytest.fixture(scope="module")
def piped(tmp_path_factory):
    """What `indiclip fit ... | head -1` did, in a new Python, and the folder of its run."""
    folder = tmp_path_factory.mktemp("piped")
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(config(trainer__profiler="simple")))
    command = f"{sys.executable} -m indiclip.cli fit --config {file} --runs {folder}/runs | head -1"
    words = ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=os.environ)
    return done, folder / "runs" / "experiment"


def test_a_closed_pipe_does_not_end_the_run(piped):
    done, folder = piped
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert (folder / "metrics.json").is_file()


def test_a_profile_is_printed(piped):
    assert re.search(r"run_training_batch +\t?\|", piped[0].stderr)


@pytest.mark.parametrize("profiler", ["PyTorchProfiler", "SimpleProfiler"])
def test_a_profile_lies_in_the_runs_folder(profiler, tmp_path, elsewhere):
    """Also torch's, which hooks itself into every module and cannot be copied."""
    tree = config(
        trainer__profiler=part(f"lightning.pytorch.profilers.{profiler}", filename="times", dirpath="profile")
    )
    assert fit(tmp_path, tree) == 0
    assert list((tmp_path / "runs" / "experiment" / "profile").iterdir())


def test_a_timer_ends_the_run(tmp_path):
    tree = config(trainer__max_steps=10**6, trainer__callbacks=[part(f"{LIGHTNING}.Timer", duration="00:00:00:01")])
    assert fit(tmp_path, tree) == 0
    assert json.loads((tmp_path / "runs" / "experiment" / "metrics.json").read_text())["step"] < 10**6


def test_a_run_without_a_step_leaves_no_folder(tmp_path):
    assert fit(tmp_path, config(trainer__max_time="00:00:00:00")) == 0
    assert not list((tmp_path / "runs").glob("*"))


def test_no_training_goes_on_from_weights_alone(tmp_path, capsys):
    tree = config(trainer__callbacks=[part(f"{LIGHTNING}.ModelCheckpoint", save_weights_only=True)])
    assert fit(tmp_path, tree) == 0
    assert fit(tmp_path, tree, "--ckpt_path", "last", "--trainer.max_steps", "4") == 2
    assert "--ckpt_path: found weights only (save_weights_only)" in one_line(capsys)


def test_a_checkpoint_of_an_error_lies_with_the_others(tmp_path, elsewhere, capsys):
    saver = part(f"{LIGHTNING}.OnExceptionCheckpoint", dirpath="x")
    tree = config(trainer__max_steps=4, trainer__callbacks=[part("trouble.Fails", step=2), saver])
    assert fit(tmp_path, tree) == 1
    assert "the sensor is gone (while training" in one_line(capsys)
    assert (tmp_path / "runs" / "experiment" / "checkpoints" / "on_exception.ckpt").is_file()


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        (
            {"trainer__accumulate_grad_batches": 4},
            [],
            "trainer.accumulate_grad_batches: .* expected model.micro_batches 4",
        ),
        (
            {"trainer__callbacks": [part(f"{LIGHTNING}.GradientAccumulationScheduler", scheduling={0: 2})]},
            [],
            "trainer.accumulate_grad_batches: .* expected model.micro_batches k",
        ),
        ({"trainer__precision": "bf16-true"}, [], "trainer.precision: found bf16-true, .*; expected bf16-mixed"),
        ({"trainer__check_val_every_n_epoch": 0}, [], "trainer.check_val_every_n_epoch: found 0; expected 1 or more"),
        ({"trainer__val_check_interval": 0}, [], "trainer.val_check_interval: found 0; trainer.limit_val_batches 0"),
        ({"trainer__gradient_clip_val": -1}, [], "trainer.gradient_clip_val: found -1.*; expected 0 or more"),
        ({"trainer__strategy": "ddp_spawn"}, [], "trainer.strategy: found ddp_spawn; .*expected ddp"),
        ({"trainer__devices": "many"}, [], "trainer: `devices` selected with `CPUAccelerator` should be"),
        ({"trainer__precision": "bf17"}, [], "trainer.precision: expected int or 'transformer-engine'.*; found bf17$"),
        (
            {"trainer__logger": part("lightning.pytorch.loggers.MLFlowLogger")},
            [],
            "^indiclip: lightning.pytorch.loggers.MLFlowLogger: Requirement 'mlflow.*' not met",
        ),
        (
            {"trainer__callbacks": [part(f"{LIGHTNING}.Timer", duration="an hour")]},
            [],
            r"^indiclip: lightning.pytorch.callbacks.Timer: `Timer\(duration='an hour'\)` is not a valid duration",
        ),
        (
            {"trainer__callbacks": [part(f"{LIGHTNING}.EarlyStopping", monitor="train/loss", patience="long")]},
            [],
            r"^indiclip: trainer.callbacks\[0\].patience: expected int; found long$",
        ),
        (
            {"trainer__callbacks": [part(f"{LIGHTNING}.EarlyStopping")]},
            [],
            r"callbacks\[0\]: .* required: monitor$",
        ),
        (
            {
                "trainer__callbacks": [part(f"{LIGHTNING}.EarlyStopping", monitor="val/contrastive/zero_shot")],
                "trainer__limit_val_batches": 0,
            },
            [],
            "val/contrastive/zero_shot is not logged, for this run has no validation",
        ),
        ({}, ["--seed_everything", "true"], "seed_everything: found true; expected a number"),
        ({}, ["--seed_everything", "-1"], "seed_everything: found -1; expected a number from 0 to 4294967295"),
        ({"data__steps_per_epoch": -3}, [], "data.steps_per_epoch: found -3; expected 1 or more"),
        ({"data__steps_per_epoch": 0}, [], "data.steps_per_epoch: found 0; expected 1 or more"),
        ({"trainer__max_steps": 0}, [], "trainer.max_steps: found 0, with which nothing is trained"),
        ({"trainer__limit_train_batches": 0}, [], "trainer.limit_train_batches: found 0"),
        ({"trainer__default_root_dir": "x"}, [], "trainer.default_root_dir: the run's folder is --runs and --name"),
        # Steps of AdamW are not numbers in float16.
        (
            {"trainer__precision": "16-true"},
            [],
            "trainer.precision: no training in 16-true; expected 32-true,",
        ),
        (
            {"trainer__callbacks": [part(CHECKPOINTS, monitor="val/contrastiv/zero_shot")]},
            [],
            "the monitor of Checkpoints: .*no head 'contrastiv'; nearest is 'val/contrastive/zero_shot'",
        ),
        *(
            ({"model__optimizer": {"class_path": "torch.optim.AdamW", "init_args": options}}, [], f"{message}$")
            for options, message in (
                (
                    {"betaz": [0.9, 0.9]},
                    "model.optimizer.betaz: torch.optim.AdamW has no such option; nearest is 'betas'",
                ),
                ({"eps": "x"}, "model.optimizer.eps: expected float; found x"),
            )
        ),
        *(
            ({f"model__{name}": value}, [], f"model.{name}.*: {message}$")
            for name, value, message in (
                ("lr", "x", "expected float; found x"),
                ("lr", -1, "found -1.0; expected 0 or more"),
                ("lr", float("inf"), "found inf; expected 0 or more"),
                ("weight_decay", -1, "found -1.0; expected 0 or more"),
                ("warmup_steps", -5, "found -5; expected 0 or more"),
                ("layer_decay", 2, "found 2.0; expected above 0 to 1"),
                ("lr_scale", {"encoder.backbone": "x"}, "expected float; found x"),
                ("lr_scale", {"encoder.backbone": -1}, "found -1.0; expected 0 or more"),
                (
                    "lr_schedule",
                    part("indiclip.optim.Cosine", min_lr_ratio=2),
                    "found 2.0; expected 0 to 1",
                ),
                ("optimizer", part("torch.optim.AdamW", fused=True, foreach=True), ".*cannot be `True` together.*"),
                (
                    "optimizer",
                    part("timm.optim.Muon", adjust_lr_fn="mach_rms"),
                    'Invalid scaling function "mach_rms".*',
                ),
                ("optimizer", part("timm.optim.Muon", betas=[1.9, 2]), "result type ComplexFloat can't be cast.*"),
                ("optimizer", part("torch.optim.LBFGS"), r"LBFGS doesn't support per-parameter options.*"),
                ("heads", 3, "expected list; found 3"),
            )
        ),
        *(
            (
                {f"model__{name}": 0.5, "model__optimizer": part("torch.optim.AdamW", **{name: 3.0})},
                [],
                f"model.{name} is 0.5, and {name} of model.optimizer 3.0; give one of them$",
            )
            for name in ("lr", "weight_decay")
        ),
        (
            {"model__heads": [part("heads.contrastive.Contrastive", weight=-2)]},
            [],
            "heads.contrastive.weight: found -2.0; expected 0 or more$",
        ),
        (
            {"model__heads": [part("heads.contrastive.Contrastive", name="forward")]},
            [],
            "heads.Contrastive.name: found 'forward', expected .* no name of torch's ModuleDict$",
        ),
        ({}, ["--data.val.batch_size", "x"], "^indiclip: data.val.batch_size: expected int; found x$"),
        ({}, ["--data.val.dataset.init_args.size", "-3"], "^indiclip: .*found -3"),
        (
            {},
            ["--data.val.dataset.init_args.siez", "3"],
            "data.val.dataset.siez: .*Mela has no such option; nearest is 'size'$",
        ),
        ({"model__optimizer": "timm.optim.Lionn"}, [], "'timm.optim' has no attribute 'Lionn'; nearest is 'Lion'"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_no_folder(changes, flags, message, tmp_path, elsewhere, capsys):
    tree = config()
    tree["model"]["optimizer"] = None
    for key, value in changes.items():
        group, _, name = key.partition("__")
        tree[group][name] = value
    assert fit(tmp_path, tree, *flags) == 2
    line = one_line(capsys)
    assert re.search(message, line)
    assert len(line) < 400
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize(
    ("callback", "near"),
    [
        (part(CHECKPOINTS, monitor="val/contrastive/zeroshot"), "val/contrastive/zero_shot"),
        (part(f"{LIGHTNING}.EarlyStopping", monitor="val/contrastive/zeroshot"), "val/contrastive/zero_shot"),
        (part(f"{LIGHTNING}.EarlyStopping", monitor="train/losss"), "train/loss"),
        (part(f"{LIGHTNING}.EarlyStopping", monitor="lr-AdamW"), "lr-AdamW/pg2"),
    ],
)
def test_a_missing_monitor_is_one_line(callback, near, tmp_path, capsys):
    assert fit(tmp_path, config(trainer__callbacks=[callback])) == 2
    assert f"is not logged; nearest is '{near}'" in one_line(capsys)


def test_where_no_name_is_near_those_that_are_logged_are_said(tmp_path, capsys):
    assert fit(tmp_path, config(trainer__callbacks=[part(f"{LIGHTNING}.EarlyStopping", monitor="val_loss")])) == 2
    assert re.search("val_loss is not logged; logged are epoch, .*, train/loss, ", one_line(capsys))


@pytest.mark.parametrize("command", ["validate", "test"])
def test_what_reads_held_out_data_says_that_there_is_none(command, tmp_path, capsys):
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(config(data__val=None)))
    flags = ["--config", str(tmp_path / "experiment.yaml"), "--runs", str(tmp_path / "runs")]
    assert run([command, *flags]) == 2
    assert one_line(capsys).startswith("indiclip: data.val: found no source; ")
    assert not list((tmp_path / "runs").glob("*"))


def test_a_duplicated_key_is_one_line_with_its_place(tmp_path, capsys):
    file = tmp_path / "experiment.yaml"
    file.write_text(f"{yaml.safe_dump(config())}\ntrainer: {{max_steps: 9}}\n")
    assert run(["fit", "--config", str(file)]) == 2
    line = len(file.read_text().splitlines())
    assert re.search(
        rf"experiment.yaml: .*the key 'trainer' is duplicated in .*, line {line}, column 1", one_line(capsys)
    )


@pytest.mark.parametrize(
    "content", [b"file\ten\n1.png\tone\n", b"", torch.nn.Linear(2, 2)], ids=["text", "empty", "pickle"]
)
def test_what_is_no_checkpoint_is_one_line_that_advises_nothing_unsafe(content, tmp_path, capsys):
    file = tmp_path / "x.ckpt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    assert fit(tmp_path, config(), "--ckpt_path", str(file)) == 2
    line = one_line(capsys)
    assert re.search(r"x.ckpt: not a readable checkpoint \((another kind of file, or damaged|it holds torch)", line)
    with pytest.raises(ValueError, match="not a readable checkpoint") as error:
        indiclip.load(file)
    assert "weights_only" not in f"{line} {error.value}"


def test_the_last_checkpoint_is_the_one_that_was_saved_last(tmp_path, capsys):
    """Not that of the run with the highest number: an earlier run may have gone on since."""
    for _ in range(2):
        assert fit(tmp_path, config(), "--name", "r") == 0
    first = tmp_path / "runs" / "r" / "checkpoints"
    time.sleep(1)  # a checkpoint's time is in seconds
    assert fit(tmp_path, config(), "--ckpt_path", str(first / "last.ckpt"), "--trainer.max_steps", "4") == 0
    capsys.readouterr()
    assert fit(tmp_path, config(), "--name", "r", "--ckpt_path", "last", "--trainer.max_steps", "4") == 0
    shown = capsys.readouterr().out
    assert f"going on from {first / '4.ckpt'}" in shown
    assert "no step is left: 4 are done" in shown


def test_a_run_without_scores_or_curves_says_so(tmp_path, capsys):
    assert fit(tmp_path, config(trainer__limit_val_batches=0, trainer__log_every_n_steps=10)) == 0
    shown = capsys.readouterr().out
    assert "nothing was held out: there are no scores" in shown
    assert "train[0] Mela" in shown  # with its samples, in the table; a line beside it would say no more
    assert "data.train[0]:" not in shown
    assert "the run had 2 steps" in (tmp_path / "runs" / "experiment" / "report.html").read_text()


def test_a_long_warm_up_is_said(tmp_path):
    with pytest.warns(UserWarning, match="model.warmup_steps: found 9 of 2 steps in all"):
        assert fit(tmp_path, config(), "--model.warmup_steps", "9") == 0


def test_a_run_that_fails_before_its_first_step_leaves_its_name_free(tmp_path, capsys):
    tree = config()
    tree["data"]["train"][0]["dataset"] = part("trouble.AllUnreadable")
    assert fit(tmp_path, tree) == 2
    assert "are unreadable" in one_line(capsys)
    assert list((tmp_path / "runs").iterdir()) == []
    assert fit(tmp_path, config()) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["experiment"]
    # A folder that was there before stays, whatever fails in it.
    last = str(tmp_path / "runs" / "experiment" / "checkpoints" / "last.ckpt")
    before = sorted((tmp_path / "runs" / "experiment").iterdir())
    assert fit(tmp_path, tree, "--ckpt_path", last, "--override", "true") == 2
    assert sorted((tmp_path / "runs" / "experiment").iterdir()) == before


def test_a_checkpoint_of_another_model_is_one_line(tmp_path, capsys):
    assert fit(tmp_path, config()) == 0
    flags = ["--ckpt_path", str(tmp_path / "runs/experiment/checkpoints/last.ckpt"), "--override", "true"]
    tree = config()
    tree["model"]["heads"].append(part("heads.counting.Counting", task="contrastive", channels=8))
    capsys.readouterr()
    assert fit(tmp_path, tree, *flags) == 2
    assert "--ckpt_path: found the heads contrastive; the config has contrastive, counting" in one_line(capsys)
    assert fit(tmp_path, config(model__encoder__embed_dim=48), *flags) == 2
    line = one_line(capsys)
    assert "2 tensors are not those of the config's model, such as encoder.image_projection.weight: found " in line
    assert "shape (32, 32), expected (48, 32)" in line


def pictures(folder):
    """Six captioned pictures, of which two are no images."""
    (folder / "images").mkdir()
    for number in range(6):
        file = folder / "images" / f"{number}.png"
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(file)
        if number in (1, 4):
            file.write_bytes(file.read_bytes()[:40])
    rows = "".join(f"{number}.png\tpicture {number}\n" for number in range(6))
    (folder / "names.tsv").write_text(f"file\ten\n{rows}")
    return part(
        "indiclip.datasets.captions.CaptionTable", images=str(folder / "images"), table=str(folder / "names.tsv")
    )


@pytest.mark.parametrize("batch_size", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_predict_lists_what_it_cannot_read_and_writes_to_the_checkpoints_run(batch_size, tmp_path, capsys):
    assert fit(tmp_path, config(), "--name", "mine") == 0
    folder = tmp_path / "runs" / "mine"
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["name"] == ""  # the folder may be moved and renamed
    saved["data"]["val"][0] |= {"dataset": pictures(tmp_path), "batch_size": batch_size}
    (tmp_path / "predict.yaml").write_text(yaml.safe_dump(saved))
    flags = ["--config", str(tmp_path / "predict.yaml"), "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]
    for _ in range(2):
        assert run(["predict", *flags]) == 0
        rows = json_lines.read(folder / "predictions" / "quarantine.jsonl")
        assert sorted(row["key"] for row in rows) == ["1.png", "4.png"]
    assert "unreadable samples: 2, listed in" in capsys.readouterr().out
    listed = json.loads((folder / "predictions" / "images" / "contrastive.json").read_text())["images"]
    assert [entry["key"] for entry in listed] == ["0.png", "2.png", "3.png", "5.png"]
    before = json_lines.read(folder / "quarantine.jsonl")
    for _ in range(2):
        assert run(["validate", *flags]) == 0
        assert json.loads((folder / "validate" / "metrics.json").read_text())["quarantined"] == 2
    assert json_lines.read(folder / "quarantine.jsonl") == before  # of training
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"]
