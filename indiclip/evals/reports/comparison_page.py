"""Two runs of the benchmark side by side, as one self-contained page."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from indiclip.evals.comparison import Compared, common, compare
from indiclip.evals.formatting import Bar, chance_of, language_name
from indiclip.evals.reports.page import write_page
from indiclip.evals.results import CardResult, Result


def write_comparison(file: Path, a: Result, b: Result, names: Sequence[str] = ("", "")) -> list[Compared]:
    """Write a page that sets two runs side by side.

    Args:
        file: Where.
        a: One run.
        b: The other.
        names: What they are called beside their models, such as their folders.

    Returns:
        What it shows.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    rows = compare(a, b)
    by_card = [list(group) for _, group in groupby(rows, key=lambda row: row.card.key)]
    write_page(
        file,
        "comparison.html",
        runs={"A": a, "B": b},
        names=dict(zip("AB", names, strict=True)),
        has_other_images=any(row.gap and not row.is_on_all for row in rows),
        run_languages=list(dict.fromkeys((*a.languages(), *b.languages()))),
        are_comparable=_counted(a, b) == _counted(b, a),
        rows=rows,
        common=common,
        languages=list(dict.fromkeys(row.language for row in rows)),
        cards=[(group[0].card, {row.language: row for row in group}) for group in by_card],
        panels=[_panel(group) for group in by_card],
    )
    return rows


def _counted(run: Result, other: Result) -> set[tuple[str, str]]:
    """Cards and languages that make up its means, in the languages of both."""
    cards = {card.key for card in run.photographs()}
    mains = {language: main for language, main in run.mains().items() if language in other.languages()}
    return {(card, language) for language, main in mains.items() for card, part in main if (card, part) in cards}


def _panel(rows: list[Compared]) -> tuple[CardResult, list[Bar], float | None]:
    """A card's chart: two bars per language; and chance."""
    bars = []
    for row in rows:
        name = language_name(row.language)
        if row.a is not None:
            bars.append(Bar(name, row.a, "a"))
        if row.b is not None:
            bars.append(Bar("", row.b, f"b {row.verdict}".rstrip(), row.gap))
    return rows[0].card, bars, chance_of(score for row in rows for score in (row.a, row.b))
