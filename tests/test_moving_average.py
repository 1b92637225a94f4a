"""The average of weights against its formula in float64."""

import torch
from torch import nn

from indiclip.moving_average import follow, update_averages


def test_an_average_moves_by_its_share():
    averages, values = [torch.tensor([1.0, 3.0])], [torch.tensor([2.0, -1.0])]
    update_averages(averages, values, 0.75)
    assert torch.equal(averages[0], torch.tensor([1.25, 2.0]))


def test_an_average_moves_or_stays_as_the_device_says():
    """Of several types, as a model has them whose running statistics stay in float32."""
    averages = [torch.tensor([1.0, 3.0]), torch.tensor([[1.0]], dtype=torch.float64)]
    values = [torch.tensor([2.0, -1.0]), torch.tensor([[0.0]], dtype=torch.float64)]
    for made, expected in ((0.0, ([1.0, 3.0], 1.0)), (1.0, ([1.25, 2.0], 0.75))):
        update_averages(averages, values, 0.75, torch.tensor(made))
        assert (averages[0].tolist(), averages[1].item()) == expected


def test_a_teacher_follows_weights_and_running_statistics():
    student, teacher = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2))
    before = {name: value.double() for name, value in teacher.state_dict().items()}
    student(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    follow(teacher, student, 0.9)
    now = student.state_dict()
    for name, value in teacher.state_dict().items():
        expected = 0.9 * before[name] + 0.1 * now[name].double() if value.is_floating_point() else before[name]
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)
    follow(teacher, student, 0.0)
    assert torch.equal(teacher[0].weight, student[0].weight)
    assert torch.equal(teacher[1].running_mean, student[1].running_mean)
