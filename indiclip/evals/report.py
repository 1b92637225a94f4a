"""`report.html`: one self-contained page with a run's curves, every metric, and pictures from held-out data."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from indiclip import __version__
from indiclip.patches import unpatchify
from indiclip.types import Batch

if TYPE_CHECKING:
    from indiclip.head import Head
    from indiclip.module import MultiTask

Picture = tuple[np.ndarray, str]  # uint8 (height, width, 3) and the words below it
Metrics = dict[str, float | None]  # None is not finite

_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); }
body { font: 15px/1.5 system-ui, "Noto Sans", "Noto Sans Devanagari", sans-serif; max-width: 76rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.lead { opacity: .7; margin-top: .2rem; }
table { border-collapse: collapse; } th { text-align: left; }
td, th { padding: .15rem .9rem .15rem 0; border-bottom: 1px solid var(--line); }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.curves { display: flex; flex-wrap: wrap; gap: 1rem; } .curves img { max-width: 100%; background: #fff; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { width: 100%; image-rendering: auto; border-radius: 4px; }
figcaption { white-space: pre-line; font-size: 13px; overflow-wrap: anywhere; }
pre { overflow-x: auto; font-size: 12px; }
"""


def write_report(folder: Path, title: str, record: dict[str, Any], sections: dict[str, list[Picture]]) -> Path:
    """Write `folder/report.html` from a run's record and pictures.

    Args:
        folder: The run's folder; `config.yaml` in it is shown, if there.
        title: Heading.
        record: `step`, `seconds`, `metrics` (name -> number, None if not finite), `history` (rows with `step`),
            `quarantined` (rows of task, key, shard, reason).
        sections: Head name -> pictures.

    Returns:
        The file.
    """
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="lead">IndiCLIP {__version__} · {record["step"]:,} steps · {record["seconds"]:,.0f} s</p>',
        "<h2>Metrics on held-out data</h2>",
        _held_out_tables(record["metrics"]),
        "<h2>While it trained</h2>",
        '<div class="curves">' + "".join(map(_image_tag, _curves(record["history"]))) + "</div>",
    ]
    for name, pictures in sections.items():
        body += [f"<h2>{html.escape(name.capitalize())}</h2>", _figures(pictures)]
    body += ["<h2>Every number</h2>", _metrics_table(record["metrics"])]
    body += ["<h2>Quarantined samples</h2>", _quarantine_table(record["quarantined"])]
    config = folder / "config.yaml"
    if config.is_file():
        body += ["<h2>Configuration</h2>", f"<details><pre>{html.escape(config.read_text())}</pre></details>"]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><body>{''.join(body)}</body></html>"
    )
    file = folder / "report.html"
    file.write_text(page, encoding="utf-8")
    return file


@torch.no_grad()
def held_out_pictures(module: MultiTask, batches: list[dict[str, Batch]], per_head: int) -> dict[str, list[Picture]]:
    """Let every head draw its predictions on held-out images.

    Args:
        module: In any mode; it is put into evaluation mode and back.
        batches: Steps of the held-out sources, on any device.
        per_head: Number of pictures.
    """
    was_training = module.training
    module.eval()
    sections: dict[str, list[Picture]] = {head.name: [] for head in module.each_head()}
    for step in batches:
        step = module.transfer_batch_to_device(step, module.device, 0)
        predictions = module.predict_step(step, 0)
        for head in module.each_head():
            if head.name in predictions:
                missing = per_head - len(sections[head.name])
                sections[head.name] += _draw(head, step[head.task], predictions[head.name][:missing])
    module.train(was_training)
    return {name: pictures for name, pictures in sections.items() if pictures}


def _draw(head: Head, batch: Batch, predictions: list[dict[str, Any]]) -> list[Picture]:
    pictures = []
    for i, prediction in enumerate(predictions):
        target = {name: _to_cpu(values[i]) for name, values in batch["targets"].items()}
        prediction = {name: _to_cpu(value) for name, value in prediction.items()}
        pictures.append(head.draw(unpatchify(batch["images"], i), prediction, target))
    return pictures


def _to_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _metrics_table(metrics: Metrics) -> str:
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="number">{readable(value)}</td></tr>'
        for name, value in sorted(metrics.items())
    )
    return f"<table><tr><th>metric</th><th>value</th></tr>{rows}</table>" if rows else "<p>none</p>"


def _held_out_tables(metrics: Metrics) -> str:
    plain, by_language = held_out(metrics)
    tables = [_metrics_table(plain)]
    for head, languages in by_language.items():
        names = metric_names(languages)
        header = "".join(f"<th>{html.escape(name)}</th>" for name in ("language", *names))
        rows = "".join(
            f"<tr><td>{html.escape(language)}</td>"
            + "".join(f'<td class="number">{readable(values[n]) if n in values else ""}</td>' for n in names)
            + "</tr>"
            for language, values in languages.items()
        )
        tables += [f"<h2>{html.escape(head.capitalize())} by language</h2>", f"<table><tr>{header}</tr>{rows}</table>"]
    return "".join(tables)


def held_out(metrics: Metrics) -> tuple[Metrics, dict[str, dict[str, Metrics]]]:
    """The metrics on held-out data: those of everything, and those of one language (`val/<head>/<metric>/<language>`)
    as head -> language -> metric -> value.
    """
    plain: Metrics = {}
    by_language: dict[str, dict[str, Metrics]] = {}
    for name, value in sorted(metrics.items()):
        parts = name.split("/")
        if parts[0] == "val" and len(parts) == 4:
            by_language.setdefault(parts[1], {}).setdefault(parts[3], {})[parts[2]] = value
        elif parts[0] in ("val", "eval"):
            plain[name] = value
    return plain, by_language


def metric_names(languages: dict[str, Metrics]) -> list[str]:
    """Of a table with a row per language."""
    return sorted({name for values in languages.values() for name in values})


def readable(value: float | None) -> str:
    """A metric's value for people; None stands for one that is not finite."""
    return "not finite" if value is None else f"{value:.4g}"


def _quarantine_table(quarantined: list[dict[str, str]]) -> str:
    if not quarantined:
        return "<p>No sample was unreadable.</p>"
    rows = "".join(
        f"<tr><td>{html.escape(row['task'])}</td><td>{html.escape(row['shard'])}</td>"
        f"<td>{html.escape(row['key'])}</td><td>{html.escape(row['reason'])}</td></tr>"
        for row in quarantined[:200]
    )
    return (
        f"<p>{len(quarantined):,} unreadable samples are in quarantine; in training others stood in for them.</p>"
        f"<table><tr><th>task</th><th>shard</th><th>key</th><th>reason</th></tr>{rows}</table>"
    )


def _figures(pictures: list[Picture]) -> str:
    figures = "".join(
        f"<figure>{_image_tag(_png(image))}<figcaption>{html.escape(words)}</figcaption></figure>"
        for image, words in pictures
    )
    return f'<div class="pictures">{figures}</div>'


def _png(image_HW3: np.ndarray) -> bytes:
    """At least 240 pixels wide, enlarged without blur, so that small pictures can be looked at."""
    picture = Image.fromarray(image_HW3)
    factor = max(1, -(-240 // picture.width))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _image_tag(png: bytes) -> str:
    return f'<img loading="lazy" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _curves(history: list[dict[str, Any]]) -> list[bytes]:
    """A plot per group of names, `train/<head>/...`, `val/<head>/...`, or of a number by language, of what was measured
    more than once.
    """
    times = Counter(name for row in history for name in row)
    groups: dict[str, set[str]] = {}
    for name, count in times.items():
        parts = name.split("/")
        if len(parts) >= 3 and count > 1 and not name.endswith("backbone_grad_norm"):
            groups.setdefault("/".join(parts[:-1]), set()).add(name)
    return [_plot(group, sorted(names), history) for group, names in sorted(groups.items())]


def _plot(title: str, names: list[str], history: list[dict[str, Any]]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.0), dpi=110, layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        points = [(row["step"], row[name]) for row in history if row.get(name) is not None]
        marker = "o" if len(points) < 20 else None
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            label=name.rsplit("/", 1)[-1],
            linewidth=1.2,
            linestyle=("-", "--", ":")[i // 10 % 3],  # there are ten colours
            marker=marker,
            markersize=3,
        )
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    if len(names) <= 8:
        axes.legend(fontsize=7)
    elif len(names) <= 24:
        axes.legend(fontsize=5, ncols=2)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call]
    return buffer.getvalue()
