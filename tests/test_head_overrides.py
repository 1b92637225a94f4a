"""A page that stacks on another one changes arguments of its heads, as if they had been written so."""

import pytest
import yaml
from experiments import config

from indiclip.commands.config_samples import build_config
from indiclip.module import MultiTask
from indiclip.training.cli import run

SIGMOID = {"head": "contrastive", "loss": "sigmoid", "init_logit_scale": 20, "init_logit_bias": -12.5}


def files(folder, *pages):
    """Words of a command with the small experiment and these pages on top of it."""
    tree = config(model__heads=[{"class_path": "heads.contrastive.Contrastive", "init_args": {"loss": "softmax"}}])
    words = []
    for number, page in enumerate([tree, *pages]):
        file = folder / f"{number}.yaml"
        file.write_text(yaml.safe_dump(page))
        words += ["--config", str(file)]
    return words


def page(*overrides):
    return {"model": {"head_overrides+": list(overrides)}}


def test_pages_on_one_head_count_all(tmp_path):
    """The second gives another argument, and one as the first has it."""
    pages = [page(SIGMOID), page({"head": "contrastive", "init_logit_bias": -12.5, "max_logit_scale": 50.0})]
    model, _ = build_config(files(tmp_path, *pages))
    criterion = model.heads["contrastive"].criterion
    assert criterion.logit_scale.exp().item() == pytest.approx(20)
    assert criterion.logit_bias.item() == -12.5
    assert criterion.max_logit_scale == 50


def test_a_flag_changes_what_a_page_says(tmp_path):
    model, _ = build_config([*files(tmp_path, page(SIGMOID)), "--model.head_overrides.init_logit_bias", "-7"])
    assert model.heads["contrastive"].criterion.logit_bias.item() == -7


def test_two_that_want_an_argument_differently_are_one_line(tmp_path, capsys):
    pages = [page(SIGMOID), page({"head": "contrastive", "init_logit_bias": -7.0})]
    assert run(["fit", *files(tmp_path, *pages), "--runs", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    words = "model.head_overrides[1].init_logit_bias: found -7.0, and model.head_overrides[0].init_logit_bias of the"
    assert f"{words} same head 'contrastive' is -12.5; expected one of them" in line


def test_they_are_part_of_the_heads_in_what_a_run_keeps(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(["fit", *files(tmp_path, page(SIGMOID)), "--print_config"])
    tree = yaml.safe_load(capsys.readouterr().out)
    (head,) = tree["model"]["heads"]
    assert head["init_args"]["loss"] == "sigmoid"
    assert not tree["model"].get("head_overrides")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"head": "contrastiv", "loss": "sigmoid"}, "overrides[0].head: found 'contrastiv'; nearest is 'contrastive'"),
        ({"head": "contrastive"}, "head_overrides[0]: changes nothing"),
        ({"head": "contrastive", "los": "sigmoid"}, "los: heads.contrastive.Contrastive has no such option"),
        ({"head": "contrastive", "loss": "hinge"}, "hinge"),
        ({"head": "contrastive", "init_logit_bias": -1}, "init_logit_bias: the loss softmax has none"),
        ({"head": "contrastive", "init_logit_scale": 200.0}, "init_logit_scale: found 200 with max_logit_scale 100"),
        (
            {"head": "contrastive", "loss": "sigmoid", "init_logit_bias": float("inf")},
            "heads.contrastive.init_logit_bias: found inf; expected -100 to 100",
        ),
        (
            {"head": "contrastive", "loss": "sigmoid", "init_logit_bias": float("nan")},
            "heads.contrastive.init_logit_bias: found nan; expected -100 to 100",
        ),
        ({"head": "contrastive", "max_logit_scale": 5.0}, "init_logit_scale: found 14.2857 with max_logit_scale 5"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, override, message, capsys):
    assert run(["fit", *files(tmp_path, page(override)), "--runs", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_in_python_the_heads_have_their_own_arguments():
    with pytest.raises(ValueError, match="head_overrides: is for configs"):
        MultiTask(None, [type("H", (), {"name": "a"})()], head_overrides=[SIGMOID])
