"""Plots of a study's page: differences with their intervals, and curves."""

from __future__ import annotations

import io
import math
from typing import Any

from _study_results import Compared, Results
from _study_runs import curve

from indiclip.evals.reports.page import data_uri


def forest(results: Results, name: str, compared: dict[str, Compared]) -> str:
    """Differences to the control at equal FLOPs: dots, the pooled interval thick and the own one thin."""
    from matplotlib.figure import Figure

    arms = [arm for arm, of in compared.items() if math.isfinite(of.own.value)][::-1]
    height = 0.9 + 0.26 * max(len(arms), 1)
    figure = Figure(figsize=(5.6, height))
    axes = figure.add_axes((0.36, 0.55 / height, 0.6, 1 - 0.9 / height))
    for y, arm in enumerate(arms):
        of = compared[arm]
        colour = {"better": "#12787a", "worse": "#b3403a"}.get(of.verdict.split()[-1], "#777777")
        for interval, width in ((of.pooled, 4.0), (of.own, 1.0)):
            if math.isfinite(interval.low):
                axes.plot([interval.low, interval.high], [y, y], color=colour, linewidth=width, solid_capstyle="butt")
        axes.plot([of.own.value], [y], "o", color=colour, markersize=5)
    reach = [0.0, *(compared[arm].own.value for arm in arms)]
    for arm in arms:
        reach += [end for end in (compared[arm].pooled.low, compared[arm].pooled.high) if math.isfinite(end)]
    margin = 0.15 * (max(reach) - min(reach)) or 1.0
    axes.set_xlim(min(reach) - margin, max(reach) + margin)
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set_yticks(range(len(arms)), [results.grid.reversed.get(arm, arm) for arm in arms], fontsize=8)
    axes.set_ylim(-0.7, max(len(arms), 1) - 0.3)
    axes.tick_params(labelsize=8)
    axes.set_title(name, fontsize=9)
    axes.set_xlabel(f"difference to {results.grid.control} ({results.direction(name)} is better)", fontsize=8)
    return _svg(figure)


def curves(results: Results, arm: str) -> str:
    """The validations of an arm and of the control over FLOPs and over steps; a line per seed."""
    from matplotlib.figure import Figure

    grid = results.grid
    figure = Figure(figsize=(4.6, 1.9))
    for place, axis in enumerate(("FLOPs", "steps")):
        axes = figure.add_axes((0.11 + 0.47 * place, 0.24, 0.39, 0.6))
        for name, colour in ((grid.control, "#999999"), (arm, "#12787a")):
            counted = results.study.counted[name]
            for run in (of for of in results.places if of.run.arm == name):
                points = curve(run, grid.select.metric)
                x = [counted.flops_until(step) if axis == "FLOPs" else step for step, _ in points]
                axes.plot(x, [value for _, value in points], color=colour, linewidth=1.0)
        axes.set_xlabel(axis, fontsize=7)
        axes.tick_params(labelsize=6.5)
        axes.xaxis.get_offset_text().set_fontsize(6.5)
        axes.grid(alpha=0.25)
    figure.suptitle(arm, fontsize=8.5)
    return _svg(figure)


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg")
    return data_uri(buffer.getvalue(), "svg+xml")
