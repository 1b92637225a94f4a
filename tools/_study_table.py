"""A study's verdicts as Markdown, to be copied: for each arm and main score a word and its numbers, and the cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from _study_statistics import Difference

from indiclip.evals.protocols.metrics import Interval

if TYPE_CHECKING:
    from _study_results import Compared, Results

_NOTES = """\
Against `{control}`, whose row has the scores themselves. Each cell: the verdict, the mean of the differences over the
seeds, their 95% interval with the spread pooled over all arms. `better`, `worse`: p < 0.05 after Holm's correction for
the arms, for each score by itself; `perhaps`: only the interval leaves out 0; `no difference seen` is no proof that
there is none; `not judged`: too few seeds; `diverged`: a seed ended in numbers that are not finite, and the numbers are
of the others. †: the arm's own {seeds} differences alone would not say so. Lower is better of: {lower}.
"""


def markdown(
    results: Results, main: list[str], tables: dict[str, dict[str, dict[str, Compared]]], end: str = ""
) -> str:
    """Two tables of the main scores, at equal FLOPs and at equal steps; `end` is of the machine and the whole cost."""
    grid = results.grid
    lines = [f"# {grid.title}", ""]
    for equal in ("FLOPs", "steps"):
        lines += [f"## At equal {equal}", "", f"| {' | '.join(['arm', 'FLOPs a step', 'steps', *main])} |"]
        lines += ["|---" * (3 + len(main)) + "|"]
        arms = [arm for arm in grid.arms if equal == "FLOPs" or arm not in grid.not_at_equal_steps]
        lines += [_row(results, arm, main, {name: tables[equal][name] for name in main}) for arm in arms]
        lines.append("")
    lower = [name for name in main if results.direction(name) == "lower"]
    seeds = sorted({len(grid.arm_seeds(arm)) for arm in grid.arms})
    notes = _NOTES.format(control=grid.control, seeds=" or ".join(map(str, seeds)), lower=", ".join(lower) or "none")
    return "\n".join([*lines, notes, *([end, ""] if end else [])])


def _row(results: Results, arm: str, main: list[str], tables: dict[str, dict[str, Compared]]) -> str:
    grid, counted = results.grid, results.study.counted
    relative = counted[arm].step_flops / counted[grid.control].step_flops
    if arm == grid.control:
        values = [[*results.values(arm, name).values()] for name in main]
        cells = [f"{np.mean(of):.3f}" if of else "–" for of in values]
    else:
        cells = [cell(tables[name].get(arm)) for name in main]
    return f"| {' | '.join([grid.shown_arm(arm), f'{relative:.2f}', str(counted[arm].steps), *cells])} |"


def cell(of: Compared | None) -> str:
    """A verdict, its number and its interval."""
    if of is None or not (of.diverged or math.isfinite(of.own.value)):
        return "–"
    seeds = f" with seed {', '.join(map(str, of.diverged))}" if of.diverged else ""
    numbers = f" {signed(of.own.value)} ({ends(of.pooled)})" if math.isfinite(of.own.value) else ""
    return f"{of.verdict}{'†' * of.only_pooled}{seeds}{numbers}"


def signed(value: float) -> str:
    return "–" if not math.isfinite(value) else f"{value:+.3f}"


def ends(difference: Difference | Interval | None) -> str:
    """Of an interval."""
    if difference is None or not math.isfinite(difference.low + difference.high):
        return "–"
    return f"{difference.low:+.3f} to {difference.high:+.3f}"
