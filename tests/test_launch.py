"""The processes that were started are those of the trainer, and all run the same; else one line says what to do."""

import os
import subprocess
import sys

import pytest
import yaml
from experiments import config, fit
from processes import as_ranks, environment

from indiclip.training.cli import run


def lines(text):
    return [line for line in text.splitlines() if line.startswith("indiclip: ")]


def written(folder, tree):
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(tree))
    return ["fit", "--config", str(file), "--runs", str(folder / "runs")]


def test_torchrun_without_devices_is_refused_in_one_line_and_leaves_nothing(tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words += ["indiclip.cli", *written(tmp_path, config())]
    ended = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=240)
    assert ended.returncode != 0
    (line,) = lines(ended.stderr)
    assert "torchrun started 1 x 2 processes" in line
    assert "expected --trainer.num_nodes 1 --trainer.devices 2" in line
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("devices", [3, 1])
def test_another_number_of_devices_than_processes_is_refused(tmp_path, devices):
    words = written(tmp_path, config(trainer__devices=devices))
    ended = as_ranks(lambda: run(words), tmp_path)
    assert ended.returncode == 2
    assert {line.partition("; ")[0] for line in lines(ended.stderr)} == {
        "indiclip: trainer.devices: torchrun started 1 x 2 processes (nodes x processes of each), and the trainer has "
        f"1 x {devices}"
    }


def test_nodes_that_nobody_started_are_not_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert fit(tmp_path, config(trainer__num_nodes=2)) == 2
    (line,) = lines(capsys.readouterr().err)
    assert line.startswith("indiclip: trainer.num_nodes: found 2, and MASTER_ADDR is not set")


@pytest.mark.parametrize("devices", [3, 1])
def test_tasks_of_slurm_that_the_trainer_does_not_know_are_refused(tmp_path, monkeypatch, capsys, devices):
    variables = {"JOB_ID": 7, "JOB_NAME": "train", "NTASKS": 4, "NNODES": 2, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    variables["NTASKS_PER_NODE"] = 2
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert fit(tmp_path, config(trainer__devices=devices)) == 2
    (line,) = lines(capsys.readouterr().err)
    assert "SLURM started 4 tasks on 2 nodes" in line
    assert "expected --trainer.num_nodes 2 --trainer.devices 2" in line


def test_ranks_with_different_configurations_end_together_in_one_line(tmp_path):
    words = written(tmp_path, config(trainer__devices=2))
    ended = as_ranks(lambda: run([*words, "--model.warmup_steps", os.environ["RANK"]]), tmp_path)
    assert ended.statuses == [2, 0]  # see AgreedStop
    assert lines(ended.stderr) == ["indiclip: the configuration of rank 1 is not that of rank 0; expected one"]
    assert list((tmp_path / "runs").iterdir()) == []
