"""The numbers of masked modelling by hand."""

import pytest
import torch

from indiclip.tasks.masked_metric import MaskedMetric


def test_accuracies_beside_the_most_frequent_answer():
    metric = MaskedMetric()
    metric.update("mim", torch.tensor([1, 2]), torch.tensor([1, 3]))
    metric.update("mim", torch.tensor([3, 3]), torch.tensor([3, 1]))
    metric.update("mim", torch.tensor([4]), torch.tensor([3]))
    metric.update("mlm", torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    metric.update("mmm_image", torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0]]))
    assert {name: value.item() for name, value in metric.compute().items()} == {
        "mim_accuracy": pytest.approx(2 / 5),
        "mim_most_frequent": pytest.approx(3 / 5),
        "mmm_image_explained": pytest.approx(1 - 4 / 5),
    }
