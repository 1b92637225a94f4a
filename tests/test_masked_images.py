"""Hidden tokens and their patches: places and pixels by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import batch_images, noise

from indiclip.tasks.masked_images import patches_of_tokens, patches_per_side, with_hidden_tokens

FIRST, SECOND = np.array([[True, False], [False, False]]), np.array([[False, True]])


def backbone(stride=8, patch_size=8, canvas_hw=None):
    mean_P, std_P = torch.full((3 * patch_size**2,), 100.0), torch.full((3 * patch_size**2,), 2.0)
    return SimpleNamespace(stride=stride, patch_size=patch_size, canvas_hw=canvas_hw, mean_P=mean_P, std_P=std_P)


def hidden(images, masks, tower):
    """Which patches are another colour, and which tokens are predicted."""
    learned_P = torch.ones(len(tower.mean_P), requires_grad=True)
    found, rows_R, _ = with_hidden_tokens(images, masks, patches_of_tokens(images, tower), learned_P, tower)
    changed_BN = (found["patches_BNP"] != images["patches_BNP"]).any(-1)
    assert (found["patches_BNP"][changed_BN] == 102).all()
    found["patches_BNP"].sum().backward()
    assert (learned_P.grad == 2 * changed_BN.sum()).all()
    return changed_BN.int().tolist(), rows_R.tolist()


def test_each_hidden_token_is_one_learned_patch():
    images = batch_images([noise(16, 16), noise(8, 16)], 8, 64)
    assert hidden(images, [FIRST, SECOND], backbone()) == ([[1, 0, 0, 0], [0, 1, 0, 0]], [0, 5])


def test_a_token_of_four_patches_hides_them_all():
    """On a canvas of 2 x 3 tokens; of the larger image the second row and column of tokens are not whole."""
    tower = backbone(16, 8, (32, 48))
    images = batch_images([noise(24, 24), noise(8, 32)], 8, 64)
    first, second = patches_of_tokens(images, tower)
    assert first[1, 1].tolist() == [[8, 8], [8, 8]]
    assert second[0].tolist() == [[[9, 10], [9, 10]], [[11, 12], [11, 12]]]
    expected = [[1, 1, 0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0, 0]]
    assert hidden(images, [FIRST, SECOND], tower) == (expected, [0, 7])


def test_an_image_with_dropped_patches_is_a_row():
    images = {**batch_images([noise(40, 24), noise(16, 48)], 8, 64), "num_patches": [15, 5]}
    assert [of.shape for of in patches_of_tokens(images, backbone())] == [(5, 3, 1, 1), (1, 5, 1, 1)]


@pytest.mark.parametrize("stride", [4, 12])
def test_tokens_of_part_of_a_patch_are_refused(stride):
    with pytest.raises(ValueError, match=f"key: the backbone's tokens are {stride} pixels apart.* or nothing$"):
        patches_per_side(backbone(stride), "key", ", or nothing")
    assert patches_per_side(backbone(16), "key") == 2


def test_a_canvas_with_a_part_of_a_token_is_refused():
    """Some models round it up and others down."""
    with pytest.raises(ValueError, match=r"heads.x: model.encoder.backbone.canvas_hw is \[40, 48\].* multiples of 16"):
        patches_per_side(backbone(16, 8, (40, 48)), "heads.x")
