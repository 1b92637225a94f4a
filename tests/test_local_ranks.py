"""Ranks that Lightning started: where one is gone, the others end, also those that wait and do not notice."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_cli import config
from test_workers import ENVIRONMENT, alive, wait_until

from indiclip.training.fault_tolerance.local_ranks import explain


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_waits_for_one_that_was_killed_ends_too(killed, tmp_path):
    """As in NCCL, which may not notice for many minutes. Of the first rank's death nobody tells the second."""
    file = tmp_path / "experiment.yaml"
    tree = config(trainer__max_steps=9, trainer__devices=2)
    tree["trainer"]["callbacks"] = [
        {"class_path": "trouble.Stuck", "init_args": {"step": 2}},
        {"class_path": "indiclip.training.fault_tolerance.local_ranks.LocalRanks", "init_args": {"grace_seconds": 1.0}},
    ]
    file.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "indiclip.cli", "fit", "--config", str(file), "--runs", str(tmp_path / "runs")]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    seen = ""
    while seen.count("stuck\n") < 2:
        seen += first.stderr.readline()
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    second = next(int(pid) for pid in children if b"indiclip" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill([first.pid, second][killed], signal.SIGKILL)
    _, error = first.communicate(timeout=60)  # both have closed it
    assert first.returncode == [-signal.SIGKILL, 1][killed]
    gone = ["the first process", f"process {second}, status -9"][killed]
    assert f"indiclip: another rank is gone ({gone}), so this one ends too" in error
    wait_until(lambda: not alive(second))


def test_what_a_lost_rank_looks_like_to_the_others():
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:37301."
    assert "another rank is gone" in explain(RuntimeError(gloo))
    assert explain(BrokenPipeError(32, "Broken pipe")) is None  # of `indiclip fit | head`
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
