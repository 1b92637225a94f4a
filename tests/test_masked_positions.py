"""Which patches and tokens are hidden: numbers by hand, and that nothing but a sample's seed decides."""

import numpy as np
from helpers import batch_images, noise

from indiclip.masked_positions import hidden_patches, hidden_tokens


def test_a_share_of_each_image_is_hidden_whatever_the_others_are():
    sizes = [(40, 24), (16, 48), (8, 8)]
    images = batch_images([noise(*size) for size in sizes], 8, 64)
    hidden_BN = hidden_patches(images, 8, 0.4, [5, 6, 7])
    assert hidden_BN.sum(1).tolist() == [6, 5, 0]  # of 15, 12 and 1; a single patch stays
    alone = hidden_patches(batch_images([noise(16, 48)], 8, 64), 8, 0.4, [6])
    assert np.array_equal(alone[0], hidden_BN[1, :12])
    assert not np.array_equal(alone, hidden_patches(batch_images([noise(16, 48)], 8, 64), 8, 0.4, [5]))
    dropped = {**images, "num_patches": [10, 5, 1]}  # of which the host does not know the places
    assert [row[10:].any() for row in hidden_patches(dropped, 8, 0.4, [5, 6, 7])] == [False] * 3
    assert hidden_patches(dropped, 8, 0.4, [5, 6, 7]).sum(1).tolist() == [4, 2, 0]


def test_a_share_of_the_tokens_is_hidden_but_never_those_that_every_text_has():
    rows = [[1, *range(10, 30), 2], [1, 10, 2], [1, 2], []]
    places = hidden_tokens(rows, 0.15, [1, 2, 3, 4], {0, 1, 2})
    assert [len(of) for of in places] == [3, 1, 0, 0]
    assert places[1].tolist() == [1]
    seen = np.concatenate([hidden_tokens(rows[:1], 0.15, [seed], {0, 1, 2})[0] for seed in range(2000)])
    shares = np.bincount(seen, minlength=22) / 2000
    assert shares[[0, 21]].tolist() == [0, 0]
    assert np.abs(shares[1:21] - 3 / 20).max() < 0.04  # five standard deviations


def test_a_block_has_16_patches_on_a_grid_of_14_by_14():
    """BEiT's least: where fewer are to be hidden, no block fits, and where as many are, some block does."""
    images = batch_images([noise(14 * 8, 14 * 8)] * 20, 8, 14 * 14)

    def alike(number):  # share of the patches that are hidden as the one above them is
        hidden = hidden_patches(images, 8, number / 14**2, [*range(20)]).reshape(20, 14, 14)
        assert set(hidden.sum((1, 2))) == {number}
        return (hidden[:, 1:] & hidden[:, :-1]).sum() / hidden.sum()

    assert alike(15) < 0.15  # of single ones 15 / 196
    assert alike(20) > 0.5
