"""The classes of another card, for one that asks otherwise about the same images."""

from indiclip.evals.cards.card import load_card
from indiclip.evals.cards.classes import CardClass, ClassSource


class SameClasses(ClassSource):
    """Those of a card, with all their names and confusions; a card names this by `class_source:`.

    Args:
        card: The id of a packaged one, or a file.
    """

    def __init__(self, card: str) -> None:
        self.card = card

    def classes(self) -> tuple[CardClass, ...]:
        return load_card(self.card).classes
