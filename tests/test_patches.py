"""Images as patches: nothing is lost."""

import numpy as np
import torch

from indiclip import patches
from indiclip.preprocessing import Preprocessing


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
    images = Preprocessing(16).batch(originals, max_tokens=10)
    assert images["sizes_hw"] == sizes  # all within the budget
    assert images["scale"] == [(1.0, 1.0)] * 4
    for i, original in enumerate(originals):
        assert (patches.unpatchify(images, i) == original).all()
