"""FSDP and HSDP on gloo processes: the numbers are ddp's, and everything that a run does goes on working."""

import json
import shutil

import pytest
import torch
import yaml
from experiments import config
from processes import as_ranks, on_ranks
from torch import nn

from indiclip.pretrained.weights import read_tensors
from indiclip.training.cli import run

EMA = {"class_path": "indiclip.training.ema.EMA", "init_args": {"decay": 0.9}}
STRATEGY = "indiclip.training.sharding.ShardedStrategy"


def sharded(copies, shards):
    return {"class_path": STRATEGY, "init_args": {"data_parallel_size": copies, "tensor_parallel_size": shards}}


def fitted(folder, tree, world, *flags):
    """What `indiclip fit` did on so many ranks, and the run's folder."""
    folder.mkdir(exist_ok=True)
    tree["trainer"] |= {"devices": world, "accelerator": "cpu"}
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(tree))
    words = ["fit", "--config", str(file), "--runs", str(folder / "runs"), *flags]
    return as_ranks(lambda: run(words), folder, world), folder / "runs" / "experiment"


def ten_steps(strategy, **changes):
    """Steps that move the weights far, with clipped gradients and batch norm, and validations between."""
    tree = config(trainer__max_steps=10, data__steps_per_epoch=5)
    tree["trainer"] |= {"strategy": strategy, "gradient_clip_val": 0.5}
    tree["model"] |= {"warmup_steps": 0, "lr": 0.01}
    tree["model"]["encoder"] |= {"batch_norm": True}
    tree["model"]["encoder"]["backbone"]["init_args"]["depth"] = 2
    for key, value in changes.items():
        tree["model"][key] = value
    return tree


def weights(run_folder, entry="state_dict"):
    return read_tensors(run_folder / "checkpoints" / "last.ckpt")[entry]


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


@pytest.mark.parametrize("copies, shards", [(1, 2), (2, 2)], ids=["fsdp", "hsdp"])
def test_ten_steps_end_at_the_weights_of_ddp(copies, shards, tmp_path):
    """Against torch's DDP on as many ranks, with towers in float64: the steps are so long that noise grows fast."""
    found = {}
    for name, strategy in {"ddp": "ddp", "sharded": sharded(copies, shards)}.items():
        tree = ten_steps(strategy)
        tree["trainer"]["callbacks"] = [{"class_path": "trouble.Double"}]
        done, found[name] = fitted(tmp_path / name, tree, copies * shards)
        assert done.returncode == 0, done.stderr
    ends = {name: weights(run_folder) for name, run_folder in found.items()}
    print(largest_difference(ends["ddp"], ends["sharded"]))
    assert largest_difference(ends["ddp"], ends["sharded"]) < 1e-6
    metrics = [json.loads((run_folder / "metrics.json").read_text())["metrics"] for run_folder in found.values()]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-5)
    assert "data:image/png;base64," in (found["sharded"] / "report.html").read_text()
    assert read_tensors(found["sharded"] / "checkpoints" / "last.ckpt")["encoder"]["backbone"]["class_path"] == (
        "indiclip.backbone.NaFlexViT"
    )


def test_a_mesh_that_does_not_fit_the_ranks_ends_all_with_one_line(tmp_path):
    done, _ = fitted(tmp_path, ten_steps(sharded(3, "auto")), 4)
    assert done.statuses == [2, 0, 0, 0]
    assert done.stderr.strip().splitlines() == [
        "indiclip: trainer.strategy.data_parallel_size: found 3 and tensor_parallel_size 1, 3 ranks in all, and the run "
        "has 4; expected two of 1, 2, 4 whose product is 4, or auto"
    ]


def test_a_run_goes_on_on_other_numbers_of_ranks_and_with_ddp(tmp_path):
    """Five steps on two ranks, then five more on others, from the same folder; against ten steps without a stop.

    The loss is over the batch of all ranks, so that their number makes no difference but in rounding. There are no
    batch norm and dropout, which are each rank's own; and no AdamW, which makes a step of a gradient that is nothing but rounding.
    """

    def tree(strategy, steps=10):
        made = ten_steps(strategy)
        made["trainer"] |= {"callbacks": [{"class_path": "trouble.Double"}, EMA], "max_steps": steps}
        made["model"]["encoder"]["batch_norm"] = False
        drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        made["model"]["encoder"]["text"]["architecture"] |= drops
        made["model"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
        made["model"]["lr_schedule"] = {"class_path": "indiclip.optim.Constant"}  # the same for any number of steps
        return made

    done, straight = fitted(tmp_path / "straight", tree("auto"), 1)
    assert done.returncode == 0, done.stderr
    done, half = fitted(tmp_path / "half", tree(sharded(1, 2), 5), 2)
    assert done.returncode == 0, done.stderr
    for name, strategy, world in [("one", "auto", 1), ("hsdp", sharded(2, 2), 4), ("ddp", "ddp", 2)]:
        shutil.copytree(tmp_path / "half", tmp_path / name, symlinks=True)
        done, run_folder = fitted(tmp_path / name, tree(strategy), world, "--ckpt_path", "last")
        assert done.returncode == 0, done.stderr
        assert "5.ckpt: step 5, saved" in done.stdout
        for entry in ("state_dict", "averages"):
            first, second = (weights(folder, entry) for folder in (straight, run_folder))
            if entry == "averages":
                assert first["num_updates"] == second["num_updates"] == 9
                first, second = first["state_dict"], second["state_dict"]
            assert largest_difference(first, second) < 1e-6
    # And on with shards from the file that ddp has written.
    done, run_folder = fitted(tmp_path / "ddp", tree(sharded(1, 2), 12), 2, "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (run_folder / "checkpoints").iterdir()} == {"12.ckpt", "last.ckpt", "manifest.json"}
    done, straight = fitted(tmp_path / "straight", tree("auto", 12), 1, "--ckpt_path", "last")
    assert largest_difference(weights(straight), weights(run_folder)) < 1e-6
