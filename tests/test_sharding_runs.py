"""What a sharded run does beside its steps: held-out data, averages, benchmark, bad steps, signals; against ddp."""

import json
import signal

import pytest
import torch
from experiments import learnt
from test_sharding import EMA, fitted, largest_difference, sharded, ten_steps, weights

from indiclip.evals import procedural
from indiclip.training.record import read_history

BENCH = {"class_path": "indiclip.training.india_bench.IndiaBench", "init_args": {"every_n_steps": 5, "probes": False}}


def uneven(strategy):
    """Held-out batches of one and of no sample on the second rank, averages, a benchmark, and a bad loss there."""
    tree = ten_steps(strategy)
    tree["data"]["val"][0]["dataset"]["init_args"] |= {"num_scenes": 5, "seed": 1}
    tree["model"]["heads"] = [{"class_path": "trouble.BadLoss", "init_args": {"bad": [3], "rank": 1}}]
    tree["trainer"]["callbacks"] = [{"class_path": "trouble.Double"}, EMA, BENCH]
    return tree


@pytest.mark.slow
def test_held_out_data_averages_benchmark_and_bad_steps_are_those_of_ddp(tmp_path, monkeypatch):
    for name in ("WORDS", "SWATCHES"):
        monkeypatch.setattr(procedural, name, {"test": 3, "train": 2})
    found = {}
    for name, strategy in {"ddp": "ddp", "sharded": sharded(1, 2)}.items():
        done, found[name] = fitted(tmp_path / name, uneven(strategy), 2)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("step 4: the loss of trouble (task contrastive) is not finite: skipped") == 1
        assert "benchmark of the averaged weights of 9 updates" in done.stdout
    assert largest_difference(*(weights(folder) for folder in found.values())) < 1e-6
    averages = [weights(folder, "averages") for folder in found.values()]
    assert averages[0]["num_updates"] == averages[1]["num_updates"] == 9
    assert largest_difference(*(entry["state_dict"] for entry in averages)) < 1e-6
    rows = [read_history(folder) for folder in found.values()]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    assert {row["step"] for row in rows[0] if any(name.startswith("eval/india/") for name in row)} == {5, 10}
    for first, second in zip(*rows, strict=True):
        assert first.keys() == second.keys()
        assert learnt(first) == pytest.approx(learnt(second), abs=1e-5)


@pytest.mark.slow
def test_bfloat16_is_that_of_autocast(tmp_path):
    """Only matrices travel in bfloat16, to which autocast casts them: what is computed is the same.

    Gradients are not clipped: their norm is summed in another order, and what that rounds otherwise may round a
    weight's bfloat16 otherwise in the next step.
    """
    found = {}
    for name, strategy in {"ddp": "ddp", "sharded": sharded(1, 2)}.items():
        tree = ten_steps(strategy)
        del tree["trainer"]["gradient_clip_val"]
        tree["model"]["optimizer"] = {"class_path": "torch.optim.SGD"}
        done, found[name] = fitted(tmp_path / name, tree, 2, "--trainer.precision", "bf16-mixed")
        assert done.returncode == 0, done.stderr
    ends = [weights(folder) for folder in found.values()]
    assert {tensor.dtype for name, tensor in ends[1].items() if "num_batches" not in name} == {torch.float32}
    assert largest_difference(*ends) < 1e-6


@pytest.mark.parametrize(
    ("number", "status"),
    [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGINT, 130)],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_one_rank_gets_a_signal_and_all_save_and_leave(number, status, tmp_path):
    tree = ten_steps(sharded(1, 2))
    options = {"number": int(number), "step": 3, "rank": 1}
    tree["trainer"]["callbacks"] = [{"class_path": "trouble.Signal", "init_args": options}]
    done, folder = fitted(tmp_path, tree, 2)
    assert done.statuses == [status, 0], done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("indiclip: ")]
    goes_on = "the same command with --ckpt_path last goes on from it"
    assert lines == [f"indiclip: {number.name}: saved {folder / 'checkpoints' / '3.ckpt'}, step 3; {goes_on}"]
    assert "Traceback" not in done.stderr
    assert json.loads((folder / "checkpoints" / "manifest.json").read_text())["files"][0]["name"] == "3.ckpt"
    if number == signal.SIGTERM:  # both leave the same behind
        done, folder = fitted(tmp_path, ten_steps(sharded(1, 2)), 2, "--ckpt_path", "last", "--trainer.max_steps", "5")
        assert done.returncode == 0, done.stderr
        assert "3.ckpt: step 3, saved" in done.stdout


@pytest.mark.parametrize("what", ["precision", "gradients", "lightning"])
def test_what_does_not_go_with_shards_is_one_line(what, tmp_path):
    tree = ten_steps(sharded(1, 2))
    flags, message = {
        "precision": (("--trainer.precision", "16-mixed"), "16-mixed"),
        "gradients": ((), "TaskGradients needs whole gradients on each rank"),
        "lightning": ((), "expected indiclip.training.sharding.ShardedStrategy"),
    }[what]
    if what == "gradients":
        tree["trainer"]["callbacks"] = [{"class_path": "indiclip.training.callbacks.TaskGradients"}]
    if what == "lightning":
        tree["trainer"]["strategy"] = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}
    done, _ = fitted(tmp_path, tree, 2, *flags)
    assert done.statuses[0] == 2
    # Of each rank: they do not know of each other yet.
    assert all(message in line for line in done.stderr.strip().splitlines())
