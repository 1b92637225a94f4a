"""Cosines at shorter lengths, and what counts as at least as near."""

import numpy as np
import pytest
import torch

from indiclip.evals.protocols.cosines import as_near, chunks, truncate_normalize


def test_a_prefix_is_cut_and_made_a_unit_vector_again():
    # By hand: (3, 4, 12) has the prefix (3, 4) of length 5.
    np.testing.assert_allclose(truncate_normalize(np.array([[3.0, 4.0, 12.0]]), 2), [[0.6, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(
        truncate_normalize(torch.tensor([[3.0, 4.0, 12.0]])), [[3 / 13, 4 / 13, 12 / 13]], rtol=1e-6
    )


@pytest.mark.parametrize("length", [0, 4])
def test_a_length_that_the_embedding_does_not_have_is_named(length):
    with pytest.raises(ValueError, match=f"length: found {length}; expected a whole number from 1 to 3"):
        truncate_normalize(np.ones((2, 3)), length)


def test_ties_to_rounding_and_nan_are_as_near():
    cosine = torch.tensor([0.5, 0.5 - 1e-7, 0.5 - 1e-5, 0.7, torch.nan])
    assert as_near(cosine, torch.tensor(0.5)).tolist() == [True, True, False, True, True]
    assert as_near(cosine, torch.tensor(torch.nan)).all()


@pytest.mark.parametrize(("rows", "columns"), [(7, 1_000_000), (10_000, 10), (3, 9_000_000), (0, 5), (5, 0)])
def test_chunks_cover_every_row_once(rows, columns):
    parts = list(chunks(rows, columns))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(rows))
    assert all((part.stop - part.start) * columns <= 2_500_000 or part.stop - part.start == 1 for part in parts)
