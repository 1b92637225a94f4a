"""Ranks that Lightning started: where one is gone, the others end, also those that wait and do not notice."""

import os
import signal
from pathlib import Path

import pytest
import yaml
from experiments import config
from processes import alive, as_they_end, command, forked, wait_until

from indiclip.training.fault_tolerance.local_ranks import explain


@pytest.mark.slow
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
    words = ["fit", "--config", str(file), "--runs", str(tmp_path / "runs")]
    error = tmp_path / "err"
    with forked(lambda: command(*words), tmp_path) as first:
        wait_until(lambda: error.is_file() and error.read_text().count("stuck\n") == 2, 240)
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        second = next(int(pid) for pid in children if b"indiclip" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill([first, second][killed], signal.SIGKILL)
        assert dict(as_they_end([first])) == {first: [-signal.SIGKILL, 1][killed]}
        wait_until(lambda: not alive(second))
    gone = ["the first process", f"process {second}, status -9"][killed]
    assert f"indiclip: another rank is gone ({gone}), so this one ends too" in error.read_text()


def test_what_a_lost_rank_looks_like_to_the_others():
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:37301."
    assert "another rank is gone" in explain(RuntimeError(gloo))
    assert explain(BrokenPipeError(32, "Broken pipe")) is None  # of `indiclip fit | head`
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
