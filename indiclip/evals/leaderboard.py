"""A file that collects runs of the benchmark, and the table made of it: `leaderboard.jsonl`, `.html` and `.md`."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from indiclip import json_lines
from indiclip.evals.formatting import language_name
from indiclip.evals.reports.page import write_page
from indiclip.evals.results import PHOTOGRAPHS, Result, finite

Row = dict[str, Any]
Cell = tuple[float | None, float | None]  # a value and its chance


class Group(NamedTuple):
    """Runs that were scored on the same images, best first."""

    data: str  # digest of these; "" where a run does not say which they were
    covered: int
    of: int
    rows: list[Row]


def row_of(result: Result) -> Row:
    """What the leaderboard keeps of a run.

    `run` tells runs apart: the same model at another time is another run. `data` tells which images they are over, the
    India suite's photographs that were scored.
    """
    headline = result.headline()
    scored = result.photographs()
    digests = result.about.get("data", {})
    known = bool(scored) and all(card.card in digests for card in scored)
    data = _digest({card.card: digests[card.card] for card in scored}) if known else ""
    date = str(result.about.get("date", ""))
    identity = [result.model, date, result.lengths, result.views, sorted(card.card for card in scored), data]
    cards: dict[str, dict[str, float | None]] = {card.card: {} for card in scored}
    for language in result.languages():
        for (card, part), score in result.main(language).items():
            if part == PHOTOGRAPHS and card in cards:
                cards[card][language] = finite(score.value)
    return {
        "run": _digest(identity),
        "model": result.model,
        "date": date,
        "covered": headline["covered"],
        "of": headline["of"],
        "mean": {language: finite(mean["value"]) for language, mean in headline["mean"].items()},
        "cards": cards,
        "titles": {card.card: card.title for card in scored},
        "chance": {name: score.chance for (name, part), score in result.main().items() if name in cards},
        "lengths": result.lengths,
        "views": result.views,
        "data": data,
    }


def add(file: Path, results: Sequence[Result]) -> list[Group]:
    """Add runs to the file, each instead of its earlier row, and write the tables beside it.

    Processes that add at once wait for each other: no row is lost, and the tables are of all of them.

    Returns:
        What the table shows now.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        json_lines.append(file, map(row_of, results))
        groups = groups_of(read(file))
        tables = list(map(_table, groups))
        for suffix in (".html", ".md"):
            write_page(file.with_suffix(suffix), f"leaderboard{suffix}", tables=tables)
    return groups


def read(file: Path) -> list[Row]:
    """The newest row of every run."""
    newest: dict[str, Row] = {}
    for row in json_lines.read(file):
        if "run" in row and "model" in row:
            newest.pop(row["run"], None)  # so that it stands where it was added last
            newest[row["run"]] = row
    return list(newest.values())


def groups_of(rows: list[Row]) -> list[Group]:
    """The group that covers most first; in a group by the mean in English, then that over all languages."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["data"] or f"unknown {row['run']}", []).append(row)
    groups = [
        Group(of[0]["data"], of[0]["covered"], of[0]["of"], sorted(of, key=_merit, reverse=True))
        for of in found.values()
    ]
    return sorted(groups, key=lambda group: (group.data == "", -group.covered, -len(group.rows)))


def _merit(row: Row) -> tuple[float, float]:
    means = [value for value in row["mean"].values() if value is not None]
    english = row["mean"].get("en")
    overall = sum(means) / len(means) if means else -math.inf
    return (english if english is not None else -math.inf, overall)


def _table(group: Group) -> tuple[str, list[tuple[str, str]], list[tuple[list[str], list[Cell]]]]:
    """Its name; names of the columns, and what of these; a row's words and its numbers: the means of languages and the
    cards' main metrics in English.
    """
    found = {language for row in group.rows for language in row["mean"]}
    languages = sorted(found, key=lambda language: (language != "en", language))
    cards = list(dict.fromkeys(card for row in group.rows for card in row["cards"]))
    chance = {card: value for row in group.rows for card, value in row.get("chance", {}).items()}
    titles = {card: name for row in group.rows for card, name in row.get("titles", {}).items()}
    columns = [("", ""), ("model", ""), ("date", ""), ("length, view", "")]
    columns += [(language_name(language), "mean") for language in languages]
    columns += [(titles.get(card, card), "in English") for card in cards]
    rows = []
    for place, row in enumerate(group.rows, 1):
        words = [f"{place}", row["model"], row["date"], f"{row['lengths'][-1]}, {row['views'][0]}"]
        cells: list[Cell] = [(row["mean"].get(language), None) for language in languages]
        cells += [(row["cards"].get(card, {}).get("en"), chance.get(card)) for card in cards]
        rows.append((words, cells))
    of = f"Covers {group.covered} of {group.of} categories"
    images = f"images {group.data}" if group.data else "images not known, so compared with none"
    return f"{of} · {images}", columns, rows


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode(errors="replace")).hexdigest()[:12]
