"""A study's page: every number, the bad ones too, with paired intervals, curves, costs and commands."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from _study_figures import curves, forest
from _study_grid import command
from _study_prepare import Prepared
from _study_results import Results
from _study_runs import BEFORE_TRAINING, Costs, common_step
from _study_scores import Scores, scored
from _study_state import Study
from _study_statistics import NO_DIFFERENCE, Difference
from _study_table import ends, markdown, mean_of, numbers, signed

from indiclip import json_lines
from indiclip.evals.reports.page import write_page


def write_study(study: Study, prepared: Prepared, failed: list[str]) -> Path:
    """Write `study.html`, `study.md` and `study.csv`, with what went wrong meanwhile; the page's path."""
    results = Results(study)
    grid, costs = study.grid, Costs(study.root)
    main = [name for name in grid.main if name in results.names] or results.names[:4]
    tables = {equal: {name: results.compared(name, equal) for name in results.names} for equal in ("FLOPs", "steps")}
    machine = _machine(costs)
    spent, rows, references = _spent(costs), _costs(study, results, costs), _references(study, prepared)
    values = {
        "title": grid.title,
        "grid": grid,
        "results": results,
        "main": main,
        "tables": tables,
        "forests": {name: forest(results, name, tables["FLOPs"][name]) for name in main},
        "curves": {arm: curves(results, arm) for arm in grid.arms},
        "costs": rows,
        "rates": {arm: study.rates(arm) for arm in grid.arms},
        "spent": spent,
        "commands": _commands(study),
        "diverged": {
            f"{p.run.arm}, {p.run.name}": p.state()["diverged"] for p in _places(study) if "diverged" in p.state()
        },
        "references": references,
        "prepared": prepared.items,
        "skipped": _skipped(study),
        "failed": failed,
        "left": study.left(),
        "machine": machine,
        "dates": _dates(costs),
        "NO_DIFFERENCE": NO_DIFFERENCE,
        "signed": signed,
        "ends": ends,
        "seeds_missing": lambda arm, of: _seeds_missing(results, arm, of),
        "shown_p": lambda p: "–" if not math.isfinite(p) else f"{p:.3f}" if p >= 0.0005 else "<0.001",
        "mean_of": mean_of,
        "shown_arm": grid.shown_arm,
        "scored_at": lambda arm, equal: _scored_at(study, arm, equal),
    }
    end = f"{sum(spent.values()) / 3600:.1f} CPU-hours, {values['dates']}. {machine}."
    json_lines.write_whole(study.root / "study.md", markdown(results, main, tables, rows, references, end).encode())
    json_lines.write_whole(study.root / "study.csv", numbers(results).encode())
    return write_page(study.root / "study.html", "study.html", **values)


def _scored_at(study: Study, arm: str, equal: str) -> str:
    """After which steps an arm is scored, and the control where that is another number."""
    steps = study.counted[arm].steps, study.counted[study.grid.control].steps
    if equal == "FLOPs":
        return f"{steps[0]} steps"
    own, control = common_step(*steps)
    return f"both {own} steps" if own == control else f"{own} and {control} steps"


def _skipped(study: Study) -> dict[str, int]:
    """Run -> steps that changed no weight, where there were any."""
    found = {}
    for place in _places(study):
        file = place.folder / "metrics.json"
        if place.state().get("done") and (count := json.loads(file.read_text()).get("nonfinite_steps", 0)):
            found[f"{place.run.arm}, {place.run.name}"] = count
    return found


def _seeds_missing(results: Results, arm: str, difference: Difference) -> str:
    """Said beside a difference that is not of all seeds of its arm."""
    planned = len(results.grid.arm_seeds(arm))
    return f"{difference.num} of {planned} seeds" if difference.num < planned else ""


def _machine(costs: Costs) -> str:
    """What the numbers depend on: of this process, and the commits that made them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = next(iter(names), "") or platform.machine()
    libraries = ("torch", "lightning", "timm", "transformers", "indiclip")
    versions = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in libraries)]
    commits = dict.fromkeys(row["code"] for row in costs.rows if row.get("code"))
    versions += [f"commit {', '.join(commits)}"] * bool(commits)
    return f"{os.cpu_count()} cores of {processor}, one thread per run; {', '.join(versions)}"


def _dates(costs: Costs) -> str:
    """On which days something ran."""
    days = sorted({row["date"].partition(" ")[0] for row in costs.rows if "date" in row})
    return f"{days[0]} to {days[-1]}" if len(days) > 1 else next(iter(days), time.strftime("%Y-%m-%d"))


def _spent(costs: Costs) -> dict[str, float]:
    """What it was for -> CPU-seconds so far."""
    words = {"rate": "choice of learning rates", "seed": "runs", "timing": "timing"}
    words |= {BEFORE_TRAINING: "weights before training"}
    found: dict[str, float] = {}
    for row in costs.rows:
        kind = words.get(row["run"].partition("-")[0], "runs") if row["kind"] == "train" else f"{row['kind']}"
        name = {"score": "scores", "prepare": "what was prepared"}.get(kind, kind)
        found[name] = found.get(name, 0.0) + row["cpu_seconds"]
    return found


def _references(study: Study, prepared: Prepared) -> dict[str, Scores]:
    """What is no arm: the weights before training, and runs that were prepared."""
    (before,) = study.runs["reference"]
    found = {f"{name} (prepared)": prepared.scores(name) for name in prepared.items}
    found[before.name] = scored(study.place(before), study.grid).get(before.steps, {})
    return {name: scores for name, scores in found.items() if scores}


def _places(study: Study) -> list[Any]:
    return [study.place(run) for kind in study.runs.values() for run in kind]


def _costs(study: Study, results: Results, costs: Costs) -> list[dict[str, Any]]:
    control = study.counted[study.grid.control]
    rows = []
    for arm, counted in study.counted.items():
        runs = [row["cpu_seconds"] for row in costs.rows if row["arm"] == arm and row["run"].startswith("seed-")]
        rows.append(
            {
                "arm": arm,
                "stages": counted.stages,
                "steps": counted.steps,
                "flops": counted.flops,
                "relative": counted.step_flops / control.step_flops,
                "step_seconds": costs.step(arm),
                "seconds": sum(runs),
                "lr": study.rate(arm),
                "reached": results.reached(arm),
                "within_warmup": _within_warmup(study, arm),
            }
        )
    return rows


def _within_warmup(study: Study, arm: str) -> str:
    """Said of an arm whose rates were tried in runs that ended before their warm-up did; else nothing."""
    run = next((run for run in study.runs["rates"] if run.arm == arm), None)
    config = study.place(run).folder / "config.yaml" if run else None
    if run is None or config is None or not config.exists():
        return ""
    warmup = yaml.safe_load(config.read_text())["model"]["warmup_steps"]
    return f"tried in {run.steps} steps, all in a warm-up of {warmup}" if run.steps <= warmup else ""


def _commands(study: Study) -> dict[str, str]:
    """Of each arm, with the first seed."""
    first = {run.arm: run for run in reversed(study.seeds())}
    return {
        arm: command(study.place(run).words(study.grid), study.grid.environment(run.seed))
        for arm in study.grid.arms
        if (run := first.get(arm))
    }
