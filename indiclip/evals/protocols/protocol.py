"""What a protocol of the benchmark is: one file that says what it asks of the images of a card, and scores it.

A card names its protocols by their class paths (`protocols:`), or takes those of its `task`. Nothing else need know of
one: which truth the images need, which texts are encoded, and what the numbers are called, is all said here.

Shape letters: N images, M those of them that are scored, D candidate classes, P prompts, E embedding length.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from indiclip.evals.protocols import metrics
from indiclip.evals.results import CLEAN, Score

if TYPE_CHECKING:
    from indiclip.evals.card_scorer import CardScorer
    from indiclip.evals.cards.classes import Card
    from indiclip.evals.images.items import Items

_SUBSETS = {"": "all images", CLEAN: "the images that are not in the training data"}  # names that no group may have


@dataclass
class Options:
    """What is scored.

    Attributes:
        languages: Of prompts and captions; None takes all that a card has. English is always among them.
        views: Sizes and aspects of the images; the first is the main one.
        probes: Score what a classifier learns on the images alone, such as kNN.
        resamples: Of the intervals that have no formula.
        seed: Of these.
        all_names: Tell classes apart by names that only one writer has, too, see `indiclip.evals.cards.names`.
    """

    languages: Sequence[str] | None = None
    views: Sequence[str] = ("native",)
    probes: bool = True
    resamples: int = metrics.RESAMPLES
    seed: int = metrics.SEED
    all_names: bool = False

    def __post_init__(self) -> None:
        if not self.views:
            raise ValueError("views: found none; expected at least one, such as native")

    def names(self, card: "Card", language: str) -> dict[int, str]:
        """Index of a class -> the name that it is asked for by."""
        return card.names(language, sure=not self.all_names)

    def wants(self, language: str) -> bool:
        """Whether a language is scored."""
        return self.languages is None or language in self.languages or language == "en"


class Setting(NamedTuple):
    """One way to look at the same embeddings."""

    view: str
    length: int
    main: bool  # the first view at the full length, whose predictions are kept


class Protocol(ABC):
    """A way to score a card. Arguments of the constructor are those that a card may give (`init_args`).

    Attributes:
        name: In scores and tables. A metric is logged as `<name>_<metric>`, or as `<metric>` alone where `is_plain`.
        required_fields: What has to be known of each image: `class`, `text` (what is written on it), `captions`, or any
            other column of a table, which is in `Items.columns`.
        metrics: What a card may name as its `metric`, where this is its first protocol; the first is taken if it names
            none.
        embeds_text: Whether it needs a model that embeds texts.
        embeds_images: Whether it looks at images; a card of protocols that do not has none.
        uses_gallery: Whether it looks at the images that are not scored; else these need not be encoded.
        is_probe: Whether it learns from images alone: `--no_probes` leaves it out.
        is_plain: See `name`.
        chance: Of its first metric, where that is not 1 / candidates.
        candidates: What is ranked for an image: the card's `classes`, `texts` of its own, or all `images` and their
            texts, so that with one image more or less all answers are other ones.
    """

    name: str
    required_fields: frozenset[str] = frozenset({"class"})
    metrics: tuple[str, ...] = ()
    embeds_text: ClassVar[bool] = True
    embeds_images: ClassVar[bool] = True
    uses_gallery: ClassVar[bool] = False
    is_probe: ClassVar[bool] = False
    is_plain: bool = False
    chance: float | None = None
    candidates: ClassVar[Literal["classes", "texts", "images"]] = "classes"

    def check(self, items: "Items") -> None:  # noqa: B027  # most have nothing to check
        """Raise ValueError, naming the image, for what is known of the images but cannot be meant."""

    def shown_classes(self, items: "Items") -> set[int]:
        """The classes, by their places on the card, that the images to score show."""
        return set(items.labels[items.tested_N].tolist()) - {-1}

    def texts(self, items: "Items", options: Options) -> Iterable[str]:
        """Every text whose embedding `run` asks for, besides the prompts of the classes.

        These are the captions of the images that are scored, where it asks for captions.
        """
        for code, texts_N in items.captions.items():
            if "captions" in self.required_fields and options.wants(code):
                yield from chain.from_iterable(compress(texts_N, items.tested_N))

    @abstractmethod
    def run(self, scorer: "CardScorer") -> Iterator[Score]:
        """The numbers in `scorer.setting`. What was answered for an image is given to `scorer.keep`."""


def check_group(name: str, where: str) -> None:
    """Raise ValueError, which begins with `where`, for a group of images that is called as another subset of scores."""
    if name in _SUBSETS:
        raise ValueError(f"{where}: found {name!r}, which is what scores call {_SUBSETS[name]}; expected another name")
