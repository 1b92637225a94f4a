"""`report.html` of the benchmark: one self-contained page with every number, mistake and gap of a run."""

import json
from pathlib import Path
from typing import Any

from indiclip import __version__
from indiclip.evals.formatting import NAMES, language_name, suite_name
from indiclip.evals.reports.bench_card import card_section
from indiclip.evals.reports.bench_pictures import PictureOf
from indiclip.evals.reports.page import write_page
from indiclip.evals.results import PHOTOGRAPHS, PROBES, CardResult, Result, Score
from indiclip.evals.suites import has_mean

_OF_PAGE, _OF_CARD, _FEWEST = 170, 18, 3  # pictures, of about 7 kB


def write_bench_report(folder: Path, result: Result, picture: PictureOf) -> Path:
    """Write `folder/report.html`.

    Args:
        folder: The run's folder.
        result: What was found.
        picture: (card, part, key) -> uint8 (height, width, 3), as large as it is to be shown, or None where there is
            nothing to show.

    Returns:
        The file.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    suites = [*NAMES["suite_names"], *(card.suite for card in result.cards)]
    # What was scored comes first; then India before its culture before the world before the user's own, and photographs
    # before what is generated.
    cards = sorted(result.cards, key=lambda card: (card.status != "scored", suites.index(card.suite), card.part))
    scored = [card for card in cards if card.status == "scored"]
    most = min(_OF_CARD, max(_OF_PAGE // max(len(scored), 1), _FEWEST))
    sections = [card_section(result, card, picture, most) for card in scored]
    columns = _columns(result)
    about = {"model": result.model, "lengths": result.lengths, "views": result.views} | result.about
    return write_page(
        folder / "report.html",
        "bench.html",
        result=result,
        version=__version__,
        headline=result.headline(),
        scored=scored,
        skipped=[card for card in cards if card.status == "skipped"],
        seen={section["card"].key: section["seen"]["flagged"] for section in sections if section["seen"]},
        columns=list(columns),
        blocks=_blocks(result, cards, list(columns.values())),
        sections=sections,
        about=json.dumps(about, indent=1, ensure_ascii=False, default=str),
    )


def _blocks(
    result: Result, cards: list[CardResult], columns: list[dict[tuple[str, str], Score]]
) -> list[dict[str, Any]]:
    """Cards by columns, a block per suite and part; the mean of a block of photographs below it."""
    blocks = []
    for suite, part in dict.fromkeys((card.suite, card.part) for card in cards):
        of_block = [card for card in cards if (card.suite, card.part) == (suite, part)]
        name = suite_name(suite)
        if part == PHOTOGRAPHS:
            kind = "texts" if all(card.is_texts for card in of_block) else "photographs"
            name += f", {kind}: {sum(card.status == 'scored' for card in of_block)} of {len(of_block)} scored"
        else:
            name += ", generated pictures: in no mean"
        means = part == PHOTOGRAPHS and len(of_block) > 1 and has_mean(suite)
        rows = [(card, [found.get(card.key) for found in columns]) for card in of_block]
        blocks.append({"name": name, "rows": rows, "mean": result.headline(suite)["mean"] if means else {}})
    return blocks


def _columns(result: Result) -> dict[str, dict[tuple[str, str], Score]]:
    """Main numbers by language; and the probes, where there is a card that these alone have scored."""
    columns = {language_name(language): main for language, main in result.mains().items()}
    with_main = {key for main in columns.values() for key in main}
    if any(card.key not in with_main for card in result.cards if card.status == "scored"):
        columns |= {f"{name}, top-1": found for one, name in PROBES.items() if (found := result.probes(one))}
    return columns
