"""A benchmark run as a table for the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from indiclip.evals.formatting import NAMES, chance_of, found_by, language_name, metric_name, number, protocol_name
from indiclip.evals.results import IMAGES, PROBES, PROCEDURAL, CardResult, Result, Score
from indiclip.names import plain

_LANGUAGES = 3  # beside each other
_PLAIN_WIDTH = 120  # columns, where the output is no terminal


def print_result(result: Result, folder: Path) -> None:
    """The main number of each card in the languages of most cards, what was skipped, and where the rest is."""
    console = Console()
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH  # rich would take 80 columns
    counts = {language: len(main) for language, main in result.mains().items() if main}
    without_text = [IMAGES] if counts.pop(IMAGES, 0) else []  # stands beside any language
    # Of as many cards Hindi is the first, which most people of India read.
    by_cards = sorted(counts, key=lambda language: (-counts[language], language not in ("en", "hi"), language))
    languages = by_cards[:_LANGUAGES]
    table = _table(result, languages + without_text)
    # A number that is cut at the edge of a terminal says nothing; a language more or less does.
    while len(languages) > 1 and _width(console, table) > console.width:
        languages.pop()
        table = _table(result, languages + without_text)
    console.print(table)
    if any(card.part == PROCEDURAL for card in result.cards):
        console.print("* generated images: in no mean", style="dim")
    if any(score.language == IMAGES for score in result.scores):
        console.print("kNN, probe: top-1 among so many classes with images", style="dim")
    if others := _others(result, len(counts) - len(languages)):
        console.print(f"in the report: {', '.join(others)}", style="dim")
    _print_notes(console, result.cards)
    _print_contamination(console, result.about.get("contamination", {}).get("cards", {}))
    headline = result.headline()
    means = ", ".join(f"{language} {mean['value']:.3f}" for language, mean in headline["mean"].items())
    if headline["of"]:
        line = f"India: {headline['covered']} of {headline['of']} categories have photographs"
        line += f"; mean corrected for chance: {means}" if means else ""
        console.print(line, style="bold", soft_wrap=True)
    console.print(f"report [bold]{escape(plain(str(folder / 'report.html')))}[/]", soft_wrap=True)


def _others(result: Result, num_languages: int) -> list[str]:
    """What the table does not show."""
    counts = {"language": num_languages, "length": len(result.lengths) - 1, "view": len(result.views) - 1}
    more = [f"{count} more {name}{'s' * (count > 1)}" for name, count in counts.items() if count]
    shown = {*PROBES, *(card.protocol for card in result.cards)}
    return more + [protocol_name(name) for name in sorted({score.protocol for score in result.scores} - shown)]


def _table(result: Result, languages: Sequence[str]) -> Table:
    """The main number of each card in these languages."""
    names = [language_name(language) if language == IMAGES else language for language in languages]
    numbers = [Column(name, justify="right", no_wrap=True) for name in ("images", "chance", *names, "kNN", "probe")]
    table = Table(
        Column("card", overflow="fold"),
        Column("metric", no_wrap=True),
        *numbers,
        title=escape(plain(result.model)),
        title_justify="left",
        box=box.SIMPLE,
        collapse_padding=True,
    )
    mains = [result.main(language) for language in languages]
    probes = [result.probes(protocol) for protocol in PROBES]
    for card in result.cards:
        if card.status == "scored":
            scores = [main.get(card.key) for main in mains]
            cells = [*map(_cell, scores), *(_probe_cell(found.get(card.key)) for found in probes)]
            chance = chance_of(scores)
            name = f"{escape(plain(card.card))}{' [dim]*[/]' * (card.part == PROCEDURAL)}"
            metric = NAMES["short_metrics"].get(card.metric) or metric_name(card.metric)
            said = "" if chance is None else f"{chance:.3f}"
            table.add_row(name, metric, f"{card.num_images:,}", said, *cells)
    return table


def _width(console: Console, table: Table) -> int:
    return console.measure(table, options=console.options.update(max_width=1000)).maximum


def _print_notes(console: Console, cards: Sequence[CardResult]) -> None:
    """What is skipped, and what is not as a card says."""
    skipped: dict[str, list[str]] = {}
    for card in cards:
        if card.status == "skipped":
            name = f"{card.card} *" if card.part == PROCEDURAL else card.card
            skipped.setdefault("; ".join(card.notes), []).append(name)
    for reason, names in skipped.items():
        _print_line(console, f"skipped: {', '.join(names)}: {reason}", "yellow")
    if absent := [card.card for card in cards if card.status == "absent"]:
        _print_line(console, f"no photographs of: {', '.join(absent)}")
    for card in cards:
        for note in card.notes if card.status == "scored" else []:
            _print_line(console, f"{card.card}: {note}")


def _print_contamination(console: Console, cards: dict[str, Any]) -> None:
    """How many images are among the training data, where that was looked for."""
    for name, card in cards.items():
        said = f"{name}: {card['flagged']:,} of {card['images']:,} are in the training data ({found_by(card)})"
        if card["flagged"]:
            are_left = card["flagged"] < card["images"]
            rest = "the report has the scores without them" if are_left else "no other is left to score"
            _print_line(console, f"{said}; {rest}", "red")
        else:
            _print_line(console, said)


def _print_line(console: Console, text: str, style: str = "dim") -> None:
    """Words that may be anyone's, as they are."""
    console.print(plain(text), style=style, markup=False, highlight=False, soft_wrap=True)


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    said = number(score.value, score.metric)
    # All resamples of no hit are without a hit: that is no interval of width 0.
    if score.low is None or score.high is None or score.low == score.high:
        return said
    return f"{said} [dim]±{number((score.high - score.low) / 2, score.metric, digits=2)}[/]"


def _probe_cell(score: Score | None) -> str:
    return "" if score is None else f"{number(score.value)} [dim]of {score.num_classes}[/]"
