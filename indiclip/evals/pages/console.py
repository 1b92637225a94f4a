"""A benchmark run as a table for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from indiclip.evals.results import IMAGES, PROCEDURAL, CardResult, Result, Score

_LANGUAGES = 3  # beside each other
_PLAIN_WIDTH = 110  # columns, where the output is no terminal


def print_result(result: Result, folder: Path) -> None:
    """The main number of each card in the languages of most cards, what was skipped, and where the rest is."""
    console = Console()
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH  # rich would take 80 columns
    counts = Counter(language for language in result.languages() for _ in result.main(language))
    languages = [language for language, _ in counts.most_common(_LANGUAGES)]
    numbers = [Column(name, justify="right", no_wrap=True) for name in ("images", "chance", *languages, "kNN", "probe")]
    table = Table(
        Column("card", no_wrap=True), *numbers, title=escape(result.model), title_justify="left", box=box.SIMPLE
    )
    mains = [result.main(language) for language in languages]
    probes = [_probes(result, protocol) for protocol in ("knn", "linear_probe")]
    for card in result.cards:
        if card.status == "scored":
            key = card.card, card.part
            chance = next((main[key].chance for main in mains if key in main), None)
            cells = [*(_cell(main.get(key), True) for main in mains), *(_cell(found.get(key)) for found in probes)]
            name = f"{card.card} [dim]*[/]" if card.part == PROCEDURAL else card.card
            table.add_row(name, f"{card.num_images:,}", "" if chance is None else f"{chance:.3f}", *cells)
    console.print(table)
    if any(card.part == PROCEDURAL for card in result.cards):
        console.print("* generated images: in no mean", style="dim")
    if len(counts) > _LANGUAGES:
        console.print(f"{len(counts) - _LANGUAGES} more languages are in the report", style="dim")
    print_notes(console, result.cards)
    headline = result.headline()
    means = ", ".join(f"{language} {mean['value']:.3f}" for language, mean in headline["mean"].items())
    if headline["of"]:
        line = f"India: {headline['covered']} of {headline['of']} categories have photographs"
        line += f"; mean corrected for chance: {means}" if means else ""
        console.print(line, style="bold", soft_wrap=True)
    console.print(f"report [bold]{escape(str(folder / 'report.html'))}[/]", soft_wrap=True)


def print_notes(console: Console, cards: Sequence[CardResult]) -> None:
    """What is skipped, and what is not as a card says."""
    skipped: dict[str, list[str]] = {}
    for card in cards:
        if card.status == "skipped":
            skipped.setdefault("; ".join(card.notes), []).append(card.card)
    for reason, names in skipped.items():
        console.print(f"skipped: {', '.join(names)}: {reason}", style="yellow", markup=False, soft_wrap=True)
    for card in cards:
        for note in card.notes if card.status != "skipped" else []:
            console.print(f"{card.card}: {note}", style="dim", markup=False, highlight=False, soft_wrap=True)


def _probes(result: Result, protocol: str) -> dict[tuple[str, str], Score]:
    """(card, part) -> accuracy in the main setting."""
    return {
        (score.card, score.part): score
        for score in result.scores
        if (score.protocol, score.language, score.metric, score.subset) == (protocol, IMAGES, "acc1", "")
        and (score.length, score.view) == (result.lengths[-1], result.views[0])
    }


def _cell(score: Score | None, with_interval: bool = False) -> str:
    if score is None:
        return ""
    if not with_interval or score.low is None or score.high is None:
        return f"{score.value:.3f}"
    return f"{score.value:.3f} [dim]±{(score.high - score.low) / 2:.2f}[/]"
