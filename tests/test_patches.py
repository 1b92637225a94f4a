"""Images as patches: nothing lost, aspect kept, and never more tokens than allowed."""

import numpy as np
import pytest
import torch
from PIL import Image

from indiclip import patches

PATCH_SIZES, BUDGETS = (4, 7, 8, 14, 16, 32), (1, 2, 16, 49, 256, 1024)


def random_sizes(number, seed):
    """(height, width, patch size, budget) with sides from 1 to 8,000, small ones as often as large ones."""
    rng = np.random.default_rng(seed)
    for height, width in np.exp(rng.uniform(0, np.log(8000), (number, 2))).astype(int).tolist():
        yield height, width, int(rng.choice(PATCH_SIZES)), int(rng.choice(BUDGETS))


def test_the_token_budget_is_never_exceeded():
    for height, width, patch, budget in random_sizes(4000, seed=0):
        new_height, new_width = patches.fit_hw(height, width, patch, budget)
        assert new_height % patch == new_width % patch == 0
        assert 1 <= (new_height // patch) * (new_width // patch) <= budget
        assert new_height < height + patch
        assert new_width < width + patch


def test_the_aspect_is_kept_within_a_patch():
    for height, width, patch, budget in random_sizes(4000, seed=1):
        new = patches.fit_hw(height, width, patch, budget)
        (long, short), (new_long, new_short) = sorted((height, width))[::-1], new if height >= width else new[::-1]
        if new_short > patch:  # one patch is the least there is, whatever the aspect
            assert abs(new_short - new_long / long * short) <= patch


def test_an_image_within_the_budget_keeps_its_size():
    assert patches.fit_hw(224, 160, 16, 140) == (224, 160)
    assert patches.fit_hw(224, 160, 16, 139) < (224, 160)
    assert patches.fit_hw(225, 160, 16, 256) == (240, 160)  # up to whole patches, never cut off


def test_a_canvas_is_filled_in_one_direction_at_least():
    for height, width, patch, budget in random_sizes(2000, seed=2):
        canvas = (patch * (1 + budget % 17), patch * (1 + budget % 5))
        rows, columns = patches.fit_canvas_hw(height, width, patch, canvas)
        assert rows % patch == columns % patch == 0
        assert patch <= rows <= canvas[0]
        assert patch <= columns <= canvas[1]
        assert rows == canvas[0] or columns == canvas[1]
    assert patches.fit_canvas_hw(100, 50, 16, (224, 224)) == (224, 112)


def test_the_order_inside_and_of_patches():
    image = torch.arange(3 * 4 * 6).reshape(3, 4, 6).to(torch.uint8)
    cells, coords = patches.patchify(image, 2)
    assert coords.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    # Row, column, channel: the pixel (2, 5) in the last patch's first row is its second.
    assert cells[5].reshape(2, 2, 3)[0, 1].tolist() == image[:, 2, 5].tolist()


def test_what_is_cut_up_is_put_together_again():
    rng = np.random.default_rng(0)
    sizes = [(32, 48), (16, 16), (80, 32), (16, 160)]
    originals = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    images = patches.batch_images(originals, patch_size=16, max_tokens=10)
    assert images["sizes_hw"] == sizes  # all within the budget
    assert images["scale"] == [(1.0, 1.0)] * 4
    for i, original in enumerate(originals):
        assert (patches.unpatchify(images, i) == original).all()


def test_a_batch_of_mixed_sizes_is_padded_to_its_longest():
    rng = np.random.default_rng(1)
    sizes = [(40, 40), (100, 30), (8, 8), (300, 600)]
    originals = [rng.integers(1, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    images = patches.batch_images(originals, patch_size=8, max_tokens=20)
    numbers = [height * width // 64 for height, width in images["sizes_hw"]]
    assert images["valid_BN"].sum(1).tolist() == numbers
    assert images["patches_BNP"].shape == (4, max(numbers), 192)
    assert images["patches_BNP"].dtype == torch.uint8
    for i, (number, (height, width)) in enumerate(zip(numbers, images["sizes_hw"], strict=True)):
        assert images["valid_BN"][i, :number].all()
        assert images["patches_BNP"][i, number:].sum() == 0
        cells = [tuple(cell) for cell in images["coords_BN2"][i, :number].tolist()]
        assert cells == [(row, column) for row in range(height // 8) for column in range(width // 8)]
        assert images["scale"][i] == (height / sizes[i][0], width / sizes[i][1])
        alone = patches.batch_images([originals[i]], patch_size=8, max_tokens=20)
        assert torch.equal(alone["patches_BNP"][0], images["patches_BNP"][i, :number])


def test_every_kind_of_image_gives_the_same_patches():
    array = np.random.default_rng(2).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [array, Image.fromarray(array), tensor, tensor / 255, (tensor / 255).double(), array[:, ::-1][:, ::-1]]
    images = patches.batch_images(kinds, patch_size=8, max_tokens=6)
    assert all(torch.equal(images["patches_BNP"][0], cells) for cells in images["patches_BNP"])


def test_transparent_pixels_are_white_as_in_training():
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    assert (patches.batch_images([clear], 8, 1)["patches_BNP"] == 255).all()


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.zeros((8, 8), np.uint8), r"image 1: found ndarray uint8 \(8, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), r"image 1: found ndarray uint8 \(8, 8, 4\)"),
        (np.zeros((8, 8, 3), np.float32), r"image 1: found ndarray float32 \(8, 8, 3\)"),
        (torch.full((3, 8, 8), 1.5), r"image 1: found Tensor torch\.float32 \(3, 8, 8\)"),
        (torch.full((3, 8, 8), torch.nan), r"image 1: found Tensor torch\.float32"),
        ("photo.jpg", r"image 1: found str"),
    ],
)
def test_no_image_is_named_by_its_position(image, found):
    with pytest.raises(ValueError, match=found + ".*; expected a PIL image, a uint8 array"):
        patches.batch_images([np.zeros((8, 8, 3), np.uint8), image], 8, 4)
    with pytest.raises(ValueError, match="images: the list is empty"):
        patches.batch_images([], 8, 4)


@pytest.mark.parametrize("image", [np.zeros((0, 8, 3), np.uint8), Image.new("RGB", (8, 0)), torch.zeros(3, 8, 0)])
def test_an_image_without_pixels_is_named(image):
    with pytest.raises(ValueError, match=r"image 0: found .*0"):
        patches.batch_images([image], 8, 4)
