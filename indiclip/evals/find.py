"""The cards of a benchmark run and their images, before anything is encoded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from indiclip.datasets.folders import subfolders
from indiclip.datasets.languages import language_tag
from indiclip.evals.cards.card import Card, load_cards
from indiclip.evals.cards.protocols import with_protocols
from indiclip.evals.images.items import Items
from indiclip.evals.images.layouts import NoImages, find_items
from indiclip.evals.images.splits import is_split
from indiclip.evals.results import PHOTOGRAPHS, PROCEDURAL, CardResult, name_of, part_of
from indiclip.evals.suites import INDIA
from indiclip.generated.fonts import MissingFonts
from indiclip.images import storable
from indiclip.names import check_choice, did_you_mean, plain


@dataclass
class Bench:
    """The cards of a run and their images.

    Attributes:
        items: What is scored: a card's photographs, its generated part, or both.
        skipped: Cards without images, and why.
    """

    items: list[Items] = field(default_factory=list)
    skipped: list[CardResult] = field(default_factory=list)

    @property
    def data(self) -> dict[str, str]:
        """`name_of` a card's part -> a digest of its images and what is right about them, in any order."""
        return {name_of(items.card.id, part_of(items.procedural)): items.digest for items in self.items}


def find_bench(
    images: str | Path | None,
    cards: Sequence[str] | None = None,
    procedural: bool = True,
    seed: int = 0,
    skip_unknown: bool = False,
    protocols: Sequence[str] = (),
) -> Bench:
    """Look for the images of cards.

    Args:
        images: Folder with a folder, table or shards for each card, by its id. None: only what is generated.
        cards: Ids of packaged cards, files, or names of suites; None takes the eleven categories of India.
        procedural: Score the generated parts of cards that have one.
        seed: Of what is generated.
        skip_unknown: Leave out and count the images of other classes than a card's; they are an error else.
        protocols: Score by these too, see `with_protocols`.

    Raises:
        FileNotFoundError: No such folder or card.
        ValueError: A card or its images are not as expected; names the file.
    """
    asked = load_cards(cards or [INDIA])
    for number, card in enumerate(asked):
        if other := next((other for other in asked[:number] if other.id == card.id), None):
            raise ValueError(f"cards: {other.file} and {card.file} are both called {card.id!r}; rename a file")
    asked = with_protocols(asked, protocols)
    root = Path(images).expanduser() if images else None
    if root is not None and not root.is_dir():
        what = "is a file" if root.exists() else "no such folder"
        raise FileNotFoundError(f"{root}: {what}; expected a folder with the images of each card in it")
    # What somebody may have meant for a card's folder.
    others = sorted({*subfolders(root)} - {card.folder for card in asked}) if root else []
    bench = Bench()
    for card in asked:
        photographs = _photographs(card, root, skip_unknown)
        generated = _generated(card, seed) if procedural else None
        is_generated = isinstance(generated, Items)
        # Of the categories of India the photographs count, whatever is generated.
        if photographs is None and (card.suite == INDIA or not is_generated):
            hint = did_you_mean(card.folder, others)
            photographs = (
                f"{storable(root)} has no folder {card.folder}{hint}" if root else "no folder of images was given"
            )
        for part, found in ((PHOTOGRAPHS, photographs), (PROCEDURAL, generated)):
            if isinstance(found, Items):
                bench.items.append(found)
            elif found is not None:
                status = "absent" if is_generated and card.suite == INDIA else "skipped"
                bench.skipped.append(card_result(card, part, status, [found]))
    if not bench.items:
        raise FileNotFoundError(_nothing_to_score(bench, asked, root, others))
    return bench


def _photographs(card: Card, root: Path | None, skip_unknown: bool) -> Items | str | None:
    """A card's photographs, why none of them can be scored, or None where there is no folder of it."""
    try:
        return find_items(card, root, skip_unknown) if root else None
    except NoImages as error:
        if not skip_unknown:
            raise
        return str(error)


def _generated(card: Card, seed: int) -> Items | str | None:
    """A card's generated images, why they cannot be made, or None where it has none."""
    try:
        return card.generator(card, seed) if card.generator else None
    except MissingFonts as error:
        return str(error)


def _nothing_to_score(bench: Bench, asked: Sequence[Card], root: Path | None, others: Sequence[str]) -> str:
    reasons = list(dict.fromkeys(note for card in bench.skipped for note in card.notes))[:3]
    said = f"nothing to score: {'; '.join(reasons)}"
    if root is None:
        return said
    said += f"; found the folders {', '.join(others[:5])}" if others else ""
    said += f"; expected {', '.join(card.folder for card in asked)}"
    # Folders called as those in a card's folder are: by a split or a class.
    if any(is_split(name) or any(card.place(name) is not None for card in asked) for name in others):
        called = f", in which it is called {asked[0].folder}" if len(asked) == 1 else ""
        said += f"; {storable(root)} looks like the images of a card itself: name the folder above it{called}"
    return said


def check_languages(bench: Bench, languages: Sequence[str] | None, where: str = "languages") -> None:
    """Raise ValueError, which begins with `where`, for one in which no card has a name, prompt or caption."""
    known = {"en"}
    for items in bench.items:
        known |= {*items.card.languages, *items.card.prompts, *items.captions}
    for language in languages or []:
        tag = language_tag(language.capitalize())
        if language not in known and tag in known:
            raise ValueError(
                f"{where}: found {language!r}; nearest is {tag!r}; expected one of {', '.join(sorted(known))}"
            )
        check_choice(where, language, sorted(known))


def card_result(card: Card, part: str, status: str, notes: list[str]) -> CardResult:
    """What becomes of a part of a card."""
    return CardResult(
        card.suite,
        card.id,
        card.title,
        part,
        card.metric,
        status,
        of_classes=len(card.classes),
        source=card.source,
        licence=card.licence,
        notes=list(map(plain, notes)),
        protocol=card.protocols[0].name,
        plain=[protocol.name for protocol in card.protocols if protocol.is_plain],
        candidates=card.protocols[0].candidates,
        is_texts=not any(protocol.embeds_images for protocol in card.protocols),
        places={
            one.id: [one.facts["lat"], one.facts["lon"], str(one.facts.get("state", ""))]
            for one in card.classes
            if {"lat", "lon"} <= one.facts.keys()
        },
    )
