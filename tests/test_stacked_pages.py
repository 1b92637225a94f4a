"""Stacked config files that do not agree: what is said is what the command then does."""

import pytest
import yaml

from indiclip.commands.config_samples import build_config

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
