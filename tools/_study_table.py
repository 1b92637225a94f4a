"""A study's verdicts as Markdown, to be copied: for each arm and main score a word and its numbers, and the cost; and
every number of every seed as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection
from typing import Any

import numpy as np
from _study_results import Compared, Results
from _study_runs import curve
from _study_scores import Scores
from _study_statistics import Difference

from indiclip.evals.protocols.metrics import Interval

_NOTES = """\
Against `{control}`, whose row has the scores themselves. Each cell: the verdict, the mean of the differences over the
seeds, their 95% interval with the spread pooled over all arms. `better`, `worse`: p < 0.05 after Holm's correction for
the arms, for each score by itself; `perhaps`: only the interval leaves out 0; `no difference seen` is no proof that
there is none; `not judged`: too few seeds; `diverged`: a seed ended in numbers that are not finite, and the numbers are
of the others. †: the arm's own {seeds} differences alone would not say so. `before_training` is of seed {first}
alone{fold}. Lower is better of: {lower}.
"""


def markdown(
    results: Results,
    main: list[str],
    tables: dict[str, dict[str, dict[str, Compared]]],
    costs: list[dict[str, Any]],
    references: dict[str, Scores],
    end: str = "",
) -> str:
    """Two tables of the main scores, at equal FLOPs and at equal steps.

    Args:
        results: Of the study.
        main: Names of the scores.
        tables: "FLOPs" or "steps" -> score -> arm -> how it compares.
        costs: Of each arm, as the page shows them.
        references: Scores of what is no arm: the weights before training, what was prepared.
        end: Of the machine and the whole cost.
    """
    grid = results.grid
    lines = [f"# {grid.title}", ""]
    for equal in ("FLOPs", "steps"):
        lines += [f"## At equal {equal}", ""]
        lines += [_line("arm", "FLOPs a step", "steps", "learning rate", *main)]
        lines += ["|---" * (4 + len(main)) + "|"]
        of = {name: tables[equal][name] for name in main}
        shown = [row for row in costs if equal == "FLOPs" or row["arm"] not in grid.not_at_equal_steps]
        lines += [_row(results, row, of) for row in shown]
        if equal == "FLOPs":
            lines += [_line(name, "", "", "", *_means(at, main)) for name, at in references.items()]
        lines.append("")
    lower = [name for name in main if results.direction(name) == "lower"]
    seeds = sorted({len(grid.arm_seeds(arm)) for arm in grid.arms})
    notes = _NOTES.format(
        control=grid.control,
        seeds=" or ".join(map(str, seeds)),
        first=grid.seeds[0],
        fold=", and of its fold" if grid.folds else "",
        lower=", ".join(lower) or "none",
    )
    return "\n".join([*lines, notes, *([end, ""] if end else [])])


def numbers(results: Results) -> str:
    """CSV with a row for each run and step at which it was scored or validated, and a column for each score.

    The last column is validation's metric. Nothing stands where nothing was measured. The weights before training and
    the short runs that chose the learning rates are in the page alone.
    """
    metric = results.grid.select.metric
    rows: dict[tuple[str, int, int], dict[str, float]] = {}
    for place in results.places:
        arm, seed = place.run.arm, place.run.seed
        rows |= {(arm, seed, step): {metric: value} for step, value in curve(place, metric)}
        for step, scores in results.scores[arm, seed].items():
            rows[arm, seed, step] = rows.get((arm, seed, step), {}) | scores
    text = io.StringIO()
    written = csv.writer(text, lineterminator="\n")
    written.writerow(["arm", "seed", "step", *results.names, metric])
    order = {arm: number for number, arm in enumerate(results.grid.arms)}
    for key in sorted(rows, key=lambda row: (order[row[0]], *row[1:])):
        values = (rows[key].get(name) for name in (*results.names, metric))
        written.writerow([*key, *("" if value is None else f"{value:.5g}" for value in values)])
    return text.getvalue()


def _row(results: Results, costs: dict[str, Any], tables: dict[str, dict[str, Compared]]) -> str:
    """Of an arm; the control's has the scores themselves."""
    grid, arm = results.grid, costs["arm"]
    if arm == grid.control:
        cells = [mean_of(results.values(arm, name).values()) for name in tables]
    else:
        cells = [cell(of.get(arm)) for of in tables.values()]
    rate = "–" if costs["lr"] is None else f"{costs['lr']:g}"
    return _line(grid.shown_arm(arm), f"{costs['relative']:.2f}", str(costs["steps"]), rate, *cells)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _means(scores: Scores, names: list[str]) -> list[str]:
    return [mean_of([scores[name]] if name in scores else []) for name in names]


def mean_of(scores: Collection[float]) -> str:
    return f"{np.mean([*scores]):.3f}" if scores else "–"


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
