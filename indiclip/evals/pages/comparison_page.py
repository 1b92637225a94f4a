"""Two runs of the benchmark side by side, as one self-contained page."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from indiclip.evals.comparison import Compared, compare
from indiclip.evals.pages.formatting import Bar, language_name
from indiclip.evals.pages.page import write_page
from indiclip.evals.results import PHOTOGRAPHS, Result


def write_comparison(file: Path, a: Result, b: Result) -> list[Compared]:
    """Write a page that sets two runs side by side.

    Returns:
        What it shows.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    rows = compare(a, b)
    by_card = [list(group) for _, group in groupby(rows, key=lambda row: (row.card.card, row.card.part))]
    write_page(
        file,
        "comparison.html",
        runs={"A": a, "B": b},
        run_languages=list(dict.fromkeys((*a.languages(), *b.languages()))),
        are_comparable=_counted(a) == _counted(b),
        rows=rows,
        languages=list(dict.fromkeys(row.language for row in rows)),
        cards=[(group[0].card, {row.language: row for row in group}) for group in by_card],
        panels=[(group[0].card, _bars(group), _chance(group)) for group in by_card],
    )
    return rows


def _counted(run: Result) -> set[tuple[str, str]]:
    """Cards and languages that make up its means."""
    cards = {(c.card, c.part) for c in run.cards if (c.suite, c.part, c.status) == ("india", PHOTOGRAPHS, "scored")}
    return {(key[0], language) for language in run.languages() for key in run.main(language) if key in cards}


def _bars(rows: list[Compared]) -> list[Bar]:
    """Two bars per language."""
    bars = []
    for row in rows:
        gap = None if row.difference is None else (row.difference, row.low, row.high)
        name = language_name(row.language)
        if row.a is not None:
            bars.append(Bar(name, row.a.value, row.a.low, row.a.high, "a"))
        if row.b is not None:
            bars.append(Bar("", row.b.value, row.b.low, row.b.high, "b", gap))
    return bars


def _chance(rows: list[Compared]) -> float | None:
    return next((score.chance for row in rows for score in (row.a, row.b) if score is not None), None)
