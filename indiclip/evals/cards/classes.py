"""A benchmark card: what is told apart, by which names in which language, and how it is asked. No images."""

import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from indiclip.names import did_you_mean

if TYPE_CHECKING:
    from indiclip.evals.protocols.protocol import Protocol

_SURE = 2  # votes


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
        votes: Language -> how many writers and sources have the name, see `indiclip.evals.cards.names`; empty on a card
            of the user's, all of whose names count.
    """

    id: str
    names: dict[str, str]
    aliases: tuple[str, ...] = ()
    confusable_with: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    derived: tuple[str, ...] = ()
    votes: dict[str, int] = field(default_factory=dict)

    def is_sure(self, language: str) -> bool:
        """Whether its name in a language counts in scores: one that nobody else wrote does not."""
        return self.votes.get(language, _SURE) >= _SURE


class ClassSource(ABC):
    """Where a card's classes come from that do not stand on its page, and what lies beside the images changes of them.

    Attributes:
        names_file: A file that has to lie with the images, else the card has none; "" asks for nothing.
    """

    names_file = ""

    @abstractmethod
    def classes(self) -> tuple[CardClass, ...]:
        """The classes."""

    def with_list(self, card: "Card", names: list[str], file: str) -> tuple["Card", list[str]] | None:
        """The card with the names of a class list (classnames.txt) that lies with the images, and notes.

        None where the list's lines are looked up among the card's names, as those of any card are.

        Raises:
            ValueError: The list is of other classes; names the file and the line.
        """
        return None

    def with_file(self, card: "Card", file: Path) -> tuple["Card", list[str]]:
        """The card with the names of `names_file`, and notes. Raises as `with_list` does."""
        return card, []


@dataclass(frozen=True)
class Card:
    """A benchmark's page.

    Attributes:
        id: The file's name without its ending.
        title: For people.
        suite: `india`, `world`, or `own`: the user's file.
        task: What it asks for, in a word: one of cards/tasks.yaml, or nothing.
        protocols: How it is scored; the first is the main one.
        classes: Empty where no protocol tells classes apart.
        prompts: Language -> templates with `{c}`.
        metric: The main one of the first protocol, such as `acc1`, `mean_per_class_recall`, `image_to_text_r5`.
        source: Where images come from.
        licence: Theirs.
        notes: What to know before believing a number.
        file: Where it was read from, for messages.
        chance: Of guessing right: 1 / classes, of matching 1 / candidates, or what the first protocol says; 0 for
            retrieval, where it depends on the number of images.
        folder: The folder that its images lie in, below that of the benchmark.
        num_candidates: Texts that an image is matched with; 0 where it is with none.
        class_source: What gave the classes; None where they stand on the page.
        generator: (card, seed) -> `Items` that are drawn; None where nothing is.
    """

    id: str
    title: str
    suite: str
    task: str
    protocols: tuple["Protocol", ...]
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
    class_source: ClassSource | None = None
    generator: Callable[["Card", int], Any] | None = None

    @property
    def required_fields(self) -> frozenset[str]:
        """What its protocols have to know of each image."""
        return frozenset().union(*(protocol.required_fields for protocol in self.protocols))

    @property
    def ids(self) -> list[str]:
        """The classes' ids, in order."""
        return [one.id for one in self.classes]

    @property
    def languages(self) -> dict[str, int]:
        """Language -> how many classes have a name in it; English and Hindi first, then the most frequent."""
        counts = Counter(language for one in self.classes for language in one.names)
        return dict(sorted(counts.items(), key=lambda item: (item[0] != "en", item[0] != "hi", -item[1], item[0])))

    def names(self, language: str, sure: bool = False) -> dict[int, str]:
        """Index of a class -> its name, of the classes that have one in this language.

        `sure` leaves out those that only one writer has: the others are what scores are by.
        """
        named = [(place, one) for place, one in enumerate(self.classes) if language in one.names]
        return {place: one.names[language] for place, one in named if one.is_sure(language) or not sure}

    def shown_names(self, languages: Sequence[str] = ()) -> dict[str, dict[str, str]]:
        """Id of a class -> its names for people: the English one, and one in another language and its own script. That
        is one of `languages` where the class has any, else the language of most names.
        """
        others = [code for code in self.languages if code != "en" and not code.endswith("-Latn")]
        others.sort(key=lambda code: code not in languages)
        return {
            one.id: {code: one.names[code] for code in ["en", *[code for code in others if code in one.names][:1]]}
            for one in self.classes
        }

    def templates(self, language: str) -> tuple[str, ...]:
        """The prompts of a language; `{c}` alone where it has none."""
        return self.prompts.get(language, ("{c}",))

    def asked(self, texts: Sequence[str]) -> list[str]:
        """Texts as its first English prompt asks for them."""
        return [self.templates("en")[0].replace("{c}", text) for text in texts]

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
        others = [
            (place, name)
            for place, one in enumerate(self.classes)
            for name in {*map(bare, (*one.names.values(), *one.aliases))}
        ]
        owners = Counter(name for _, name in others)
        found = {name: place for place, name in others if owners[name] == 1}
        # An id counts before an English name, and that before any other.
        found |= {bare(one.names["en"]): place for place, one in enumerate(self.classes)}
        return found | {bare(one.id): place for place, one in enumerate(self.classes)}


def bare(name: str) -> str:
    """A name as it is looked up: without what case, underscores and Unicode's ways of writing it make of it."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().replace("_", " ").split())
