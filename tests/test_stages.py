"""Fewer tokens for a part of a run: how many in each step, which patches stay, resume, ranks, and what is refused."""

from collections import Counter

import numpy as np
import pytest
import torch
from experiments import ENCODER, config, fit
from helpers import noise, tiny_encoder
from lightning import Callback, Trainer
from processes import two_ranks
from test_plan import Numbers
from test_resume import EVERY_STEP, same, train
from torch.testing import assert_close

from indiclip.generated.mela import Mela
from indiclip.lightning_internals import run_steps
from indiclip.loading.plan import Plan
from indiclip.loading.sampler import BatchSpec, SourceInfo
from indiclip.loading.source import Source
from indiclip.loading.stages import Stage, TokenBudget, stage_ends
from indiclip.loading.steps import Steps
from indiclip.loading.workers import StepLoader
from indiclip.patches import drop_patches, stack
from indiclip.position_table import whole_grids
from indiclip.preprocessing import Preprocessing
from indiclip.training.record import read_history
from indiclip.types import part_of

STAGES = [Stage(0.3, max_tokens=4), Stage(0.6, drop=0.5)]  # of 10 steps: 0 to 2, and 3 to 5
TOKENS = [4] * 3 + [8] * 3 + [16] * 4


def steps_of(rank=0, world=1, run_steps=10, seed=5, scenes=50, **options):
    options = {"batch_size": 4, "max_tokens": 16, "stages": STAGES} | options
    source = Source("t", Mela(scenes, 32, "single", seed=1), **options)
    return Steps([source], seed, Preprocessing(8), True, rank, world, run_steps)


def test_tokens_of_each_step():
    """Images of 4 x 4 patches: 2 x 2 of them, then half, then all."""
    steps, plain = steps_of(), steps_of(stages=[])
    for step, tokens in enumerate(TOKENS):
        batch = steps[step]["t"]
        assert batch["images"]["num_patches"] == [tokens] * 4
        assert batch["images"]["patches_BNP"].shape == (4, tokens, 192)
        assert batch["keys"] == plain[step]["t"]["keys"]  # the samples are those of a run without stages
    assert batch["images"]["sizes_hw"] == [(32, 32)] * 4


def test_a_token_budget_holds_more_images_in_early_stages():
    steps = steps_of(batch_size=None, batch_tokens=70, batch_multiple=2)
    batches = [steps[step]["t"]["images"]["num_patches"] for step in range(10)]
    assert batches == [[4] * 16] * 3 + [[8] * 8] * 3 + [[16] * 4] * 4  # of 17.5, 8.75 and 4.4
    assert len(steps) == 4  # an epoch of the trainer: 50 samples in the first stage's batches


def test_a_stage_has_a_batch_of_its_own():
    """6, then 2, then 4 images; none twice in a stage, each of which begins an epoch of data without shards."""
    stages = [Stage(0.3, max_tokens=4, batch_size=6), Stage(0.6, drop=0.5, batch_size=2)]
    steps = steps_of(stages=stages)
    batches = [steps[step]["t"] for step in range(10)]
    assert [batch["images"]["num_patches"] for batch in batches] == [[4] * 6] * 3 + [[8] * 2] * 3 + [[16] * 4] * 4
    for first, last in ((0, 3), (3, 6), (6, 10)):
        keys = [key for batch in batches[first:last] for key in batch["keys"]]
        assert len({*keys}) == len(keys)
    halves = [steps_of(rank, 2, stages=stages) for rank in range(2)]
    for step, batch in enumerate(batches):
        assert sorted(key for half in halves for key in half[step]["t"]["keys"]) == sorted(batch["keys"])


@pytest.mark.parametrize("budget", [{"batch_size": 4}, {"batch_size": None, "batch_tokens": 70, "batch_multiple": 2}])
def test_a_step_is_the_same_on_any_ranks_and_in_any_worker(budget):
    one, four = steps_of(**budget), [steps_of(rank, 2, **budget) for rank in range(2)]
    loader = StepLoader(steps_of(**budget), batch_size=None, sampler=range(10), num_workers=2)
    for step, loaded in enumerate(loader):
        whole, parts = one[step]["t"], [steps[step]["t"] for steps in four]
        for found, expected in ((loaded["t"], whole), *((part, None) for part in parts)):
            for row, key in enumerate(found["keys"]):
                other = (expected or whole)["keys"].index(key)
                for name in ("patches_BNP", "coords_BN2", "num_patches"):
                    assert_close(found["images"][name][row], whole["images"][name][other], rtol=0, atol=0)
        assert sorted(key for part in parts for key in part["keys"]) == sorted(whole["keys"])


def test_no_sample_comes_twice_in_an_epoch_across_stages():
    """Four shards of 10, each a window: three steps of 8 end in the third, so the next stage begins with the fourth."""
    source = SourceInfo(40, np.arange(0, 41, 10))
    plans = [Plan("t", [source], [1.0], BatchSpec(samples), 0, window=1) for samples in (8, 5)]
    expected = [plans[1].batch(step) for step in range(6, 20)]  # the eighth batch of five begins with sample 30
    plans[0].then(3, plans[1])
    assert [len(plans[0].batch(step)) for step in range(6)] == [8, 8, 8, 5, 5, 5]
    assert [plans[0].batch(step) for step in range(3, 17)] == expected
    first_epoch = [ref.index for step in range(5) for ref in plans[0].batch(step)]
    assert len(set(first_epoch)) == len(first_epoch) == 34
    assert [len(plans[0].batch(step, 1, 2)) for step in (2, 3)] == [4, 2]


@pytest.mark.parametrize("grouped", [False, True])
def test_sources_that_take_turns_go_through_all_in_each_stage(grouped):
    """Three stages of two sources: no batch twice, budgets hold, and each sample about as often as any other."""
    sizes = np.random.default_rng(0).integers(8, 64, (300, 2))
    stages = [Stage(40, max_tokens=4), Stage(90, max_tokens=9, drop=0.25)]
    options = {"batch_tokens": 160, "batch_multiple": 2, "max_tokens": 16, "stages": stages}
    data = [Numbers(name, 300, sizes_hw=sizes) for name in "ab"]
    sources = [Source("t", each, group_by_length=grouped, **options) for each in data]
    plan = Steps(sources, 0, Preprocessing(8), True).plans["t"]
    batches = [plan.batch(step) for step in range(400)]
    seen = Counter((ref.source, ref.index) for refs in batches for ref in refs)
    if not grouped:
        assert [len(batches[step]) for step in (0, 39, 40, 89, 90, 399)] == [40, 40, 22, 22, 10, 10]
    assert len(seen) == 600
    # Where a stage ends a part of an epoch is passed over, and less than a batch may come again.
    assert max(seen.values()) - min(seen.values()) <= 2 * 2 + 1
    assert len({(ref.source, ref.position) for refs in batches for ref in refs}) >= sum(map(len, batches)) - 2 * 2 * 40


def test_what_is_kept_are_patches_of_the_image_with_their_coordinates():
    whole, steps = steps_of(stages=[]), steps_of(stages=[], drop=0.3)
    masks = set()
    for step in range(13):  # an epoch of 50, and two more
        images, all_of = steps[step]["t"]["images"], whole[step]["t"]["images"]
        assert images["num_patches"] == [11] * 4  # of 16: 11.2
        assert images["sizes_hw"] == all_of["sizes_hw"]
        for row in range(4):
            coords_N2, cells_NP = images["coords_BN2"][row], images["patches_BNP"][row]
            places = coords_N2[:, 0] * 4 + coords_N2[:, 1]
            assert (places.diff() > 0).all()  # in their order, none twice
            assert torch.equal(cells_NP, all_of["patches_BNP"][row][places])
            masks.add(tuple(places.tolist()))
    assert len(masks) > 45  # drawn anew for each image and step


def test_each_patch_is_as_likely_as_any_other():
    """1,000 draws of 3 of 12: 250 of each, with a deviation of 13.7."""
    patches = torch.arange(12)[:, None], torch.arange(24).reshape(12, 2)
    kept = torch.cat([drop_patches(patches, 3, seed)[0] for seed in range(1000)])
    assert (kept.flatten().bincount(minlength=12) - 250).abs().max() < 4 * 13.7


@pytest.mark.parametrize(("drop", "kept"), [(0.0, 7), (0.5, 4), (0.3, 5), (0.99, 1), (1 / 7, 6)])
def test_the_number_kept_is_the_nearest_whole_one(drop, kept):
    assert TokenBudget(7, drop).most_kept == kept


def test_a_dropped_image_is_what_the_tower_makes_of_its_patches_alone():
    """Beside an image that is whole, one that is smaller, and in another micro-batch; the oracle is timm's tower, to
    which the place of patches in a whole image is told (see tests/test_dropped_patches.py).
    """
    encoder = tiny_encoder().eval()
    vit = encoder.backbone.vit
    cuts = [Preprocessing(8).cut(torch.from_numpy(noise(h, w, i)).permute(2, 0, 1), (h, w))
            for i, (h, w) in enumerate([(32, 32), (32, 32), (16, 24), (32, 32)])]  # fmt: skip
    for row, num_kept in ((0, 8), (2, 3), (3, 8)):
        cuts[row]["patches"] = drop_patches(cuts[row]["patches"], num_kept, row)
    images = stack(cuts)
    assert images["num_patches"] == [8, 16, 3, 8]
    parts = [
        part_of({"images": images, "targets": {}, "keys": list("abcd")}, *ends)["images"] for ends in ((0, 2), (2, 4))
    ]
    assert [part["patches_BNP"].shape[1] for part in parts] == [16, 8]
    with torch.no_grad():
        embedded = encoder.embed_features(encoder.features(images))
        in_parts = torch.cat([encoder.embed_features(encoder.features(part)) for part in parts])
        for row, cut in enumerate(cuts):
            cells_1NP, coords_1N2 = (part[None] for part in cut["patches"])
            grid_hw = tuple(side // 8 for side in images["sizes_hw"][row])
            with whole_grids([grid_hw], torch.device("cpu")):
                alone = vit.forward_features((cells_1NP / 255 - 0.5) / 0.5, coords_1N2)["patches"]
            tokens = encoder.features(images).tokens_BND[row, : cells_1NP.shape[1]]
            assert_close(tokens, alone[0, vit.num_prefix_tokens :], rtol=1e-4, atol=1e-5)
            assert_close(encoder.embed_features(encoder.features(stack([cut])))[0], embedded[row], rtol=1e-4, atol=1e-5)
    assert_close(in_parts, embedded, rtol=1e-4, atol=1e-5)


OWN_BATCHES = {"stages": [Stage(0.5, max_tokens=4, batch_size=6), Stage(0.7, drop=0.25, batch_size=2)]}


@pytest.mark.parametrize("budget", [{}, {"batch_size": None, "batch_tokens": 64, "batch_multiple": 2}, OWN_BATCHES])
def test_a_run_killed_on_either_side_of_a_stage_goes_on_as_if_it_had_not_been(tmp_path, budget):
    """Equal weights after six steps, of which the first half has a quarter of the tokens, then three quarters."""
    stages = [Stage(0.5, max_tokens=4), Stage(0.7, drop=0.25)]
    options = {"steps": 6, "held_out": False, "checkpoints": EVERY_STEP, "source": {"stages": stages} | budget}
    whole, _ = train(tmp_path / "whole", **options)
    for batch in (2, 3, 5):
        folder = tmp_path / str(batch)
        assert train(folder, kill=batch, **options)[0] is None
        resumed, _ = train(folder, going_on=True, num_workers=2 * (batch == 3), **options)
        assert same(whole, resumed)
    unlike, _ = train(tmp_path / "unlike", **options | {"source": budget | {"stages": []}})
    assert not same(whole, unlike)


def test_one_rank_and_two_train_alike(tmp_path):
    """Through the command: stages, dropped patches and clusters, which are the scenes' labels here."""
    found = {}
    for world in (1, 2):
        tree = config(trainer__max_steps=4, model__warmup_steps=0)
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        tree["model"]["encoder"]["text"] = ENCODER["text"] | {"architecture": ENCODER["text"]["architecture"] | dropout}
        tree["model"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
        np.save(tmp_path / "clusters.npy", np.arange(12) % 3)
        less = [{"until": 0.5, "max_tokens": 4}, {"until": 0.75, "drop": 0.5}]
        clusters = {"file": str(tmp_path / "clusters.npy"), "share": 2 / 3}
        tree["data"]["train"][0] |= {"stages": less, "clusters": clusters}
        tree["data"] |= {"val": [], "steps_per_epoch": 4}
        tree["trainer"] |= {"precision": "64-true", "devices": world}
        folder = tmp_path / f"{world}"
        folder.mkdir()
        if world == 1:
            assert fit(folder, tree) == 0
        else:
            ended, _ = two_ranks(folder, tree)
            assert ended.returncode == 0, ended.stderr[-3000:]
        rows = read_history(folder / "runs" / "experiment")
        found[world] = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(found[1]) == 4
    assert found[2] == pytest.approx(found[1], rel=1e-5)  # Lightning logs in float32


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": 4}, 4),
        ({"steps": -1, "max_epochs": 2}, 6),
        ({"steps": 4, "max_epochs": 2}, 4),
        ({"steps": 9, "max_epochs": 2}, 6),
        ({"steps": -1, "max_epochs": 2, "limit_train_batches": 2}, 4),
        ({"steps": -1, "max_epochs": 2, "limit_train_batches": 0.34}, 2),
    ],
)
def test_the_length_of_a_run_is_known_before_it_begins(tmp_path, options, expected):
    """The oracle is the run, of epochs of three steps; the last step is behind a stage of 0.74."""

    class Length(Callback):
        found = ()

        def on_train_start(self, trainer, module):
            self.found = (run_steps(trainer, 3),)

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.tokens = batch["contrastive"]["images"]["num_patches"][0]

        def on_train_end(self, trainer, module):
            self.found += (trainer.global_step, self.tokens)

    length = Length()
    source = {"stages": [Stage(0.74, max_tokens=4)]}
    train(tmp_path, more=[length], source=source, steps_per_epoch=3, held_out=False, **options)
    assert length.found == (expected, expected, 16)


def test_a_run_without_an_end_has_no_length():
    trainer = Trainer(accelerator="cpu", max_steps=-1, max_epochs=-1, logger=False, enable_checkpointing=False)
    assert run_steps(trainer, 10) is None


def bad(**options):
    return Source("t", Numbers("a", 8), **{"batch_size": 4} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": 1.0}, "task 't': drop: found 1.0; expected 0 to below 1"),
        ({"drop": -0.1}, "task 't': drop: found -0.1; expected 0 to below 1"),
        ({"stages": [Stage(0.5, drop=1.0)]}, r"stages\[0\].drop: found 1.0; expected 0 to below 1"),
        ({"stages": [Stage(0.5, max_tokens=0)]}, r"stages\[0\].max_tokens: found 0; expected 1 or more"),
        ({"stages": [Stage(0.5)]}, r"stages\[0\]: changes nothing; expected max_tokens, drop or batch_size"),
        ({"stages": [Stage(0.5, batch_size=0)]}, r"stages\[0\].batch_size: found 0; expected 1 or more"),
        (
            {"batch_size": None, "batch_tokens": 9000, "stages": [Stage(0.5, batch_size=2)]},
            r"stages\[0\].batch_size: found one beside batch_tokens",
        ),
        (
            {"shard_groups": 2, "stages": [Stage(0.5, batch_size=2)]},
            "shard_groups is 2; leave out either it or stages w",
        ),
        ({"stages": [Stage(0.9, 4), Stage(0.5, 9)]}, r"stages\[1\].until: found 0.5 after 0.9; expected more"),
        (
            {"stages": [Stage(0.9, 4), Stage(500, 9)]},
            r"stages\[1\].until: found 500 after 0.9; expected all shares, or",
        ),
        ({"stages": [Stage(1, 4)]}, r"stages\[0\].until: found 1; expected a share of the run's steps between 0 and 1"),
        ({"stages": [Stage(2.5, 4)]}, r"stages\[0\].until: found 2.5; expected a share"),
        ({"stages": [Stage(0, 4)]}, r"stages\[0\].until: found 0; expected a share"),
    ],
)
def test_bad_stages_are_said(options, message):
    with pytest.raises(ValueError, match=message):
        bad(**options)


def test_a_share_of_a_run_needs_its_length():
    steps = Steps([bad(stages=[Stage(0.5, 4)])], 0, Preprocessing(8), True)
    with pytest.raises(ValueError, match=r"stages\[0\].until: 0.5 is a share .* which need trainer.max_steps"):
        steps[0]
    assert stage_ends([Stage(7, 4), Stage(9, 5)], None, "x") == [7, 9]
    assert stage_ends([Stage(0.29, 4), Stage(0.9, 5)], 100, "x") == [29, 90]


def test_sources_of_a_task_share_their_stages_with_a_token_budget():
    options = {"batch_tokens": 64, "batch_multiple": 2, "max_tokens": 16}
    stages = [[Stage(5, 4)], [Stage(6, 4)]]
    sources = [Source("t", Numbers(name, 8), stages=own, **options) for name, own in zip("ab", stages, strict=True)]
    with pytest.raises(ValueError, match="the sources of task 't' differ in .*max_tokens or stages"):
        Steps(sources, 0, Preprocessing(8), True)


DENSE = {"class_path": "heads.detection.Detection"}
DENSE |= {"init_args": {"task": "contrastive", "num_classes": 17, "out_channels": 8, "num_convs": 1, "scales": [1.0]}}
CANVAS = {
    "class_path": "indiclip.timm_backbone.TimmBackbone",
    "init_args": {"name": "convnext_atto", "canvas_hw": [32, 32], "patch_size": 8},
}


def test_a_backbone_of_one_size_may_have_stages_of_other_batches(tmp_path):
    tree = config(model__encoder__backbone=CANVAS, data__val=[])
    tree["data"]["train"][0]["stages"] = [{"until": 0.5, "batch_size": 2}]
    assert fit(tmp_path, tree) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"until": 0.5, "max_token": 4}]}, "max_token"),
        ({"stages": [{"max_tokens": 4}]}, "until"),
        ({"stages": [{"until": 0.9, "max_tokens": 4}, {"until": 0.5, "max_tokens": 9}]}, "stages ascend"),
        (
            {"stages": [{"until": 0.5, "max_tokens": 65}]},
            "data.train[0].stages[0].max_tokens: 65 is over the backbone's",
        ),
        ({"drop": 1.0}, "task 'contrastive': drop: found 1.0; expected 0 to below 1"),
        ({"clusters": {"alpa": 0.5}}, "alpa"),
        ({"clusters": {}}, "clusters: the samples of Mela have neither cluster nor label; expected"),
        ({"drop": 0.5, "dense": True}, "data.train[0].drop: detection reads the source and needs all patches"),
        (
            {"stages": [{"until": 0.5, "drop": 0.5}], "dense": True},
            "data.train[0].stages: detection reads the source and needs all patches",
        ),
        ({"drop": 0.5, "rope": True}, "data.train[0].drop: the backbone's positions are those of whole images"),
        ({"drop": 0.5, "canvas": True}, "data.train[0].drop: the backbone reads whole images of one size, 32x32"),
        (
            {"stages": [{"until": 0.5, "max_tokens": 4}], "canvas": True},
            "data.train[0].stages: the backbone reads whole",
        ),
        ({"drop": 0.5, "val": True}, "data.val[0].drop: held-out data are read whole; expected it in data.train alone"),
    ],
)
def test_one_line_says_what_is_wrong(tmp_path, capsys, changes, message):
    tree = config()
    if changes.pop("dense", False):
        tree["model"]["heads"].append(DENSE)
    if changes.pop("rope", False):
        tree["model"]["encoder"]["backbone"]["init_args"]["options"] = {"rope_type": "axial", "pos_embed": "none"}
    if changes.pop("canvas", False):
        tree["model"]["encoder"]["backbone"] = CANVAS
    tree["data"]["val" if changes.pop("val", False) else "train"][0] |= changes
    assert fit(tmp_path, tree) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("indiclip: ")]
    assert message in line
    assert not (tmp_path / "runs" / "experiment").exists()
