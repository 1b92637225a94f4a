"""The losses of mixed images against dense matrices of soft targets, written out by hand in float64."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from indiclip import logit_chunks
from indiclip.logit_chunks import Mixture
from indiclip.losses import SigmoidLoss, SoftmaxLoss

EXACT = {"rtol": 1e-9, "atol": 1e-11}
BOTH = pytest.mark.parametrize("loss_class", [SoftmaxLoss, SigmoidLoss])
# Labels and captions that are not the same pairs' positives; -1 has none.
LABELS = torch.tensor([4, -1, 4, 3, 2, 4, -1, 3])
CAPTIONS = torch.tensor([1, 2, 3, 4, 1, 5, 6, 6])
PARTNER = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
SHARE = torch.tensor([0.7, 1.0, 0.25, 0.0, 0.7, 0.9, 0.25, 0.5], dtype=torch.float64)  # some pairs of two sizes
BATCH = 8


def pairs(seed=0, length=6):
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, BATCH, length, generator=generator, dtype=torch.float64).unbind()
    return image.requires_grad_(), text.requires_grad_()


def dense(loss, image_BE, text_BE, share_B=SHARE, labels_B=LABELS):
    """Each pair's part: an image's row and a text's column of the whole matrix."""
    size = range(BATCH)
    positive = torch.eye(BATCH, dtype=torch.float64)
    for i in size:
        for j in size:
            if labels_B[i] == labels_B[j] >= 0 or CAPTIONS[i] == CAPTIONS[j]:
                positive[i, j] = 1
    number = positive.sum(1)
    shown = share_B[:, None] * positive + (1 - share_B)[:, None] * positive[PARTNER]
    own, other = positive / number[:, None], positive[PARTNER] / number[PARTNER][:, None]
    of_image = share_B[:, None] * own + (1 - share_B)[:, None] * other
    of_text = shown / number[None]
    total = 0
    for length, weight in zip(loss.lengths or [image_BE.shape[1]], loss.length_weights, strict=True):
        image, text = (F.normalize(x[:, :length], dim=1) for x in (image_BE, text_BE))
        logits = loss.logit_scale.exp() * image @ text.T
        if isinstance(loss, SigmoidLoss):
            parts = F.binary_cross_entropy_with_logits(logits + loss.logit_bias, shown, reduction="none").sum(1)
        else:
            rows = -(of_image * logits.log_softmax(1)).sum(1)
            columns = -(of_text * logits.log_softmax(0)).sum(0)
            parts = (rows + columns) / 2
        total = total + weight * parts
    return total


@BOTH
@pytest.mark.parametrize("lengths", [None, [2, 6]])
@pytest.mark.parametrize("elements", [4, 2**18])  # in many chunks, and in one
def test_mixed_images_have_the_dense_matrix_of_soft_targets(loss_class, lengths, elements, monkeypatch):
    monkeypatch.setitem(logit_chunks._MIN_ELEMENTS, "cpu", elements)
    loss, (image, text) = loss_class(lengths).double(), pairs()
    inputs = [image, text, *loss.parameters()]
    found = loss(image, text, LABELS, CAPTIONS, Mixture(PARTNER, SHARE))
    expected = dense(loss, image, text)
    torch.testing.assert_close(loss.pair_losses_B, expected.detach(), **EXACT)
    torch.testing.assert_close(found, expected.mean(), **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected.mean(), inputs), **EXACT
    )


@BOTH
def test_a_whole_share_is_no_mixing(loss_class):
    loss, (image, text) = loss_class().double(), pairs()
    mixed = loss(image, text, LABELS, CAPTIONS, Mixture(PARTNER, torch.ones(BATCH)))
    torch.testing.assert_close(mixed, loss(image, text, LABELS, CAPTIONS), **EXACT)


def test_softmax_of_two_mixed_pairs_is_the_average_of_right_and_swapped():
    # Both images are 0.75 of one and 0.25 of the other: 0.75 * loss(image, text) + 0.25 * loss(image, swapped text).
    loss, (image, text) = SoftmaxLoss().double(), pairs()
    image, text = image[:2], text[:2]
    swap = torch.tensor([1, 0])
    found = loss(image, text, mixture=Mixture(swap, torch.tensor([0.75, 0.75])))
    torch.testing.assert_close(found, 0.75 * loss(image, text) + 0.25 * loss(image, text[swap]), **EXACT)


def _worker(rank, folder):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=60), 2, rank)
    # As `indiclip.loading.mixing` deals them: partners lie half a batch apart, so that both are on one rank.
    mine = slice(rank, None, 2)
    partner = torch.tensor([2, 3, 0, 1])
    results = []
    for loss_class in (SoftmaxLoss, SigmoidLoss):
        loss, inputs = loss_class([2, 6]).double(), [x.detach()[mine].requires_grad_() for x in pairs()]
        mixture = Mixture(partner, SHARE[mine])
        value = loss(*inputs, LABELS[mine], CAPTIONS[mine], mixture)
        results.append((value.detach(), torch.autograd.grad(value, inputs)))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path):
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case, loss_class in enumerate((SoftmaxLoss, SigmoidLoss)):
        loss, inputs = loss_class([2, 6]).double(), pairs()
        expected = dense(loss, *inputs).mean()
        values, gradients = zip(*(rank[case] for rank in ranks), strict=True)
        torch.testing.assert_close(torch.stack(values).mean(), expected.detach(), **EXACT)
        for of_ranks, whole in zip(zip(*gradients, strict=True), torch.autograd.grad(expected, inputs), strict=True):
            found = torch.stack(of_ranks, dim=1).flatten(0, 1)  # dealt in turn
            torch.testing.assert_close(found / 2, whole, **EXACT)  # DDP averages
