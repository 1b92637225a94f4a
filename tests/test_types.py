"""`Features.map`: every token on its own cell, and nothing anywhere else."""

import pytest
import torch

from indiclip.types import Features


def grid_coords(rows, columns):
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns))


def test_a_full_grid_is_laid_out_row_by_row():
    tokens = torch.arange(2 * 6 * 1.0).reshape(2, 6, 1)
    features = Features(tokens, grid_coords(2, 3).expand(2, -1, -1), None, (2, 3), 16)
    found, mask = features.map()
    assert found.shape == (2, 1, 2, 3)
    assert found[1, 0].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert mask.all()


def test_tokens_of_several_sizes_go_to_their_cells_and_padding_nowhere():
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 2), (1, 5), (4, 4)]
    N, D = 20, 7
    tokens = torch.randn(3, N, D, generator=generator)  # padding holds numbers too
    coords, valid = torch.zeros(3, N, 2, dtype=torch.long), torch.zeros(3, N, dtype=torch.bool)
    expected, occupied = torch.zeros(3, D, 4, 5), torch.zeros(3, 4, 5, dtype=torch.bool)
    for i, (rows, columns) in enumerate(sizes):
        places = torch.randperm(N, generator=generator)[: rows * columns]  # in any order, padding in between
        for place, (row, column) in zip(places, grid_coords(rows, columns), strict=True):
            coords[i, place] = torch.stack([row, column])
            valid[i, place] = True
            expected[i, :, row, column] = tokens[i, place]
            occupied[i, row, column] = True
    rows = valid.flatten().nonzero()[:, 0]
    padded = Features(tokens, coords, valid, (4, 5), 16)
    without = Features(tokens.flatten(0, 1)[rows], coords, valid, (4, 5), 16, rows_T=rows)
    for features in (padded, without):
        found, mask = features.map()
        assert torch.equal(found, expected)
        assert torch.equal(mask, occupied)
    assert torch.equal(without.tokens_BND, tokens * valid[..., None])


def test_both_ways_agree_on_a_full_grid():
    tokens, coords = torch.randn(2, 12, 5), grid_coords(3, 4).expand(2, -1, -1)
    quick, quick_mask = Features(tokens, coords, None, (3, 4), 8).map()
    slow, slow_mask = Features(tokens, coords, torch.ones(2, 12, dtype=torch.bool), (3, 4), 8).map()
    assert torch.equal(quick, slow)
    assert torch.equal(quick_mask, slow_mask)


@pytest.mark.parametrize("valid", [None, torch.tensor([[True, True, False, True]])])
def test_gradients_reach_the_valid_tokens_alone(valid):
    tokens = torch.zeros(1, 4, 3, requires_grad=True)
    found, _ = Features(tokens, grid_coords(2, 2)[None], valid, (2, 2), 16).map()
    found.sum().backward()
    expected = torch.ones(1, 4, 3) if valid is None else valid[..., None].expand(1, 4, 3).float()
    assert torch.equal(tokens.grad, expected)
