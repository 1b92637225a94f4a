"""The leaderboard's tables: one page with all of them, one page for each run, and Markdown."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from filelock import FileLock

from indiclip import json_lines
from indiclip.evals.formatting import language_name, suite_name
from indiclip.evals.leaderboard import Group, groups_of, rows_of
from indiclip.evals.leaderboard_file import INDIA, Row, read
from indiclip.evals.reports.page import write_page
from indiclip.evals.results import IMAGES, Result

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
    """The name of a column of numbers, and what stands below it."""

    name: str
    of: str
    chance: float | None = None


class Table(NamedTuple):
    """A group's rows, best first, each with its numbers."""

    name: str
    columns: list[Column]
    rows: list[tuple[Row, list[Cell]]]


class Added(NamedTuple):
    """What became of the runs and of the file.

    Attributes:
        groups: What the tables show now.
        skipped: Why lines of the file are in none.
        without_row: Names of runs of whose photographs no card has its main number.
    """

    groups: list[Group]
    skipped: list[str]
    without_row: list[str]


def add(file: Path, runs: Sequence[tuple[Result, Path | None]], site: bool = False) -> Added:
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
    new = [(result, rows_of(result), _places(folder, file.parent)) for result, folder in runs]
    with FileLock(file.with_name(f".{file.name}.lock")):
        json_lines.append(file, (row | places for _, rows, places in new for row in rows))
        rows, skipped = read(file)
        groups = groups_of(rows)
        tables = [_table(group, groups[:place]) for place, group in enumerate(groups)]
        if site:
            for row in rows:
                _write_run(file.parent / _RUNS / f"{row['run']}.html", row)
        page = file.with_name("index.html") if site else file.with_suffix(".html")
        write_page(page, "leaderboard.html", tables=tables, runs=_RUNS if site else "", setting=setting)
        write_page(file.with_suffix(".md"), "leaderboard.md", tables=tables, setting=setting)
    return Added(groups, skipped, [result.model for result, rows, _ in new if not rows])


def _places(folder: Path | None, beside: Path) -> Row:
    """The name of a run's folder, and the way to its report."""
    if folder is None:
        return {"folder": "", "report": ""}
    return {"folder": folder.resolve().name, "report": _report(folder, beside)}


def _report(folder: Path, beside: Path) -> str:
    """The way to a run's report from the leaderboard's folder, where that is or lies beside one that holds it."""
    if not (folder / "report.html").is_file():
        return ""
    way = Path(os.path.relpath((folder / "report.html").resolve(), beside.resolve()))
    return way.as_posix() if way.parts.count("..") <= 1 else ""


def _write_run(page: Path, row: Row) -> None:
    languages = _languages([row])
    cards = {card: [_cell(row, card, language) for language in languages] for card in row["cards"]}
    is_there = row["report"] and (page.parent.parent / row["report"]).is_file()
    write_page(
        page,
        "leaderboard_run.html",
        row=row,
        setting=setting(row),
        languages=languages,
        means=[_mean_cell(row, language) for language in languages],
        cards=cards,
        report=quote(f"../{row['report']}") if is_there else "",
    )


def _table(group: Group, before: Sequence[Group]) -> Table:
    """The means of the languages, and the cards' main metrics in English; below the groups `before`."""
    languages = _languages(group.rows)
    cards = list(dict.fromkeys(card for row in group.rows for card in row["cards"]))
    chance = {card: value for row in group.rows for card, value in row["chance"].items()}
    titles = {card: name for row in group.rows for card, name in row["titles"].items()}
    columns = [Column(language_name(language), _of_mean(group.rows, language)) for language in languages]
    without_text = {card for row in group.rows for card, found in row["cards"].items() if IMAGES in found}
    asked = {card: IMAGES if card in without_text else "en" for card in cards}
    said = {"en": "in English", IMAGES: language_name(IMAGES)}
    columns += [Column(titles.get(card, card), said[asked[card]], chance.get(card)) for card in cards]
    rows = []
    for row in group.rows:
        cells = [_mean_cell(row, language) for language in languages]
        rows.append((row, cells + [_cell(row, card, asked[card]) for card in cards]))
    covers = f"Covers {group.covered} of {group.of} categories"
    if group.suite != INDIA:
        covers = f"{suite_name(group.suite)}: {group.covered} of {group.of}"
    images = f"images {group.data}" if group.data else "images not known, so compared with none"
    return Table(" · ".join([covers, images, *_apart(group, before)]), columns, rows)


def _apart(group: Group, before: Sequence[Group]) -> list[str]:
    """Why it is not in one of the tables of its suite that stand above it."""
    above = [other for other in before if other.suite == group.suite]
    same_cards = [other for other in above if other.rows[0]["cards"].keys() == group.rows[0]["cards"].keys()]
    if not above or not group.data:
        return []
    if not same_cards:
        return ["apart: other cards"]
    same_images = any(other.data == group.data for other in same_cards)
    return [f"apart: {'other names or prompts in English' if same_images else 'other images or labels'}"]


def _of_mean(rows: Sequence[Row], language: str) -> str:
    """English was asked alike in a table; another language may not have been."""
    asked = {row["asked"][language] for row in rows if language in row["asked"] and language in row["mean"]}
    return "mean" if len(asked) < 2 else "mean, asked by different names or prompts"


def _mean_cell(row: Row, language: str) -> Cell:
    low, high = row["mean_interval"].get(language, (None, None))
    return Cell(row["mean"].get(language), low, high, row["mean_gap"].get(language))


def _cell(row: Row, card: str, language: str) -> Cell:
    found = {key: row[key].get(card, {}) for key in ("cards", "intervals", "gaps", "chances")}
    low, high = found["intervals"].get(language, (None, None))
    gap, chance = (found[key].get(language) for key in ("gaps", "chances"))
    return Cell(found["cards"].get(language), low, high, gap, chance, row["metrics"].get(card, ""))


def setting(row: Row) -> str:
    """In which embeddings were compared: length and view, and the precision where it is not full."""
    words = [f"{row['lengths'][-1]}", row["views"][0], row["precision"]]
    return ", ".join(words[: 3 - (row["precision"] == "fp32")])


def _languages(rows: Sequence[Row]) -> list[str]:
    found = {language for row in rows for language in row["mean"]}
    return sorted(found, key=lambda language: (language != "en", language))
