"""Which text is no image's own, and its loss: by hand, and any number of ranks and parts against one."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import on_ranks

from indiclip.tasks.mismatched_pairs import (
    Keys,
    Matching,
    half_a_step_on,
    hard_texts,
    order_of_step,
    tokens_of_all_ranks,
)
from indiclip.tasks.multimodal_encoder import MultimodalEncoder, Tokens

W = 8


def test_a_text_of_another_caption_and_class():
    keys = Keys(torch.tensor([1, 2, 1, 3]), torch.tensor([0, 0, -1, -1]))
    index_B, apart_B = half_a_step_on(keys, torch.arange(4))
    assert index_B.tolist() == [2, 3, 0, 1]
    assert apart_B.tolist() == [False, True, False, True]
    assert keys.apart(Keys(*(of.roll(1) for of in keys))).tolist() == [True, False, True, True]
    same_class = Keys(torch.tensor([1, 2]), torch.tensor([4, 4]))
    assert half_a_step_on(same_class, torch.arange(2))[1].tolist() == [False, False]
    assert half_a_step_on(Keys(torch.arange(3), -torch.ones(3)), torch.tensor([2, 0, 1]))[0].tolist() == [1, 2, 0]


def test_samples_that_are_not_dealt_in_turn_are_ordered_by_their_seeds():
    """Two of one seed by their captions."""
    seeds_B, ids_B = torch.tensor([7, 3, 9, 3]), torch.tensor([1, 8, 0, 5])
    assert order_of_step(ids_B, seeds_B, in_turn=False).tolist() == [3, 1, 0, 2]
    assert order_of_step(ids_B, seeds_B, in_turn=True).tolist() == [0, 1, 2, 3]


def test_hard_texts_are_drawn_by_their_similarity():
    """Against the softmax in NumPy over what is not the image's own, with the caption of the first twice."""
    rng = np.random.default_rng(0)
    image_BE, text_BE = (F.normalize(torch.from_numpy(rng.standard_normal((5, 8))), dim=1) for _ in range(2))
    keys = Keys(torch.tensor([1, 2, 1, 3, 4]), torch.tensor([-1, 7, -1, 7, -1]))
    weights = np.exp((image_BE @ text_BE.T).numpy() / 0.07)
    for own in [(0, 2), (2, 0), (1, 3), (3, 1), *((i, i) for i in range(5))]:
        weights[own] = 0
    shares = weights / weights.sum(1, keepdims=True)
    draws, order_G = (np.arange(2000) + 0.5) / 2000, torch.tensor([4, 2, 0, 1, 3])

    def drawn(draw):
        return hard_texts(image_BE, text_BE, keys, torch.full((5,), draw), order_G)[0].numpy()

    counts = np.stack([np.bincount(column, minlength=5) for column in np.stack([*map(drawn, draws)]).T]) / 2000
    assert np.abs(counts - shares).max() <= 1 / 2000
    nothing = Keys(torch.zeros(5), torch.full((5,), -1))
    index_B, found_B = hard_texts(image_BE, text_BE, nothing, torch.zeros(5), order_G)
    assert found_B.tolist() == [False] * 5
    assert index_B.max() < 5


def made_rows(number, dtype=torch.float64):
    """Of pairs of which two have one caption, with padding; embeddings so alike that any text may be drawn."""
    torch.manual_seed(0)
    return {
        "image_BNW": torch.randn(number, 4, W, dtype=dtype),
        "image_valid_BN": torch.arange(4) < torch.randint(1, 5, (number, 1)),
        "text_BTW": torch.randn(number, 3, W, dtype=dtype),
        "text_valid_BT": torch.arange(3) < torch.randint(1, 4, (number, 1)),
        "ids_B": torch.arange(number).clamp(max=number - 2),
        "labels_B": torch.full((number,), -1),
        "seeds_B": torch.randint(2**32, (number,)),
        "image_BD": 1 + 0.1 * torch.randn(number, W, dtype=dtype),
        "text_BD": 1 + 0.1 * torch.randn(number, W, dtype=dtype),
        "draws_B": torch.rand(number, dtype=torch.float64),
    }


def made_modules(hard_negatives, dtype=torch.float64):
    torch.manual_seed(1)
    return Matching(W, hard_negatives).to(dtype), MultimodalEncoder(W, W, W, depth=2, num_heads=2).to(dtype)


def unit(x_BD, batch_statistics):
    return F.normalize(x_BD, dim=1)


ENCODER = SimpleNamespace(
    text=SimpleNamespace(tokenizer=SimpleNamespace(context_length=5)), project_image=unit, project_text=unit
)


def with_gradients(rows, hard_negatives, in_turn, num_parts):
    """The sum, the number, and the gradients of the tokens and of all weights."""
    matching, multimodal = made_modules(hard_negatives)
    tokens = [rows[name].clone().requires_grad_() for name in ("image_BNW", "text_BTW")]
    rows = rows | {"image_BNW": tokens[0], "text_BTW": tokens[1]}
    total, number = matching.mismatches(rows, multimodal, ENCODER, in_turn, num_parts)
    trained = [p for module in (matching, multimodal.layers, multimodal.norm) for p in module.parameters()]
    found = torch.autograd.grad(total, [*tokens, *trained])
    return total.detach(), number, found[:2], found[2:]


@pytest.mark.parametrize("number", [6, 12])  # an odd and an even number for each of two ranks
def test_two_ranks_are_one_however_samples_are_dealt(number, tmp_path):
    """Rank r has every second sample, or a block of them; the loss, and gradients of all tokens and weights."""
    rows, half = made_rows(number), number // 2
    deals = {"in turn": [slice(rank, None, 2) for rank in range(2)]}
    deals["blocks"] = [slice(rank * half, (rank + 1) * half) for rank in range(2)]
    cases = [(deal, hard, parts) for deal in deals for hard in (False, True) for parts in (1, 2)]

    def work(rank):
        return [
            with_gradients({name: row[deals[deal][rank]] for name, row in rows.items()}, hard, deal == "in turn", parts)
            for deal, hard, parts in cases
        ]

    of_ranks = on_ranks(2, work, tmp_path)
    for case, (deal, hard, _) in enumerate(cases):
        expected, count, of_tokens, of_weights = with_gradients(rows, hard, deal == "in turn", 1)
        totals, counts, tokens, weights = zip(*(found[case] for found in of_ranks), strict=True)
        torch.testing.assert_close(sum(totals), expected)
        assert sum(counts) == count
        for place in range(2):
            whole = torch.empty_like(of_tokens[place])
            for rank, found in enumerate(tokens):
                whole[deals[deal][rank]] = found[place]
            torch.testing.assert_close(whole, of_tokens[place])
        for one, other, both in zip(*weights, of_weights, strict=True):
            torch.testing.assert_close(one + other, both)


def test_two_ranks_put_their_tokens_together_in_turn(tmp_path):
    torch.manual_seed(0)
    text = Tokens(torch.randn(8, 3, 2), torch.arange(3) < torch.tensor([[1], [2], [3], [1]]).repeat(2, 1))

    def work(rank):
        own, longest = slice(rank, None, 2), 3 - rank  # texts of the second rank are shorter
        return tokens_of_all_ranks(Tokens(text.tokens_BNW[own, :longest], text.valid_BN[own, :longest]), 4)

    for tokens_BNW, valid_BN in on_ranks(2, work, tmp_path):
        assert tokens_BNW.shape == (8, 4, 2)
        assert torch.equal(tokens_BNW[::2, :3], text.tokens_BNW[::2])
        assert torch.equal(tokens_BNW[1::2, :2], text.tokens_BNW[1::2, :2])
        assert torch.equal(valid_BN[::2, :3], text.valid_BN[::2])


@pytest.mark.parametrize("hard_negatives", [False, True])
def test_memory_is_that_of_one_part_and_gradients_are_those_of_all(hard_negatives):
    """Bytes that autograd holds beside the rows themselves, as its hooks see them, and how many pairs the multimodal
    encoder reads at once, also when it reads them again.
    """

    def held(number, num_parts):
        rows, (matching, multimodal) = made_rows(number, torch.float32), made_modules(hard_negatives, torch.float32)
        given = [*rows.values(), *matching.parameters(), *multimodal.parameters()]
        known, saved, sizes = {tensor.untyped_storage().data_ptr() for tensor in given}, {}, []
        for name in ("image_BNW", "text_BTW"):
            rows[name].requires_grad_()

        def keep(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        multimodal.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0].valid_BN)))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total, _ = matching.mismatches(rows, multimodal, ENCODER, True, num_parts)
        size = sum(of.untyped_storage().nbytes() for place, of in saved.items() if place not in known)
        total.backward()
        return size, sizes

    (few, _), (many, sizes), (whole, _) = held(8, 2), held(40, 10), held(40, 1)
    assert sizes == [4] * 20
    another_text = 3 * W * 4 + 3  # float32, and its mask
    assert many - few <= 32 * (another_text + 24)  # an index, and a few numbers of each pair
    assert whole > 20 * many
    rows = made_rows(10)
    one, parts = (with_gradients(rows, hard_negatives, True, number) for number in (1, 4))
    torch.testing.assert_close(parts, one)
