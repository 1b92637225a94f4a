"""Stacked config files that do not agree: what is said is what the command then does."""

import pytest

from indiclip.commands.config_samples import build_config


def stacked(*methods):
    words = ["--config", "quickstart"]
    for name in methods:
        words += ["--config", f"methods/{name}"]
    return build_config(words)[0]


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        (
            ("high_resolution", "augreg_regularised"),
            r"backbone\.init_args\.options: .*augreg_regularised.yaml says {'pos_",
        ),
        (("wsd", "high_resolution"), r"model\.lr_schedule: .*high_resolution.yaml says .*Staged.*, in place of .*wsd"),
    ],
)
def test_a_page_that_takes_the_place_of_anothers_value_is_named(methods, words):
    with pytest.warns(UserWarning, match=words):
        model = stacked(*methods)
    assert type(model.lr_schedule).__name__ == "Staged"
    assert ("pos_embed_grid_size" in model.encoder.backbone._args["options"]) == (methods[1] == "high_resolution")


def test_pages_that_agree_say_nothing(recwarn):
    """An experiment is there to be changed, lists grow, and what a page says of a part of another's is that part."""
    stacked("augreg_regularised", "wsd", "ema")
    assert not [str(found.message) for found in recwarn if "in place of" in str(found.message)]
