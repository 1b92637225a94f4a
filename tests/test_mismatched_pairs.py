"""Which text is no image's own: by hand, and two ranks against one."""

import numpy as np
import torch
import torch.nn.functional as F
from processes import on_ranks

from indiclip.mismatched_pairs import Keys, half_a_batch_on, hard_texts, tokens_of_all_ranks
from indiclip.multimodal_encoder import Tokens


def test_a_text_of_another_caption_and_class():
    keys = Keys(torch.tensor([1, 2, 1, 3]), torch.tensor([0, 0, -1, -1]))
    others = Keys(*map(half_a_batch_on, keys))
    assert others.ids_B.tolist() == [1, 3, 1, 2]
    assert keys.apart(others).tolist() == [False, True, False, True]
    same_class = Keys(torch.tensor([1, 2]), torch.tensor([4, 4]))
    assert keys.apart(Keys(*(of.roll(1) for of in keys))).tolist() == [True, False, True, True]
    assert same_class.apart(Keys(*map(half_a_batch_on, same_class))).tolist() == [False, False]


def test_hard_texts_are_drawn_by_their_similarity():
    """Against the softmax in NumPy over what is not the image's own, with the caption of the first twice."""
    rng = np.random.default_rng(0)
    image_BE, text_BE = (F.normalize(torch.from_numpy(rng.standard_normal((5, 8))), dim=1) for _ in range(2))
    keys = Keys(torch.tensor([1, 2, 1, 3, 4]), torch.tensor([-1, 7, -1, 7, -1]))
    weights = np.exp((image_BE @ text_BE.T).numpy() / 0.07)
    for own in [(0, 2), (2, 0), (1, 3), (3, 1), *((i, i) for i in range(5))]:
        weights[own] = 0
    shares = weights / weights.sum(1, keepdims=True)
    draws = (np.arange(2000) + 0.5) / 2000
    found = np.stack([hard_texts(image_BE, text_BE, keys, torch.full((5,), draw))[0].numpy() for draw in draws])
    counts = np.stack([np.bincount(column, minlength=5) for column in found.T]) / 2000
    assert np.abs(counts - shares).max() <= 1 / 2000
    nothing = Keys(torch.zeros(5), torch.full((5,), -1))
    index_B, found_B = hard_texts(image_BE, text_BE, nothing, torch.zeros(5))
    assert found_B.tolist() == [False] * 5
    assert index_B.max() < 5


def test_two_ranks_draw_what_one_does(tmp_path):
    torch.manual_seed(0)
    image_BE, text_BE = (F.normalize(torch.randn(8, 4).double(), dim=1) for _ in range(2))
    keys, draws_B = Keys(torch.arange(8) // 2, torch.full((8,), -1)), torch.rand(8)
    text = Tokens(torch.randn(8, 3, 2), torch.arange(3) < torch.tensor([[1], [2], [3], [1]]).repeat(2, 1))
    expected_B, _ = hard_texts(image_BE, text_BE, keys, draws_B)

    def work(rank):
        own = slice(rank, None, 2)
        index_B, _ = hard_texts(image_BE[own], text_BE[own], Keys(*(of[own] for of in keys)), draws_B[own])
        longest = 3 - rank  # texts of the second rank are shorter
        tokens_BNW = text.tokens_BNW[own, :longest].clone().requires_grad_()
        found = tokens_of_all_ranks(Tokens(tokens_BNW, text.valid_BN[own, :longest]), 4)
        found.tokens_BNW.square().sum().backward()
        return index_B.tolist(), found.tokens_BNW.detach(), found.valid_BN, tokens_BNW.grad, tokens_BNW.detach()

    for rank, (index_B, tokens_BNW, valid_BN, gradient, own) in enumerate(on_ranks(2, work, tmp_path)):
        assert index_B == expected_B[rank::2].tolist()
        assert tokens_BNW.shape == (8, 4, 2)
        assert torch.equal(tokens_BNW[::2, :3], text.tokens_BNW[::2])
        assert torch.equal(tokens_BNW[1::2, :2], text.tokens_BNW[1::2, :2])
        assert torch.equal(valid_BN[::2, :3], text.valid_BN[::2])
        torch.testing.assert_close(gradient, 2 * 2 * own)  # of both ranks' losses
