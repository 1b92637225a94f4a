"""Benchmark cards by name: a page of YAML each, one of ours (`india/`, `culture/`, `world/`) or a file of the user's.

Where images of a card lie is told by `indiclip.evals.images.layouts`.
"""

from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path

from indiclip.datasets.tables import existing
from indiclip.evals.cards.classes import Card, CardClass
from indiclip.evals.cards.file import parse_card
from indiclip.evals.suites import SUITES, packaged
from indiclip.names import did_you_mean

__all__ = ["SUITES", "Card", "CardClass", "load_card", "load_cards", "packaged"]


def load_cards(names: Sequence[str]) -> list[Card]:
    """Cards by ids or files, as `load_card` reads them, and all of a suite by its name; each once."""
    ids = [card for name in names for card in (packaged(name) if name in SUITES else [name])]
    return [load_card(card) for card in dict.fromkeys(ids)]


def load_card(card: str) -> Card:
    """A card.

    Args:
        card: The id of a packaged one, or a file of the user's (`.yaml`, `.yml`).

    Raises:
        FileNotFoundError: No such file.
        ValueError: No packaged card is called so, or the file is no card. Names the file, the class, what was expected
            and the nearest valid name.
    """
    if Path(card).suffix in (".yaml", ".yml"):
        file = existing(card)
        return parse_card(file.read_text("utf-8"), str(file), file.stem, "own")
    return _load_packaged(card)


@lru_cache(maxsize=64)
def _load_packaged(card: str) -> Card:
    for suite in SUITES:
        file = resources.files("indiclip.evals") / suite / f"{card}.yaml"
        if card in packaged(suite):
            return parse_card(file.read_text("utf-8"), f"{suite}/{card}.yaml", card, suite)
    known = [*SUITES, *(name for suite in SUITES for name in packaged(suite))]
    raise ValueError(
        f"no card {card!r}{did_you_mean(card, known)}; expected one of {', '.join(known)}, or a .yaml file"
    )
