"""Mixup and CutMix of images of any size. Oracles: timm's mixer of images of different sizes; hand-made grids; the same
batches on one rank and on two.
"""

from itertools import product

import numpy as np
import pytest
import torch
from experiments import config, fit
from fake_gpu import NoWaits, moved, on_fake_gpu
from helpers import caption_batch, step_losses, tiny_encoder
from timm.data.naflex_mixup import mix_batch_variable_size
from torch._subclasses import FakeTensorMode

from heads.contrastive import Contrastive
from indiclip.datasets.base import SampleDataset
from indiclip.loading.mixing import Mix, blend, mix_pairs, mix_two
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.patches import drop_patches, patchify
from indiclip.preprocessing import Preprocessing

PATCH = 4
DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")  # which each part draws anew


def prepared(rows, columns, seed, grey=None):
    """An image of so many patches, of noise or of one grey."""
    size_hw = (rows * PATCH, columns * PATCH)
    noise = torch.randint(0, 256, (3, *size_hw), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    pixels = noise if grey is None else torch.full_like(noise, grey)
    return {"patches": patchify(pixels, PATCH), "size_hw": size_hw, "random_seed": seed, "pixels": pixels}


@pytest.mark.parametrize("sizes", [((4, 6), (4, 6)), ((4, 6), (8, 2)), ((5, 5), (1, 9)), ((3, 3), (7, 5))])
def test_mixup_is_timms(sizes, monkeypatch):
    # Sides that differ by an odd number have their middles between patches; these differ by an even one.
    first, second = (prepared(*size, seed) for seed, size in enumerate(sizes))
    noted = Noted()
    monkeypatch.setattr("indiclip.loading.mixing.np.random.default_rng", lambda seed: noted)
    mixed = mix_two(first, second, Mix(mixup=0.7))
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self: torch.tensor(noted.share))
    images = [sample["pixels"].float() for sample in (first, second)]
    expected, kept, _ = mix_batch_variable_size(images, mixup_alpha=0.7, cutmix_alpha=0.0, local_shuffle=1)
    for found, image, share in zip(mixed, expected, kept, strict=True):
        assert found["mix_share"] == pytest.approx(share)
        patches = patchify(image, PATCH)[0]
        assert (found["patches"][0] - patches).abs().max() <= 0.5 + 1e-3  # rounded to bytes


class Noted:
    """A generator that keeps what it draws from Beta."""

    def __init__(self):
        self.generator = np.random.Generator(np.random.PCG64(0))

    def random(self):
        return self.generator.random()

    def beta(self, *args):
        self.share = self.generator.beta(*args)
        return self.share


@pytest.mark.parametrize("sizes", [((6, 6), (6, 6)), ((4, 9), (8, 3)), ((2, 2), (9, 9))])
def test_cutmix_swaps_a_rectangle_and_says_how_much_is_left(sizes):
    cut = 0
    for seed in range(20):
        white, black = prepared(*sizes[0], seed, 255), prepared(*sizes[1], seed + 100, 0)
        for own, other, found in zip(
            (white, black), (black, white), mix_two(white, black, Mix(cutmix=1.0)), strict=True
        ):
            patches, coords = found["patches"]
            assert torch.equal(coords, own["patches"][1])
            foreign = (patches == other["patches"][0][0]).all(1)
            assert (patches[~foreign] == own["patches"][0][0]).all()  # whole patches, of one or the other
            assert found["mix_share"] == pytest.approx(1 - foreign.float().mean().item())
            if foreign.any():
                where = coords[foreign]
                assert len(where) == (where.amax(0) - where.amin(0) + 1).prod()  # all of a rectangle
                cut += 1
    assert cut > 10


def test_dropped_patches_are_mixed_where_both_images_have_them():
    first, second = prepared(6, 6, 1, 200), prepared(6, 6, 2, 100)
    few = [s | {"patches": drop_patches(s["patches"], 18, seed)} for seed, s in enumerate((first, second))]
    common = {tuple(row) for row in few[0]["patches"][1].tolist()} & {
        tuple(row) for row in few[1]["patches"][1].tolist()
    }
    found, _ = mix_two(*few, Mix(mixup=1.0))
    changed = (found["patches"][0] != 200).all(1)
    assert {tuple(row) for row in found["patches"][1][changed].tolist()} == common
    share = (found["patches"][0][changed].float().mean() - 100) / 100
    assert found["mix_share"] == pytest.approx(1 - (1 - share.item()) * len(common) / 18, abs=0.01)


def test_partners_and_probability():
    samples = [prepared(2, 2, seed) for seed in range(400)]
    mixed = mix_pairs(samples, Mix(mixup=1.0, prob=0.5))
    assert [sample["mix_partner"] for sample in mixed] == [*range(200, 400), *range(200)]
    alone = [sample["mix_share"] == 1 for sample in mixed]
    assert alone[:200] == alone[200:]
    assert 0.4 < sum(alone) / 400 < 0.6
    for before, after, unmixed in zip(samples, mixed, alone, strict=True):
        assert torch.equal(before["patches"][0], after["patches"][0]) == unmixed
    assert "mix_share" not in samples[0]
    assert mix_pairs(samples, Mix(mixup=1.0, prob=0.5))[7]["mix_share"] == mixed[7]["mix_share"]


def test_both_kinds_come():
    pairs = [mix_two(prepared(4, 4, i, 255), prepared(4, 4, i + 99, 0), Mix(1.0, 1.0))[0] for i in range(40)]
    blended = [bool(((p["patches"][0] > 0) & (p["patches"][0] < 255)).any()) for p in pairs]
    assert 10 < sum(blended) < 30


def test_bytes_are_rounded_to_the_nearest():
    own, other = torch.tensor([10, 255, 0], dtype=torch.uint8), torch.tensor([11, 0, 255], dtype=torch.uint8)
    assert blend(own, other, 0.75).tolist() == [10, 191, 64]


class Greys(SampleDataset):
    """Images of three sizes, each of its own grey."""

    def __len__(self):
        return 40

    def key(self, index):
        return str(index)

    def __getitem__(self, index):
        return {"image": np.full((8, 8 + 4 * (index % 3), 3), 6 * index, np.uint8), "caption": str(index)}


def source(**options):
    return Source("t", Greys(), **({"batch_size": 8, "mix": Mix(0.5, 1.0), "max_tokens": 16} | options))


def parts(world, **options):
    """Key -> the image's patches, its share and the key of its partner, of three steps."""
    found = {}
    for step, rank in product(range(3), range(world)):
        batch = Steps([source(**options)], 3, Preprocessing(PATCH), True, rank, world)[step]["t"]
        targets, keys = batch["targets"], batch["keys"]
        for i, key in enumerate(keys):
            count = batch["images"]["num_patches"][i]
            partner = keys[targets["mix_partner"][i]]
            found[step, key] = batch["images"]["patches_BNP"][i, :count], targets["mix_share"][i], partner
    return found


@pytest.mark.parametrize("options", [{}, {"drop": 0.5}, {"batch_size": None, "batch_tokens": 128}])
def test_batches_are_the_same_on_any_number_of_ranks(options):
    expected = parts(1, **options)
    assert any(share < 1 for _, share, _ in expected.values())
    for world in (2, 4):
        found = parts(world, **options)
        assert found.keys() == expected.keys()
        for place, (patches, *others) in expected.items():
            assert torch.equal(found[place][0], patches)
            assert list(found[place][1:]) == others


def test_held_out_images_and_zero_are_not_mixed():
    steps = Steps([source()], 3, Preprocessing(PATCH), False)
    assert "mix_share" not in steps[0]["t"]["targets"]
    assert "mix_share" not in Steps([source(mix=Mix())], 3, Preprocessing(PATCH), True)[0]["t"]["targets"]
    assert not Mix(1.0, prob=0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Steps([source(batch_size=6)], 0, Preprocessing(4), True, 0, 2),
            "batch_size 6 must be a multiple of twice",
        ),
        (lambda: Steps([source(), source(mix=None)], 0, Preprocessing(4), True), "differ in mix"),
        (lambda: source(shard_groups=2), "shard_groups is 2.*mix"),
        (lambda: Mix(mixup=-1), r"data: mix\.mixup"),
        (lambda: Mix(prob=2), r"data: mix\.prob"),
    ],
)
def test_what_cannot_be_mixed_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_micro_batches_of_mixed_images_together_are_the_batch(tmp_path):
    weights = []
    for number in (1, 3):  # three parts of 8, which no pair is in whole
        tree = config(data__train__0__batch_size=8, data__val=[], model__micro_batches=number, seed_everything=1)
        tree["data"]["overrides"] = [{"task": "contrastive", "mix": {"mixup": 1.0, "cutmix": 1.0}}]
        tree["model"]["heads"][0]["init_args"] = {"loss": "softmax"}
        tree["model"]["encoder"]["text"]["architecture"] |= dict.fromkeys(DROPOUT, 0.0)
        tree["model"]["warmup_steps"] = 0
        tree["model"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
        folder = tmp_path / str(number)
        folder.mkdir()
        assert fit(folder, tree) == 0
        last = folder / "runs" / "experiment" / "checkpoints" / "last.ckpt"
        weights.append(torch.load(last, weights_only=True)["state_dict"])
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", ["overrides", "train", "val"])
def test_mixing_with_boxes_is_one_line_before_training(key, tmp_path, capsys):
    tree = config()
    detection = {"num_classes": 17, "out_channels": 8, "num_convs": 1, "scales": [1.0]}
    tree["model"]["heads"].append({"class_path": "heads.detection.Detection", "init_args": detection})
    for part in ("train", "val"):
        tree["data"][part].append(tree["data"][part][0] | {"task": "detection"})
    mix, words = {"mix": {"mixup": 0.2}}, "data.train[1].mix: detection reads the task 'detection' and cannot learn"
    if key == "overrides":
        tree["data"]["overrides"] = [{"task": "detection"} | mix]
    else:
        tree["data"][key][1] |= mix
        words = words if key == "train" else "data.val[1].mix: held-out images are read as they are"
    assert fit(tmp_path, tree) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("indiclip:")]
    assert words in line


def mixed_batch(share):
    batch = caption_batch(["a kite", "a drum", "two kites", "a diya"], [1, 2, 1, -1])
    batch["targets"] |= {"mix_partner": [2, 3, 0, 1], "mix_share": [share] * 4}
    return batch


def head_loss(batch, encoder, loss):
    torch.manual_seed(0)
    head = Contrastive(loss=loss)
    head.bind(encoder)
    return step_losses(head.loss(encoder.features(batch["images"]), batch, encoder)).terms["loss"]


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_an_image_that_is_all_its_partners_belongs_to_the_partners_caption(loss):
    encoder = tiny_encoder().eval()
    swapped = caption_batch(["two kites", "a diya", "a kite", "a drum"], [1, -1, 1, 2])
    for share, expected in (
        (0.0, swapped),
        (1.0, caption_batch(["a kite", "a drum", "two kites", "a diya"], [1, 2, 1, -1])),
    ):
        found = head_loss(mixed_batch(share), encoder, loss)
        torch.testing.assert_close(found, head_loss(expected, encoder, loss), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_loss_of_mixed_images_never_waits_for_the_device(loss):
    encoder, batch = tiny_encoder(), mixed_batch(0.5)
    head = Contrastive(loss=loss)
    head.bind(encoder)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in (encoder, head):
            on_fake_gpu(mode, module)
        with NoWaits():
            on_device = moved(batch, "cuda")
            terms, _ = step_losses(head.loss(encoder.features(on_device["images"]), on_device, encoder))
    assert terms["loss"].device.type == "cuda"
