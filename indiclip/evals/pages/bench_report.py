"""`report.html` of the benchmark: one self-contained page with every number, mistake and gap of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

from indiclip import __version__, json_lines
from indiclip.evals.pages.bench_card import anchor, card_section
from indiclip.evals.pages.bench_pictures import PictureOf
from indiclip.evals.pages.formatting import (
    STYLE,
    Bar,
    chart,
    heated,
    images_were,
    interval,
    language_name,
    metric_name,
    number,
    protocol_name,
    signed,
    title,
)
from indiclip.evals.pages.page import Html, details, many, page, small_print, tag, text
from indiclip.evals.results import PHOTOGRAPHS, PROCEDURAL, CardResult, Result, Score, less_english

_MOST_PICTURES = 150  # about 20 kB each
_PICTURES_OF_CARD = 18
_SUITES = {"india": "India", "world": "World", "own": "Your own"}


def write_bench_report(folder: Path, result: Result, picture: PictureOf) -> Path:
    """Write `folder/report.html`.

    Args:
        folder: The run's folder.
        result: What was found.
        picture: (card, part, key) -> uint8 (height, width, 3), or None where there is nothing to show.

    Returns:
        The file.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    scored = [card for card in _ordered(result.cards) if card.status == "scored"]
    share = min(_PICTURES_OF_CARD, max(_MOST_PICTURES // max(len(scored), 1), 3))
    body = [
        *_head(result),
        _headline(result),
        tag("h2", "Every card in every language"),
        _overview(result),
        tag("h2", "Languages side by side"),
        _language_panels(result, scored),
        *(card_section(result, card, picture, share) for card in scored),
        tag("h2", "Every number"),
        *_every_number(result, scored),
        tag("h2", "About this run"),
        details("Options, versions and data, as JSON", tag("pre", _json(result))),
    ]
    file = folder / "report.html"
    folder.mkdir(parents=True, exist_ok=True)
    json_lines.write_whole(file, page(f"India benchmark: {result.model}", body, STYLE).encode(errors="replace"))
    return file


def _ordered(cards: Iterable[CardResult]) -> list[CardResult]:
    """India before the world before the user's own; photographs before what is generated."""
    suites = list(_SUITES)
    return sorted(cards, key=lambda c: (suites.index(c.suite) if c.suite in suites else len(suites), c.part))


def _head(result: Result) -> list[Html]:
    facts = [str(result.about[name]) for name in ("date",) if name in result.about]
    facts.append(f"embedding length {result.lengths[-1]}, images at “{result.views[0]}”")
    if isinstance(seconds := result.about.get("seconds"), dict):
        facts.append(f"{sum(seconds.values()):,.0f} s on {result.about.get('device', 'the training machine')}")
    facts.append(f"IndiCLIP {result.about.get('indiclip', __version__)}")
    return [
        tag("p", "India benchmark", class_="eyebrow"),
        tag("h1", result.model),
        tag("p", " · ".join(facts), class_="lead"),
    ]


def headline_words(result: Result) -> str:
    """How much of India the headline is over, in a sentence."""
    headline = result.headline()
    if not headline["of"]:
        return "No card of the India suite was in this run."
    return f"Covers {headline['covered']} of {headline['of']} categories of India."


def _headline(result: Result) -> Html:
    means = result.headline()["mean"]
    parts: list[str] = [tag("p", headline_words(result), class_="covers")]
    if means:
        said = "Mean of the photographs’ main metrics, corrected for chance: 0 is guessing, 1 is all right."
        parts += [tag("p", said, class_="quiet")]
        parts += [tag("div", *(_tile(language, mean) for language, mean in means.items()), class_="tiles")]
    skipped = [card for card in result.cards if card.status == "skipped"]
    if skipped:
        names = ", ".join(title(card) for card in skipped)
        parts.append(tag("p", tag("b", f"{len(skipped)} skipped"), f", so in no mean: {names}."))
        reasons = (tag("li", tag("b", title(card)), f": skipped, {_reason(card)}") for card in skipped)
        parts.append(details("why they were skipped", tag("ul", *reasons, class_="plain quiet")))
    if any(card.part == PROCEDURAL and card.status == "scored" for card in result.cards):
        parts.append(tag("p", "Scores on generated pictures stand apart below and are in no mean."))
    flagged = _flagged(result)
    if "contamination" in result.about or flagged:
        count = sum(map(len, flagged.values()))
        said = f"{images_were(count)} found among the training images; each card says what its scores are without."
        parts.append(tag("p", said if count else "No image was found among the training images.", class_="note"))
    return many(parts)


def _flagged(result: Result) -> dict[tuple[str, str], set[str]]:
    """(card, part) -> keys of images that were seen in training."""
    found: dict[tuple[str, str], set[str]] = {}
    for row in result.predictions:
        if row.flagged:
            found.setdefault((row.card, row.part), set()).add(row.key)
    return found


def _tile(language: str, mean: dict[str, float]) -> Html:
    value = mean["value"]
    cards = f"{mean['cards']} card{'s' * (mean['cards'] != 1)}"
    fill = tag("i", class_="fill en", style=f"--v:{100 * min(max(value, 0), 1) if math.isfinite(value) else 0:.1f}%")
    return tag(
        "div",
        tag("span", language_name(language)),
        tag("b", number(value, digits=2)),
        tag("small", f"{language} · {cards}"),
        tag("span", fill, class_="track"),
        class_="tile",
    )


def _reason(card: CardResult) -> str:
    return "; ".join(card.notes) or "no reason given"


def _overview(result: Result) -> Html:
    """Cards by languages, a block per suite and part; the mean of a block of photographs above it."""
    languages = result.languages()
    mains = {language: result.main(language) for language in languages}
    flagged = _flagged(result)
    lines: list[Html] = []
    for suite, part in dict.fromkeys((card.suite, card.part) for card in _ordered(result.cards)):
        block = [card for card in _ordered(result.cards) if (card.suite, card.part) == (suite, part)]
        lines.append(tag("tr", tag("th", _block_name(suite, part, block), colspan=f"{len(languages) + 3}")))
        for card in block:
            cells = [mains[language].get((card.card, card.part)) for language in languages]
            lines.append(_overview_row(card, cells, len(flagged.get((card.card, card.part), ()))))
        if part == PHOTOGRAPHS and len(block) > 1:
            lines.append(_mean_row(result.headline(suite)["mean"], languages))
    head = ["card", "main metric", "chance", *map(language_name, languages)]
    names = many(tag("th", name, class_="number" if i > 1 else None) for i, name in enumerate(head))
    content = tag("table", tag("thead", tag("tr", names)), tag("tbody", *lines), class_="overview")
    legend = "Below a value: its 95% interval. Stronger colour: farther above chance."
    return many([tag("div", content, class_="scroll", tabindex="0"), small_print(legend)])


def _block_name(suite: str, part: str, block: list[CardResult]) -> str:
    name = _SUITES.get(suite, suite)
    if part == PROCEDURAL:
        return f"{name}, generated pictures: in no mean"
    return f"{name}, photographs: {sum(card.status == 'scored' for card in block)} of {len(block)} scored"


def _overview_row(card: CardResult, cells: list[Score | None], flagged: int) -> Html:
    if card.status == "skipped":
        reason = tag("td", f"skipped: {_reason(card)}", colspan=f"{len(cells) + 2}", class_="reason")
        return tag("tr", tag("td", card.title), reason)
    chance = next((score.chance for score in cells if score is not None), None)
    seen = tag("small", f" {flagged:,} of {card.num_images:,} seen in training", class_="miss") if flagged else ""
    name = tag("td", tag("a", card.title, href=f"#{anchor(card)}"), seen)
    first = [name, tag("td", metric_name(card.metric)), tag("td", number(chance), class_="number")]
    return tag("tr", *first, *map(heated, cells))


def _mean_row(means: dict[str, dict[str, float]], languages: list[str]) -> Html:
    cells = [
        tag("td", number(means[language]["value"]) if language in means else "", class_="number")
        for language in languages
    ]
    first = [tag("td", "mean, corrected for chance"), tag("td", ""), tag("td", "")]
    return tag("tr", *first, *cells, class_="mean")


def _language_panels(result: Result, scored: list[CardResult]) -> Html:
    """A chart per card: a bar per language, and how far it is from English."""
    panels = []
    languages = result.languages()
    for card in scored:
        found = {language: result.main(language).get((card.card, card.part)) for language in languages}
        english = found.get("en")
        scores = [score for score in found.values() if score is not None]
        if not scores:
            continue
        bars = [
            Bar(
                language_name(score.language),
                score.value,
                score.low,
                score.high,
                _gap(result, score, english),
                "en" if score.language == "en" else "",
            )
            for score in scores
        ]
        head = tag("h3", tag("a", title(card), href=f"#{anchor(card)}"), " ", tag("small", metric_name(card.metric)))
        panels.append(tag("div", head, chart(bars, card.metric, scores[0].chance)))
    legend = "Lines: 95% intervals. Dotted: chance. Right: the gap to English on the same images."
    return many([tag("div", *panels, class_="panels"), small_print(legend)])


def _gap(result: Result, score: Score, english: Score | None) -> Html:
    """`−0.120 (−0.150 to −0.090)`: a language less English."""
    if english is None or score.language == "en":
        return Html("")
    wanted = score._replace(metric=f"parity_{score.metric}")[:8]
    gap_to_english = next((row for row in result.scores if row[:8] == wanted and not row.subset), None)
    if gap_to_english is None:
        return text(signed(score.value - english.value, score.metric))
    gap_to_english = less_english(gap_to_english)
    ends = interval(gap_to_english.low, gap_to_english.high)
    return many([signed(gap_to_english.value, score.metric), tag("span", f" ({ends})" if ends else "", class_="ends")])


def _every_number(result: Result, scored: list[CardResult]) -> list[Html]:
    """A folded table per card, with no more tags than HTML asks for: there may be tens of thousands of rows."""
    columns = ["protocol", "language", "metric", "view", "group", "length"]
    columns += ["value", "low", "high", "chance", "images", "classes"]
    head = Html(f"<tr><th>{'<th>'.join(columns)}")
    parts = []
    for card in scored:
        rows = [
            [protocol_name(s.protocol), s.language, s.metric, s.view, s.subset, f"{s.length}"]
            + [number(value, s.metric, 4) for value in (s.value, s.low, s.high, s.chance)]
            + [f"{s.num_items}", f"{s.num_classes}"]
            for s in result.scores
            if (s.card, s.part) == (card.card, card.part)
        ]
        lines = (Html(f"<tr><td>{'<td>'.join(map(text, row))}") for row in rows)
        content = tag("div", tag("table", head, *lines, class_="all"), class_="scroll", tabindex="0")
        parts.append(details(f"{title(card)}: {len(rows)} numbers", content))
    return parts


def _json(result: Result) -> str:
    return json.dumps(
        {"model": result.model, "lengths": result.lengths, "views": result.views} | result.about,
        indent=1,
        ensure_ascii=False,
        default=str,
    )
