"""Steps of a run, written as numbers or as shares of it."""

from collections.abc import Mapping, Sequence


def check_starts(found: Mapping[str, float]) -> None:
    """Raise ValueError for the first, under its YAML key, that is neither a share of a run nor the number of a step."""
    for key, start in found.items():
        if not (0 <= start < 1 or (start > 0 and float(start).is_integer())):
            raise ValueError(
                f"{key}: found {_written(start)}; expected a share of the run's steps below 1, or the number of a step"
            )


def check_ends(ends: Sequence[float], key: str) -> None:
    """Raise ValueError for the first end of a row of stages that is none, or that does not come after the one before.

    Args:
        ends: Each a share of the run's steps, or the number of the first step behind the stage; all of one kind. 1 is
            refused, as it may be meant as either.
        key: Of the stages in the YAML, each of which has `until`.
    """
    for i, until in enumerate(ends):
        own, before = f"{key}[{i}].until: found {_written(until)}", ends[i - 1] if i else 0
        if not (0 < until < 1 or (until >= 2 and float(until).is_integer())):
            raise ValueError(
                f"{own}; expected a share of the run's steps between 0 and 1, or the number of a step from 2 up"
            )
        if (until < 1) != (ends[0] < 1):
            raise ValueError(f"{own} after {_written(before)}; expected all shares, or all steps")
        if until <= before:
            raise ValueError(f"{own} after {_written(before)}; expected more: stages ascend")


def first_step(start: float, run_steps: int) -> int:
    """The step that a share of the run's steps (below 1), or a number of steps, stands for."""
    return round(start * run_steps if start < 1 else start)


def start_step(start: float, run_steps: int) -> int:
    """As `first_step`, of what begins: a share below 1 is never behind the last step, however short the run is."""
    step = first_step(start, run_steps)
    return min(step, run_steps - 1) if start < 1 else step


def start_within(key: str, start: float, run_steps: int | None) -> int:
    """As `start_step`, of a run that must have the step.

    Args:
        key: Of the start in the YAML.
        start: A share or a number of steps.
        run_steps: Of the whole run; None where it has no end.

    Raises:
        ValueError: The step is behind the run's last one, or a share of a run without an end.
    """
    if run_steps is None:
        if 0 < start < 1:
            raise ValueError(
                f"{key}: {_written(start)} is a share of the run's steps, which need trainer.max_steps (or max_epochs)"
            )
        return int(start)
    step = start_step(start, run_steps)
    if step >= run_steps:
        raise ValueError(
            f"{key}: {_written(start)} is beyond the last of the run's {run_steps} steps; expected less, or a share of "
            "them below 1"
        )
    return step


def _written(number: float) -> str:
    """All digits of a step's number, and no more of a share than a user writes."""
    return f"{number:.15g}"
