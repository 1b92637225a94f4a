"""`report.html` of the benchmark: one self-contained page with every number, mistake and gap of a run."""

import json
from collections import defaultdict
from pathlib import Path

from indiclip import __version__
from indiclip.evals.formatting import NAMES, language_name
from indiclip.evals.reports.bench_card import card_section
from indiclip.evals.reports.bench_pictures import PictureOf
from indiclip.evals.reports.page import write_page
from indiclip.evals.results import PROBES, Result, Score

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
    blocks = defaultdict(list)  # suite and part -> cards by columns
    for card in cards:
        blocks[card.suite, card.part].append((card, [found.get(card.key) for found in columns.values()]))
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
        blocks=blocks,
        sections=sections,
        about=json.dumps(about, indent=1, ensure_ascii=False, default=str),
    )


def _columns(result: Result) -> dict[str, dict[tuple[str, str], Score]]:
    """Main numbers by language; and the probes, where there is a card that these alone have scored."""
    columns = {language_name(language): main for language, main in result.mains().items()}
    with_main = {key for main in columns.values() for key in main}
    if any(card.key not in with_main for card in result.cards if card.status == "scored"):
        columns |= {f"{name}, top-1": found for one, name in PROBES.items() if (found := result.probes(one))}
    return columns
