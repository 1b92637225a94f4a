"""Two runs of the benchmark side by side, as one self-contained page."""

from __future__ import annotations

from pathlib import Path

from indiclip import json_lines
from indiclip.evals.comparison import Compared, compare
from indiclip.evals.pages.confusion import words
from indiclip.evals.pages.formatting import (
    STYLE,
    Bar,
    chart,
    interval,
    language_name,
    metric_name,
    number,
    signed,
    title,
)
from indiclip.evals.pages.page import Html, details, many, page, small_print, table, tag
from indiclip.evals.results import PHOTOGRAPHS, CardResult, Result

_MOST_LISTED = 200  # images of a list, so that the page stays small


def write_comparison(file: Path, a: Result, b: Result) -> list[Compared]:
    """Write a page that sets two runs side by side.

    Returns:
        What it shows.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    rows = compare(a, b)
    body = [
        tag("p", "India benchmark: two runs", class_="eyebrow"),
        tag("h1", f"{a.model} and {b.model}"),
        _runs(a, b),
        tag("h2", "B less A"),
        _differences(rows),
        tag("h2", "Side by side"),
        _panels(rows),
        tag("h2", "Every row"),
        _table(rows),
        tag("h2", "Images that changed"),
        *_changes(rows),
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    content = page(f"India benchmark: {a.model} and {b.model}", body, STYLE)
    json_lines.write_whole(file, content.encode(errors="replace"))
    return rows


def _runs(a: Result, b: Result) -> Html:
    """What each run is, and its means."""
    languages = list(dict.fromkeys((*a.languages(), *b.languages())))
    rows = []
    for name, run in (("A", a), ("B", b)):
        headline = run.headline()
        means = [headline["mean"].get(language, {}).get("value") for language in languages]
        facts = [name, run.model, str(run.about.get("date", "")), f"{run.lengths[-1]}", run.views[0]]
        rows.append([*facts, f"{headline['covered']} of {headline['of']}", *map(number, means)])
    head = ["", "model", "date", "length", "view", "categories", *map(language_name, languages)]
    said = "On the right: the mean of the photographs’ main metrics, corrected for chance."
    if _counted(a) != _counted(b):
        said += " These means are over different cards, so they say nothing about each other."
    return many([table(head, rows, words=6), small_print(said)])


def _counted(run: Result) -> set[tuple[str, str]]:
    """Cards and languages that make up its means."""
    cards = {(c.card, c.part) for c in run.cards if (c.suite, c.part, c.status) == ("india", PHOTOGRAPHS, "scored")}
    return {(key[0], language) for language in run.languages() for key in run.main(language) if key in cards}


def _differences(rows: list[Compared]) -> Html:
    """Cards by languages."""
    languages = list(dict.fromkeys(row.language for row in rows))
    lines = []
    for card in _cards(rows):
        of_card = {row.language: row for row in rows if row.card is card}
        cells = [_difference(of_card[name]) if name in of_card else "" for name in languages]
        if all(row.why_not for row in of_card.values()):
            reasons = dict.fromkeys(row.why_not for row in of_card.values())
            said = f"not compared: {'; '.join(reasons)}"
            cells = [tag("td", said, colspan=f"{len(languages)}", class_="reason")]
        lines.append([title(card), metric_name(card.metric), *cells])
    said = "Below a difference: the 95% interval of a paired bootstrap over the images. Coloured: it leaves out 0."
    head = ["card", "metric", *map(language_name, languages)]
    return many([table(head, lines, words=2), small_print(said)])


def _cards(rows: list[Compared]) -> list[CardResult]:
    return list({(row.card.card, row.card.part): row.card for row in rows}.values())


def _difference(row: Compared) -> Html:
    if row.difference is None:
        return tag("td", "–", class_="number", title=row.why_not)
    ends = tag("small", interval(row.low, row.high))
    return tag("td", tag("b", signed(row.difference), class_=_side(row)), ends, class_="number")


def _table(rows: list[Compared]) -> Html:
    lines = []
    for row in rows:
        metric = row.card.metric
        name = [title(row.card), language_name(row.language), metric_name(metric)]
        values = [number(score.value, metric) if score else "" for score in (row.a, row.b)]
        if row.why_not:
            reason = tag("td", f"not compared: {row.why_not}", colspan="4", class_="reason")
            lines.append([*name, *values, reason])
            continue
        changed = [f"{len(row.gained)}", f"{len(row.lost)}"]
        lines.append([*name, *values, _difference(row), f"{row.shared:,}", *changed])
    head = ["card", "language", "metric", "A", "B", "B − A", "images shared", "now right", "now wrong"]
    return table(head, lines, words=3)


def _side(row: Compared) -> str | None:
    """Better, worse, or neither beyond chance."""
    if row.low is None or row.high is None or row.low <= 0 <= row.high:
        return None
    return "hit" if row.low > 0 else "miss"


def _panels(rows: list[Compared]) -> Html:
    """A chart per card: two bars per language."""
    panels = []
    for card in _cards(rows):
        of_card = [row for row in rows if row.card is card]
        bars = [
            Bar(language_name(row.language) if kind == "a" else "", s.value, s.low, s.high, _note(row, kind), kind)
            for row in of_card
            for kind, s in (("a", row.a), ("b", row.b))
            if s is not None
        ]
        chance = next((s.chance for row in of_card for s in (row.a, row.b) if s is not None), None)
        head = tag("h3", title(card), " ", tag("small", metric_name(card.metric)))
        panels.append(tag("div", head, chart(bars, card.metric, chance)))
    legend = tag("p", tag("i", class_="key a"), "A ", tag("i", class_="key b"), "B, and B less A", class_="quiet")
    return many([legend, tag("div", *panels, class_="panels")])


def _note(row: Compared, kind: str) -> Html:
    if kind == "a" or row.difference is None:
        return Html("")
    return many([signed(row.difference), tag("span", f" ({interval(row.low, row.high)})", class_="ends")])


def _changes(rows: list[Compared]) -> list[Html]:
    """Which images B got right that A did not, and the reverse."""
    parts = []
    for row in rows:
        if not (row.gained or row.lost):
            continue
        name = f"{title(row.card)}, {language_name(row.language)}"
        inside = []
        for said, images in (("wrong in A, right in B", row.gained), ("right in A, wrong in B", row.lost)):
            if not images:
                continue
            listed = [(key, words(truth)) for key, truth in images[:_MOST_LISTED]]
            more = f", the first {_MOST_LISTED}" if len(images) > _MOST_LISTED else ""
            heading = tag("h4", f"{len(images)} {said}{more}")
            inside.append(tag("div", heading, table(["image", "truth"], listed, words=2, class_="all")))
        summary = f"{name}: {len(row.gained)} now right, {len(row.lost)} now wrong"
        parts.append(details(summary, tag("div", *inside, class_="beside")))
    return parts or [tag("p", "None.")]
