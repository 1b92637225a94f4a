"""A run's curves: what it logged more than once, in plots of numbers that have one unit."""

import io
import math
from collections import Counter
from typing import Any, NamedTuple

from indiclip.evals.reports.page import data_uri
from indiclip.evals.results import is_summary
from indiclip.training.report.run_names import HeadNames, named, reading_order

_DIRECTIONS = {"higher": "higher is better", "lower": "lower is better"}


class Curve(NamedTuple):
    """A plot as a data URI, and what it shows."""

    title: str
    plot: str


class _Group(NamedTuple):
    """What shares a plot."""

    title: str
    ylabel: str


def curves(history: list[dict[str, Any]], heads: HeadNames) -> list[Curve]:
    """A plot per head of its losses, one per head and unit of its scores, and one per number by language.

    Of a benchmark only what a summary has room for, a plot per suite. What `throughput/` measures has a plot for each
    number.

    Args:
        history: Rows with `step` and numbers by their logged names.
        heads: As of `run_names`.
    """
    times = Counter(name for row in history for name in row)
    groups: dict[_Group, list[str]] = {}
    for name in sorted((name for name, count in times.items() if count > 1), key=lambda name: _order(name, heads)):
        if (group := _group(name, heads)) is not None:
            groups.setdefault(group, []).append(name)
    from matplotlib import rc_context

    # Letters stay letters, and of points nearer than a pixel the extremes alone are kept.
    with rc_context({"svg.fonttype": "none", "path.simplify_threshold": 1.0}):
        return [Curve(group.title, _plot(group, names, history, heads)) for group, names in groups.items()]


def _order(name: str, heads: HeadNames) -> Any:
    """Scores first, then losses, the benchmark and the speed."""
    suites = ("val", "train", "eval", "throughput")
    suite = name.split("/")[0]
    return (suites.index(suite) if suite in suites else len(suites), reading_order(name, heads))


def _group(name: str, heads: HeadNames) -> _Group | None:
    """None of what no plot shows."""
    suite, *parts = name.split("/")
    number = named(name, heads)
    if suite == "throughput":
        return _Group(f"{number.words[:1].upper()}{number.words[1:]}", number.unit or number.words)
    if len(parts) < 2 or name.endswith("backbone_grad_norm"):
        return None
    if suite == "eval":
        return _Group(f"{number.subject}", "score") if is_summary(name) else None
    direction = f" ({_DIRECTIONS[number.better]})" if number.better else ""
    if suite == "val" and number.language:
        return _Group(f"{number.subject}: {number.words}, by language", f"{number.unit or 'value'}{direction}")
    if suite == "val":
        # With a unit, what a constant answer gets stands beside it, which has no direction.
        of_kind = "errors" if number.unit or number.better == "lower" else "scores"
        label = number.unit or f"{of_kind.removesuffix('s')}{direction}"
        return _Group(f"{number.subject}: {of_kind} on held-out data", label)
    title = f"{number.subject}: {number.words} in training, by language" if number.language else ""
    is_loss = parts[0] in {key.partition("/")[0] for key in heads}
    return _Group(title or f"{number.subject}: in training", "loss (lower is better)" if is_loss else "value")


def _plot(group: _Group, names: list[str], history: list[dict[str, Any]], heads: HeadNames) -> str:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    labels = [_label(name, heads) for name in names]
    is_speed = names[0].startswith("throughput/")
    has_legend = len(names) <= 24 and not is_speed
    widest = max(map(len, labels)) if has_legend else 0
    columns = max(1, min(3, 66 // (widest + 5)))
    legend = 0.17 * math.ceil(len(labels) / columns) if has_legend else 0.0  # inches, as the height
    title = _wrapped(group.title)
    height = 3.0 + legend + 0.15 * title.count("\n")
    figure = Figure(figsize=(4.9, height))
    axes = figure.add_axes((0.16, (0.55 + legend) / height, 0.8, 2.15 / height))
    for i, (name, label) in enumerate(zip(names, labels, strict=True)):
        measured = [row for row in history if row.get(name) is not None]
        axes.plot(
            [row["step"] for row in measured],
            [row[name] for row in measured],
            label=label,
            linewidth=1.2,
            linestyle=("-", "--", ":")[i // 10 % 3],  # there are ten colours
            marker="o" if len(measured) < 20 else None,
            markersize=3,
        )
    if is_speed:
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("training step", fontsize=9)
    axes.set_ylabel(group.ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if has_legend:
        figure.legend(loc="lower center", fontsize=7.5, ncols=columns, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return data_uri(buffer.getvalue(), "svg+xml")


def _label(name: str, heads: HeadNames) -> str:
    number = named(name, heads)
    is_of_language = number.language and not name.startswith("eval/")
    return number.language if is_of_language else f"{number.words}, {number.language}".removesuffix(", ")


def _wrapped(title: str, most: int = 52) -> str:
    if len(title) <= most:
        return title
    cut = title.rfind(" ", 0, most)
    return f"{title[:cut]}\n{title[cut + 1 :]}"
