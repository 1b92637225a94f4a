"""A list of a later config or flag takes the place of the earlier one whole; a dotted option says which item it met."""

import json

import pytest
import yaml
from experiments import config

from indiclip.training.cli import run

CONTRASTIVE = "heads.contrastive.Contrastive"
EVERY_EPOCH = "lightning.pytorch.callbacks.LearningRateMonitor"
# Per key: items that an earlier page gives, and as many of a later one, of the same class and with fewer options.
LISTS = {
    "data.train": (
        [
            {
                "task": "contrastive",
                "batch_size": 2,
                "max_tokens": 9,
                "dataset": {"class_path": "indiclip.generated.mela.Mela", "init_args": {"languages": ["ta"]}},
            }
        ],
        [
            {
                "task": "contrastive",
                "batch_size": 4,
                "dataset": {"class_path": "indiclip.generated.mela.Mela", "init_args": {"num_scenes": 7}},
            }
        ],
    ),
    "model.heads": (
        [
            {"class_path": CONTRASTIVE, "init_args": {"name": "first", "weight": 3.0, "max_logit_scale": 50.0}},
            {"class_path": CONTRASTIVE, "init_args": {"name": "second", "weight": 2.0}},
        ],
        [
            {"class_path": CONTRASTIVE, "init_args": {"name": "third"}},
            {"class_path": CONTRASTIVE, "init_args": {"name": "fourth", "loss": "sigmoid"}},
        ],
    ),
    "trainer.callbacks": (
        [{"class_path": EVERY_EPOCH, "init_args": {"logging_interval": "epoch"}}],
        [{"class_path": EVERY_EPOCH, "init_args": {"log_momentum": True}}],
    ),
}


def printed(capsys, *words):
    """What a run of these words would keep as its config."""
    with pytest.raises(SystemExit):
        run(["fit", *words, "--print_config"])
    out, err = capsys.readouterr()
    assert not err
    return yaml.safe_load(out)


def page(file, key, items):
    group, name = key.split(".")
    file.write_text(yaml.safe_dump({group: {name: items}}))
    return ["--config", str(file)]


@pytest.fixture
def base(tmp_path):
    file = tmp_path / "base.yaml"
    file.write_text(yaml.safe_dump(config()))
    return ["--config", str(file)]


@pytest.mark.parametrize("as_flag", [False, True], ids=["config", "flag"])
@pytest.mark.parametrize("key", LISTS)
def test_a_later_list_is_as_if_there_had_been_no_other(base, tmp_path, capsys, key, as_flag):
    earlier, later = LISTS[key]
    first = page(tmp_path / "first.yaml", key, earlier)
    second = [f"--{key}", json.dumps(later)] if as_flag else page(tmp_path / "second.yaml", key, later)
    assert printed(capsys, *base, *first, *second) == printed(capsys, *base, *second)


def test_a_list_within_an_object_too(base, tmp_path, capsys):
    pages = []
    for number, item in enumerate([{"weights": "a.ckpt", "parts": ["text"]}, {"weights": "b.ckpt"}]):
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump({"model": {"encoder": {"init_from": [item]}}}))
        pages += ["--config", str(file)]
    assert printed(capsys, *base, *pages) == printed(capsys, *base, *pages[2:])


def test_a_list_that_grows_keeps_what_it_had(base, tmp_path, capsys):
    earlier, later = LISTS["model.heads"]
    first = page(tmp_path / "first.yaml", "model.heads", earlier)
    second = page(tmp_path / "second.yaml", "model.heads+", later)
    heads = printed(capsys, *base, *first, *second)["model"]["heads"]
    assert [head["init_args"]["name"] for head in heads] == ["first", "second", "third", "fourth"]
    assert [head["init_args"]["weight"] for head in heads] == [3.0, 2.0, 1.0, 1.0]


def test_a_dotted_option_says_which_item_it_has_changed(base, tmp_path, capsys):
    heads = page(tmp_path / "heads.yaml", "model.heads", LISTS["model.heads"][0])
    said = pytest.warns(UserWarning, match="--model.heads.weight: changes the last of 2 items, second$")
    with said, pytest.raises(SystemExit):
        run(["fit", *base, *heads, "--model.heads.weight", "7", "--print_config"])
    heads = yaml.safe_load(capsys.readouterr().out)["model"]["heads"]
    assert [head["init_args"]["weight"] for head in heads] == [3.0, 7.0]
