"""What only a CUDA device can show; skipped without one. `tools/gpu_check.py` runs these, and measures beside them."""

import copy
import json

import pytest
import torch
from experiments import config, fit
from test_float8 import towers
from test_sharding import largest_difference, sharded, weights

from indiclip.float8 import convert_to_float8

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def on_gpu(**changes):
    tree = config(trainer__max_steps=4, model__warmup_steps=0, trainer__accelerator=DEVICE, **changes)
    tree["trainer"]["devices"] = 1
    return tree


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise"])
def test_products_in_float8_are_those_that_a_cpu_emulates(recipe):
    """The CPU's are checked against rounding by hand. Outputs are bfloat16, of 8 bits."""
    pytest.importorskip("torchao", reason="needs torchao")
    block = towers()[0].vit.blocks[0]
    x = torch.randn(3, 37, 32)
    found = {}
    for name, device in {"cpu": "cpu", "gpu": DEVICE}.items():
        made = torch.nn.Module()
        made.blocks = torch.nn.ModuleList([copy.deepcopy(block)]).to(device)
        convert_to_float8([made], recipe, "bf16-mixed", torch.device(device))
        with torch.autocast(device, torch.bfloat16):
            out = made.blocks[0](x.to(device))
        out.float().square().sum().backward()
        gradients = {name: p.grad.float().cpu() for name, p in made.named_parameters()}
        found[name] = out.float().cpu(), gradients
    (expected, gradients), (out, ours) = found.values()
    assert (out - expected).norm() < 0.03 * expected.norm()
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() < 0.15 * gradient.norm(), name


@pytest.mark.parametrize(
    "changes",
    [{}, {"trainer__precision": "bf16-mixed"}, {"trainer__precision": "bf16-mixed", "model__compile": True}],
    ids=["float32", "bfloat16", "compiled"],
)
def test_a_run_ends_where_a_cpus_does_and_goes_on_there(changes, tmp_path):
    """Dropout is drawn otherwise there, so there is none."""
    found = {}
    for name in ("gpu", "cpu"):
        tree = on_gpu(**changes)
        tree["model"]["encoder"]["text"]["architecture"] |= {
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        if name == "cpu":
            tree["trainer"] |= {"accelerator": "cpu", "precision": "32-true"}
            tree["model"].pop("compile", None)
        (tmp_path / name).mkdir()
        assert fit(tmp_path / name, tree) == 0
        found[name] = tmp_path / name / "runs" / "experiment"
    assert largest_difference(*map(weights, found.values())) < (0.005 if changes else 1e-4)
    file = found["gpu"] / "checkpoints" / "last.ckpt"
    tree["trainer"]["max_steps"] = 5
    assert fit(tmp_path, tree, "--ckpt_path", str(file), "--override", "true") == 0


def test_shards_are_saved_from_the_gpu_and_read_again(tmp_path):
    """One rank, with NCCL beside gloo."""
    tree = on_gpu(trainer__strategy=sharded(1, 1), trainer__precision="bf16-mixed")
    assert fit(tmp_path, tree) == 0
    tree["trainer"]["max_steps"] = 5
    assert fit(tmp_path, tree, "--ckpt_path", "last", "--override", "true") == 0
    metrics = json.loads((tmp_path / "runs" / "experiment" / "metrics.json").read_text())
    assert metrics["step"] == 5
