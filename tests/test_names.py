"""indiclip/names.py: a hint names what is near, or nothing."""

from indiclip.names import did_you_mean, nearest_beside


def test_the_nearest_name():
    assert did_you_mean("captoin", ["url", "caption"]) == "; nearest is 'caption'"
    assert did_you_mean("x", []) == ""
    assert did_you_mean("softmax", ["sigmoid", "attention"]) == ""


def test_of_files_only_their_own_names_count_and_hidden_ones_do_not(tmp_path):
    """However long the path that they share, and whatever a version control keeps there."""
    for name in (".git", ".x.tar.part", "unrelated.csv", "train-0000.tar"):
        (tmp_path / name).touch()
    assert nearest_beside(tmp_path / "x.tar") == ""
    assert nearest_beside(tmp_path / "notes") == ""
    assert nearest_beside(tmp_path / "train-0001.tar") == "; nearest is 'train-0000.tar'"
    assert nearest_beside(tmp_path / "train-0001.tar", "*.csv") == ""
    assert nearest_beside(tmp_path / "gone" / "x.tar") == ""
