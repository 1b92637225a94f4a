"""Masks of tokens: their number and place by the definition, on grids of any size."""

import numpy as np
import pytest

from indiclip.tasks.block_masks import block_mask, masks_of, predicted_tokens


@pytest.mark.parametrize("grid_hw", [(1, 1), (1, 7), (2, 3), (8, 8), (5, 16)])
@pytest.mark.parametrize("kind", ["block", "large_block", "random"])
def test_a_share_of_each_crop_is_hidden_whatever_its_grid(grid_hw, kind):
    size = grid_hw[0] * grid_hw[1]
    for mask_HW in masks_of(range(50), [grid_hw] * 50, 1.0, (0.1, 0.5), kind):
        assert mask_HW.shape == grid_hw
        least, most = (0, 0) if size == 1 else (1, max(1, round(0.5 * size)))
        assert least <= mask_HW.sum() <= most


def test_block_masks_are_rectangles_and_have_their_number():
    masks = [block_mask(np.random.default_rng(seed), (16, 16), 64) for seed in range(40)]
    assert {int(mask.sum()) for mask in masks} == {64}
    alike = [(mask[1:] == mask[:-1]).mean() for mask in masks]
    assert np.mean(alike) > 0.85  # neighbours; of single random tokens 0.625 are alike
    assert len({mask.tobytes() for mask in masks}) == 40


def test_a_large_block_has_16_tokens_on_a_grid_of_14_by_14():
    """BEiT's least: where fewer are to be hidden, no block fits, and where as many are, some block does."""

    def alike(number, kind="large_block"):  # share of the tokens that are hidden as the one above them is
        hidden = np.stack(masks_of(range(20), [(14, 14)] * 20, 1.0, (number / 14**2,) * 2, kind))
        assert set(hidden.sum((1, 2))) == {number}
        return (hidden[:, 1:] & hidden[:, :-1]).sum() / hidden.sum()

    assert alike(15) < 0.15  # of single ones 15 / 196
    assert alike(20) > 0.5
    assert alike(15, "block") > 0.3


@pytest.mark.parametrize(("share", "expected"), [(0.5, {1}), (1.0, {2}), (0.0, {0}), (0.75, {1, 2})])
def test_a_share_of_the_crops_of_each_image_has_masks(share, expected):
    masks = masks_of(range(30), [(4, 4)] * 60, share, (0.5, 0.5), "random")
    numbers = {sum(bool(mask.any()) for mask in masks[2 * i : 2 * i + 2]) for i in range(30)}
    assert numbers == expected


def test_masks_are_of_the_image_wherever_it_lies():
    whole = masks_of([3, 4, 5], [(4, 4), (2, 3)] * 3, 0.5, (0.1, 0.5), "block")
    part = masks_of([5], [(4, 4), (2, 3)], 0.5, (0.1, 0.5), "block")
    assert all(np.array_equal(*pair) for pair in zip(whole[4:], part, strict=True))


def test_predicted_tokens_are_those_of_the_mask():
    masks = [np.array([[True, False], [False, False]]), np.array([[False, True]])]
    rows, weights = predicted_tokens(masks, 4, None)
    assert (rows.tolist(), weights.tolist()) == ([0, 5], [1, 1])
    rows, weights = predicted_tokens(masks, 4, None, visible_weight=0.5)
    assert rows.tolist() == [0, 1, 2, 3, 5, 4]
    assert weights == pytest.approx([1, *[0.5 / 3] * 3, 1, 0.5])
    rows, _ = predicted_tokens(masks, 9, canvas_columns=3, visible_weight=1.0)
    assert rows.tolist() == [0, 1, 3, 4, 10, 9]
