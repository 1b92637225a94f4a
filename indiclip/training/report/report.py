"""`report.html`: one self-contained page that says what a run reached, with pictures from held-out data and curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device

from indiclip import __version__
from indiclip.evals.formatting import language_name
from indiclip.evals.reports.page import large, readable, write_page
from indiclip.evals.reports.place_map import overlap
from indiclip.evals.results import is_summary
from indiclip.patches import unpatchify
from indiclip.training.report.curves import curves
from indiclip.training.report.headline import FIRST, Metrics, headlines, sentence
from indiclip.training.report.run_names import HeadNames, named, reading_order, spoken
from indiclip.types import Step, class_names, targets_of

if TYPE_CHECKING:
    from indiclip.module import MultiTask
    from indiclip.presentation import Picture


_PICTURE_BYTES = 2_200_000  # of all pictures of a page; beside them stand curves, fonts and tables
_PANEL_WIDTH, _CHARACTER, _LINE = 240, 7.2, 18  # pixels: of a panel at least, of a label's letter and height
_QUALITIES = (85, 60, 30)  # of a WebP; 0 to 100
Numbers = dict[str, float | None]  # None is not finite
ByLanguage = dict[str, dict[str, Numbers]]  # head -> language -> metric -> value


class Label(NamedTuple):
    """Words on a picture, at a point as shares of its width and height."""

    x: float
    y: float
    words: str
    side: str  # `above` or `below` the point; empty where it would cover another, and only the alt text says it


class Shown(NamedTuple):
    """A held-out image on the page.

    Attributes:
        panels: Side by side: a data URI, its title, and its labels.
        lines: Below: a text, the code of its language, the name of that, and a mark; empty where there is none.
    """

    panels: list[tuple[str, str, list[Label]]]
    lines: list[tuple[str, str, str, str]]


def write_report(folder: Path, title: str, record: dict[str, Any], sections: dict[str, "list[Picture]"]) -> Path:
    """Write `folder/report.html` from a run's record and pictures.

    Args:
        folder: The run's folder; `config.yaml` in it is shown, if there.
        title: Heading.
        record: `step`, `seconds`, `metrics` (name -> number, None if not finite), `history` (rows with `step`),
            `quarantined` (rows of task, key, shard, reason), `data` (YAML key of each source -> `Inventory`); and, if
            known, `trained_seconds` (where `seconds` are those of scoring), `weights` (what was scored, in words),
            `heads` (see `run_names`), `earlier` (see `earlier_run`), and for the opening sentence `model`, `learned`
            (what the heads are called) and `sources` (data -> `Drawn`).
        sections: Head name -> pictures.

    Returns:
        The file.
    """
    heads: HeadNames = record.get("heads", {})
    earlier = record.get("earlier", FIRST)
    plain, by_language = held_out(record["metrics"])
    quarantined = [[row[name] for name in ("task", "shard", "key", "reason")] for row in record["quarantined"][:200]]
    config = folder / "config.yaml"
    rows = headlines(record["metrics"], heads, earlier)
    return write_page(
        folder / "report.html",
        "training.html",
        title=title,
        version=__version__,
        record=record,
        sentence=sentence(record, rows),
        rows=rows,
        earlier=earlier,
        scores=_scores(plain, heads),
        by_language=language_tables(by_language, heads),
        curves=curves(record["history"], heads),
        sections=[(_title(name, heads), shown) for name, shown in _fitting(sections).items()],
        every={name: (record["metrics"][name], named(name, heads).full) for name in sorted(record["metrics"])},
        data=[(key, line) for key, inventory in record["data"].items() for line in inventory.lines()],
        quarantined=quarantined,
        config=config.read_text() if config.is_file() else None,
    )


def _title(name: str, heads: HeadNames) -> str:
    return heads[name][0] if name in heads else spoken(name)


def _scores(plain: Metrics, heads: HeadNames) -> dict[str, list[tuple[str, str, str, str]]]:
    """Whose they are -> what each number is, its value, unit and direction."""
    scores: dict[str, list[tuple[str, str, str, str]]] = {}
    for name in sorted(plain, key=lambda name: reading_order(name, heads)):
        number = named(name, heads)
        said = f"{number.words}, {number.language}" if number.language else number.words
        scores.setdefault(number.subject, []).append((said, readable(plain[name]), number.unit, number.better))
    return scores


def _fitting(sections: dict[str, "list[Picture]"]) -> dict[str, list[Shown]]:
    """Pictures of a quality that a page of 3 MB has room for; of very many, fewer of each head."""
    for quality in _QUALITIES:
        shown = {name: [_shown(picture, quality) for picture in of] for name, of in sections.items()}
        size = sum(len(uri) for of in shown.values() for picture in of for uri, _, _ in picture.panels)
        if size <= _PICTURE_BYTES:
            return shown
    return {name: of[: max(1, len(of) * _PICTURE_BYTES // size)] for name, of in shown.items()}


def _shown(picture: "Picture", quality: int) -> Shown:
    pixels, said = picture
    panels = [(pixels, "", ())] if isinstance(pixels, np.ndarray) else pixels
    lines = [(line, "", "") for line in said.splitlines()] if isinstance(said, str) else said
    return Shown(
        [(large(image, quality), title, _placed(labels, image)) for image, title, labels in panels],
        [(text, code, language_name(code) if code else "", mark) for text, code, mark in lines],
    )


def _placed(labels: Sequence[tuple[float, float, str]], image_HW3: np.ndarray) -> list[Label]:
    """Labels that cover none of those before them, on a panel as narrow as the page makes it."""
    height, width = image_HW3.shape[:2]
    panel_height = _PANEL_WIDTH * height / width
    taken: list[tuple[float, float, float, float]] = []
    placed = []
    for x, y, said in labels:
        x, y = min(max(x / width, 0), 1), min(max(y / height, 0), 1)
        length = min(_CHARACTER * len(said) + _CHARACTER, _PANEL_WIDTH)
        left = x * (_PANEL_WIDTH - length)  # as the style sheet has it: inside the picture wherever the point is
        tops = {"above": y * panel_height - _LINE, "below": y * panel_height}
        boxes = {side: (left, top, left + length, top + _LINE) for side, top in tops.items()}
        inside = [side for side, top in tops.items() if -1 < top < panel_height - _LINE + 1]
        side = next((side for side in inside if not any(overlap(boxes[side], other) for other in taken)), "")
        taken += [boxes[side]] if side else []
        placed.append(Label(x, y, said, side))
    return placed


@torch.no_grad()
def held_out_pictures(module: "MultiTask", batches: Sequence[Step], per_head: int) -> "dict[str, list[Picture]]":
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
                picture = head.visualize(unpatchify(batch["images"], i), prediction, target)
                pictures += [] if picture is None else [picture]
    module.train(was_training)
    return {name: pictures for name, pictures in sections.items() if pictures}  # some heads only teach


class LanguageTable(NamedTuple):
    """Scores by language.

    Attributes:
        title: What the head is called.
        columns: What the numbers are, and which direction is better.
        rows: A language's name and its values in words, as many as there are columns.
    """

    title: str
    columns: list[tuple[str, str]]
    rows: list[tuple[str, list[str]]]


def language_tables(by_language: ByLanguage, heads: HeadNames) -> list[LanguageTable]:
    """A table per head of what `held_out` found, languages by their names."""
    tables = []
    for head, languages in by_language.items():
        names = {name for values in languages.values() for name in values}
        ordered = sorted(names, key=lambda name: reading_order(f"val/{head}/{name}", heads))
        columns = [named(f"val/{head}/{name}", heads) for name in ordered]
        rows = [
            (language_name(code), [readable(values[name]) if name in values else "" for name in ordered])
            for code, values in languages.items()
        ]
        directions = [(column.words, f"{column.better} is better" if column.better else "") for column in columns]
        tables.append(LanguageTable(_title(head, heads), directions, sorted(rows)))
    return tables


def held_out(metrics: Metrics) -> tuple[Numbers, ByLanguage]:
    """The metrics on held-out data: those of everything (of a benchmark, the main ones), and those of one language as
    head -> language -> metric -> value.

    A number is `val/<head>/<metric>`, or `val/<head>/<source>/<metric>` of a head with several held-out sources; and
    with `/<language>` behind it, it is that of a language.
    """
    single = {name.split("/")[1] for name in metrics if name.startswith("val/") and name.count("/") == 2}
    plain: Numbers = {}
    by_language: ByLanguage = {}
    for name, value in sorted(metrics.items()):
        suite, *parts = name.split("/")
        head = parts[:1] if parts[0] in single else parts[:2]
        if suite == "val" and len(parts) == len(head) + 2:
            by_language.setdefault("/".join(head), {}).setdefault(parts[-1], {})[parts[-2]] = value
        elif suite == "val" or (suite == "eval" and is_summary(name)):
            plain[name] = value
    return plain, by_language
