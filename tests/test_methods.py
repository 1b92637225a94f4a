"""Every page of conf/methods: it stacks on the quickstart as that stands, and a run with it that is killed goes on.

The quickstart trains image-text matching, detection, DensePose and counting in one step, so each method is with all of
them here. Most of these runs are `slow`: `make test` leaves them to CI.
"""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from experiments import config
from lightning import Callback
from processes import in_processes

from indiclip.training.cli import run

ROOT = Path(__file__).parent.parent
METHODS = {file.stem: file for file in sorted((ROOT / "conf" / "methods").glob("*.yaml"))}
QUICK = {"mixup"}
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name) for name in METHODS]
LAST = 10  # steps of the runs that are killed; a border at 80% is at the eighth
KILLED = (3, 8, 9)  # inside, at the border, and inside what begins there


def test_every_method_opens_with_what_it_is_its_command_and_its_verdict():
    for name, file in METHODS.items():
        opening = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
        assert f"--config conf/methods/{name}.yaml" in opening, name
        assert "\n# Measured: " in opening, name


@pytest.mark.parametrize("name", EACH)
def test_two_steps_on_the_quickstart(name, tmp_path):
    base = ["fit", "--config", "quickstart", "--config", f"methods/{name}", "--runs", str(tmp_path)]
    short = ["--trainer.max_steps", "2", "--data.steps_per_epoch", "2", "--trainer.limit_val_batches", "0"]
    assert run([*base, *short, "--model.warmup_steps", "1"]) == 0
    last = tmp_path / "quickstart" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2


class KillAfter(Callback):
    """Kills this process once the checkpoint of a step was written.

    Args:
        step: Of the optimizer.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def small_quickstart(folder):
    """The quickstart's four tasks with towers of a few numbers, on a few scenes."""
    tree = yaml.safe_load((ROOT / "conf" / "quickstart.yaml").read_text())
    encoder = tree["model"]["encoder"]
    encoder["backbone"]["init_args"] |= {"width": 32, "depth": 2, "num_heads": 2}
    encoder["text"]["architecture"] |= {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    encoder |= {"embed_dim": 32, "lengths": [16]}
    for source in tree["data"]["train"]:
        source["batch_size"] = 8 if source["task"] == "contrastive" else 2
        source["dataset"]["init_args"]["num_scenes"] = 64
    tree["data"] |= {"val": [], "steps_per_epoch": 4}
    tree["trainer"] |= {"max_steps": LAST, "enable_progress_bar": False, "logger": False}
    tree["model"]["warmup_steps"] = 2
    saves = {"class_path": "indiclip.training.fault_tolerance.checkpoints.Checkpoints"}
    tree["trainer"]["callbacks"] = [saves | {"init_args": {"every_n_train_steps": 1, "filename": "each-{step}"}}]
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def tensors(checkpoint):
    """(path, value) of the weights, the optimizer's moments and the averages."""
    kept = [checkpoint[part] for part in ("state_dict", "optimizer_states", "averages") if part in checkpoint]
    return [(path, leaf) for path, leaf in torch.utils._pytree.tree_flatten_with_path(kept)[0] if torch.is_tensor(leaf)]


def check_killed(words, folder, last=LAST, steps=KILLED):
    """Assert that a run of so many steps, killed by SIGKILL after some of them, ends at the same bits.

    Args:
        words: Of the command, which saves a checkpoint after each step.
        folder: For the runs.
    """

    def fit(name, *more):
        return in_processes([partial(run, [*words, "--runs", str(folder / name), *more])], folder)

    def end(name):
        checkpoints = (folder / name).glob("*/checkpoints/last.ckpt")
        found = torch.load(max(checkpoints, key=lambda file: file.stat().st_mtime), weights_only=True)
        assert found["global_step"] == last
        return dict(tensors(found))

    assert (done := fit("whole")).returncode == 0, done.stderr
    whole = end("whole")
    for step in steps:
        kill = ["--trainer.callbacks+=test_methods.KillAfter", f"--trainer.callbacks.step={step}"]
        done = fit(f"killed-{step}", *kill)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert (done := fit(f"killed-{step}", "--ckpt_path", "last")).returncode == 0, done.stderr
        resumed = end(f"killed-{step}")
        apart = [path for path, value in whole.items() if not torch.equal(resumed[path], value)]
        assert apart == [], f"killed after step {step}"


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_a_killed_run_goes_on_bit_by_bit(name, tmp_path):
    """Before a border of its schedule, at it and behind it, where it has one."""
    words = ["fit", "--config", str(small_quickstart(tmp_path)), "--config", f"methods/{name}"]
    words += ["--data.train.batch_size=8"] * (name == "unicl")  # of the source that it adds, as large as the first
    check_killed(words, tmp_path)


@pytest.mark.parametrize("methods", [["lit", "ema"], ["lora", "layer_decay"]], ids=str)
def test_methods_stack_by_name(methods, tmp_path, capsys):
    """On any experiment, here two steps of a small one."""
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(config()))
    parts = [word for name in methods for word in ("--config", f"methods/{name}")]
    short = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"]
    assert run(["fit", "--config", str(base), *parts, "--runs", str(tmp_path), *short]) == 0
    out = capsys.readouterr().out
    saved = torch.load(tmp_path / "base" / "checkpoints" / "last.ckpt", weights_only=True)
    rates = {group["lr_scale"] for group in saved["optimizer_states"][0]["param_groups"]}
    if "lit" in methods:
        assert "frozen: encoder.backbone, encoder.image_pool.pool; " in out
        assert saved["averages"]["num_updates"] == 1
        assert not any(name.startswith("encoder.backbone.") for name in saved["averages"]["state_dict"])
        assert rates == {1.0}
    else:
        assert saved["encoder"]["lora"]["r"] == 8
        assert rates == {1.0, 0.75}  # adapters of the only block
