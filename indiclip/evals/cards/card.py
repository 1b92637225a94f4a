"""Benchmark cards: what is told apart, by which names in which language, and how it is asked. Facts only, no images.

A card is a page of YAML: one of ours (`india/`, `world/`) or a file of the user's. Where images of it lie is told by
`indiclip.evals.images.layouts`.
"""

import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from indiclip.datasets.tables import existing
from indiclip.names import check_choice, did_you_mean

SUITES = ("india", "world")
TASKS = ("classification", "retrieval", "matching")


@dataclass(frozen=True)
class CardClass:
    """A class of a card.

    Attributes:
        id: Its folder's name, such as `masala_dosa`.
        names: Language (BCP 47, `hi-Latn` for romanised text) -> the name in prompts; `en` is always there.
        aliases: Other names, in any language; never in prompts.
        confusable_with: Ids of classes that look like it, on our cards both ways.
        facts: Anything else, such as `lat`, `lon`, `hex`, `group`.
        derived: The languages of `names` that were romanised by rule and that nobody has checked.
    """

    id: str
    names: dict[str, str]
    aliases: tuple[str, ...] = ()
    confusable_with: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    derived: tuple[str, ...] = ()


@dataclass(frozen=True)
class Card:
    """A benchmark's page.

    Attributes:
        id: The file's name without its ending.
        title: For people.
        suite: `india`, `world`, or `own`: the user's file.
        task: `classification`; `retrieval`: captions and images find each other; `matching`: one of several texts is
            right for the image.
        classes: Empty for retrieval.
        prompts: Language -> templates with `{c}`.
        metric: The main one, such as `acc1`, `mean_per_class_recall`, `image_to_text_r5`.
        source: Where images come from.
        licence: Theirs.
        notes: What to know before believing a number.
        file: Where it was read from, for messages.
        chance: Of guessing right: 1 / classes, of matching 1 / candidates. 0 for retrieval, where it depends on the
            number of images.
        folder: The folder that its images lie in, below that of the benchmark.
        num_candidates: Texts that an image is matched with; 0 for other tasks.
    """

    id: str
    title: str
    suite: str
    task: str
    classes: tuple[CardClass, ...]
    prompts: dict[str, tuple[str, ...]]
    metric: str
    source: str
    licence: str
    notes: str
    file: str
    chance: float
    folder: str = ""
    num_candidates: int = 0

    @property
    def ids(self) -> list[str]:
        """The classes' ids, in order."""
        return [one.id for one in self.classes]

    @property
    def languages(self) -> dict[str, int]:
        """Language -> how many classes have a name in it; English first, then the most frequent."""
        counts = Counter(language for one in self.classes for language in one.names)
        return dict(sorted(counts.items(), key=lambda item: (item[0] != "en", -item[1], item[0])))

    def names(self, language: str) -> dict[int, str]:
        """Index of a class -> its name, of the classes that have one in this language."""
        return {place: one.names[language] for place, one in enumerate(self.classes) if language in one.names}

    def templates(self, language: str) -> tuple[str, ...]:
        """The prompts of a language; `{c}` alone where it has none."""
        return self.prompts.get(language, ("{c}",))

    def place(self, name: str) -> int | None:
        """Index of the class with this id or English name, or with a name or alias that no other class has; None where
        there is none. Case, and a space for an underscore, are forgiven.
        """
        return self._places.get(bare(name))

    def check_place(self, name: str, where: str) -> int:
        """As `place`.

        Raises:
            ValueError: The name is of no class; begins with `where` and names the nearest.
        """
        place = self.place(name)
        if place is None:
            known = [*self.ids, *(one.names["en"] for one in self.classes)]
            raise ValueError(f"{where}: {name!r} is no class of the card {self.id}{did_you_mean(name, known)}")
        return place

    @cached_property
    def _places(self) -> dict[str, int]:
        others = [(place, name) for place, one in enumerate(self.classes) for name in _other_names(one)]
        owners = Counter(name for _, name in others)
        found = {name: place for place, name in others if owners[name] == 1}
        # An id counts before an English name, and that before any other.
        found |= {bare(one.names["en"]): place for place, one in enumerate(self.classes)}
        return found | {bare(one.id): place for place, one in enumerate(self.classes)}


def packaged(suite: str) -> list[str]:
    """The ids of the cards of a suite, in alphabetical order.

    Raises:
        ValueError: No such suite.
    """
    check_choice("suite", suite, SUITES)
    folder = resources.files("indiclip.evals") / suite
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


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
        from indiclip.evals.cards.file import parse_card

        return parse_card(file.read_text("utf-8"), str(file), file.stem, "own")
    return _load_packaged(card)


@lru_cache(maxsize=64)
def _load_packaged(card: str) -> Card:
    from indiclip.evals.cards.file import parse_card

    for suite in SUITES:
        file = resources.files("indiclip.evals") / suite / f"{card}.yaml"
        if card in packaged(suite):
            return parse_card(file.read_text("utf-8"), f"{suite}/{card}.yaml", card, suite)
    known = [name for suite in SUITES for name in packaged(suite)]
    raise ValueError(
        f"no card {card!r}{did_you_mean(card, known)}; expected one of {', '.join(known)}, or a .yaml file"
    )


def _other_names(one: CardClass) -> set[str]:
    return {bare(name) for name in (*one.names.values(), *one.aliases)}


def bare(name: str) -> str:
    """A name as it is looked up: without what case, underscores and Unicode's ways of writing it make of it."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().replace("_", " ").split())
