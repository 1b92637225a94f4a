"""Against loops in float64, Sinkhorn's iteration as it is written in the papers, and lightly's losses.

Numbers of lightly are what its 1.6.0 gave for inputs in float64 that `waves` makes: a loss and its gradient's norm.
Where it is installed (`pip install --no-deps lightly`) they are compared with what it gives now.
"""

import math

import pytest
import torch
from processes import on_ranks
from torch.testing import assert_close

from indiclip.chunked_cross_entropy import chunked_cross_entropy
from indiclip.tasks.block_masks import predicted_tokens
from indiclip.tasks.self_distillation_losses import Projector, Targets, dino_loss, koleo_loss, sinkhorn


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def waves(*shape, seed=0):
    """Numbers in -1..1 by a formula, the same in every version of torch."""
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(1.3 * n * (1 + 0.1 * seed) + 0.01 * n**2 + seed).reshape(shape)


def loss_and_norm(loss, of):
    (gradient,) = torch.autograd.grad(loss, of)
    return loss.item(), gradient.norm().item()


# DINOLoss(6, teacher_temp=0.04, student_temp=0.1), three steps; 2 crops of the teacher and 5 of the student.
DINO = [
    (9.457552357053979, 2.2573782196159136), (9.933161062736598, 2.436563821095802),
    (7.9584235757762105, 2.115929609897288),
]  # fmt: skip
# IBOTPatchLoss(6) of what a mask hides, and IBOTPlusPlusPatchLoss(6), which counts what it shows by half.
IBOT = {0.0: (9.950253494423023, 2.9613245538186272), 0.5: (14.338903264233078, 3.226683129308932)}
KOLEO = (1.1299194065179285, 2.0809779078177526)
EYE = torch.eye(6, dtype=torch.float64)  # prototypes, with which points are the logits themselves


def iterated(logits_RK, temperature, iterations=3):
    """Algorithm 1 of SwAV's appendix (arXiv:2006.09882): each prototype gets 1/K of all, each row 1/R."""
    q_KR = (logits_RK / temperature).exp().T
    q_KR = q_KR / q_KR.sum()
    K, R = q_KR.shape
    for _ in range(iterations):
        q_KR = q_KR / q_KR.sum(1, keepdim=True) / K
        q_KR = q_KR / q_KR.sum(0, keepdim=True) / R
    return (q_KR * R).T


def test_sinkhorn_is_the_iteration_of_the_papers():
    logits_RK = random(7, 5) / 3
    assert_close(sinkhorn(logits_RK, 0.07), iterated(logits_RK, 0.07))
    # By hand: exp gives ((2, 1), (1, 1)); one iteration divides columns by 3 and 2, then rows by 7/6 and 5/6.
    by_hand = torch.tensor([[4 / 7, 3 / 7], [2 / 5, 3 / 5]])
    assert_close(sinkhorn(torch.tensor([[math.log(2), 0.0], [0, 0]]), 1.0, iterations=1), by_hand)


def test_sinkhorn_shares_out_prototypes_where_a_softmax_takes_one_and_at_any_temperature():
    logits_RK = torch.tensor([1.0, 0, 0, 0]) + 0.01 * random(40, 4).float()
    assert logits_RK.argmax(1).unique().tolist() == [0]
    used = sinkhorn(logits_RK, 0.02, iterations=20).mean(0)
    assert_close(used, torch.full((4,), 0.25), atol=1e-3, rtol=0)
    assert sinkhorn(1000 * logits_RK, 0.001).isfinite().all()


@pytest.mark.parametrize("centring", ["sinkhorn", "mean"])
def test_targets_are_those_of_all_ranks_also_where_one_has_no_row(tmp_path, centring):
    steps = [random(9, 6, seed=seed) for seed in (1, 2)]

    def targets(rank=None):
        cuts = [slice(None)] * 2 if rank is None else [slice(0, 5), slice(5, 9)][rank], slice(0, 9 * (rank == 1))
        made = Targets(6, 0.07, centring).double()
        found = []
        for logits, cut in zip(steps, cuts if rank is not None else cuts[0], strict=True):
            found.append(made.of(logits[cut], EYE)(slice(None)))
            made.update(torch.ones(()))
        return found

    whole, parts = targets(), on_ranks(2, targets, tmp_path)
    for number, expected in enumerate(whole):
        assert_close(torch.cat([part[number] for part in parts]), expected)


def test_a_running_mean_centres_as_that_of_lightly():
    targets = Targets(6, 0.04, "mean").double()
    for seed, theirs in enumerate(DINO):
        teacher_BGK, student_BSK = waves(4, 2, 6, seed=seed), waves(4, 5, 6, seed=seed + 9).requires_grad_()
        of_teacher = targets.of(teacher_BGK.flatten(0, 1), EYE)(slice(None)).unflatten(0, (4, 2))
        targets.update(torch.ones(()))
        loss = dino_loss(of_teacher, student_BSK, 0.1, same_crops=True)
        assert loss_and_norm(loss, student_BSK) == pytest.approx(theirs, rel=1e-7)


@pytest.mark.parametrize("same_crops", [True, False])
def test_each_crop_is_compared_with_the_others_of_its_image(same_crops):
    targets_BGK, logits_BSK = random(3, 2, 5).softmax(-1), random(3, 4, 5, seed=1)
    terms = [
        -(targets_BGK[b, g] * (logits_BSK[b, s] / 0.1).log_softmax(-1)).sum()
        for b in range(3)
        for g in range(2)
        for s in range(4)
        if not (same_crops and g == s)
    ]
    assert_close(dino_loss(targets_BGK, logits_BSK, 0.1, same_crops), torch.stack(terms).mean())


@pytest.mark.parametrize(("visible_weight", "theirs"), IBOT.items())
def test_each_image_weighs_as_much_in_the_loss_of_tokens_as_in_lightly(visible_weight, theirs):
    mask_BHW = waves(4, 3, 3, seed=5) > 0.3
    rows, weights = predicted_tokens(list(mask_BHW.numpy()), 9, None, visible_weight)
    rows, weights = torch.from_numpy(rows), torch.from_numpy(weights).double()
    teacher_RK, student_RK = waves(36, 6), waves(36, 6, seed=1).requires_grad_()
    targets = Targets(6, 0.04, "mean").double().of(teacher_RK[rows], EYE)
    total, _ = chunked_cross_entropy(student_RK[rows] / 0.1, EYE, targets, weights, elements=12)  # two rows at a time
    assert loss_and_norm(total / 4, student_RK) == pytest.approx(theirs, rel=1e-6)  # weights are float32


def test_the_numbers_of_lightly_are_its_own():
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    dino = lightly.DINOLoss(6, teacher_temp=0.04, student_temp=0.1).double()
    for seed, theirs in enumerate(DINO):
        student_BSK = waves(4, 5, 6, seed=seed + 9).requires_grad_()
        loss = dino([*waves(4, 2, 6, seed=seed).unbind(1)], [*student_BSK.unbind(1)])
        assert loss_and_norm(loss, student_BSK) == pytest.approx(theirs, rel=1e-7)
    mask_BHW, teacher_RK = waves(4, 3, 3, seed=5) > 0.3, waves(36, 6)
    student_RK = waves(36, 6, seed=1).requires_grad_()
    hidden = mask_BHW.flatten()
    masked = lightly.IBOTPatchLoss(6, teacher_temp=0.04).double()(teacher_RK[hidden], student_RK[hidden], mask_BHW)
    assert loss_and_norm(masked, student_RK) == pytest.approx(IBOT[0.0], rel=1e-7)
    both = lightly.IBOTPlusPlusPatchLoss(6, teacher_temp=0.04).double()
    loss = both(teacher_RK, student_RK, mask_BHW, visible_loss_weight=0.5)
    assert loss_and_norm(loss, student_RK) == pytest.approx(IBOT[0.5], rel=1e-7)
    x_BD = waves(8, 4).requires_grad_()
    assert loss_and_norm(lightly.KoLeoLoss()(x_BD), x_BD) == pytest.approx(KOLEO, rel=1e-7)


def test_koleo_is_of_the_nearest_of_all_ranks_gradients_too(tmp_path):
    x_BD = random(8, 4)

    def loss_and_gradient(rank=None):
        own = (x_BD if rank is None else x_BD[4 * rank : 4 * rank + 4]).clone().requires_grad_()
        loss = koleo_loss(own)
        loss.backward()
        return loss.detach(), own.grad

    expected, gradient = loss_and_gradient()
    unit_BD = x_BD / x_BD.norm(dim=1, keepdim=True)
    distances = torch.cdist(unit_BD, unit_BD).fill_diagonal_(math.inf).min(1).values
    assert_close(expected, -distances.log().mean(), rtol=1e-6, atol=1e-6)  # which has no epsilon
    parts = on_ranks(2, loss_and_gradient, tmp_path)
    assert_close((parts[0][0] + parts[1][0]) / 2, expected)
    assert_close(torch.cat([gradient for _, gradient in parts]) / 2, gradient)  # a rank's loss is a half of the mean


def test_koleo_is_that_of_lightly():
    x_BD = waves(8, 4).requires_grad_()
    assert loss_and_norm(koleo_loss(x_BD), x_BD) == pytest.approx((1.1299194065179285, 2.0809779108177526), rel=1e-7)


def test_logits_are_cosines_to_the_prototypes():
    projector = Projector(6, 8, 4, 10).double()
    points = projector(random(3, 6))
    expected = torch.cosine_similarity(points[:, None], projector.prototypes_KC[None], dim=-1)
    assert_close(projector.logits(points), expected)
    assert [tuple(layer.weight.shape) for layer in projector.layers[::2]] == [(8, 6), (8, 8), (4, 8)]
