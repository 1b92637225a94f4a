"""The processes that were started are those of the trainer, and all run the same; else one line says what to do."""

import os
import re
import socket
import subprocess
import sys
import tarfile
import time
from datetime import timedelta

import pytest
import torch
import yaml
from experiments import config, fit
from PIL import Image
from processes import as_ranks, as_they_end, environment, forked, free_port, wait_until
from torch.distributed import TCPStore

from indiclip.training import launch
from indiclip.training.cli import run

NODES = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "NODE_RANK": "0"}


def lines(text):
    return [line for line in text.splitlines() if line.startswith("indiclip: ")]


def written(folder, tree):
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(tree))
    return ["fit", "--config", str(file), "--runs", str(folder / "runs")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused_with_what_would_run(tmp_path, capsys):
    assert fit(tmp_path, config(trainer__accelerator="gpu")) == 2
    (line,) = lines(capsys.readouterr().err)
    assert line.startswith("indiclip: trainer.accelerator: found gpu, and torch finds no such device here")
    assert "--trainer.accelerator cpu" in line


@pytest.mark.slow
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


@pytest.mark.parametrize("unset", [["MASTER_ADDR"], ["MASTER_PORT", "NODE_RANK"]], ids=str)
def test_nodes_that_nobody_started_are_not_waited_for(unset, tmp_path, monkeypatch, capsys):
    for name, value in NODES.items():
        monkeypatch.setenv(name, value)
        if name in unset:
            monkeypatch.delenv(name)
    assert fit(tmp_path, config(trainer__num_nodes=2)) == 2
    (line,) = lines(capsys.readouterr().err)
    assert line.startswith(f"indiclip: trainer.num_nodes: found 2, and not set: {', '.join(unset)}, so the nodes")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MASTER_PORT", "abc", "'abc'; expected a number from 1 to 65535"),
        ("MASTER_PORT", "70000", "'70000'; expected a number from 1 to 65535"),
        ("NODE_RANK", "2", "'2'; expected a number from 0 to 1"),
        ("MASTER_ADDR", "nowhere.invalid", "no host 'nowhere.invalid'"),
        ("MASTER_ADDR", "a..b", "no host 'a..b'"),
    ],
)
def test_nodes_that_cannot_meet_are_told_which_variable_is_wrong(name, value, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "_SECONDS_TO_RESOLVE", 0.0)
    for other, right in (NODES | {name: value}).items():
        monkeypatch.setenv(other, right)
    assert fit(tmp_path, config(trainer__num_nodes=2)) == 2
    (line,) = lines(capsys.readouterr().err)
    assert line.startswith(f"indiclip: {name}: ")
    assert said in line


@pytest.mark.parametrize("taken", [True, False], ids=["port taken", "other node missing"])
def test_a_node_that_waits_says_so_and_one_whose_port_is_taken_ends(taken, tmp_path, monkeypatch):
    if not taken:
        monkeypatch.setattr(launch, "_SECONDS_TO_MEET", 0.5)
    words = [*written(tmp_path, config(trainer__num_nodes=2, trainer__devices=1)), "--trainer.strategy", "ddp"]
    port, error = free_port(), tmp_path / "err"
    with socket.socket() as other:
        if taken:
            other.bind(("", port))
            other.listen()
        for name, value in (NODES | {"MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        with forked(lambda: run(words), tmp_path) as node:
            if taken:
                assert dict(as_they_end([node])) == {node: 1}
                said = f"MASTER_PORT: rank 0 cannot listen at {port}: address already in use; expected a free port"
            else:
                wait_until(lambda: error.is_file() and "waiting" in error.read_text())
                said = f"waiting for all of 2 ranks to meet at 127.0.0.1:{port}"
    assert lines(error.read_text()) == [f"indiclip: {said}"]


def test_ranks_that_do_not_meet_in_time_are_told_which():
    """By torch's own errors."""
    soon = timedelta(seconds=1)
    with pytest.raises(torch.distributed.DistError) as missing:
        TCPStore("127.0.0.1", 0, world_size=2, is_master=True, timeout=soon)
    assert re.fullmatch(r"only 1 of 2 ranks came in \d seconds", launch.explain(missing.value))
    port = free_port()
    with pytest.raises(torch.distributed.DistError) as nobody:
        TCPStore("127.0.0.1", port, is_master=False, timeout=soon)
    assert launch.explain(nobody.value) == f"MASTER_ADDR, MASTER_PORT: no rank 0 was found at 127.0.0.1:{port}"
    assert launch.explain(RuntimeError("out of memory")) is None


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


STRATEGIES = {
    "ddp": "ddp",
    "sharded": {"class_path": "indiclip.training.sharding.ShardedStrategy", "init_args": {"data_parallel_size": 1}},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_with_different_configurations_end_together_in_one_line(strategy, tmp_path):
    """Here with towers of different depths, with which the ranks would wait for each other's weights."""
    words = written(tmp_path, config(trainer__devices=2, trainer__strategy=STRATEGIES[strategy]))
    depth = "--model.encoder.backbone.init_args.depth"
    ended = as_ranks(lambda: run([*words, depth, str(1 + int(os.environ["RANK"]))]), tmp_path)
    assert ended.statuses == [2, 0]  # see AgreedStop
    assert lines(ended.stderr) == ["indiclip: the configuration of rank 1 is not that of rank 0; expected one"]
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_with_different_code_end_together_in_one_line(strategy, tmp_path):
    """Of a user's own head, of which one node has a newer file."""
    tree = config(trainer__devices=2, trainer__strategy=STRATEGIES[strategy])
    tree["model"]["heads"][0]["class_path"] = "own_head.Own"
    words = written(tmp_path, tree)

    def work():
        folder = tmp_path / f"node{os.environ['RANK']}"
        folder.mkdir()
        code = "from heads.contrastive import Contrastive\n\nclass Own(Contrastive):\n    weight_of_node = "
        (folder / "own_head.py").write_text(code + os.environ["RANK"])
        sys.path.insert(0, str(folder))
        return run(words)

    ended = as_ranks(work, tmp_path)
    assert ended.statuses == [2, 0]
    assert lines(ended.stderr) == ["indiclip: the code of rank 1 is not that of rank 0; expected one"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_groups_than_shards_is_one_line_and_more_ranks_are_not(strategy, tmp_path):
    """A single shard; without groups it is read by both ranks, which share out its samples."""
    names = []
    for number in range(4):
        names += [f"{number}.png", f"{number}.txt"]
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(tmp_path / names[-2])
        (tmp_path / names[-1]).write_text(f"red {number}")
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name in names:
            shard.add(tmp_path / name, name)
    tree = config(trainer__devices=2, trainer__strategy=STRATEGIES[strategy])
    source = tree["data"]["train"][0]
    source["dataset"] = {"class_path": "indiclip.webdataset.shards.Shards", "init_args": {"urls": f"{tmp_path}/a.tar"}}
    words = written(tmp_path, tree)
    ended = as_ranks(lambda: run([*words, "--data.val", "[]"]), tmp_path)
    assert ended.returncode == 0, ended.stderr
    source["shard_groups"] = 2
    words = written(tmp_path, tree)
    ended = as_ranks(lambda: run([*words, "--data.val", "[]"]), tmp_path)
    assert ended.returncode == 2
    (line,) = set(lines(ended.stderr))  # found before they meet; torchrun's own store would let one of them say it
    assert "shard_groups of task 'contrastive' is 2, but the source has 1 shards with samples; expected at" in line


def test_of_ranks_that_have_met_one_says_why(tmp_path):
    """Also where the first, which has their store, is at its end before the other asks."""

    def say():
        torch.distributed.init_process_group("gloo")
        time.sleep(0.3 * torch.distributed.get_rank())
        print("says it" if launch.speaks("a batch that cannot be shared out") else "does not")
        launch.wait_for_others()
        return 0

    assert as_ranks(say, tmp_path).stdout.splitlines() == ["says it", "does not"]


def test_a_batch_that_ranks_cannot_share_out_is_one_line(tmp_path):
    """Found by each of them when they have met."""
    words = written(tmp_path, config(trainer__devices=2))
    ended = as_ranks(lambda: run([*words, "--data.train.batch_size", "5"]), tmp_path)
    assert ended.returncode == 2
    (line,) = lines(ended.stderr)
    assert "must be a multiple of the 2 ranks, such as 6" in line


def test_of_slurms_ranks_the_first_is_given_time_to_say_why(monkeypatch):
    """With whose end srun ends the others."""
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    waited = []
    monkeypatch.setattr(launch.time, "sleep", waited.append)
    for rank in "01":
        monkeypatch.setenv("SLURM_PROCID", rank)
        assert launch.speaks("no such option")
    assert waited == [launch._SECONDS_TO_SAY_WHY]


def test_of_torchruns_ranks_one_says_why_and_none_that_another_is_gone(monkeypatch):
    """Unless none says why: it was killed."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(launch, "_SECONDS_TO_SAY_WHY", 0.1)
    for name, value in {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
    }.items():
        monkeypatch.setenv(name, value)
    assert [launch.speaks("gone", is_consequence=True) for _ in range(3)] == [True, False, False]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert [launch.speaks("full") for _ in range(3)] == [True, False, False]
    assert not launch.speaks("gone", is_consequence=True)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert launch.speaks("gone", is_consequence=True)
