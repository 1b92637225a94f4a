"""Task gradients by hand."""

import pytest
import torch
from helpers import tiny_encoder

from heads.contrastive import Contrastive
from indiclip.module import MultiTask
from indiclip.training.callbacks import gradient_numbers


def test_task_gradients_by_hand():
    """Losses w0 + 2 w1 and 3 w0 - w1 of one parameter: norms sqrt(5) and sqrt(10), cosine 1 / sqrt(50)."""
    module = MultiTask(tiny_encoder(), [Contrastive()])
    weight = torch.nn.Parameter(torch.tensor([0.3, -0.2]))
    module.encoder.backbone = torch.nn.ParameterList([weight])
    module.head_losses = {"a": weight[0] + 2 * weight[1], "b": 3 * weight[0] - weight[1]}
    assert gradient_numbers(module) == {
        "train/a/backbone_grad_norm": pytest.approx(5**0.5),
        "train/b/backbone_grad_norm": pytest.approx(10**0.5),
        "train/grad_cosine/a_b": pytest.approx(1 / 50**0.5),
    }
