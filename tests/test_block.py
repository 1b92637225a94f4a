"""Heads on intermediate blocks: timm's own intermediates, where gradients end, ranks, FLOPs, and what is refused."""

import numpy as np
import pytest
import torch
from experiments import fit
from helpers import ARCHITECTURE, tiny_encoder
from test_every import DETECTION, SCENES, tree_of
from test_sharding import fitted, largest_difference, sharded, weights
from test_throughput import steps
from torch.utils.flop_counter import FlopCounterMode

from heads.captioning import Captioning
from heads.contrastive import Contrastive
from heads.detection import Detection
from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.module import MultiTask
from indiclip.planning.counter import count_step
from indiclip.planning.step_flops import step_flops
from indiclip.text import TextTower
from indiclip.timm_backbone import TimmBackbone
from indiclip.tokenizers import ByteTokenizer


def naflex(**options):
    torch.manual_seed(0)
    return NaFlexViT(width=32, depth=4, num_heads=2, patch_size=8, options=options).eval()


def images_of(backbone, *sizes_hw):
    rng = np.random.default_rng(0)
    return backbone.preprocessing.batch([rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes_hw], 64)


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2, "class_token": True}])
@pytest.mark.parametrize("sizes_hw", [[(32, 32)], [(64, 64), (8, 24), (40, 16)]], ids=["padded", "packed"])
def test_tokens_are_those_of_timm(options, sizes_hw):
    """Each image by itself in timm's `forward_intermediates`, without the last norm, which is put behind it here."""
    backbone = naflex(**options)
    images = images_of(backbone, *sizes_hw)
    with torch.no_grad():
        for part in backbone.vit.blocks:  # far from what they are when new
            part.attn.proj.weight.mul_(3)
        found = backbone(images, [1, 3]).after
        whole = backbone(images)
        ends = backbone(images, [1])
        assert sorted(found) == [1, 3]
        torch.testing.assert_close(found[3].tokens_BND, whole.tokens_BND)
        torch.testing.assert_close(ends.tokens_BND, found[1].tokens_BND)
        assert (found[1].rows_T is not None) == (len(sizes_hw) > 1)
        for row, number in enumerate(images["num_patches"]):
            patches_1NP = backbone.normalise(images)[row : row + 1, :number]
            inputs = {"patches": patches_1NP, "patch_coord": images["coords_BN2"][row : row + 1, :number]}
            expected = backbone.vit.forward_intermediates(
                inputs, [1], output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
            )[0]
            tokens, prefix = expected if options else (expected, None)
            torch.testing.assert_close(found[1].tokens_BND[row, :number], backbone.vit.norm(tokens)[0])
            if prefix is not None:
                torch.testing.assert_close(found[1].prefix_BKD[row], backbone.vit.norm(prefix)[0])
    assert not torch.allclose(found[1].tokens_BND, found[3].tokens_BND, atol=1e-2)


def run_tree(block, every=1, **changes):
    tree = tree_of(every, steps=4, **changes)
    tree["model"]["encoder"]["backbone"]["init_args"] |= {"depth": 3}
    tree["data"]["train"].append(SCENES | {"dataset": WIDE})
    tree["model"]["heads"][1] = {**DETECTION, "init_args": DETECTION["init_args"] | {"block": block}}
    tree["model"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}}
    tree["model"]["lr"] = None
    tree["trainer"]["callbacks"].append({"class_path": "trouble.Double"})
    return tree


WIDE = SCENES["dataset"] | {"init_args": SCENES["dataset"]["init_args"] | {"size": [32, 64]}}
BEHIND = "encoder.backbone.vit.blocks.2."


def test_later_blocks_learn_of_the_other_heads_alone(tmp_path):
    """Contrastive rests in every other step: then the block behind the detection head's stays as it is."""
    assert fit(tmp_path, run_tree(-2, every=2)) == 0
    folder = tmp_path / "runs" / "experiment" / "checkpoints"
    states = [torch.load(folder / f"{step}.ckpt", weights_only=True)["state_dict"] for step in range(1, 5)]
    for name in (name for name in states[0] if "blocks" in name and name.endswith("qkv.weight")):
        moved = [not torch.equal(states[i][name], states[i - 1][name]) for i in range(1, 4)]
        assert moved == ([False, True, False] if name.startswith(BEHIND) else [True] * 3), name


@pytest.mark.parametrize(
    "strategy", ["ddp", pytest.param(sharded(1, 2), marks=pytest.mark.slow)], ids=["ddp", "sharded"]
)
def test_two_ranks_are_one(tmp_path, strategy):
    """With micro-batches and activation checkpointing, against one process without; of images of several sizes."""
    found = []
    for world, number in ((1, 1), (2, 2)):
        tree = run_tree(1, every=2, model__micro_batches=number, model__activation_checkpointing=number > 1)
        tree["trainer"]["strategy"] = strategy if world == 2 else "auto"
        done, folder = fitted(tmp_path / str(world), tree, world)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(weights(folder))
    assert largest_difference(*found) < 1e-6


@pytest.mark.slow
def test_blocks_that_no_head_reads_do_not_run_and_are_not_counted():
    """FLOPs by rates and by the planner's counter, against torch's own counter around the real step."""
    torch.manual_seed(0)
    backbone = NaFlexViT(width=32, depth=4, num_heads=2, patch_size=8)
    encoder = Encoder(backbone, TextTower(ByteTokenizer(), ARCHITECTURE), 32, (16,), pool="mean")
    detection = Detection(task="detection", num_classes=17, out_channels=16, num_convs=1, scales=[1.0], block=-3)
    module = MultiTask(encoder, [Contrastive(loss="softmax"), detection])
    module.log = module.log_dict = lambda *_, **__: None
    _, data = steps([32, 48])
    step = data.steps(data.train, train=True)[0]
    rates, counted = step_flops(module, data), count_step(module, step)
    ran = []
    for number, block in enumerate(backbone.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    with FlopCounterMode(display=False) as counter:
        module.training_step(step, 0).backward()
    assert ran == [0, 1, 2, 3, 0, 1]
    assert rates.of(step) == pytest.approx(counter.get_total_flops(), rel=0.01)
    planned = sum(count.flops for parts in counted.values() for count in parts.values())
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_what_cannot_be_is_one_line():
    options = {"num_classes": 17, "scales": [1.0]}
    plain, timms = tiny_encoder(), TimmBackbone("resnet10t", canvas_hw=(64, 64), patch_size=8)
    other = Encoder(timms, TextTower(ByteTokenizer(), ARCHITECTURE), 32, (16,))
    with pytest.raises(ValueError, match="heads.detection.block: found 3 with a NaFlexViT; expected -1 to 0, of its 1"):
        MultiTask(plain, [Contrastive(), Detection(block=3, **options)])
    with pytest.raises(ValueError, match="heads.detection.block: found -1 with a TimmBackbone; expected null, or a Na"):
        MultiTask(other, [Contrastive(), Detection(block=-1, **options)])
    with pytest.raises(ValueError, match="heads.contrastive.block: found -1, for heads that read the tokens of imag"):
        MultiTask(plain, [Contrastive(block=-1)])
    MultiTask(plain, [Contrastive(), Captioning(task="contrastive", block=0)])
    deep = Encoder(naflex(), TextTower(ByteTokenizer(), ARCHITECTURE), 32, (16,))
    with pytest.raises(ValueError, match="model.heads: every head reads tokens before the backbone's last block"):
        MultiTask(deep, [Detection(block=1, **options)])
