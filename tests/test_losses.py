"""The contrastive losses against numbers worked out by hand, OpenCLIP's losses, and two and four processes.

Cosines in the hand-made cases come from the 3-4-5 triangle, so that embeddings are of unit length exactly.
"""

import gc
import math
import os
import weakref
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import on_ranks
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from indiclip import logit_chunks
from indiclip.losses import SigmoidLoss, SoftmaxLoss, caption_ids

BOTH = pytest.mark.parametrize("loss_class", [SoftmaxLoss, SigmoidLoss])
EXACT = {"rtol": 0, "atol": 1e-12}  # float64: above its rounding, far below any wrong factor


def _pairs(num_pairs=6, length=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    image_BE, text_BE = torch.randn(2, num_pairs, length, generator=generator, dtype=dtype)
    return image_BE.requires_grad_(), text_BE.requires_grad_()


def _gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


# By hand: cosines of image i (row) and text j (column).
#   image_0 = (1, 0), image_1 = (0, 1), image_2 = (3/5, 4/5); text_0 = (1, 0), text_1 = (3/5, 4/5), text_2 = (0, 1)
COSINES = [[1.0, 0.6, 0.0], [0.0, 0.8, 1.0], [0.6, 1.0, 0.8]]
IMAGE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], dtype=torch.float64)
TEXT = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)


def _log_share(logits, index):
    return logits[index] - math.log(sum(math.exp(logit) for logit in logits))


def test_softmax_of_two_pairs_by_hand():
    loss = SoftmaxLoss().double()
    nn.init.zeros_(loss.logit_scale)
    e = math.exp
    rows = math.log(e(1) / (e(1) + e(0.6))) + math.log(e(0.8) / (e(0) + e(0.8)))
    columns = math.log(e(1) / (e(1) + e(0))) + math.log(e(0.8) / (e(0.6) + e(0.8)))
    torch.testing.assert_close(loss(3 * IMAGE[:2], 0.1 * TEXT[:2]).item(), -(rows + columns) / 4, **EXACT)


def _naive_pair_losses(loss, image_BE, text_BE, positive_BB):
    """Each pair's part, one logit after the other."""
    parts = []
    for length, weight in zip(loss.lengths or [image_BE.shape[1]], loss.length_weights, strict=True):
        image, text = (F.normalize(x[:, :length], dim=1) for x in (image_BE, text_BE))
        logits = (loss.logit_scale.exp() * image @ text.T).tolist()
        size = range(len(logits))
        if isinstance(loss, SigmoidLoss):
            bias = loss.logit_bias.item()
            signs = [[1 if positive_BB[i][j] else -1 for j in size] for i in size]
            pairs = [sum(math.log1p(math.exp(-signs[i][j] * (logits[i][j] + bias))) for j in size) for i in size]
        else:
            pairs = []
            for i in size:
                mine = [j for j in size if positive_BB[i][j]]
                row, column = logits[i], [logits[j][i] for j in size]
                pairs.append(-sum(_log_share(row, j) + _log_share(column, j) for j in mine) / (2 * len(mine)))
        parts.append(weight * torch.tensor(pairs, dtype=torch.float64))
    return sum(parts)


@BOTH
@pytest.mark.parametrize("lengths", [None, [3, 8], [1, 3, 5, 8]])
@pytest.mark.parametrize(
    "keys", [None, [4, -1, 4, -1, 2, 4], [7] * 6, [5, 3, 1, 0, 2, 4], [-1, -2, -1, 2**62, -3, 2**62]]
)
def test_each_pairs_part_by_hand_and_their_mean_is_the_loss(loss_class, lengths, keys):
    image_BE, text_BE = _pairs()
    loss = loss_class(lengths, lengths and [1.0, *[3.0] * (len(lengths) - 1)]).double()
    labels = keys or [-1] * 6
    positive_BB = [[i == j or labels[i] == labels[j] >= 0 for j in range(6)] for i in range(6)]
    found = loss(image_BE, text_BE, torch.tensor(labels) if keys else None)
    with torch.no_grad():
        expected = _naive_pair_losses(loss, image_BE, text_BE, positive_BB)
    torch.testing.assert_close(loss.pair_losses_B, expected, **EXACT)
    torch.testing.assert_close(found, expected.mean(), **EXACT)
    assert not loss.pair_losses_B.requires_grad


@pytest.mark.parametrize(
    "keys",
    [{"labels_B": torch.tensor([7, -1, 7])}, {"caption_ids_B": caption_ids(["a kite", "a drum", "a kite"])}],
    ids=["label", "caption"],
)
def test_softmax_of_three_pairs_with_a_shared_key_by_hand(keys):
    loss = SoftmaxLoss().double()
    nn.init.constant_(loss.logit_scale, math.log(2))
    rows = [[2 * cosine for cosine in row] for row in COSINES]
    columns = [list(column) for column in zip(*rows, strict=True)]
    total = 0.0
    for direction in (rows, columns):
        total -= (_log_share(direction[0], 0) + _log_share(direction[0], 2)) / 2
        total -= _log_share(direction[1], 1)
        total -= (_log_share(direction[2], 0) + _log_share(direction[2], 2)) / 2
    torch.testing.assert_close(loss(IMAGE, TEXT, **keys).item(), total / 6, **EXACT)


def test_sigmoid_of_three_pairs_with_a_shared_label_by_hand():
    loss = SigmoidLoss().double()
    nn.init.constant_(loss.logit_scale, math.log(2))
    nn.init.constant_(loss.logit_bias, -1.5)
    positives = {(0, 0), (1, 1), (2, 2), (0, 2), (2, 0)}
    total = 0.0
    for i in range(3):
        for j in range(3):
            sign = 1 if (i, j) in positives else -1
            total += math.log(1 + math.exp(-sign * (2 * COSINES[i][j] - 1.5)))
    found = loss(IMAGE, TEXT, labels_B=torch.tensor([4, 1, 4]))
    torch.testing.assert_close(found.item(), total / 3, **EXACT)


@BOTH
def test_labels_and_captions_unite_and_negative_labels_match_nothing(loss_class):
    image_BE, text_BE = _pairs(4)
    loss = loss_class().double()
    captions_B = caption_ids(["x", "y", "x", "z"])
    united = loss(image_BE, text_BE, torch.tensor([-1, 5, -1, 5]), captions_B)
    # Pairs 0 and 2 by their caption, 1 and 3 by their label: the same as two classes.
    torch.testing.assert_close(united, loss(image_BE, text_BE, torch.tensor([0, 1, 0, 1])), **EXACT)
    alone = loss(image_BE, text_BE, torch.tensor([-1, -1, -1, -1]))
    torch.testing.assert_close(alone, loss(image_BE, text_BE), **EXACT)
    torch.testing.assert_close(alone, loss(image_BE, text_BE, torch.arange(4, dtype=torch.int32)), **EXACT)


@BOTH
@pytest.mark.parametrize("log_scale", [0.0, 2.6, 4.6])
def test_equals_open_clip(loss_class, log_scale):
    peers = pytest.importorskip("open_clip.loss")
    loss = loss_class().double()
    nn.init.constant_(loss.logit_scale, log_scale)
    image_BE, text_BE = _pairs(32, 16)
    inputs = [image_BE, text_BE, *loss.parameters()]
    peer = peers.ClipLoss() if loss_class is SoftmaxLoss else peers.SigLipLoss()
    normalised = [F.normalize(x, dim=-1) for x in (image_BE, text_BE)]
    expected = peer(*normalised, loss.logit_scale.exp(), getattr(loss, "logit_bias", None))
    found = loss(image_BE, text_BE)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(_gradients(found, *inputs), _gradients(expected, *inputs), **EXACT)


@BOTH
def test_matryoshka_is_the_weighted_mean_of_the_losses_on_prefixes(loss_class):
    image_BE, text_BE = _pairs()
    labels_B = torch.tensor([0, 1, 0, 2, -1, 1])
    one = loss_class().double()
    for weights, shares in ((None, [1 / 3] * 3), ([1.0, 1.0, 2.0], [0.25, 0.25, 0.5])):
        several = loss_class([2, 5, 8], weights).double()
        found = several(image_BE, text_BE, labels_B)
        prefixes = [one(image_BE[:, :length], text_BE[:, :length], labels_B) for length in (2, 5, 8)]
        expected = sum(share * prefix for share, prefix in zip(shares, prefixes, strict=True))
        torch.testing.assert_close(found, expected, **EXACT)
        found_gradients = _gradients(found, image_BE, text_BE, *several.parameters())
        expected_gradients = _gradients(expected, image_BE, text_BE, *one.parameters())
        torch.testing.assert_close(found_gradients, expected_gradients, **EXACT)


@BOTH
@pytest.mark.parametrize("lengths", [None, [3, 8]])
def test_gradients_are_those_of_finite_differences(loss_class, lengths):
    loss = loss_class(lengths).double()
    nn.init.constant_(loss.logit_scale, 1.0)
    names, parameters = zip(*loss.named_parameters(), strict=True)
    keys = (torch.tensor([3, 3, -1, -1]), caption_ids(["p", "q", "r", "p"]))

    def function(image_BE, text_BE, *values):
        named = dict(zip(names, values, strict=True))
        return torch.func.functional_call(loss, named, (image_BE, text_BE, *keys))

    assert torch.autograd.gradcheck(function, (*_pairs(4), *parameters))


@BOTH
def test_scale_is_clamped_at_100_and_comes_back(loss_class):
    image_BE, text_BE = _pairs()
    loss = loss_class(max_logit_scale=100.0).double()
    nn.init.constant_(loss.logit_scale, 10.0)
    loss.bound_scale()
    assert loss.logit_scale.item() == pytest.approx(math.log(100))
    value = loss(image_BE, text_BE)  # pairs at random: a lower scale is better
    value.backward()
    torch.optim.SGD(loss.parameters(), lr=0.01).step()
    loss.bound_scale()
    assert loss.logit_scale.item() < math.log(100) - 0.01
    assert loss(image_BE, text_BE) < value


def test_a_pretrained_scale_above_the_bound_is_refused():
    """SigLIP's are, such as 117.3 of its B/16: its loss has no bound. CLIP's own, rounded, are not."""
    loss = SoftmaxLoss(key="heads.x.")
    loss.begin_with({"logit_scale": 4.6052})
    loss.check_scale()
    loss.begin_with({"logit_scale": 4.765})
    expected = "heads.x.max_logit_scale: found 100, and model.encoder.init_from gives a logit_scale of 117.3"
    with pytest.raises(ValueError, match=expected):
        loss.check_scale()
    loss = SigmoidLoss()
    loss.begin_with({"logit_scale": 4.765})
    loss.check_scale()
    loss.bound_scale()
    assert loss.logit_scale.item() == pytest.approx(4.765)


def test_the_scale_of_a_sharded_loss_is_bounded(tmp_path):
    """FSDP2 on two gloo ranks: the shard itself, which is what the optimizer changes."""

    def work(rank):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        loss = SoftmaxLoss(init_logit_scale=100.0)
        fully_shard(loss, mesh=init_device_mesh("cpu", (2,)))
        with torch.no_grad():
            loss.logit_scale.add_(0.5)
        loss.bound_scale()
        return loss.logit_scale.full_tensor().item()

    assert on_ranks(2, work, tmp_path) == pytest.approx([math.log(100)] * 2)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_embeddings_are_compared_in_float32(loss_class, dtype):
    image_BE, text_BE = (x.detach().to(dtype).requires_grad_() for x in _pairs(64, 32))
    loss = loss_class()
    nn.init.constant_(loss.logit_scale, math.log(100))
    exact = loss(image_BE.double(), text_BE.double())
    exact_gradients = _gradients(exact, image_BE, text_BE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(image_BE, text_BE)
    assert found.dtype == torch.float32
    # Logits of 100 are exact to 8e-6 in float32 (to 0.25 in bfloat16).
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
    # As GradScaler does. The loss scaled thus has gradients that would underflow in float16 without.
    gradients = _gradients(found * 2.0**12, image_BE, text_BE)
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == dtype
        error = (gradient.double() / 2**12 - exact_gradient.double()).norm() / exact_gradient.double().norm()
        assert error < torch.finfo(dtype).eps


@BOTH
def test_without_a_gradient_the_value_is_the_same(loss_class):
    loss = loss_class([4, 8]).double()
    image_BE, text_BE = _pairs()
    expected = loss(image_BE, text_BE).detach()
    with torch.no_grad():
        value = loss(image_BE, text_BE)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected, **EXACT)
    with torch.inference_mode():
        torch.testing.assert_close(loss(image_BE, text_BE), expected, **EXACT)
    # A frozen image tower: texts and parameters still learn.
    frozen = loss(image_BE.detach(), text_BE)
    torch.testing.assert_close(_gradients(frozen, text_BE), _gradients(loss(image_BE, text_BE), text_BE), **EXACT)


@BOTH
@pytest.mark.parametrize("lengths", [None, [2, 4, 8]])
def test_no_logits_are_kept_for_the_backward_pass(loss_class, lengths):
    num_pairs, saved = 40, []

    def pack(x):
        saved.append(weakref.ref(x))
        return x

    loss = loss_class(lengths).double()
    with saved_tensors_hooks(pack, lambda x: x):
        value = loss(*_pairs(num_pairs))
    gc.collect()
    assert value.requires_grad
    alive = [x for reference in saved if (x := reference()) is not None]
    assert alive
    assert max(x.numel() for x in alive) < num_pairs**2


@BOTH
@pytest.mark.parametrize("lengths", [None, [2, 3]])
@pytest.mark.parametrize("keys", [False, True])
def test_many_chunks_equal_one(loss_class, lengths, keys, monkeypatch):
    loss = loss_class(lengths).double()
    pairs = _pairs(29, 5)
    given = (torch.arange(29) % 6 - 1, torch.arange(29) // 4) if keys else ()

    def results():
        value = loss(*pairs, *given)
        return value.detach(), loss.pair_losses_B, _gradients(value, *pairs, *loss.parameters())

    whole = results()
    chunks = []
    monkeypatch.setattr(logit_chunks.Chunk, "logits", _noting(chunks, logit_chunks.Chunk.logits))
    # Blocks of 4 texts and one of 1, beside 5 images at a time and 4 at last; then 5 blocks of 6 beside 12 images.
    for elements, shapes in ((1, {(5, 4), (4, 4), (5, 1), (4, 1)}), (29 * 29 // 4, {(29, 6), (29, 5)})):
        monkeypatch.setitem(logit_chunks._MIN_ELEMENTS, "cpu", elements)
        torch.testing.assert_close(results(), whole, **EXACT)
        assert set(chunks) == shapes
        chunks.clear()


def _noting(shapes, logits):
    def noted(*arguments):
        result = logits(*arguments)
        shapes.append(tuple(result.shape))
        return result

    return noted


def test_caption_ids_are_those_of_b2sum():
    # printf 'A red kite' | b2sum -l 64, and so on; shifted into 63 bits.
    digests = {"नमस्ते": 0xC6C6A62E0DCCD18E, "": 0xE4A6A0577479B2B4, "A red kite": 0x353877F0DD424DB1}
    ids = caption_ids([*digests, "A red kite"])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [digest >> 1 for digest in [*digests.values(), digests["A red kite"]]]


@pytest.mark.parametrize(
    ("lengths", "weights", "message"),
    [
        ([0, 4], None, "such as"),
        ([8, 4], None, r"such as \[4, 8\]"),
        ([4, 4], None, r"such as \[4\]"),
        ([], None, "lengths=\\[\\]"),
        ([4, 8], [1.0], r"2 weight\(s\)"),
        ([4, 8], [0.0, 0.0], "not all 0"),
        ([4, 8], [-1.0, 2.0], ">= 0"),
        (None, [1.0, 2.0], r"1 weight\(s\)"),
    ],
)
def test_wrong_lengths_are_named(lengths, weights, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxLoss(lengths, weights)


@BOTH
def test_wrong_inputs_are_named(loss_class):
    image_BE, text_BE = _pairs()
    with pytest.raises(ValueError, match="allow 1 to 8"):
        loss_class([4, 16])(image_BE, text_BE)
    with pytest.raises(ValueError, match=r"image_BE \(6, 8\), text_BE \(5, 8\)"):
        loss_class()(image_BE, text_BE[:5])
    with pytest.raises(ValueError, match=r"labels_B is torch.int64 \(5,\), expected an integer per pair: \(6,\)"):
        loss_class()(image_BE, text_BE, torch.arange(5))
    with pytest.raises(ValueError, match=r"caption_ids_B is torch\.float32"):
        loss_class()(image_BE, text_BE, None, torch.zeros(6))


# Several processes. Everything below runs in one launch per world size, as starting processes is what takes long.

CASES = [
    (loss_class, lengths, keys)
    for loss_class in (SoftmaxLoss, SigmoidLoss)
    for lengths, keys in ((None, ""), (None, "labels"), ([2, 6], "captions"), ([2, 6], "labels and captions"))
]


class Towers(nn.Module):
    """A linear encoder on each side and the loss, as a whole so that DDP averages the temperature as well."""

    def __init__(self, loss_class, lengths):
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text, self.loss = nn.Linear(5, 6), nn.Linear(7, 6), loss_class(lengths)
        self.double()

    def forward(self, image_BD, text_BD, *keys):
        return self.loss(self.image(image_BD), self.text(text_BD), *keys)


def _batch(keys, rows):
    """Four pairs per rank; labels and captions repeat within and across four ranks (and two)."""
    generator = torch.Generator().manual_seed(2)
    image_BD, text_BD = torch.randn(16, 5, generator=generator), torch.randn(16, 7, generator=generator)
    labels_B = torch.tensor([0, 1, 1, -1, 0, 2, -1, 3, 3, 1, -1, 4, 5, -1, 0, 5])
    captions_B = caption_ids(list("abcdaefbgehijakl"))
    labels_B, captions_B = labels_B if "labels" in keys else None, captions_B if "captions" in keys else None
    tensors = (image_BD.double(), text_BD.double(), labels_B, captions_B)
    return [None if x is None else x[rows] for x in tensors]


def _named_gradients(module):
    full = {name.removeprefix("module."): x.grad for name, x in module.named_parameters()}
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in full.items()}


def _results(wrap, rows, average):
    """The loss and the gradients of every case, with `rows` of the batch on this rank."""
    results = []
    for loss_class, lengths, keys in CASES:
        towers = wrap(Towers(loss_class, lengths))
        loss = towers(*_batch(keys, rows))
        loss.backward()
        results.append((average(loss.detach()), _named_gradients(towers)))
    return results


def _many_chunks(rank, world):
    """Losses, pairs' parts and gradients of rows of 10 pairs per rank, in 5 blocks of texts, by 3 images at a time."""
    results = []
    keys = [torch.arange(10 * world) % 7 - 1, torch.arange(10 * world) // 3]
    rows = slice(10 * rank, 10 * rank + 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(logit_chunks._MIN_ELEMENTS, "cpu", 1)
        for loss_class, lengths in product((SoftmaxLoss, SigmoidLoss), (None, [1, 2])):
            inputs = [x.detach()[rows].requires_grad_() for x in _pairs(10 * world, 3)]
            loss = loss_class(lengths).double()
            value = loss(*inputs, *(key_B[rows] for key_B in keys))
            gradients = _gradients(value, *inputs, *loss.parameters())
            results.append((value.detach(), loss.pair_losses_B, gradients))
    return results


def _bf16_results(rows, world):
    """This rank's loss of bfloat16 embeddings, and its rows of the gradients, averaged over the ranks."""
    results = []
    for loss_class in (SoftmaxLoss, SigmoidLoss):
        inputs = [x.detach().bfloat16()[rows].requires_grad_() for x in _pairs(16, 8)]
        loss = loss_class()(*inputs)
        loss.backward()
        results.append((loss.detach(), [x.grad / world for x in inputs]))
    return results


def _pair_losses(rows):
    """The parts of this rank's pairs in every case."""
    results = []
    for loss_class, lengths, keys in CASES:
        towers = Towers(loss_class, lengths)
        towers(*_batch(keys, rows))
        results.append(towers.loss.pair_losses_B)
    return torch.stack(results)


def _average(loss):
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def _shard(module):
    for part in (module.image, module.text, module.loss, module):
        fully_shard(part)
    return module


def _worker(rank, world, folder):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=60), world, rank)
    rows = slice(4 * rank, 4 * rank + 4)
    results = {
        "ddp": _results(DistributedDataParallel, rows, _average),
        "fsdp": _results(_shard, rows, _average),
        "bf16": _bf16_results(rows, world),
        "pairs": _pair_losses(rows),
        "chunks": _many_chunks(rank, world),
    }
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_equal_the_big_batch(world, tmp_path):
    torch.multiprocessing.spawn(_worker, (world, str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    expected = _results(lambda towers: towers, slice(4 * world), lambda loss: loss)
    for rank in ranks:
        torch.testing.assert_close(rank["ddp"], expected, **EXACT)
        torch.testing.assert_close(rank["fsdp"], expected, **EXACT)
    pairs = torch.cat([rank["pairs"] for rank in ranks], dim=1)
    torch.testing.assert_close(pairs, _pair_losses(slice(4 * world)), **EXACT)
    expected = _bf16_results(slice(4 * world), 1)
    for case, (loss, gradients) in enumerate(expected):
        losses, own_gradients = zip(*(rank["bf16"][case] for rank in ranks), strict=True)
        torch.testing.assert_close(torch.stack(losses).mean(), loss, rtol=1e-6, atol=0)
        # Summed over the ranks in float32 and rounded to bfloat16 once: two neighbours of the format at most apart.
        for gathered, gradient in zip(zip(*own_gradients, strict=True), gradients, strict=True):
            torch.testing.assert_close(torch.cat(gathered), gradient, rtol=2**-7, atol=1e-6)
    pairs, keys = _pairs(10 * world, 3), (torch.arange(10 * world) % 7 - 1, torch.arange(10 * world) // 3)
    for case, (loss_class, lengths) in enumerate(product((SoftmaxLoss, SigmoidLoss), (None, [1, 2]))):
        loss = loss_class(lengths).double()
        value = loss(*pairs, *keys)
        values, pair_losses, gradients = zip(*(rank["chunks"][case] for rank in ranks), strict=True)
        torch.testing.assert_close(torch.stack(values).mean(), value, **EXACT)
        torch.testing.assert_close(torch.cat(pair_losses), loss.pair_losses_B, **EXACT)
        image, text, *parameters = zip(*gradients, strict=True)
        found = [torch.cat(image) / world, torch.cat(text) / world, *(torch.stack(x).mean(0) for x in parameters)]
        torch.testing.assert_close(found, list(_gradients(value, *pairs, *loss.parameters())), **EXACT)
