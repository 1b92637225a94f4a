"""SIGKILL for the command and its loader workers, while it saves too: nothing is lost, repeated or torn.

`tools/bench_kill.py` does the same at random moments, many times.
"""

import json
import os
import signal
import tempfile
import zipfile
from collections import Counter

import torch
import yaml
from experiments import config
from processes import in_processes

from indiclip.generated.mela import Mela
from indiclip.training.cli import run

SCENES, BATCH = 12, 4  # an epoch of the source is three steps


def experiment(folder, kill=None, workers=0):
    """Twelve steps with dropout, a checkpoint after every third; killed where `kill` says."""
    tree = config(trainer__max_steps=12, data__steps_per_epoch=5, data__num_workers=workers)
    tree["data"]["val"] = []
    drops = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    tree["model"]["encoder"]["text"]["architecture"] |= drops
    checkpoints = "indiclip.training.fault_tolerance.checkpoints.Checkpoints"
    tree["trainer"]["callbacks"] = [
        {"class_path": checkpoints, "init_args": {"every_n_train_steps": 3}},
        {"class_path": "trouble.Diary", "init_args": {"folder": str(folder)}},
    ]
    if kill:
        tree["trainer"]["callbacks"].append({"class_path": "trouble.Kill", "init_args": kill})
    return tree


def started(folder, scratch, kill=None, workers=0):
    """Run the command in a process of its own to its end. Returns what it printed.

    Every run has one torch thread: sums over more of them round differently, and runs are compared bit for bit.
    """
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment(folder, kill, workers)))
    words = ["fit", "--config", str(file), "--runs", str(folder / "runs"), "--ckpt_path", "last"]

    def work():
        os.environ["TMPDIR"] = str(scratch)
        tempfile.tempdir = str(scratch)
        return run(words)

    done = in_processes([work], folder)
    assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr[-3000:]
    return done.stdout


def content(folder):
    """The names in a folder of checkpoints, each checkpoint of which can be read from its first to its last byte."""
    for file in folder.glob("*.ckpt"):
        assert zipfile.ZipFile(file).testzip() is None  # the archive's own checksums
        torch.load(file, weights_only=True)
    return {file.name for file in folder.iterdir()}


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def test_three_kills_lose_nothing(tmp_path, tmp_path_factory):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    scratch = tmp_path_factory.mktemp("scratch")  # a short path, for the sockets of workers
    started(whole, scratch)
    at = killed / "runs" / "experiment" / "checkpoints"

    # In the middle of writing the second checkpoint.
    started(killed, scratch, {"step": 5, "function": "write", "call": 3}, workers=2)
    assert content(at) == {"3.ckpt", "last.ckpt", "manifest.json", ".6.ckpt.part"}
    # It is written again and listed, but not yet in its place.
    out = started(killed, scratch, {"step": 5, "function": "replace", "call": 2}, workers=1)
    assert f"going on from {at}/3.ckpt: step 3" in out
    assert content(at) == {"3.ckpt", "last.ckpt", "manifest.json", ".6.ckpt.part"}
    assert any(row["name"] == "6.ckpt" for row in json.loads((at / "manifest.json").read_text())["files"])
    # In the middle of an epoch, steps after a checkpoint, with batches waiting in the workers.
    out = started(killed, scratch, {"step": 11}, workers=3)
    assert f"going on from {at}/3.ckpt: step 3" in out
    assert content(at) == {"9.ckpt", "last.ckpt", "manifest.json"}

    assert f"going on from {at}/9.ckpt: step 9" in started(killed, scratch)
    assert content(at) == {"12.ckpt", "last.ckpt", "manifest.json"}
    assert [file.name for file in scratch.rglob("*.ckpt*")] == []

    rows = [json.loads(line) for line in (killed / "keys-0.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(6), *range(3, 6), *range(3, 12), *range(9, 12)]
    counted = {row["step"]: row["keys"]["contrastive"] for row in rows}  # a step that is done again replaces itself
    scenes = Mela(SCENES, 32, "single")
    once = Counter(scenes[index]["key"] for index in range(SCENES))
    for epoch in range(4):
        steps = range(epoch * SCENES // BATCH, (epoch + 1) * SCENES // BATCH)
        assert Counter(key for step in steps for key in counted[step]) == once
    lines = (whole / "keys-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["keys"]["contrastive"] for line in lines] == list(counted.values())
    ends = [torch.load(f / "runs/experiment/checkpoints/last.ckpt", weights_only=True) for f in (whole, killed)]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert same(ends[0][part], ends[1][part]), part
