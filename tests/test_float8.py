"""Float8 in training: what is converted, that its numbers are those of rounded factors; files know nothing of it."""

import pytest
import torch
from experiments import ENCODER, config, fit
from helpers import batch_images, noise
from test_sharding import EMA, fitted, four_tasks, largest_difference, sharded, weights
from torch import nn

import indiclip
from indiclip.backbone import NaFlexViT
from indiclip.float8 import convert_to_float8
from indiclip.text import TextTower
from indiclip.tokenizers import ByteTokenizer

pytest.importorskip("torchao", reason="needs torchao")
CPU = torch.device("cpu")
MIXED = {"trainer__precision": "bf16-mixed"}


def towers():
    torch.manual_seed(0)
    return NaFlexViT(width=32, depth=2, num_heads=2, patch_size=8), TextTower(
        ByteTokenizer(), ENCODER["text"]["architecture"]
    )


def float8_layers(module):
    return [name for name, layer in module.named_modules() if type(layer).__name__ == "Float8Linear"]


def rounded(matrix, dim):
    """Of float8 (e4m3) times a scale for each row or column (`dim` is what a scale is shared along), or for all."""
    largest = matrix.abs().amax(dim, keepdim=True) if dim is not None else matrix.abs().max()
    scale = (448 / largest.double()).float()
    if dim is not None:
        scale = torch.exp2(scale.log2().floor())
    return (matrix * scale).to(torch.float8_e4m3fn).float() / scale


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise"])
def test_products_are_those_of_rounded_factors(recipe):
    """Against rounding by hand, forward and backward; gradients of tensorwise are e5m2, which is left to torchao."""
    block = nn.ModuleList([nn.Sequential(nn.Linear(32, 48)), nn.Sequential(nn.Linear(48, 32))])
    plain = [layer[0] for layer in block]
    tower = nn.Sequential(block)
    convert_to_float8([tower], recipe, "bf16-mixed", CPU)
    layer, weight = block[0][0], plain[0].weight
    assert float8_layers(block) == ["0.0", "1.0"]
    assert layer.weight is weight
    x = torch.randn(37, 32, requires_grad=True)  # a number of tokens that is no multiple of 16
    along = (1, 0) if recipe == "rowwise" else (None, None)
    out = layer(x)
    expected = rounded(x, along[0]) @ rounded(weight, along[0]).T + plain[0].bias
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert (out - plain[0](x)).abs().max() > 1e-3
    if recipe == "tensorwise":
        return
    slope = torch.randn_like(out)
    out.backward(slope)
    torch.testing.assert_close(x.grad, rounded(slope, 1) @ rounded(weight, 0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad, rounded(slope, 0).T @ rounded(x, 0), rtol=1e-5, atol=1e-5)


def test_only_trained_matrices_of_blocks_are_converted():
    image, text = towers()
    names = [*image.state_dict(), *text.state_dict()]
    image.vit.blocks[1].mlp.fc1.weight.requires_grad_(False)
    convert_to_float8([image, text], "rowwise", "bf16-mixed", CPU)
    convert_to_float8([image, text], "rowwise", "bf16-mixed", CPU)  # a second time changes nothing
    found = float8_layers(image)
    assert found == [
        f"vit.blocks.{i}.{part}"
        for i in range(2)
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        if (i, part) != (1, "mlp.fc1")
    ]
    assert len(float8_layers(text)) == 6
    assert names == [*image.state_dict(), *text.state_dict()]
    images = batch_images([noise(64, 48, 0), noise(16, 16, 1)], 8, 64)
    image(images).tokens_BND.square().mean().backward()
    assert all(p.grad is not None for p in image.vit.blocks.parameters() if p.requires_grad)


@pytest.mark.slow
def test_a_run_and_what_it_leaves(tmp_path, capsys):
    """Its losses are near those of bfloat16, and its checkpoint goes on without float8, and into an encoder."""
    ends = {}
    for recipe in (None, "rowwise", "tensorwise"):
        folder = tmp_path / str(recipe)
        folder.mkdir()
        assert fit(folder, config(model__float8=recipe, model__warmup_steps=0, **MIXED)) == 0
        ends[recipe] = weights(folder / "runs" / "experiment")
        said = f"float8, {recipe}: 10 linear layers of the towers, emulated" if recipe else "float8"
        assert (said in capsys.readouterr().out) == bool(recipe)
    assert 1e-6 < largest_difference(ends[None], ends["rowwise"]) < 0.01
    assert 1e-6 < largest_difference(ends[None], ends["tensorwise"]) < 0.01
    file = tmp_path / "rowwise" / "runs" / "experiment" / "checkpoints" / "last.ckpt"
    assert not float8_layers(indiclip.load(file))
    assert fit(tmp_path, config(trainer__max_steps=3, **MIXED), "--ckpt_path", str(file), "--override", "true") == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__float8": "rowwise"}, "trainer.precision: found 32-true; expected bf16-mixed"),
        ({"model__float8": "rowise", **MIXED}, "rowwise"),
        ({"model__float8": "rowwise", "model__freeze": ["image", "text"], **MIXED}, "no tower has a trained"),
        ({"model__float8": "rowwise", "model__encoder__lora": {"r": 16}, **MIXED}, "whose adapters are thin"),
    ],
)  # fmt: skip
def test_what_it_does_not_go_with_is_refused(changes, message, tmp_path, capsys):
    assert fit(tmp_path, config(**changes)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if message in line]
    assert "model.float8" in line


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise"])
def test_shards_end_near_the_weights_of_ddp(recipe, tmp_path):
    """They travel as bfloat16, or as float8 already, before they are rounded. A file of the shards is plain."""
    ends = {}
    for name, strategy in {"ddp": "ddp", "sharded": sharded(1, 2)}.items():
        tree = config(model__float8=recipe, model__warmup_steps=0, trainer__strategy=strategy, **MIXED)
        if (recipe, name) == ("tensorwise", "sharded"):
            tree["trainer"]["callbacks"] = [{"class_path": "trouble.Scales"}, EMA]
        done, run_folder = fitted(tmp_path / name, tree, 2)
        assert done.returncode == 0, done.stderr
        ends[name] = weights(run_folder)
        assert all(type(tensor) is torch.Tensor for tensor in ends[name].values())
    assert largest_difference(ends["ddp"], ends["sharded"]) < 0.005


@pytest.mark.slow
def test_heads_are_compared_on_shards_in_float8(tmp_path):
    """Whose whole weights are in float8: where a head does not reach one, there is no zero of its kind."""
    tree = four_tasks(sharded(1, 2))
    tree["model"] |= {"float8": "tensorwise", "task_weights": {"class_path": "indiclip.task_weights.PCGrad"}}
    tree["trainer"] |= {"precision": "bf16-mixed", "max_steps": 2, "callbacks": []}
    done, _ = fitted(tmp_path / "run", tree, 2)
    assert done.returncode == 0, done.stderr
