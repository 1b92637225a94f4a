"""When things begin and end: shares and numbers of steps, of whatever has a place in a run."""

import pytest
import torch
from experiments import config, fit

from heads.contrastive import Contrastive
from indiclip.generated.mela import Mela
from indiclip.head_schedule import start_steps
from indiclip.loading.source import Source
from indiclip.loading.stages import Stage
from indiclip.loading.steps import Steps
from indiclip.loading.views import View
from indiclip.optim import Constant, RateStage, Staged, WarmupStableDecay
from indiclip.preprocessing import Preprocessing
from indiclip.steps import first_step, start_step, start_within


@pytest.mark.parametrize(
    ("start", "run_steps", "step"), [(0, 10, 0), (0.8, 10, 8), (0.25, 10, 2), (1, 10, 1), (0.9, 1, 1)]
)
def test_below_one_is_a_share_and_from_one_on_a_number(start, run_steps, step):
    assert first_step(start, run_steps) == step


@pytest.mark.parametrize(("start", "run_steps", "step"), [(0.8, 10, 8), (0.8, 2, 1), (0.99, 1, 0), (2, 2, 2)])
def test_a_share_begins_within_the_run(start, run_steps, step):
    assert start_step(start, run_steps) == step


def test_a_run_without_an_end_has_no_shares():
    assert start_within("x", 7, None) == 7
    with pytest.raises(ValueError, match=r"x: 0\.5 is a share of the run's steps, which need trainer.max_steps"):
        start_within("x", 0.5, None)


def source(**options):
    return Source("t", Mela(num_scenes=8, size=32, layout="single"), 4, max_tokens=16, **options)


def in_a_run(kind, number, run_steps):
    """Have something begin, or a stage of it end, at a step of a run."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if kind == "head":
        return start_steps([Contrastive(), Contrastive(name="late", start=number)], run_steps)["late"]
    if kind == "rates":
        schedule = Staged([RateStage(number, 2.0)], schedule=Constant())
        (factor,) = schedule.scheduler(optimizer, 0, run_steps).lr_lambdas
        return next(step for step in range(run_steps) if factor(step) == 1)
    if kind == "decay":
        return WarmupStableDecay(number).scheduler(optimizer, 0, run_steps)
    changes = {"views": [View("late", start=number)]} if kind == "view" else {"stages": [Stage(number, max_tokens=4)]}
    steps = Steps([source(**changes)], 0, Preprocessing(8), True, run_steps=run_steps)
    if kind == "view":
        return next(step for step in range(run_steps) if "views" in steps[step]["t"])
    return next(step for step in range(run_steps) if steps[step]["t"]["images"]["num_patches"][0] == 16)


KEYS = {
    "head": r"heads\.late\.start",
    "view": "data: view 'late': start",
    "stage": r"data: task 't': stages\[0\]\.until",
    "rates": r"model\.lr_schedule\.stages\[0\]\.until",
}


@pytest.mark.parametrize("kind", KEYS)
def test_all_that_has_a_place_in_a_run_has_it_by_one_rule(kind):
    """0.8 of two steps is the second of them: all change there together, though 1.6 is rounded to 2."""
    assert [in_a_run(kind, 0.8, run_steps) for run_steps in (2, 10)] == [1, 8]
    assert in_a_run(kind, 3, 4) == 3
    for found in (4, 1234567):
        with pytest.raises(ValueError, match=f"{KEYS[kind]}: {found} is beyond the last of the run's 4 steps"):
            in_a_run(kind, found, 4)


@pytest.mark.parametrize("kind", [*KEYS, "decay"])
def test_what_is_neither_a_share_nor_a_step_is_not_rounded(kind):
    key = KEYS.get(kind, r"model\.lr_schedule\.decay_steps")
    with pytest.raises(ValueError, match=rf"{key}: found 1\.5; expected a share of the run's steps"):
        in_a_run(kind, 1.5, 10)


@pytest.mark.parametrize("kind", ["stage", "rates"])
def test_a_stage_beyond_the_run_is_one_line_before_training(kind, tmp_path, capsys):
    tree = config(trainer__max_steps=3)
    if kind == "stage":
        tree["data"]["train"][0]["stages"] = [{"until": 3, "max_tokens": 4}]
        words = "data.train[0].stages[0].until: 3 is beyond the last of the run's 3 steps"
    else:
        stages = {"stages": [{"until": 5, "factor": 2.0}]}
        tree["model"]["lr_schedule"] = {"class_path": "indiclip.optim.Staged", "init_args": stages}
        words = "model.lr_schedule.stages[0].until: 5 is beyond the last of the run's 3 steps"
    assert fit(tmp_path, tree) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("indiclip:")]
    assert words in line
    assert "Sources" not in out  # of the start-up table
    assert not (tmp_path / "runs" / "experiment").exists()
