"""The measurement of the hashes: distances by hand, and changes that are what they are called."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import bench_contamination as tool


def test_the_nearest_view_counts_and_no_image_is_paired_with_itself():
    bench = np.array([[[0b1, 0b11], [0b111, 0b1]], [[0b1000, 0b1], [0b1111, 0]]], np.uint64)  # two images in two views
    training = np.array([[0b1, 0b1], [0b1011, 0b111]], np.uint64)
    assert tool.distances(bench, training).tolist() == [[0, 0], [1, 2]]  # a hash of 0 is near nothing
    assert tool.of_different(bench, training).tolist() == [[2, 0], [2, 1]]
    assert [found.tolist() for found in tool.ways(np.array([[4, 5], [5, 9]]), np.array([[4, 5], [5, 4]]))] == [
        [True, False], [False, False], [True, False], [True, True],
    ]  # fmt: skip


def test_changes_are_what_they_are_called():
    pixels = np.random.default_rng(0).integers(1, 200, (100, 200, 3), dtype=np.uint8)
    changed = {name: np.asarray(change(Image.fromarray(pixels))) for name, change in tool.CHANGES.items()}
    assert (changed["mirrored"] == pixels[:, ::-1]).all()
    assert (changed["crop of 10%"] == pixels[5:95, 10:190]).all()
    assert (changed["crop of 10% at two sides"] == pixels[:90, :180]).all()
    assert (changed["brighter by 0.3"] == np.minimum(np.round(pixels * 1.3), 255)).all()
    assert changed["half the size"].shape == (50, 100, 3)
    border = changed["white border of 5%"]
    assert (border[10:-10, 10:-10] == pixels).all()
    assert (border[:10] == 255).all()
