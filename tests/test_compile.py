"""Towers with compiled blocks: the numbers are those of eager ones, and no batch makes a block compile again.

Where only what torch traces counts, the backend is one that calls no C++ compiler.
"""

import copy
import random
from functools import partial

import pytest
import torch
import torch.distributed as dist
from experiments import config, fit
from helpers import batch_images, noise, tiny_encoder
from processes import alone
from test_gradients import BACKBONES, TEXTS
from test_sharding import fitted, largest_difference, one_loss_for_all, sharded, weights
from torch import nn
from torch._dynamo.utils import counters
from torch.testing._internal.distributed.fake_pg import FakeStore

import indiclip
from indiclip import logit_chunks
from indiclip.backbone import NaFlexViT
from indiclip.losses import SigmoidLoss, SoftmaxLoss
from indiclip.sharding import checkpoint_activations, compile_blocks
from indiclip.text import TextTower
from indiclip.tokenizers import ByteTokenizer

WORDS = ["kite", "diya", "marigold", "matka", "dhol", "rangoli"]


def towers(dropout=0.0):
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    architecture = {"model_type": "bert"} | TEXTS["bert"] | rates
    return nn.ModuleList(
        [
            NaFlexViT(width=32, depth=2, num_heads=2, patch_size=8, options={"class_token": True}),
            TextTower(ByteTokenizer(), architecture),
        ]
    )


def step(pair, seed, count):
    """Tokens, and gradients of all parameters, of images of any sizes and as many texts of any lengths."""
    draw = random.Random(seed)
    sides = [(8 * draw.randint(1, 8), 8 * draw.randint(1, 8)) for _ in range(count)]
    device = next(pair.parameters()).device
    images = batch_images([noise(*side, seed) for side in sides], 8, 64)
    images = {name: value.to(device) if torch.is_tensor(value) else value for name, value in images.items()}
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(count)]
    rows = pair[1].tokenizer.encode(texts)
    ids_BT, valid_BT = (x.to(device) for x in pair[1].padded(rows))
    pair.zero_grad()
    features, tokens_BTD = pair[0](images), pair[1](ids_BT, valid_BT, [*map(len, rows)])
    tokens = features.tokens_BND[images["valid_BN"]], tokens_BTD[valid_BT]
    loss = sum((x * torch.linspace(-1, 1, x.shape[-1], device=device)).mean() for x in tokens)
    if loss.requires_grad:
        loss.backward()
    return {"images": tokens[0], "texts": tokens[1]} | {name: p.grad for name, p in pair.named_parameters()}


def steps_without_compiling(pair, seeds, counts=(2, 9)):
    graphs = counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in seeds:
            step(pair, seed, random.Random(seed).randint(*counts))
    assert graphs == counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]


@pytest.mark.slow
@alone("inductor")
def test_values_and_gradients_are_those_of_eager_blocks(tmp_path):
    """In float32, and of a copy, whose weights are others. After two batches none of 200 compiles again."""
    eager = towers()
    compiled = copy.deepcopy(eager)
    names = [*eager.state_dict()]
    compile_blocks(compiled)
    assert [*compiled.state_dict()] == names
    copied = copy.deepcopy(compiled)
    for parameter in copied.parameters():
        nn.init.zeros_(parameter)
    for seed, count in enumerate((4, 3, 8)):
        found, expected = step(compiled, seed, count), step(eager, seed, count)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=f"{name}: {{}}".format)
    assert step(copied, 0, 2)["images"].abs().max() == 0
    assert counters["stats"]["unique_graphs"] == 2  # of two kinds of blocks; there are two of each
    steps_without_compiling(compiled, range(2, 200))


@pytest.mark.slow
@alone("aot_eager")
def test_with_dropout_and_activations_computed_again_no_batch_compiles_again(tmp_path):
    pair = towers(dropout=0.1)
    compile_blocks(pair)
    checkpoint_activations(pair)
    for seed in range(2):
        step(pair, seed, 4)
    steps_without_compiling(pair, range(2, 40))


@pytest.mark.parametrize("family", ["clip_text_model", "gemma"])
@alone("eager")
def test_text_models_of_other_families_have_no_graph_breaks(tmp_path, family):
    """Some have two kinds of layers; all are as they were."""
    torch.manual_seed(0)
    tower = TextTower(ByteTokenizer(), {"model_type": family} | TEXTS[family]).eval()
    rows = tower.tokenizer.encode(["kite", "a peacock blue umbrella", "diya"])
    ids_BT, valid_BT = tower.padded(rows)
    lengths = [*map(len, rows)]
    expected = tower(ids_BT, valid_BT, lengths)[valid_BT]
    compile_blocks([tower])
    torch.testing.assert_close(tower(ids_BT, valid_BT, lengths)[valid_BT], expected)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("family", ["naflex, rope", "vit"])
@alone("eager")
def test_other_backbones_have_no_graph_breaks(tmp_path, family):
    torch.manual_seed(0)
    backbone = BACKBONES[family]().eval()
    height, width = backbone.canvas_hw or (24, 16)
    pictures = [noise(height, width), noise(height - 8, width)]
    images = batch_images(pictures, backbone.patch_size, backbone.max_tokens, backbone.canvas_hw)
    expected = backbone(images).tokens_BND
    compile_blocks([backbone])
    torch.testing.assert_close(backbone(images).tokens_BND[0], expected[0])
    twice = family == "naflex, rope" and torch.__version__ < "2.15"  # blocks with rotary positions
    assert counters["stats"]["unique_graphs"] == 1 + twice
    assert not counters["graph_break"]


@pytest.mark.parametrize("kind", [SoftmaxLoss, SigmoidLoss])
@alone("eager")
def test_losses_have_no_graph_breaks(tmp_path, kind):
    """Of one process; values and gradients are those without a compiler."""
    torch.manual_seed(0)
    loss = kind([8, 16])
    inputs = [torch.randn(24, 16, requires_grad=True) for _ in range(2)]
    labels = torch.arange(24) % 5
    found = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        value = function(*inputs, labels, labels)
        found.append([value, *torch.autograd.grad(value, [*inputs, *loss.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [SoftmaxLoss, SigmoidLoss])
@alone("eager")
def test_losses_of_many_ranks_have_no_graph_breaks(tmp_path, kind, monkeypatch):
    """Rank 3 of 8, in two blocks of texts; the others are fake, so that values mean nothing."""
    monkeypatch.setitem(logit_chunks._MIN_ELEMENTS, "cpu", 4 * 4 * 8 // 2)
    inputs = [torch.randn(4, 4, requires_grad=True) for _ in range(2)]
    labels = torch.arange(4) % 3
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    try:
        value = torch.compile(kind(), fullgraph=True)(*inputs, labels, labels)
        assert [x.shape for x in torch.autograd.grad(value, inputs)] == [(4, 4)] * 2
    finally:
        dist.destroy_process_group()


@alone("eager")
def test_a_compiled_encoder_embeds_as_before(tmp_path):
    """In evaluation: one image, one text, many."""
    encoder = tiny_encoder().eval()
    images = [[noise(16, 24)], [noise(40, 24), noise(24, 16), noise(8, 8)]]
    texts = [["kite"], ["kite", "a peacock blue umbrella"]]
    with torch.no_grad():
        expected = [*map(encoder.embed_image, images), *map(encoder.embed_text, texts)]
        compile_blocks([encoder.backbone, encoder.text])
        found = [*map(encoder.embed_image, images), *map(encoder.embed_text, texts)]
    assert counters["stats"]["unique_graphs"] >= 2
    torch.testing.assert_close(found, expected)


@pytest.fixture
def traced(monkeypatch):
    """In runs, too, blocks are traced, and then run operator by operator."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.mark.slow
def test_a_step_of_compiled_shards_is_that_of_ddp(tmp_path, traced):
    """With activations that are computed again, and micro-batches; in float64."""
    trees = {"ddp": one_loss_for_all("ddp", 3), "shards": one_loss_for_all(sharded(1, 2), 3)}
    trees["shards"]["model"] |= {"compile": True, "activation_checkpointing": True, "micro_batches": 2}
    found = []
    for name, tree in trees.items():
        done, run_folder = fitted(tmp_path / name, tree, 2)
        assert done.returncode == 0, done.stderr
        found.append(weights(run_folder))
    assert largest_difference(*found) < 1e-6


@pytest.mark.slow
def test_a_run_goes_on_with_compiled_blocks_and_without(tmp_path, traced):
    """To the weights, and their averages, of a run without any; and what it leaves is an encoder like any other."""
    done, straight = fitted(tmp_path / "straight", one_loss_for_all("auto", 6), 1)
    assert done.returncode == 0, done.stderr
    for steps, compiled in ((2, False), (4, True), (6, False)):
        tree = one_loss_for_all("auto", steps)
        tree["model"]["compile"] = compiled
        done, turns = fitted(tmp_path / "turns", tree, 1, *(["--ckpt_path", "last"] if steps > 2 else []))
        assert done.returncode == 0, done.stderr
    assert largest_difference(weights(straight), weights(turns)) < 1e-6
    averages = [weights(folder, "averages")["state_dict"] for folder in (straight, turns)]
    assert largest_difference(*averages) < 1e-6
    assert not indiclip.load(turns).backbone.compiled


def test_another_word_than_true_and_false_is_named(tmp_path, capsys):
    assert fit(tmp_path, config(model__compile="reduce-overhead")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "model.compile" in line
    assert "reduce-overhead" in line
