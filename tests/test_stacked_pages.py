"""Stacked config files that do not agree: what is said is what the command then does."""

import re

import pytest
import yaml

from indiclip.commands.config_samples import build_config
from indiclip.training.cli import run
from indiclip.training.stacked_pages import origins

WSD = {"class_path": "indiclip.optim.WarmupStableDecay", "init_args": {"decay_steps": 0.2}}


def stacked(*files):
    words = ["--config", "quickstart"]
    for name in files:
        words += ["--config", name]
    return build_config(words)[0]


def page(folder, model):
    file = folder / "own.yaml"
    file.write_text(yaml.safe_dump({"model": model}))
    return str(file)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"lr_schedule": WSD}, r"model\.lr_schedule: .*high_resolution.yaml says .*Staged.*, in place of .*own.yaml"),
        (
            {"encoder": {"backbone": {"init_args": {"options": {"pos_drop_rate": 0.1}}}}},
            r"backbone\.init_args\.options: .*high_resolution.yaml says {'pos_embed_grid_size.* in place of {'pos_drop",
        ),
    ],
)
def test_a_page_that_takes_the_place_of_anothers_value_is_named(model, words, tmp_path):
    with pytest.warns(UserWarning, match=words):
        found = stacked(page(tmp_path, model), "methods/high_resolution")
    assert type(found.lr_schedule).__name__ == "Staged"
    assert found.encoder.backbone._args["options"] == {"pos_embed_grid_size": [6, 6]}


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        (
            ("wsd", "high_resolution"),
            r"model\.lr_schedule: .*high_resolution.yaml says .*, and .*wsd.yaml .*; expected",
        ),
        (("high_resolution", "augreg_regularised"), r"backbone\.init_args\.options: .*augreg_regularised.yaml says"),
        (("gradnorm", "pcgrad"), r"model\.task_weights: .*pcgrad.yaml says .*PCGrad"),
        (("uncertainty", "ema", "gradnorm"), r"model\.task_weights: .*gradnorm.yaml says .*, and .*uncertainty.yaml"),
    ],
)
def test_two_methods_that_give_one_key_are_refused(methods, words):
    with pytest.raises(ValueError, match=words):
        stacked(*(f"methods/{name}" for name in methods))


def test_a_file_behind_two_methods_says_what_is_to_be(tmp_path, recwarn):
    schedule = {"class_path": "indiclip.optim.Staged", "init_args": {"stages": [{"until": 0.8}], "schedule": WSD}}
    found = stacked("methods/wsd", "methods/high_resolution", page(tmp_path, {"lr_schedule": schedule}))
    assert type(found.lr_schedule.schedule).__name__ == "WarmupStableDecay"
    assert [str(one.message) for one in recwarn if "own.yaml says" in str(one.message)]


def test_pages_that_agree_say_nothing(recwarn):
    """An experiment is there to be changed, lists grow, and what a page says of a part of another's is that part."""
    stacked("methods/augreg_regularised", "methods/wsd", "methods/ema")
    assert not [str(found.message) for found in recwarn if "in place of" in str(found.message)]


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        (
            ("augreg_medium1", "augreg_strong1"),
            r"overrides\[1\].mix: .* \(data.overrides\[1\] is of \S*strong1.yaml; .*\[0\] is of \S*medium1.yaml\)$",
        ),
        (("dinov2", "siglip2"), r"overrides\[1\].views: found 'global', .*overrides\[1\] is of \S*/siglip2.yaml;"),
    ],
)
def test_an_error_of_a_list_says_which_files_its_items_are_of(methods, words, tmp_path, capsys):
    pages = [word for name in methods for word in ("--config", f"methods/{name}")]
    assert run(["fit", "--config", "quickstart", *pages, "--runs", str(tmp_path)]) == 2
    assert re.search(words, capsys.readouterr().err.splitlines()[-1])


def test_origins_of_a_list_that_one_file_gives_or_a_flag_changes_are_not_said(tmp_path):
    """Nor any where a file is not to be read: the message is of that."""
    files = {"a": {"data": {"train": [1, 2]}}, "b": {"data": {"train+": [3]}}, "c": {"data": {"train": [4]}}}
    words = []
    for name, tree in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        words += ["--config", str(tmp_path / f"{name}.yaml")]
    message = "data.train[2]: is wrong"
    assert origins(words[:4], message) == f"data.train[2] is of {words[3]}"
    assert origins(words[:4], "data.train: is wrong") == f"data.train is of {words[1]}, {words[3]}"
    assert origins(words, message) == origins(words[:2], message) == ""
    assert origins([*words[:4], "--data.train+", "5"], message) == ""
    (tmp_path / "b.yaml").write_text("data: [")
    assert origins(words[:4], message) == ""
