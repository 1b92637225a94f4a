"""Steps of a run, written as numbers or as shares of it."""


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
