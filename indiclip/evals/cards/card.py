"""Benchmark cards by name: a page of YAML each, one of ours (`india/`, `culture/`, `world/`) or a file of the user's.

Where images of a card lie is told by `indiclip.evals.images.layouts`.
"""

from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path

from indiclip.datasets.tables import decode_text, existing
from indiclip.evals.cards.classes import Card, CardClass
from indiclip.evals.cards.file import parse_card
from indiclip.evals.cards.names import with_names
from indiclip.evals.suites import SUITES, packaged
from indiclip.names import did_you_mean, plain

__all__ = ["SUITES", "Card", "CardClass", "load_card", "load_cards", "packaged"]


def load_cards(names: Sequence[str]) -> list[Card]:
    """Cards by ids or files, as `load_card` reads them, and all of a suite by its name; each once."""
    ids = [card for name in names for card in (packaged(name) if name in SUITES else [name])]
    # A file may be written in several ways.
    files = {str(Path(card).expanduser().resolve()) if _is_file(card) else card: card for card in ids}
    return [load_card(card) for card in files.values()]


def load_card(card: str) -> Card:
    """A card.

    Args:
        card: The id of a packaged one, or a file of the user's (`.yaml`, `.yml`).

    Raises:
        FileNotFoundError: No such file.
        ValueError: No packaged card is called so, or the file is no card. Names the file, the class, what was expected
            and the nearest valid name.
    """
    if _is_file(card):
        file = existing(card)
        if file.is_dir():
            raise ValueError(f"{file}: is a folder; expected the YAML file of a card")
        return parse_card(decode_text(file.read_bytes(), str(file)), str(file), plain(file.stem), "own")
    return _load_packaged(card)


def _is_file(card: str) -> bool:
    return Path(card).suffix in (".yaml", ".yml")


@lru_cache(maxsize=64)
def _load_packaged(card: str) -> Card:
    return with_names(load_page(card))


def load_page(card: str) -> Card:
    """One of our cards with what stands on its page alone, without the names of its suite's table.

    Raises:
        ValueError: No packaged card is called so.
    """
    for suite in SUITES:
        file = resources.files("indiclip.evals") / suite / f"{card}.yaml"
        if card in packaged(suite):
            return parse_card(file.read_text("utf-8"), f"{suite}/{card}.yaml", card, suite)
    known = [*SUITES, *(name for suite in SUITES for name in packaged(suite))]
    raise ValueError(
        f"no card {card!r}{did_you_mean(card, known)}; expected one of {', '.join(known)}, or a .yaml file"
    )
