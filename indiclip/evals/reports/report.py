"""`report.html`: one self-contained page with a run's curves, every metric, and pictures from held-out data."""

import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device

from indiclip import __version__
from indiclip.evals.reports.page import data_uri, png, readable, write_page
from indiclip.evals.results import is_summary
from indiclip.patches import unpatchify
from indiclip.types import Step, class_names, targets_of

if TYPE_CHECKING:
    from indiclip.module import MultiTask

Picture = tuple[np.ndarray, str]  # uint8 (height, width, 3) and the words below it
Metrics = dict[str, float | None]  # None is not finite


def write_report(folder: Path, title: str, record: dict[str, Any], sections: dict[str, list[Picture]]) -> Path:
    """Write `folder/report.html` from a run's record and pictures.

    Args:
        folder: The run's folder; `config.yaml` in it is shown, if there.
        title: Heading.
        record: `step`, `seconds`, `metrics` (name -> number, None if not finite), `history` (rows with `step`),
            `quarantined` (rows of task, key, shard, reason), `data` (YAML key of each source -> `Inventory`), and
            `weights` (what was scored, in words), if known.
        sections: Head name -> pictures.

    Returns:
        The file.
    """
    plain, by_language = held_out(record["metrics"])
    quarantined = [[row[name] for name in ("task", "shard", "key", "reason")] for row in record["quarantined"][:200]]
    config = folder / "config.yaml"
    return write_page(
        folder / "report.html",
        "training.html",
        title=title,
        version=__version__,
        record=record,
        held_out=plain,
        by_language={head: _language_table(languages) for head, languages in by_language.items()},
        curves=_curves(record["history"]),
        sections={name: [(png(pixels), words) for pixels, words in pictures] for name, pictures in sections.items()},
        data=[(key, line) for key, inventory in record["data"].items() for line in inventory.lines()],
        quarantined=quarantined,
        config=config.read_text() if config.is_file() else None,
    )


@torch.no_grad()
def held_out_pictures(module: "MultiTask", batches: Sequence[Step], per_head: int) -> dict[str, list[Picture]]:
    """Let every head draw its predictions on held-out images.

    Args:
        module: In any mode; it is put into evaluation mode and back.
        batches: Steps of the held-out sources, on any device.
        per_head: Number of pictures.
    """
    was_training = module.training
    module.eval()
    sections: dict[str, list[Picture]] = {}
    for step in batches:
        step = module.transfer_batch_to_device(step, module.device, 0)
        for name, head, predictions, _, batch in module.predictions(step):
            pictures = sections.setdefault(name, [])
            for i, prediction in enumerate(predictions[: per_head - len(pictures)]):
                prediction, target = move_data_to_device((prediction, targets_of(batch, i)), "cpu")
                target["class_names"] = class_names(batch)
                pictures.append(head.visualize(unpatchify(batch["images"], i), prediction, target))
    module.train(was_training)
    return sections


def _language_table(languages: dict[str, Metrics]) -> tuple[list[str], list[list[str]]]:
    """Names of the columns behind the first, and the rows."""
    names = metric_names(languages)
    return names, [
        [language, *(readable(values[name]) if name in values else "" for name in names)]
        for language, values in languages.items()
    ]


def held_out(metrics: Metrics) -> tuple[Metrics, dict[str, dict[str, Metrics]]]:
    """The metrics on held-out data: those of everything (of a benchmark, the main ones), and those of one language as
    head -> language -> metric -> value.

    A number is `val/<head>/<metric>`, or `val/<head>/<source>/<metric>` of a head with several held-out sources; and
    with `/<language>` behind it, it is that of a language.
    """
    single = {name.split("/")[1] for name in metrics if name.startswith("val/") and name.count("/") == 2}
    plain: Metrics = {}
    by_language: dict[str, dict[str, Metrics]] = {}
    for name, value in sorted(metrics.items()):
        suite, *parts = name.split("/")
        head = parts[:1] if parts[0] in single else parts[:2]
        if suite == "val" and len(parts) == len(head) + 2:
            by_language.setdefault("/".join(head), {}).setdefault(parts[-1], {})[parts[-2]] = value
        elif suite == "val" or (suite == "eval" and is_summary(name)):
            plain[name] = value
    return plain, by_language


def metric_names(languages: dict[str, Metrics]) -> list[str]:
    """Of a table with a row per language."""
    return sorted({name for values in languages.values() for name in values})


def _curves(history: list[dict[str, Any]]) -> list[str]:
    """A plot per group of names, `train/<head>/...`, `val/<head>/...`, or of a number by language, of what was measured
    more than once. Of a benchmark only what a summary has room for, a plot per suite. What `throughput/` measures has a
    plot for each number, whose units differ.
    """
    times = Counter(name for row in history for name in row)
    groups: dict[str, set[str]] = {}
    for name, count in times.items():
        parts = name.split("/")
        if parts[0] == "throughput" and count > 1:
            groups[name] = {name}
        if len(parts) < 3 or count < 2 or name.endswith("backbone_grad_norm"):
            continue
        if parts[0] != "eval" or is_summary(name):
            groups.setdefault("/".join(parts[: 2 if parts[0] == "eval" else -1]), set()).add(name)
    from matplotlib import rc_context

    # Letters stay letters, and of points nearer than a pixel the extremes alone are kept.
    with rc_context({"svg.fonttype": "none", "path.simplify_threshold": 1.0}):
        return [_plot(group, sorted(names), history) for group, names in sorted(groups.items())]


def _plot(title: str, names: list[str], history: list[dict[str, Any]]) -> str:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    named = names if len(names) <= 24 and names != [title] else []
    widest = max((len(name.removeprefix(f"{title}/")) for name in named), default=0)
    columns = max(1, min(3, 60 // (widest + 5)))
    legend = 0.16 * math.ceil(len(named) / columns)  # inches, as the height; to find a layout takes twice as long
    height = 3.0 + legend
    figure = Figure(figsize=(4.6, height))
    axes = figure.add_axes((0.15, (0.55 + legend) / height, 0.82, 2.15 / height))
    for i, name in enumerate(names):
        measured = [row for row in history if row.get(name) is not None]
        axes.plot(
            [row["step"] for row in measured],
            [row[name] for row in measured],
            label=name.removeprefix(f"{title}/"),
            linewidth=1.2,
            linestyle=("-", "--", ":")[i // 10 % 3],  # there are ten colours
            marker="o" if len(measured) < 20 else None,
            markersize=3,
        )
    if title.startswith("throughput/"):
        axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if named:
        figure.legend(loc="lower center", fontsize=7, ncols=columns, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return data_uri(buffer.getvalue(), "svg+xml")
