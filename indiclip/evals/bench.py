"""A benchmark run: find the images of the cards, encode each once, score them by every protocol.

The command `indiclip bench` and the callback `IndiaBench` both run this; they differ in the model and in the ranks.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from indiclip.data.fonts import MissingFonts
from indiclip.data.tables import stable_hash
from indiclip.evals.cards import Card, load_card, packaged
from indiclip.evals.encode import Ranks, encode_images, encode_texts
from indiclip.evals.items import Items, Joined
from indiclip.evals.layouts import find_items
from indiclip.evals.models import Embedder
from indiclip.evals.procedural import colours, ocr_words
from indiclip.evals.results import PHOTOGRAPHS, PROCEDURAL, CardResult, Result, data_name
from indiclip.evals.score import score, texts_of
from indiclip.evals.sheet import Options, languages_of
from indiclip.names import nearest

_WORDS, _GALLERY_WORDS = 40, 20  # generated images of each script, scored and for probes to train on
_SWATCHES, _GALLERY_SWATCHES = 24, 12  # of each colour


@dataclass
class Bench:
    """The cards of a run and their images.

    Attributes:
        items: What is scored: a card's photographs, its generated part, or both.
        skipped: Cards without images, and why.
        flagged: For each of `items` which images are among the training data, bool (N,); empty where that was not
            looked for.
    """

    items: list[Items] = field(default_factory=list)
    skipped: list[CardResult] = field(default_factory=list)
    flagged: list[np.ndarray] = field(default_factory=list)

    def expected(self) -> list[CardResult]:
        """What is said of the items before they are scored."""
        return [_card_result(items.card, part_of(items), "found", items.notes) for items in self.items]

    @property
    def data(self) -> dict[str, str]:
        """Card and part -> a digest of the images' keys and what is right about them: the same for the same data."""
        return {data_name(items.card.id, part_of(items)): _digest(items) for items in self.items}


def find_bench(
    images: str | Path | None,
    cards: Sequence[str] | None = None,
    procedural: bool = True,
    seed: int = 0,
) -> Bench:
    """Look for the images of cards.

    Args:
        images: Folder with a folder, table or shards for each card, by its id. None: only what is generated.
        cards: Ids of packaged cards, or files; None takes the eleven categories of India.
        procedural: Score the generated parts of cards that have one.
        seed: Of what is generated.

    Raises:
        FileNotFoundError: No such folder or card.
        ValueError: A card or its images are not as expected; names the file.
    """
    bench = Bench()
    asked = [load_card(name) for name in dict.fromkeys(cards or packaged("india"))]
    for number, card in enumerate(asked):
        if other := next((other for other in asked[:number] if other.id == card.id), None):
            raise ValueError(f"cards: {other.file} and {card.file} are both called {card.id!r}; rename a file")
    root = Path(images).expanduser() if images else None
    if root is not None and not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected a folder with the images of each card in it")
    others = _folders_beside(root, asked)
    for card in asked:
        photographs = find_items(card, root) if root is not None else None
        if photographs is None:
            where = "no folder of images was given"
            if root is not None:
                where = f"{root} has no folder of it{nearest(card.folder, others)}"
            bench.skipped.append(_card_result(card, PHOTOGRAPHS, "skipped", [where]))
        else:
            bench.items.append(photographs)
        if procedural:
            try:
                bench.items += _generated(card, seed)
            except MissingFonts as error:
                bench.skipped.append(_card_result(card, PROCEDURAL, "skipped", [str(error)]))
    if not bench.items:
        reasons = list(dict.fromkeys(note for card in bench.skipped for note in card.notes))[:3]
        found = f"; found the folders {', '.join(others[:5])}" if others else ""
        expected = f"; expected {', '.join(card.folder for card in asked)}" if root is not None else ""
        raise FileNotFoundError(f"nothing to score: {'; '.join(reasons)}{found}{expected}")
    return bench


def check_languages(bench: Bench, languages: Sequence[str] | None) -> None:
    """Raise ValueError for one in which no card has a name, prompt or caption."""
    known = {"en"}
    for items in bench.items:
        known |= {*items.card.languages, *items.card.prompts, *(items.captions or {})}
    for language in languages or []:
        if language not in known:
            said = f"languages: no card has {language!r}{nearest(language, known)}; expected {', '.join(sorted(known))}"
            raise ValueError(said)


def _folders_beside(root: Path | None, cards: Sequence[Card]) -> list[str]:
    """Folders that are of none of the cards: what somebody may have meant for one."""
    if root is None:
        return []
    return sorted({entry.name for entry in root.iterdir() if entry.is_dir()} - {card.folder for card in cards})


def _generated(card: Card, seed: int) -> list[Items]:
    """The part of a card that needs no photographs, where it has one.

    Raises:
        MissingFonts: Fonts are missing; names the packages.
    """
    if card.id == "ocr_indic":
        drawn = ocr_words(card.ids, per_script=_WORDS, seed=seed, train_per_script=_GALLERY_WORDS)
    elif card.id == "indian_colours":
        values = [(one.id, str(one.facts["hex"])) for one in card.classes]
        drawn = colours(values, per_colour=_SWATCHES, seed=seed, train_per_colour=_GALLERY_SWATCHES)
    else:
        return []
    return [Items(card, **vars(drawn), procedural=True)]


def run_bench(
    embedder: Embedder,
    bench: Bench,
    options: Options,
    ranks: Ranks | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Result | None:
    """Encode and score.

    Args:
        embedder: The model.
        bench: From `find_bench`.
        options: What is scored.
        ranks: Who encodes together; None is this process alone.
        batch_size: Images in a batch.
        num_workers: Loader processes.
        progress: Is told how many more images were done.

    Returns:
        The result on rank 0, None on the others.

    Raises:
        ValueError: A view that the model cannot give; none of the images of a card is readable.
    """
    ranks = ranks or Ranks()
    views = embedder.views(options.views)
    begin = time.monotonic()
    every = Joined([items.images for items in bench.items])
    images, unreadable = encode_images(embedder, every, views, batch_size, num_workers, ranks, progress)
    encoded = time.monotonic()
    texts = {}
    if embedder.embeds_text:
        wanted = [text for items in bench.items for text in texts_of(items, options)]
        texts = encode_texts(embedder, wanted, ranks)
    prompted = time.monotonic()
    if ranks.rank:
        return None
    result = Result(embedder.name, embedder.lengths, [view.name for view in views], cards=list(bench.skipped))
    first = 0
    with _without_gc():
        for place, items in enumerate(bench.items):
            part = {view: image_NE[first : first + len(items)] for view, image_NE in images.items()}
            failed = {index - first: why for index, why in unreadable.items() if 0 <= index - first < len(items)}
            flagged_N = bench.flagged[place] if bench.flagged else None
            _score_into(result, items, part, failed, texts, options, flagged_N)
            first += len(items)
    result.about |= {
        "seconds": {
            "images": round(encoded - begin, 3),
            "texts": round(prompted - encoded, 3),
            "scores": round(time.monotonic() - prompted, 3),
        },
        "images": first,
        "texts": len(texts),
        "data": bench.data,
    }
    return result


@contextmanager
def _without_gc() -> Iterator[None]:
    """A million predictions are lists without cycles; Python would look through them again and again, for a second."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _score_into(
    result: Result,
    items: Items,
    images: dict[str, Tensor],
    unreadable: dict[int, str],
    texts: dict[str, Tensor],
    options: Options,
    flagged_N: np.ndarray | None,
) -> None:
    notes = [*items.notes, *(languages_of(items.card, options)[1] if texts else [])]
    if len(unreadable) == len(items):
        notes = []  # the reason for which it is skipped is the files
    if unreadable:
        notes += [f"not counted, unreadable: {why}" for why in unreadable.values()]
        readable = np.setdiff1d(np.arange(len(items)), list(unreadable))
        images = {view: image_NE[readable] for view, image_NE in images.items()}
        flagged_N = None if flagged_N is None else flagged_N[readable]
        items = items.without(unreadable)
    status = "scored" if len(items) else "skipped"
    if len(items):
        scores, predictions = score(items, images, texts, result.lengths, options, flagged_N)
        result.scores += scores
        result.predictions += predictions
    tested = items.labels if items.is_train is None else items.labels[~items.is_train]
    found = _card_result(items.card, part_of(items), status, notes)
    result.cards.append(replace(found, num_images=len(tested), num_classes=len(np.unique(tested[tested >= 0]))))


def part_of(items: Items) -> str:
    """`photographs` or `procedural`."""
    return PROCEDURAL if items.procedural else PHOTOGRAPHS


def _card_result(card: Card, part: str, status: str, notes: list[str]) -> CardResult:
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
        notes=notes,
    )


def _digest(items: Items) -> str:
    captions = items.captions or {}
    rows = [
        f"{key}\t{label}\t{[captions[language][i] for language in sorted(captions)]}"
        for i, (key, label) in enumerate(zip(items.keys, items.labels.tolist(), strict=True))
    ]
    return f"{stable_hash(chr(10).join(sorted(rows))):016x}"
