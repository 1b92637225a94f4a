"""`indiclip check`: what a config would train on is counted and read, and its exit status says whether to start."""

import json
import re

import pytest
import yaml
from experiments import config
from test_shards import png, write_tar
from trouble_reading import Broken

from indiclip.cli import main
from indiclip.datasets.inventory import Inventory


def shards_of(folder, name, good, bad=0):
    members = {}
    for i in range(good + bad):
        data = png(i, (24, 16))
        members |= {f"{i}.png": data if i < good else data[: 40 + i % 20], f"{i}.txt": f"number {i}", f"{i}.pkl": b"x"}
    return {
        "class_path": "indiclip.webdataset.shards.Shards",
        "init_args": {"urls": write_tar(folder / f"{name}.tar", members)},
    }


def check(folder, train, val, *words, **changes):
    tree = config(data__train__0__dataset=train, data__val__0__dataset=val, **changes)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(tree))
    return main(["check", "--config", str(folder / "experiment.yaml"), "--workers", "0", *words])


def test_every_member_of_a_config_is_used_or_left_out_for_a_reason(tmp_path, capsys):
    train, val = shards_of(tmp_path, "train", 40), shards_of(tmp_path, "val", 5)
    assert check(tmp_path, train, val, "--all") == 0
    shown = capsys.readouterr().out
    assert "data.train[0]: Shards for the task contrastive, 40 samples\n" in shown
    assert f"80 of 120 members; left out: 40 .pkl ({tmp_path}/train.tar: 0.pkl)" in shown
    assert "  40 samples read\n" in shown
    assert "  5 samples read\n" in shown
    assert not (tmp_path / "runs").exists()


def test_unreadable_samples_are_counted_by_reason_and_end_with_1_beyond_the_quarantine(tmp_path, capsys):
    train, val = shards_of(tmp_path, "train", 40, 25), shards_of(tmp_path, "val", 5)
    assert check(tmp_path, train, val, "--all") == 1
    shown = capsys.readouterr().out
    assert re.search(r"40 of 65 samples read; left out: .*\d+ damaged PNG: .* \(train/4\d: damaged PNG: ", shown)
    assert "data.quarantine: 25 samples of task 'contrastive' are unreadable, 10 are allowed" in shown
    assert check(tmp_path, train, val, "--all", "--data.quarantine", "0.5") == 0
    assert "training can use this data" in capsys.readouterr().out
    assert check(tmp_path, train, val, "--samples", "13", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    inventories = [row["inventory"] for row in found["sources"]]
    assert [inventory["samples read"]["present"] for inventory in inventories] == [13, 5]
    assert [inventory["samples read"]["used"] for inventory in inventories] == [8, 5]
    assert found["stops"] == ["data.quarantine: about 25 samples of task 'contrastive' are unreadable, 10 are allowed"]
    assert inventories[0]["members"]["present"] == 3 * 65
    assert all(kind.startswith("damaged PNG: ") for kind in inventories[0]["samples read"]["left_out"])


def test_where_nothing_is_readable_that_is_said_and_not_a_mistake_in_the_config(tmp_path, capsys):
    assert check(tmp_path, shards_of(tmp_path, "train", 0, 12), shards_of(tmp_path, "val", 3), "--all") == 1
    assert "0 of 12 samples read; left out: " in capsys.readouterr().out


def test_many_processes_find_the_same(tmp_path, capsys):
    train, val = shards_of(tmp_path, "train", 60, 40), shards_of(tmp_path, "val", 5)
    assert check(tmp_path, train, val, "--all", "--json") == 1
    alone = json.loads(capsys.readouterr().out)
    assert check(tmp_path, train, val, "--all", "--json", "--workers", "2") == 1
    assert json.loads(capsys.readouterr().out) == alone


def test_mistakes_are_one_line_and_status_2(tmp_path, capsys):
    train, val = shards_of(tmp_path, "train", 4), shards_of(tmp_path, "val", 2)
    for changes, words, message in (
        ({}, ["--smaples", "3"], "smaples: no such option"),
        ({}, ["--samples", "0"], "argument --samples: found '0'; expected a whole number from 1"),
        ({}, ["--config", str(tmp_path / "none.yaml")], "--config: no file"),
        ({"data__train__0__batchsize": 3}, [], "nearest is 'batch_size'"),
        ({"data__train__0__task": "contrastve"}, [], "no head reads 'contrastve'; nearest is 'contrastive'"),
        ({"data__train__0__dataset__init_args__urls": "nosuch.tar"}, [], "nosuch.tar: no such file"),
    ):
        given = dict(changes)
        assert check(tmp_path, json.loads(json.dumps(train)), val, *words, **given) == 2, message
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("indiclip check: ")]
        assert len(error) == 1
        assert message in error[0], error


def test_a_dataset_that_fails_or_whose_sums_do_not_fit_is_named(tmp_path, capsys, monkeypatch):
    val = shards_of(tmp_path, "val", 2)
    broken = {"class_path": "trouble_reading.Broken", "init_args": val["init_args"]}
    assert check(tmp_path, broken, val, "--all") == 1
    shown = capsys.readouterr().out
    assert "\ndata.train[0]: ends the run: KeyError: ...\n" in shown
    assert "1 ends the run: KeyError: ... (val/1: ends the run: KeyError: 'captoin')" in shown
    wrong = Inventory()
    wrong.present["members"] = 3
    monkeypatch.setattr(Broken, "inventory", wrong)
    assert check(tmp_path, broken, val) == 2
    assert "data.train[0]: Broken loses something without a reason: present {'members': 3}" in capsys.readouterr().err


def test_a_config_of_an_older_version_is_read_as_by_fit(tmp_path, capsys):
    train, val = shards_of(tmp_path, "train", 4), shards_of(tmp_path, "val", 2)
    for dataset in (train, val):
        dataset["class_path"] = "indiclip.data.shards.Shards"
    assert check(tmp_path, train, val) == 0
    said = capsys.readouterr()
    assert "data.train[0]: Shards for the task contrastive, 4 samples\n" in said.out
    assert said.err.count("its sources get group_by_length: true\n") == said.err.count("warning: ")


@pytest.mark.parametrize("words", [[], ["--config"], ["conf/x.yaml"]])
def test_without_a_config_there_is_nothing_to_check(words, capsys):
    assert main(["check", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("word", "near"), [("--sampels", "--samples"), ("--worker=2", "--workers"), ("--al", "--all")])
def test_a_mistyped_option_of_its_own_is_not_taken_for_one_of_fit(word, near, capsys):
    assert main(["check", "--config", "conf/quickstart.yaml", word]) == 2
    assert capsys.readouterr().err == (
        f"indiclip check: {word}: no such option; nearest is {near!r} (indiclip check --help)\n"
    )
