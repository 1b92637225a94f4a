"""FSDP and HSDP on gloo processes: the numbers are ddp's, and everything that a run does goes on working."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
import yaml
from experiments import ENCODER, ROOT, config, learnt
from processes import as_ranks

from indiclip.backbone import NaFlexViT
from indiclip.pretrained.weights import read_tensors
from indiclip.sharding import blocks, checkpoint_activations
from indiclip.text import TextTower
from indiclip.tokenizers import ByteTokenizer
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


@pytest.mark.parametrize(
    ("copies", "shards"), [(1, 2), pytest.param(2, 2, marks=pytest.mark.slow)], ids=["fsdp", "hsdp"]
)
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
    metrics = [learnt(json.loads((run / "metrics.json").read_text())["metrics"]) for run in found.values()]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-5)
    assert "data:image/webp;base64," in (found["sharded"] / "report.html").read_text()
    assert read_tensors(found["sharded"] / "checkpoints" / "last.ckpt")["encoder"]["backbone"]["class_path"] == (
        "indiclip.backbone.NaFlexViT"
    )


@pytest.mark.slow
def test_micro_batches_of_shards_are_the_batch_of_ddp(tmp_path):
    """Without dropout, which is another one in each part; with a weight that belongs to no part of the model."""
    found = {}
    for name, (strategy, number) in {"ddp": ("ddp", 1), "sharded": (sharded(1, 2), 2)}.items():
        tree = ten_steps(strategy, micro_batches=number, task_weights="indiclip.task_weights.Uncertainty")
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        tree["model"]["encoder"]["text"]["architecture"] |= no_dropout
        tree["trainer"] |= {"max_steps": 3, "callbacks": [{"class_path": "trouble.Double"}]}
        done, found[name] = fitted(tmp_path / name, tree, 2)
        assert done.returncode == 0, done.stderr
    assert largest_difference(*(weights(run_folder) for run_folder in found.values())) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "micro_batches", "copies"),
    [
        ("GradNorm", 1, 1),
        ("GradNorm", 2, 2),
        ("PCGrad", 1, 2),
        ("PCGrad", 2, 1),
    ],
)
def test_heads_are_compared_on_shards_as_with_ddp(name, micro_batches, copies, tmp_path):
    """With and without micro-batches and checkpointed activations, which DDP does without; one head begins later."""
    found = {}
    for kind, strategy in {"ddp": "ddp", "sharded": sharded(copies, 2)}.items():
        tree = four_tasks(strategy)
        tree["model"] |= {"task_weights": {"class_path": f"indiclip.task_weights.{name}"}, "lr": 0.1}
        tree["model"]["heads"][3]["init_args"]["start"] = 1
        tree["model"]["micro_batches"] = micro_batches if kind == "sharded" else 1
        tree["model"]["activation_checkpointing"] = kind == "sharded" and micro_batches == 1
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        tree["model"]["encoder"]["text"]["architecture"] |= no_dropout
        done, found[kind] = fitted(tmp_path / kind, tree, 2 * copies)
        assert done.returncode == 0, done.stderr
    first, second = (weights(run_folder) for run_folder in found.values())
    assert largest_difference(first, second) < 1e-6
    if name == "GradNorm":
        assert (first["task_weights.learned_K"] - 1).abs().max() > 0.01


def four_tasks(strategy):
    """conf/mela.yaml, small."""
    tree = yaml.safe_load((ROOT / "conf" / "mela.yaml").read_text())
    encoder, heads = tree["model"]["encoder"], tree["model"]["heads"]
    encoder["backbone"]["init_args"] |= {"width": 32, "depth": 2, "num_heads": 1}
    encoder["text"]["architecture"] |= {"hidden_size": 32, "num_attention_heads": 1, "intermediate_size": 32}
    heads[1]["init_args"] |= {"out_channels": 16, "num_convs": 1}
    heads[2]["init_args"] |= {"channels": 8, "num_convs": 1}
    for source in (*tree["data"]["train"], *tree["data"]["val"]):
        source["batch_size"] = 4
        source["dataset"]["init_args"]["num_scenes"] = 6
    tree["data"]["steps_per_epoch"] = 3
    tree["model"] |= {"warmup_steps": 0, "optimizer": {"class_path": "torch.optim.SGD"}, "lr": 0.01}
    tree["model"]["weight_decay"] = None
    tree["trainer"] |= {"max_steps": 3, "strategy": strategy, "callbacks": [{"class_path": "trouble.Double"}]}
    return tree


@pytest.mark.slow
def test_four_tasks_with_checkpointed_activations_are_those_of_ddp_without(tmp_path):
    """Also where a rank has another number of objects, or none, in training and in held-out data."""
    found = {}
    for name, strategy in {"ddp": "ddp", "sharded": sharded(1, 2)}.items():
        tree = four_tasks(strategy)
        tree["model"]["activation_checkpointing"] = name == "sharded"
        done, found[name] = fitted(tmp_path / name, tree, 2)
        assert done.returncode == 0, done.stderr
    difference = largest_difference(*(weights(run_folder) for run_folder in found.values()))
    assert difference < 1e-6
    metrics = [learnt(json.loads((run / "metrics.json").read_text())["metrics"]) for run in found.values()]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-4, nan_ok=True)
    pictures = [(run_folder / "report.html").read_text().count("data:image/webp") for run_folder in found.values()]
    assert pictures[0] == pictures[1] > 16  # of four heads


def test_checkpointed_activations_are_less_memory_and_the_same_gradients():
    """Of towers of both libraries, with dropout, against the same without; bytes are those that its hooks see."""
    torch.manual_seed(0)
    backbone = NaFlexViT(width=32, depth=4, num_heads=2, patch_size=8, options={"proj_drop_rate": 0.1})
    text = TextTower(ByteTokenizer(), ENCODER["text"]["architecture"] | {"num_hidden_layers": 4})
    images = backbone.preprocessing.batch([np.zeros((64, 64, 3), np.uint8)], 64)

    def step():
        saved = {}

        def keep(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            tokens = backbone(images).tokens_BND, text(*text.padded(text.tokenizer.encode(["a kite", "दीया"])))
        sum(one.square().sum() for one in tokens).backward()
        gradients = [p.grad.clone() for tower in (backbone, text) for p in tower.parameters() if p.grad is not None]
        backbone.zero_grad()
        text.zero_grad()
        return gradients, sum(saved.values())

    (gradients, size), names = step(), [*backbone.state_dict(), *text.state_dict()]
    checkpoint_activations([backbone, text])
    checkpoint_activations([backbone, text])  # a second time changes nothing
    again, smaller = step()
    assert [*backbone.state_dict(), *text.state_dict()] == names
    assert smaller < size / 2
    assert len(again) == len(gradients) > 40
    assert all(torch.equal(first, second) for first, second in zip(gradients, again, strict=True))


@pytest.mark.parametrize(
    ("name", "count"), [("vit_tiny_patch16_224", 12), ("swin_tiny_patch4_window7_224", 12), ("convnext_atto", 12)]
)
def test_the_blocks_of_a_tower_are_found(name, count):
    """As many as the models' papers say (ConvNeXt-Atto: 2, 2, 6, 2)."""
    assert len(blocks(timm.create_model(name))) == count


def test_a_mesh_that_does_not_fit_the_ranks_ends_all_with_one_line(tmp_path):
    done, _ = fitted(tmp_path, ten_steps(sharded(3, "auto")), 4)
    assert done.statuses == [2, 0, 0, 0]
    assert done.stderr.strip().splitlines() == [
        "indiclip: trainer.strategy.data_parallel_size: found 3 and tensor_parallel_size 1, 3 ranks in all, and the "
        "run has 4; expected two of 1, 2, 4 whose product is 4, or auto"
    ]


def one_loss_for_all(strategy, steps):
    """The loss is over the batch of all ranks, so that their number makes no difference but in rounding.

    There are no batch norm and dropout, which are each rank's own; and no AdamW, which makes a step of a gradient that
    is nothing but rounding.
    """
    tree = ten_steps(strategy)
    tree["trainer"] |= {"callbacks": [{"class_path": "trouble.Double"}, EMA], "max_steps": steps}
    tree["model"]["encoder"]["batch_norm"] = False
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tree["model"]["encoder"]["text"]["architecture"] |= drops
    tree["model"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
    tree["model"]["lr_schedule"] = {"class_path": "indiclip.optim.Constant"}  # the same for any number of steps
    return tree


@pytest.fixture(scope="module")
def straight_and_half(tmp_path_factory):
    """Ten steps of one process, and five on two ranks."""
    folders = [tmp_path_factory.mktemp(name) for name in ("straight", "half")]
    for folder, tree, world in zip(
        folders, (one_loss_for_all("auto", 10), one_loss_for_all(sharded(1, 2), 5)), (1, 2), strict=True
    ):
        done, _ = fitted(folder, tree, world)
        assert done.returncode == 0, done.stderr
    return folders


@pytest.mark.slow
@pytest.mark.parametrize(
    "starts",
    [[("auto", 1, 10)], [(sharded(2, 2), 4, 10)], [("ddp", 2, 8), (sharded(1, 2), 2, 10)]],
    ids=["one process", "hsdp", "ddp, and with its file shards again"],
)
def test_a_run_goes_on_on_other_numbers_of_ranks_and_with_ddp(starts, straight_and_half, tmp_path):
    """From a folder that two ranks wrote, with averages; `starts` are strategy, ranks, and the last step."""
    straight, half = straight_and_half
    shutil.copytree(half, tmp_path, symlinks=True, dirs_exist_ok=True)
    for strategy, world, steps in starts:
        done, run_folder = fitted(tmp_path, one_loss_for_all(strategy, steps), world, "--ckpt_path", "last")
        assert done.returncode == 0, done.stderr
        assert "going on from" in done.stdout
    straight = straight / "runs" / "experiment"
    assert largest_difference(weights(straight), weights(run_folder)) < 1e-6
    first, second = (weights(folder, "averages") for folder in (straight, run_folder))
    assert first["num_updates"] == second["num_updates"] == 9
    assert largest_difference(first["state_dict"], second["state_dict"]) < 1e-6
