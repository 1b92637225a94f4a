"""The distance to teachers against open_clip's DistillClipLoss, and against the formula written out in float64."""

import pytest
import torch
import torch.nn.functional as F
from processes import on_ranks

from indiclip import chunked_cross_entropy
from indiclip.tasks.distillation_loss import DistillationLoss

SCALES = torch.tensor([30.0, 8.0])


def pairs(number=12, embed_dim=10, lengths=(7, 9)):
    """Embeddings of a student, and of two teachers of two lengths, the shorter with zeros behind."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teachers = [torch.stack([F.pad(draw(number, n), (0, max(lengths) - n)) for n in lengths], 1) for _ in range(2)]
    return [draw(number, embed_dim).requires_grad_() for _ in range(2)], teachers


def formula(student, teachers, log_scale, lengths, weights, scales=SCALES):
    """MobileCLIP's equation, one row after the other."""
    total = 0.0
    for length, weight in zip(lengths, weights, strict=True):
        image, text = (F.normalize(x[:, :length], dim=1) for x in student)
        for direction in (0, 1):
            own, other = (image, text) if direction == 0 else (text, image)
            for i in range(len(own)):
                student_log = torch.log_softmax(log_scale.exp() * (own[i] @ other.T), 0)
                for t, scale in enumerate(scales):
                    a, b = teachers[direction][:, t], teachers[1 - direction][:, t]
                    taught = torch.softmax(scale * (F.normalize(a[i], dim=0) @ F.normalize(b, dim=1).T), 0)
                    divergence = (taught * (taught.log() - student_log)).sum()
                    total = total + weight * divergence / (2 * len(own) * len(scales))
    return total


def gradients_of(loss, student, log_scale):
    return torch.autograd.grad(loss, [*student, log_scale])


@pytest.mark.parametrize("chunk", [2**20, 40])
def test_values_and_gradients_are_those_of_the_formula(chunk, monkeypatch):
    """At three lengths of unequal weights; the second time some rows at a time."""
    monkeypatch.setitem(chunked_cross_entropy._ELEMENTS, "cpu", chunk)
    student, teachers = pairs()
    loss = DistillationLoss([4, 10], [3.0, 1.0]).double()
    ours = loss(*student, *teachers, SCALES)
    log_scale = loss.logit_scale.detach().clone().requires_grad_()
    expected = formula(student, teachers, log_scale, [4, 10], [0.75, 0.25])
    assert ours.item() == pytest.approx(expected.item(), rel=1e-12)
    found = gradients_of(ours, student, loss.logit_scale)
    for own, other in zip(found, gradients_of(expected, student, log_scale), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)


def test_gradients_are_those_of_open_clip():
    """Of one teacher at full length, to the last digits; its value has the teacher's entropy less."""
    peer = pytest.importorskip("open_clip.loss").DistillClipLoss()
    student, teachers = pairs(lengths=(9,))
    loss = DistillationLoss().double()
    ours = loss(*student, *teachers, SCALES[:1])
    log_scale = loss.logit_scale.detach().clone().requires_grad_()
    units = [F.normalize(x, dim=1) for x in student]
    taught = [F.normalize(x[:, 0], dim=1) for x in teachers]
    _, theirs = peer(*units, log_scale.exp(), *taught, SCALES[0].double())
    for own, other in zip(
        gradients_of(ours, student, loss.logit_scale), gradients_of(theirs, student, log_scale), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-14)
    assert 0 < ours.item() < theirs.item()


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    student, _ = pairs()
    loss = DistillationLoss().double()
    own = [x.detach()[:, None] for x in student]
    value = loss(*student, *own, loss.logit_scale.detach().exp())
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert all(g.abs().max() < 1e-12 for g in gradients_of(value, student, loss.logit_scale))


def test_two_ranks_are_one_with_all_pairs(tmp_path):
    """The mean over the ranks of values and gradients, as DDP takes it."""
    student, teachers = pairs()

    def step(rows):
        loss = DistillationLoss([4, 10]).double()
        own = [x.detach()[rows].requires_grad_() for x in student]
        value = loss(*own, *(x[rows] for x in teachers), SCALES)
        value.backward()
        return value.item(), [x.grad for x in own], loss.logit_scale.grad

    value, gradients, of_scale = step(slice(None))
    found = on_ranks(2, lambda rank: step(slice(6 * rank, 6 * rank + 6)), tmp_path)
    assert sum(one[0] for one in found) / 2 == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(sum(one[2] for one in found) / 2, of_scale, rtol=1e-9, atol=1e-12)
    for side in (0, 1):
        whole = torch.cat([one[1][side] for one in found]) / 2
        torch.testing.assert_close(whole, gradients[side], rtol=1e-9, atol=1e-12)


def test_it_is_in_float32_under_autocast_and_needs_no_gradients():
    student, teachers = pairs()
    loss = DistillationLoss([4, 10])
    halves = [x.detach().bfloat16() for x in student]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        value = loss(*halves, *(x.half() for x in teachers), SCALES)
    exact = formula([x.double() for x in halves], teachers, loss.logit_scale.detach().double(), [4, 10], [0.5, 0.5])
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=1e-2)  # the teachers' were rounded to 11 bits
