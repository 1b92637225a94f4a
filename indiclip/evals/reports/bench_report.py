"""`report.html` of the benchmark: one self-contained page with every number, mistake and gap of a run."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from indiclip import __version__
from indiclip.evals.formatting import NAMES, Bar, Gap, chance_of, language_name, suite_name
from indiclip.evals.reports.bench_card import Most, card_section
from indiclip.evals.reports.bench_pictures import PictureOf
from indiclip.evals.reports.page import write_page
from indiclip.evals.results import PHOTOGRAPHS, PROBES, PROCEDURAL, CardResult, Result, Score, name_of
from indiclip.evals.suites import has_mean

_OF_PAGE, _OF_CARD = Most(pictures=170, thumbnails=600), Most(pictures=18, thumbnails=60)  # about 7 kB and 1 kB each


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
    suites = [*NAMES["suite_names"], *(card.suite for card in result.cards)]
    # India before its culture before the world before the user's own; photographs before what is generated.
    cards = sorted(result.cards, key=lambda card: (suites.index(card.suite), card.part))
    scored = [card for card in cards if card.status == "scored"]
    shares = (of_page // max(len(scored), 1) for of_page in _OF_PAGE)
    most = Most(*(min(of_card, max(share, 3)) for of_card, share in zip(_OF_CARD, shares, strict=True)))
    flagged = defaultdict(set)
    for row in result.predictions:
        if row.flagged:
            flagged[row.card, row.part].add(row.key)
    num_flagged = {key: len(keys) for key, keys in flagged.items()}
    looked_for = result.about.get("contamination", {}).get("cards", {})
    num_flagged |= {
        card.key: looked_for[name_of(*card.key)]["flagged"] for card in scored if name_of(*card.key) in looked_for
    }
    about = {"model": result.model, "lengths": result.lengths, "views": result.views} | result.about
    return write_page(
        folder / "report.html",
        "bench.html",
        result=result,
        version=__version__,
        headline=result.headline(),
        skipped=[card for card in result.cards if card.status == "skipped"],
        has_generated=any(card.part == PROCEDURAL for card in scored),
        num_flagged=sum(num_flagged.values()) if flagged or "contamination" in result.about else None,
        training=result.about.get("contamination"),
        columns=[name for name, _ in _columns(result)],
        blocks=_blocks(result, cards, num_flagged),
        panels=[_panel(result, card) for card in scored],
        sections=[card_section(result, card, picture, most) for card in scored],
        about=json.dumps(about, indent=1, ensure_ascii=False, default=str),
    )


def _blocks(result: Result, cards: list[CardResult], flagged: dict[tuple[str, str], int]) -> list[dict[str, Any]]:
    """Cards by languages, a block per suite and part; the mean of a block of photographs below it."""
    columns = [found for _, found in _columns(result)]
    blocks = []
    for suite, part in dict.fromkeys((card.suite, card.part) for card in cards):
        of_block = [card for card in cards if (card.suite, card.part) == (suite, part)]
        rows = []
        for card in of_block:
            cells = [found.get(card.key) for found in columns]
            rows.append((card, cells, chance_of(cells), flagged.get(card.key, 0)))
        name = suite_name(suite)
        if part == PHOTOGRAPHS:
            kind = "texts" if all(card.is_texts for card in of_block) else "photographs"
            name += f", {kind}: {sum(card.status == 'scored' for card in of_block)} of {len(of_block)} scored"
        else:
            name += ", generated pictures: in no mean"
        means = part == PHOTOGRAPHS and len(of_block) > 1 and has_mean(suite)
        blocks.append({"name": name, "rows": rows, "mean": result.headline(suite)["mean"] if means else None})
    return blocks


def _columns(result: Result) -> list[tuple[str, dict[tuple[str, str], Score]]]:
    """Main numbers by language; and the probes, where there is a card that these alone have scored."""
    languages = [(language_name(language), result.main(language)) for language in result.languages()]
    with_main = {key for _, main in languages for key in main}
    if all(card.key in with_main for card in result.cards if card.status == "scored"):
        return languages
    return languages + [(f"{name}, top-1", found) for one, name in PROBES.items() if (found := result.probes(one))]


def _panel(result: Result, card: CardResult) -> tuple[CardResult, list[Bar], float | None]:
    """A card's chart: a bar per language, with how far it is from English; and chance."""
    found = [result.main(language).get(card.key) for language in result.languages()]
    scores = [score for score in found if score is not None]
    english = next((score for score in scores if score.language == "en"), None)
    gaps = result.gaps()
    bars = []
    for score in scores:
        difference: Gap | None = None
        if gap := gaps.get(score.measured):
            difference = gap.value, gap.low, gap.high
        elif english is not None and score is not english:
            difference = score.value - english.value, None, None
        bars.append(Bar(language_name(score.language), score, "en" if score is english else "", difference))
    return card, bars, chance_of(scores)
