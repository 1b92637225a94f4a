"""indiclip/names.py: a hint names what is near, or nothing."""

import pytest

from indiclip.names import check_range, did_you_mean, differences, nearest_beside


def test_the_nearest_name():
    assert did_you_mean("captoin", ["url", "caption"]) == "; nearest is 'caption'"
    assert did_you_mean("x", []) == ""
    assert did_you_mean("softmax", ["sigmoid", "attention"]) == ""


def test_initials_are_near():
    """Other trainers have the long name, or the short one."""
    keys = ["model.lr_scale", "model.lr", "model.weight_decay"]
    assert did_you_mean("model.learning_rate", keys) == "; nearest is 'model.lr'"
    assert did_you_mean("model.wd", keys) == "; nearest is 'model.weight_decay'"
    assert did_you_mean("d", ["depth"]) == ""
    assert did_you_mean("image_pth", ["ip", "image_path"]) == "; nearest is 'image_path'"
    assert did_you_mean("captoin", ["", "caption"]) == "; nearest is 'caption'"  # pandas' column without a name
    assert did_you_mean("", ["abc", "caption"]) == ""


@pytest.mark.parametrize(
    ("limits", "good", "bad", "expected"),
    [
        ({"most": 1, "without": 1}, (0, 0.5), (1, -0.1), "0 to below 1"),
        ({"most": 1, "without": 0}, (0.5, 1), (0, 1.1), "above 0 to 1"),
        ({"without": 0}, (0.1, 9.0), (0, -1), "above 0"),
        ({"least": 1}, (1, 9), (0, float("nan")), "1 or more"),
    ],
)
def test_a_range_with_an_open_end(limits, good, bad, expected):
    check_range({"x": None} | {f"x{number}": number for number in good}, **limits)
    for number in bad:
        with pytest.raises(ValueError, match=f"^x: found {number}; expected {expected}$"):
            check_range({"x": number}, **limits)


def test_of_files_only_their_own_names_count_and_hidden_ones_do_not(tmp_path):
    """However long the path that they share, and whatever a version control keeps there."""
    for name in (".git", ".x.tar.part", "unrelated.csv", "train-0000.tar"):
        (tmp_path / name).touch()
    assert nearest_beside(tmp_path / "x.tar") == ""
    assert nearest_beside(tmp_path / "notes") == ""
    assert nearest_beside(tmp_path / "train-0001.tar") == "; nearest is 'train-0000.tar'"
    assert nearest_beside(tmp_path / "train-0001.tar", "*.csv") == ""
    assert nearest_beside(tmp_path / "gone" / "x.tar") == ""


CROP = {"class_path": "torchvision.transforms.v2.RandomResizedCrop", "size": 16}
ERASING = {"class_path": "torchvision.transforms.v2.RandomErasing", "p": 0.5}


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ([CROP], [CROP, ERASING], ["x[1]: none -> torchvision.transforms.v2.RandomErasing"]),
        ([CROP], [ERASING, CROP], ["x[0]: none -> torchvision.transforms.v2.RandomErasing"]),
        ([CROP, ERASING], [ERASING], ["x[0]: torchvision.transforms.v2.RandomResizedCrop -> none"]),
        ([CROP], [CROP | {"size": 8}, ERASING], ["x[0].size: 16 -> 8", f"x[1]: none -> {ERASING['class_path']}"]),
        ([CROP], [ERASING], [f"x[0]: {CROP['class_path']} -> {ERASING['class_path']}"]),
        ([0.9], [0.9, 0.95], ["x[1]: none -> 0.95"]),
        ([], [CROP], [f"x[0]: none -> {CROP['class_path']}"]),
        ("a" * 90, "a" * 90 + "b", [f"x: ...{'a' * 20}' -> ...{'a' * 20}b'"]),
    ],
)
def test_what_one_of_two_lists_has_more_is_named(old, new, lines):
    assert [line for _, line in differences(old, new, "x")] == lines
