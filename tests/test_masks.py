"""Mask codes: what pycocotools writes is taken and comes back; what its C code would misread is refused."""

import numpy as np
import pytest
from pycocotools import mask as rle

from indiclip.datasets.densepose import fields
from indiclip.datasets.masks import check_mask, check_room, check_run_lengths, decode_mask


def compressed(mask: np.ndarray) -> dict:
    code = rle.encode(np.asfortranarray(mask))
    return code | {"counts": code["counts"].decode()}


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("size_hw", [(1, 1), (7, 300), (256, 256)])
def test_codes_of_pycocotools_pass_and_come_back(size_hw, density):
    mask = (np.random.default_rng(0).random(size_hw) < density).astype(np.uint8)
    code = compressed(mask)
    assert check_mask(code, list(size_hw), "x") == code
    np.testing.assert_array_equal(decode_mask(code, size_hw), mask)


def test_a_list_of_runs_goes_down_the_columns():
    code = {"size": [2, 3], "counts": [1, 2, 3]}
    assert check_mask(code, [2, 3], "x") == code
    np.testing.assert_array_equal(decode_mask(code, (2, 3)), [[0, 1, 0], [1, 0, 0]])


def test_a_size_in_fractions_is_no_trouble_for_the_decoder():
    """JSON's 2.0 equals 2, and pycocotools takes whole numbers only."""
    mask = np.eye(3, dtype=np.uint8)
    for code in (compressed(mask), {"counts": [0, 1, 3, 1, 3, 1]}):
        code |= {"size": [3.0, 3.0]}
        np.testing.assert_array_equal(decode_mask(check_mask(code, [3, 3], "x"), (3, 3)), mask)


def test_masks_of_a_few_letters_that_unpack_to_gigabytes_are_refused():
    check_room(2**10, 2**10, 2**10)
    with pytest.raises(ValueError, match=r"1025 masks of 1024x1024 pixels; expected 1,073,741,824 pixels at most"):
        check_room(1025, 2**10, 2**10)
    person = {"bbox": [0, 0, 9, 9], "dp_masks": []} | {name: [] for name in ("dp_x", "dp_y", "dp_I", "dp_U", "dp_V")}
    with pytest.raises(ValueError, match=r"1025 masks of 1024x1024 pixels"):
        fields([person] * 1025, 2**10, 2**10)


def test_a_polygon_covers_its_pixels_and_one_without_area_none():
    square = [2, 1, 5, 1, 5, 3, 2, 3]
    mask = decode_mask(check_mask([square, [1, 1, 2, 2]], [6, 8], "x"), (6, 8))
    expected = np.zeros((6, 8))
    expected[1:3, 2:5] = 1
    np.testing.assert_array_equal(mask, expected)
    for nothing in ([], [[]]):
        assert not decode_mask(check_mask(nothing, [6, 8], "x"), (6, 8)).any()


def test_a_code_cut_anywhere_is_refused():
    """pycocotools decodes each of these without a word and leaves the rest of the mask unwritten."""
    whole = compressed((np.random.default_rng(1).random((40, 50)) < 0.1).astype(np.uint8))
    for length in range(len(whole["counts"])):
        with pytest.raises(ValueError, match=r"x: (the runs cover|counts ends|counts is)"):
            check_run_lengths(whole | {"counts": whole["counts"][:length]}, [40, 50], "x")


@pytest.mark.parametrize("counts", ["~~~~", "oooooooooooooo", 12, [1.0, 5.0], ["6"], [-1, 7], None, "न"])
def test_what_is_no_run_length_code_is_refused(counts):
    with pytest.raises(ValueError, match=r"x: counts "):
        check_run_lengths({"size": [2, 3], "counts": counts}, [2, 3], "x")
