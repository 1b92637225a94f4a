"""Counting data: points and boxes as in the file, and an error for every entry that does not add up."""

import copy
import json

import numpy as np
import pytest
from PIL import Image

from indiclip.datasets.points import CountingPoints
from indiclip.images import UnreadableSample

CONTENT = [
    {"file_name": "b.png", "class_name": "kite", "count": 2, "points": [[1, 2], [30.5, 10]],
     "boxes": [[0, 0, 2, 4], [21, 0, 20, 20]], "width": 40, "height": 20},
    {"file_name": "a.png", "class_name": "diya", "count": 3, "points": [[0, 0], [8, 8], [8.5, -0.5]], "boxes": None},
    {"file_name": "none.png", "class_name": "kite", "count": 0, "points": []},
]  # fmt: skip


@pytest.fixture
def build(tmp_path):
    def make(change=None):
        content = copy.deepcopy(CONTENT)
        (tmp_path / "folder").mkdir(exist_ok=True)
        for entry, size in zip(content, [(40, 20), (8, 8), (9, 9)], strict=True):
            Image.new("RGB", size).save(tmp_path / entry["file_name"])
        if change:
            change(content)
        (tmp_path / "counting.json").write_text(json.dumps(content))
        return CountingPoints(str(tmp_path), str(tmp_path / "counting.json"))

    return make


def test_points_boxes_and_the_counted_class(build):
    dataset = build()
    assert dataset.classes == ["diya", "kite"]
    assert dataset.counts.tolist() == [2, 3, 0]
    sample = dataset[0]
    assert sample["key"] == dataset.key(0) == "b.png"
    assert (sample["count_class"], sample["count_label"]) == ("kite", 1)
    assert sample["points_xy"].tolist() == [[1, 2], [30.5, 10]]
    assert sample["boxes_xyxy"].tolist() == [[0, 0, 2, 4], [21, 0, 40, 20]]  # clipped by a pixel
    assert sample["classes"].tolist() == [1, 1]


def test_points_on_the_far_edges_are_moved_inside(build):
    points = build()[1]["points_xy"]
    assert ((points >= 0) & (points < 8)).all()
    assert points == pytest.approx(np.array([[0, 0], [8, 8], [8, 0]]), abs=1e-5)


def test_an_image_may_have_no_boxes_and_no_points(build):
    dataset = build()
    assert "boxes_xyxy" not in dataset[1]
    assert dataset[2]["points_xy"].shape == (0, 2)


@pytest.mark.parametrize("thin", [[1, 1, 1e-9, 4], [1, 1, 0, 4], [-2, -2, 1, 1], [0.1, 0.1, 0.5, 0.5]])
def test_boxes_that_training_cannot_use_are_counted(build, thin):
    dataset = build(lambda content: content[0].update(boxes=[thin, [21, 0, 20, 20]]))
    assert any(line.startswith("1 of 2 boxes, 1 of them clipped to the") for line in dataset.inventory.lines())
    sample = dataset[0]
    assert (sample["boxes_xyxy"].tolist(), sample["classes"].tolist()) == ([[21, 0, 40, 20]], [1])
    assert len(sample["points_xy"]) == 2
    dataset = build(lambda content: content[0].update(boxes=[thin, thin]))
    assert dataset.inventory.unused().startswith("none of the boxes can be used: 0 of 2 boxes; left out: 2 thinner")


BAD = {
    r"b\.png': count is 3, but there are 2 points": lambda c: c[0].update(count=3),
    r"b\.png': boxes is \[\[0, 0, 2, 4\]\]; expected null or a list of 2": lambda c: c[0].update(boxes=[[0, 0, 2, 4]]),
    r"b\.png': boxes is \[\]; expected null or a list of 2 \[x, y": lambda c: c[0].update(boxes=[]),
    r"b\.png': bbox is \['x'\]; expected \[x, y, width, height\]": lambda c: c[0].update(boxes=[["x"], [1, 1, 2, 2]]),
    r"b\.png': the box .* has a negative size": lambda c: c[0].update(boxes=[[0, 0, 2, 4], [1, 1, -1, 4]]),
    r"counting\.json: all 5 points lie from 0 to 1: normalised\?": lambda c: [
        entry.update(points=[[0.5, 0.25]] * entry["count"]) for entry in c
    ],
    r"1 of 3 images are not in .*, first 'folder'": lambda c: c[0].update(file_name="folder"),
    r"b\.png': the box .* lies outside its image \(40x20": lambda c: c[0].update(boxes=[[0, 0, 2, 4], [1, 1, 50, 4]]),
    r"b\.png': the point \[42\.5, 2\.0\] lies outside .* 40x20": lambda c: c[0].update(points=[[9, 9], [42.5, 2]]),
    r"b\.png': points is \[\[1\], \[2\]\]; expected \[\[x, y\]": lambda c: c[0].update(points=[[1], [2]]),
    r"b\.png': points is \[\['a', 2\]\]; expected": lambda c: c[0].update(points=[["a", 2]], count=1),
    r"b\.png': class_name is ' '; expected text": lambda c: c[0].update(class_name=" "),
    r"b\.png': the file has \(height, width\) \(20, 40\), the entry says \(20, 41\)": lambda c: c[0].update(width=41),
    r"entry number 1 has no 'count'": lambda c: c[0].pop("count"),
    r"1 of 3 images are not in .*, first 'bb\.png'; nearest is 'b\.png'": lambda c: c[0].update(file_name="bb.png"),
    r"counting\.json: image 'a\.png' is duplicated": lambda c: c[0].update(file_name="a.png"),
    r"found list \[\]; expected a list of images": lambda c: c.clear(),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_entries_are_named_in_one_line(build, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        build(BAD[message])
    assert "counting.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_image_is_an_unreadable_sample_as_of_other_datasets(build, tmp_path):
    def damage(content):
        (tmp_path / "a.png").write_bytes(b"<html>not found</html>")

    dataset = build(damage)
    assert dataset.sizes_hw.tolist() == [[20, 40], [0, 0], [9, 9]]
    with pytest.raises(UnreadableSample, match=r"a\.png: expected the bytes of a JPEG, PNG or WebP, found"):
        dataset[1]
    assert len(dataset[0]["points_xy"]) == 2


def test_real_points_lie_in_the_middle_of_their_boxes(data_root):
    dataset = CountingPoints(str(data_root / "counting" / "images"), str(data_root / "counting" / "counting.json"))
    assert len(dataset) == 222
    assert dataset.classes == ["red blood cell", "vehicle (aerial view)"]
    for i in range(0, len(dataset), 10):
        sample = dataset[i]
        assert len(sample["points_xy"]) == len(sample["boxes_xyxy"]) == dataset.counts[i]
        middle = (sample["boxes_xyxy"][:, :2] + sample["boxes_xyxy"][:, 2:]) / 2
        assert abs(middle - sample["points_xy"]).max() <= 1  # the file rounds them to half pixels
