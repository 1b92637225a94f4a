"""The leaderboard's tables: one page with all of them, one page for each run, and Markdown."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from filelock import FileLock

from indiclip import json_lines
from indiclip.evals.formatting import language_name, suite_name
from indiclip.evals.leaderboard import groups_of, rows_of
from indiclip.evals.leaderboard_file import Row, read
from indiclip.evals.reports.page import write_page
from indiclip.evals.results import IMAGES, PROBES, Result
from indiclip.evals.suites import INDIA, has_mean

_RUNS = "runs"  # folder of the runs' pages


class Cell(NamedTuple):
    """A number with its interval, and its gap to English with that of the gap; None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    gap: Sequence[float | None] | None = None
    chance: float | None = None
    metric: str = ""

    @property
    def is_above_chance(self) -> bool:
        """Whether its interval, or the number where there is none, is."""
        least = self.value if self.low is None else self.low
        return least is not None and least > (self.chance or 0.0)


class Column(NamedTuple):
    """The numbers of a table's rows below each other, and what stands above them."""

    name: str
    of: str
    cells: list[Cell]


class Table(NamedTuple):
    """A group's rows, best first, and its columns of numbers."""

    name: str
    rows: list[Row]
    columns: list[Column]


class Added(NamedTuple):
    """What became of the runs and of the file.

    Attributes:
        groups: What the tables show now.
        skipped: Why lines of the file are in none.
        without_row: Names of runs of whose photographs no card has a number.
    """

    groups: list[list[Row]]
    skipped: list[str]
    without_row: list[str]


def add(file: Path, runs: Sequence[tuple[Result, Path]], site: bool = False) -> Added:
    """Add runs to the file, each instead of its earlier row, and write the tables beside it.

    Processes that add at once wait for each other: no row is lost, and the tables are of all of them.

    Args:
        file: `leaderboard.jsonl`; made where there is none.
        runs: Results, and the folders that they and their reports lie in.
        site: Call the page index.html, and write one for each run, to which it links.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    new, without_row = [], []
    for result, folder in runs:
        of_run = rows_of(result)
        new += [row | _places(folder, file.parent) for row in of_run]
        if not of_run:
            without_row.append(result.model)
    with FileLock(file.with_name(f".{file.name}.lock")):
        json_lines.append(file, new)
        rows, skipped = read(file)
        groups = groups_of(rows)
        tables = [_table(group, groups[:place]) for place, group in enumerate(groups)]
        if site:
            for row in rows:
                _write_run(file.parent / _RUNS / f"{row['run']}.html", row)
        page = file.with_name("index.html") if site else file.with_suffix(".html")
        write_page(page, "leaderboard.html", tables=tables, runs=_RUNS if site else "", setting=setting)
        write_page(file.with_suffix(".md"), "leaderboard.md", tables=tables, setting=setting)
    return Added(groups, skipped, without_row)


def _places(folder: Path, beside: Path) -> Row:
    """The name of a run's folder, and the way to its report from the leaderboard's folder, where that is or lies beside
    one that holds it.
    """
    folder = folder.resolve()
    way = Path(os.path.relpath(folder / "report.html", beside.resolve()))
    is_near = way.parts.count("..") <= 1 and (folder / "report.html").is_file()
    return {"folder": folder.name, "report": way.as_posix() if is_near else ""}


def _write_run(page: Path, row: Row) -> None:
    """A run's page: its categories below each other, its languages beside each other."""
    languages = _languages([row])
    is_there = row["report"] and (page.parent.parent / row["report"]).is_file()
    write_page(
        page,
        "leaderboard_run.html",
        row=row,
        setting=setting(row),
        languages=languages,
        means=[_mean_cell(row, language) for language in languages] if has_mean(row["suite"]) else [],
        cards={card: [_cell(row, card, language) for language in languages] for card in row["cards"]},
        report=quote(f"../{row['report']}") if is_there else "",
    )


def _table(group: list[Row], before: Sequence[list[Row]]) -> Table:
    """The means of the languages and probes, and the cards' main metrics in English; below the groups `before`."""
    first = group[0]
    columns = []
    for language in _languages(group) if has_mean(first["suite"]) else ():
        cells = [_mean_cell(row, language) for row in group]
        columns.append(Column(language_name(language), _of_mean(group, language), cells))
    titles = {card: name for row in group for card, name in row["titles"].items()}
    for card in dict.fromkeys(card for row in group for card in row["cards"]):
        known = {language for row in group for language in row["cards"].get(card, ())}
        shown = {IMAGES: language_name(IMAGES)} if IMAGES in known else {"en": "in English"}
        if not has_mean(first["suite"]):  # else their means stand before
            shown |= {probe: language_name(probe) for probe in PROBES if probe in known}
        for language, said in shown.items():
            columns.append(Column(titles.get(card, card), said, [_cell(row, card, language) for row in group]))
    covers = f"Covers {first['covered']} of {first['of']} categories"
    if first["suite"] != INDIA:
        covers = f"{suite_name(first['suite'])}: {first['covered']} of {first['of']}"
    images = f"images {first['data']}" if first["data"] else "images not known, so compared with none"
    return Table(" · ".join([covers, images, *_apart(first, before)]), group, columns)


def _apart(row: Row, before: Sequence[list[Row]]) -> list[str]:
    """Why a group's rows are not in one of the tables of their suite that stand above."""
    above = [group[0] for group in before if group[0]["suite"] == row["suite"]]
    if not above or not row["data"]:
        return []
    same_cards = [other for other in above if other["cards"].keys() == row["cards"].keys()]
    if not same_cards:
        return ["apart: other cards"]
    same_images = any(other["data"] == row["data"] for other in same_cards)
    return [f"apart: {'other names or prompts in English' if same_images else 'other images or labels'}"]


def _of_mean(rows: Sequence[Row], language: str) -> str:
    """English was asked alike in a table; another language may not have been."""
    asked = {row["asked"][language] for row in rows if language in row["asked"] and language in row["mean"]}
    return "mean" if len(asked) < 2 else "mean, asked by different names or prompts"


def _mean_cell(row: Row, language: str) -> Cell:
    low, high = row["mean_interval"].get(language, (None, None))
    return Cell(row["mean"].get(language), low, high, row["mean_gap"].get(language))


def _cell(row: Row, card: str, language: str) -> Cell:
    keys = ("cards", "intervals", "gaps", "chances")
    value, ends, gap, chance = (row[key].get(card, {}).get(language) for key in keys)
    low, high = ends or (None, None)
    return Cell(value, low, high, gap, chance, row["metrics"].get(card, ""))


def setting(row: Row) -> str:
    """In which embeddings were compared: length and view, and the precision where it is not full."""
    precision = "" if row["precision"] == "fp32" else f", {row['precision']}"
    return f"{row['lengths'][-1]}, {row['views'][0]}{precision}"


def _languages(rows: Sequence[Row]) -> list[str]:
    found = {language for row in rows for language in row["mean"]}
    return sorted(found, key=lambda language: (language != "en", language not in PROBES, language))
