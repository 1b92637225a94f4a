"""Held-out parts: complete, disjoint, and unmoved when the data grows."""

import numpy as np
import pytest
from jsonargparse import ArgumentParser

from indiclip.datasets.base import SampleDataset
from indiclip.datasets.split import Split
from indiclip.datasets.tables import Strings, stable_hash


class Numbers(SampleDataset):
    """Samples whose image must not be looked at."""

    classes = ("odd", "even")

    def __init__(self, size: int = 1000, first: int = 0):
        self.size, self.first = size, first
        self.labels = np.arange(first, first + size)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"image": None, "key": self.key(index)}

    def key(self, index):
        return f"n{index + self.first}"

    def captions(self, index):
        return {"en": [f"number {index + self.first}"]}


def keys(dataset, part, **options):
    split = Split(dataset, part, **options)
    return {split.key(i) for i in range(len(split))}


def test_parts_are_disjoint_and_complete():
    train, val = keys(Numbers(), "train"), keys(Numbers(), "val")
    assert not train & val
    assert train | val == {f"n{i}" for i in range(1000)}
    assert 150 < len(val) < 250  # 200 with a standard deviation of 12.6


def test_a_key_never_changes_sides_when_the_data_grows_or_is_cut():
    assert keys(Numbers(300), "val") == keys(Numbers(1000), "val") & {f"n{i}" for i in range(300)}
    assert keys(Numbers(500, first=500), "val") == keys(Numbers(1000), "val") & {f"n{i}" for i in range(500, 1000)}


def test_a_larger_fraction_only_adds_to_the_held_out_part():
    assert keys(Numbers(), "val", fraction=0.1) < keys(Numbers(), "val", fraction=0.3)


def test_another_seed_holds_out_others():
    assert keys(Numbers(), "val", seed=1) != keys(Numbers(), "val", seed=0)


@pytest.mark.parametrize("folds", [2, 3, 5, 10])
def test_folds_hold_out_every_sample_once(folds):
    parts = [keys(Numbers(), "val", fraction=1 / folds, fold=fold) for fold in range(folds)]
    assert sum(len(part) for part in parts) == 1000
    assert set().union(*parts) == {f"n{i}" for i in range(1000)}
    assert parts[0] == keys(Numbers(), "val", fraction=1 / folds)
    for fold, part in enumerate(parts):
        assert keys(Numbers(), "train", fraction=1 / folds, fold=fold) == {f"n{i}" for i in range(1000)} - part


def test_the_hash_is_the_same_on_every_machine_and_in_every_release():
    # A changed value would move samples of running experiments between their training and held-out parts.
    assert stable_hash("0:train-0000/000000") == 0xFBE252616F6CC8AC


def test_what_the_dataset_knows_is_handed_on():
    split = Split(Numbers(), "val")
    assert list(split.classes) == ["odd", "even"]
    for i in range(len(split)):
        number = int(split.key(i)[1:])
        assert split[i]["key"] == split.key(i)
        assert split.labels[i] == number
        assert split.captions(i) == {"en": [f"number {number}"]}


def test_it_is_wired_from_yaml():
    parser = ArgumentParser()
    parser.add_argument("--data", type=SampleDataset)
    inner = {"class_path": f"{__name__}.Numbers", "init_args": {"size": 50}}
    outer = {
        "class_path": "indiclip.datasets.split.Split",
        "init_args": {"dataset": inner, "part": "val", "fraction": 0.5},
    }
    built = parser.instantiate(parser.parse_object({"data": outer})).data
    assert isinstance(built.dataset, Numbers)
    assert keys(Numbers(50), "val", fraction=0.5) == {built.key(i) for i in range(len(built))}


def test_bad_arguments():
    with pytest.raises(ValueError, match="part: found 'test'; expected 'train' or 'val'"):
        Split(Numbers(), "test")
    for fraction in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"fraction: found .*; expected more than 0 and less than 1"):
            Split(Numbers(), "val", fraction)
    for fold in (-1, 5):
        with pytest.raises(ValueError, match=rf"fold: found {fold}; expected 0 to 4 with fraction 0.2"):
            Split(Numbers(), "val", fold=fold)
    with pytest.raises(ValueError, match="dataset: found list; expected a SampleDataset"):
        Split([], "val")
    with pytest.raises(ValueError, match=r"val: no sample of 3 falls here with fraction 1e-09"):
        Split(Numbers(3), "val", 1e-9)


def test_strings():
    texts = ["", "दीया", "kite", "\N{DIYA LAMP}"]
    column = Strings(texts)
    assert len(column) == 4
    assert [column[i] for i in range(4)] == texts
    assert column[-1] == texts[-1]
    with pytest.raises(IndexError):
        column[4]
    assert len(Strings([])) == 0
