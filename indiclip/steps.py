"""Steps of a run, written as numbers or as shares of it."""

from collections.abc import Mapping


def check_starts(found: Mapping[str, float]) -> None:
    """Raise ValueError for the first, under its YAML key, that is neither a share of a run nor the number of a step."""
    for key, start in found.items():
        if not (0 <= start < 1 or (start > 0 and float(start).is_integer())):
            raise ValueError(
                f"{key}: found {start:g}; expected a share of the run's steps below 1, or the number of a step"
            )


def first_step(start: float, run_steps: int | None) -> int:
    """The step that a share of the run's steps (below 1), or a number of steps, stands for.

    Args:
        start: 0 or more.
        run_steps: Of the whole run; without it, a share is of one step.
    """
    return round(start * (run_steps or 1) if start < 1 else start)


def start_step(start: float, run_steps: int | None) -> int:
    """As `first_step`, of what begins: a share below 1 is never behind the last step, however short the run is."""
    step = first_step(start, run_steps)
    return min(step, run_steps - 1) if run_steps and start < 1 else step
