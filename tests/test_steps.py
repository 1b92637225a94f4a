"""When things begin: shares and numbers of steps."""

import pytest

from indiclip.steps import first_step, start_step


@pytest.mark.parametrize(
    ("start", "run_steps", "step"), [(0, 10, 0), (0.8, 10, 8), (0.25, 10, 2), (1, 10, 1), (7, None, 7), (0.9, None, 1)]
)
def test_below_one_is_a_share_and_from_one_on_a_number(start, run_steps, step):
    assert first_step(start, run_steps) == step


@pytest.mark.parametrize(("start", "run_steps", "step"), [(0.8, 10, 8), (0.8, 2, 1), (0.99, 1, 0), (2, 2, 2)])
def test_a_share_begins_within_the_run(start, run_steps, step):
    assert start_step(start, run_steps) == step
