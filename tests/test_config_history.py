"""A run that goes on with other settings: each is listed, and takes effect or is refused; no config is lost."""

import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from experiments import config, fit
from PIL import Image

from indiclip import json_lines
from indiclip.training.config_history import ConfigHistory

FOLDER = "runs/experiment"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    assert fit(folder, config()) == 0
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """One with a run of two steps."""
    return shutil.copytree(trained, tmp_path / "folder", symlinks=True)


def saved(folder, name="config.yaml"):
    return yaml.safe_load((folder / FOLDER / name).read_text())


def going_on(folder, tree, *flags):
    return fit(folder, tree, "--ckpt_path", str(folder / FOLDER / "checkpoints" / "last.ckpt"), *flags)


def rates(folder, step):
    """Learning rate, decay and betas of the groups that decay, as a checkpoint has them, and the scheduler's peak."""
    checkpoint = torch.load(folder / FOLDER / "checkpoints" / f"{step}.ckpt", weights_only=True)
    group = next(g for g in checkpoint["optimizer_states"][0]["param_groups"] if "use_fallback" not in g)
    return group["lr"], group["weight_decay"], tuple(group["betas"]), checkpoint["lr_schedulers"][0]["base_lrs"][0]


def test_the_optimizers_values_take_effect_and_are_listed(tmp_path, capsys):
    """From the step that the run stands at: a constant rate after one step of warm-up."""
    tree = config(model__lr=1e-3, trainer__max_steps=2)
    tree["model"] |= {"warmup_steps": 1, "lr_schedule": "indiclip.optim.Constant"}
    assert fit(tmp_path, tree) == 0
    assert rates(tmp_path, 2) == (1e-3, 0.05, (0.9, 0.98), 1e-3)
    tree["model"] |= {"lr": 3e-4, "weight_decay": 0.2}
    tree["model"]["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.8, 0.9], "fused": True}}
    capsys.readouterr()
    assert going_on(tmp_path, tree, "--trainer.max_steps", "3") == 0
    out = capsys.readouterr().out
    assert "changed since the checkpoint:" in out
    for line in ("model.lr: 0.001 -> 0.0003", "model.weight_decay: None -> 0.2", "trainer.max_steps: 2 -> 3"):
        assert f"  {line}\n" in out
    assert rates(tmp_path, 3) == (3e-4, 0.2, (0.8, 0.9), 3e-4)


def test_new_rates_are_those_of_a_run_that_had_them_from_this_step_on(tmp_path):
    """By hand: AdamW with the moments of the checkpoint and the new rate gives the weights of the next step."""
    tree = config(model__lr=1e-3, trainer__max_steps=2)
    tree["model"] |= {"warmup_steps": 0, "weight_decay": 0.0, "lr_schedule": "indiclip.optim.Constant"}
    assert fit(tmp_path, tree) == 0
    assert going_on(tmp_path, tree, "--name", "same", "--trainer.max_steps", "3") == 0
    assert going_on(tmp_path, tree, "--name", "twice", "--trainer.max_steps", "3", "--model.lr", "2e-3") == 0
    weights = [
        torch.load(tmp_path / "runs" / name / "checkpoints" / f"{step}.ckpt", weights_only=True)["state_dict"]
        for name, step in (("experiment", 2), ("same", 3), ("twice", 3))
    ]
    name = "encoder.image_projection.weight"
    before, same, twice = (found[name] for found in weights)
    assert not torch.equal(before, same)
    torch.testing.assert_close(twice - before, 2 * (same - before), atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "flags", "key"),
    [
        ({"data__train__0__batch_size": 3}, [], "data.train[0].batch_size: 4 -> 3"),
        ({}, ["--seed_everything", "7"], "seed_everything: 0 -> 7"),
        ({"data__train__0__dataset__init_args__num_scenes": 20}, [], "init_args.num_scenes: 12 -> 20"),
        ({"data__steps_per_epoch": 5}, [], "data.steps_per_epoch: 2 -> 5"),
    ],
)
def test_another_training_step_is_refused_without_override(changes, flags, key, folder, capsys):
    before = {file.name: file.read_bytes() for file in (folder / FOLDER).iterdir() if file.is_file()}
    assert going_on(folder, config(trainer__max_steps=3, **changes), *flags) == 2
    error = capsys.readouterr().err
    assert key in error
    assert "--override true trains on with the new ones" in error
    assert {name: (folder / FOLDER / name).read_bytes() for name in before} == before


def test_another_head_is_refused_without_advice_that_does_not_help(folder, capsys):
    """As weights of a head that is not in the checkpoint would be."""
    tree = config(trainer__max_steps=3)
    tree["model"]["heads"].append({"class_path": "heads.counting.Counting", "init_args": {"task": "contrastive"}})
    assert going_on(folder, tree) == 2
    error = capsys.readouterr().err
    assert "a new one may begin with its encoder (model.encoder.init_from)" in error
    assert "--override" not in error


@pytest.mark.parametrize("step", [2, 4])
def test_a_rate_that_rises_again_is_told(step, tmp_path, recwarn):
    """A longer run from inside the decay, which begins behind step 3 of 6; from before it does not rise."""
    decays = {"class_path": "indiclip.optim.WarmupStableDecay", "init_args": {"decay_steps": 3, "decay": "linear"}}
    kept = {"every_n_train_steps": 2, "save_top_k": -1}
    kept = {"class_path": "indiclip.training.fault_tolerance.checkpoints.Checkpoints", "init_args": kept}
    tree = config(model__lr_schedule=decays, model__warmup_steps=0, trainer__max_steps=6, trainer__callbacks=[kept])
    assert fit(tmp_path, tree) == 0
    recwarn.clear()
    checkpoint = str(tmp_path / FOLDER / "checkpoints" / f"{step}.ckpt")
    assert fit(tmp_path, tree, "--ckpt_path", checkpoint, "--name", "branch", "--trainer.max_steps", "8") == 0
    told = [str(w.message) for w in recwarn if "rate rises" in str(w.message)]
    expected = "model.lr_schedule: after step 4 the learning rate rises from 0.667 to 1 of its peak"
    assert [message.startswith(expected) for message in told] == [True] * (step == 4)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_bound_that_older_runs_wrote_down_is_listed_and_no_hindrance(loss, tmp_path, capsys):
    """They had 100 for each loss; SigLIP's has none any more."""
    contrastive = {"class_path": "heads.contrastive.Contrastive", "init_args": {"loss": loss}}
    assert fit(tmp_path, config(model__heads=[contrastive])) == 0
    file = tmp_path / FOLDER / "config.yaml"
    assert "max_logit_scale: null" in file.read_text()
    file.write_text(file.read_text().replace("max_logit_scale: null", "max_logit_scale: 100.0"))
    assert going_on(tmp_path, config(model__heads=[contrastive]), "--trainer.max_steps", "3") == 0
    assert "model.heads[0].init_args.max_logit_scale: 100.0 -> None" in capsys.readouterr().out


def test_a_source_that_a_lone_checkpoint_did_not_know_is_told(folder, capsys):
    """Where no config lies beside it."""
    last = shutil.copy(folder / FOLDER / "checkpoints" / "last.ckpt", folder / "lone.ckpt")
    tree = config(trainer__max_steps=3)
    tree["data"]["train"].append(tree["data"]["train"][0])
    assert fit(folder, tree, "--ckpt_path", str(last), "--name", "other") == 2
    assert "--ckpt_path: its run read other data: data.train[1]" in capsys.readouterr().err


def test_with_override_it_trains_on(folder):
    longer = config(trainer__max_steps=3, data__train__0__batch_size=3)
    assert going_on(folder, longer, "--override", "true") == 0
    assert saved(folder)["trainer"]["max_steps"] == 3
    assert saved(folder)["data"]["train"][0]["batch_size"] == 3


@pytest.mark.parametrize(
    ("names", "found"),
    [
        pytest.param("abc", "samples: 4 -> 3", marks=pytest.mark.slow),
        ("abcde", "samples: 4 -> 5"),
        ("abce", "crc32_of_keys: "),
    ],
)
def test_other_samples_under_the_same_config_are_refused_without_override(names, found, tmp_path, capsys):
    def write_table(names):
        for name in names:
            Image.new("RGB", (32, 32), "orange").save(tmp_path / f"{name}.png")
        (tmp_path / "table.csv").write_text("file,caption\n" + "".join(f"{name}.png,a photo\n" for name in names))

    write_table("abcd")
    init_args = {"images": str(tmp_path), "table": str(tmp_path / "table.csv")}
    dataset = {"class_path": "indiclip.datasets.captions.CaptionTable", "init_args": init_args}
    tree = config(data__train__0__dataset=dataset)
    assert fit(tmp_path, tree) == 0
    write_table(names)
    capsys.readouterr()
    flags = ["--trainer.max_steps", "3"]
    assert going_on(tmp_path, tree, *flags) == 2
    error = capsys.readouterr().err
    assert f"--ckpt_path: its run read other data: data.train[0].{found}" in error
    assert "--override true trains on with the new ones" in error
    assert going_on(tmp_path, tree, *flags, "--override", "true") == 0
    assert f"  data.train[0].{found}" in capsys.readouterr().out
    assert going_on(tmp_path, tree, "--trainer.max_steps", "4") == 0  # the new ones are now the run's own


def test_another_optimizer_is_refused_always(tmp_path, capsys):
    assert fit(tmp_path, config(), "--model.optimizer", "timm.optim.Lion") == 0
    flags = ["--trainer.max_steps", "3", "--override", "true"]
    assert going_on(tmp_path, config(), "--model.optimizer", "timm.optim.Muon", *flags) == 2
    assert "timm.optim.Muon cannot go on from the moments of timm.optim.Lion" in capsys.readouterr().err
    assert going_on(tmp_path, config(), *flags) == 2
    assert "torch.optim.AdamW cannot go on from the moments of timm.optim.Lion" in capsys.readouterr().err
    assert going_on(tmp_path, config(), "--model.optimizer", "timm.optim.Lion", *flags) == 0


@pytest.mark.parametrize("begun", [{"model__layer_decay": 0.5}, {}])
def test_rates_by_layer_may_come_and_go(begun, tmp_path):
    """The optimizer has other groups then, more or fewer."""
    assert fit(tmp_path, config(**begun)) == 0
    rates = [] if begun else ["--model.layer_decay", "0.5"]
    assert going_on(tmp_path, config(), "--trainer.max_steps", "3", *rates) == 0
    last = torch.load(tmp_path / FOLDER / "checkpoints" / "last.ckpt", weights_only=True)
    scales = {group["lr_scale"] for group in last["optimizer_states"][0]["param_groups"]}
    assert (len(scales) > 1) == (not begun)
    assert [len(schedule["base_lrs"]) for schedule in last["lr_schedulers"]] == [
        len(last["optimizer_states"][0]["param_groups"])
    ]


@pytest.mark.slow
def test_the_config_of_each_stretch_is_kept(tmp_path):
    """`config.yaml` is what made the newest steps; what ran before is beside it by its last step; what never ran is not
    there."""
    for steps, rate in ((2, 1e-3), (4, 2e-3), (4, 9e-3), (6, 2e-3)):
        flags = ["--ckpt_path", "last", "--model.lr", str(rate)]
        assert fit(tmp_path, config(trainer__max_steps=steps), *flags) == 0
    names = sorted(file.name for file in (tmp_path / FOLDER).glob("config*.yaml"))
    assert names == ["config-2.yaml", "config-4.yaml", "config.yaml"]
    found = [(saved(tmp_path, name)["model"]["lr"], saved(tmp_path, name)["trainer"]["max_steps"]) for name in names]
    assert found == [(1e-3, 2), (2e-3, 4), (2e-3, 6)]
    assert saved(tmp_path)["ckpt_path"] is None  # which `fit --config RUN/config.yaml` would go on from
    assert fit(tmp_path, config(trainer__max_steps=7), "--ckpt_path", "last", "--model.lr", "2e-3") == 0
    assert fit(tmp_path, config(trainer__max_steps=7), "--ckpt_path", "last", "--model.lr", "2e-3") == 0
    assert len(list((tmp_path / FOLDER).glob("config*.yaml"))) == 4


@pytest.mark.parametrize("failing", ["config-2.yaml", "config.yaml"])
def test_a_full_disk_loses_no_config_and_changes_are_still_refused(failing, tmp_path, monkeypatch):
    """At either of the two writes; what is on the disk then is what a kill leaves there."""
    assert fit(tmp_path, config()) == 0
    before = (tmp_path / FOLDER / "config.yaml").read_bytes()
    write = json_lines.write_whole

    def fail(file, content):
        if file.name == failing:
            raise OSError(28, "No space left on device", str(file))
        write(file, content)

    longer = config(trainer__max_steps=4)
    with monkeypatch.context() as patched:
        patched.setattr(json_lines, "write_whole", fail)
        assert going_on(tmp_path, longer, "--model.lr", "2e-3") != 0
    assert (tmp_path / FOLDER / "config.yaml").read_bytes() == before
    assert going_on(tmp_path, config(trainer__max_steps=4, data__train__0__batch_size=3)) == 2
    assert going_on(tmp_path, longer, "--model.lr", "2e-3") == 0
    assert (tmp_path / FOLDER / "config-2.yaml").read_bytes() == before
    assert saved(tmp_path)["model"]["lr"] == 2e-3


def history(folder, **tree):
    """The callback at the start of a run, without one."""
    found = ConfigHistory(None, {"override": False}, SimpleNamespace(tree=tree))
    found._folder = folder
    return found


WITHOUT_HEADS = SimpleNamespace(each_head=list)


def at_step(step, rank=0):
    return SimpleNamespace(global_step=step, is_global_zero=rank == 0, datamodule=SimpleNamespace(train=[]))


@pytest.mark.parametrize("hook", ["on_save_checkpoint", "on_train_batch_end"])
def test_a_config_is_kept_with_its_first_step_and_once(hook, tmp_path):
    """Also by a checkpoint that is saved within that step, before the batch has ended."""
    first = history(tmp_path, lr=1)
    first.on_save_checkpoint(at_step(0), WITHOUT_HEADS, {})  # of a run that has not begun
    first.on_train_start(at_step(0), None)
    first.on_save_checkpoint(at_step(0), WITHOUT_HEADS, {})  # before any step
    assert list(tmp_path.iterdir()) == []
    getattr(first, hook)(at_step(1), WITHOUT_HEADS, {})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"lr": 1}
    second = history(tmp_path, lr=2)
    second.on_train_start(at_step(5), None)
    second.on_save_checkpoint(at_step(5), WITHOUT_HEADS, {})
    getattr(second, hook)(at_step(6, rank=1), WITHOUT_HEADS, {})  # another rank
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"lr": 1}
    for step in (6, 7):
        getattr(second, hook)(at_step(step), WITHOUT_HEADS, {})
    found = {file.name: yaml.safe_load(file.read_text()) for file in tmp_path.iterdir()}
    assert found == {"config.yaml": {"lr": 2}, "config-5.yaml": {"lr": 1}}


def test_the_same_config_again_leaves_one(tmp_path):
    for began in (0, 5):
        same = history(tmp_path, lr=1)
        same.on_train_start(at_step(began), None)
        same.on_train_batch_end(at_step(began + 1))
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_what_does_not_change_the_step_may_change(folder, capsys):
    longer = config(trainer__max_steps=3, data__num_workers=1, trainer__log_every_n_steps=2, trainer__logger=False)
    assert going_on(folder, longer) == 0
    assert "data.num_workers: 0 -> 1" in capsys.readouterr().out
