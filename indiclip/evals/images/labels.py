"""Labels, by name and never by number: a list of classes in another order must not count wrong."""

import random
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from indiclip.datasets.tables import decode_text, stable_hash
from indiclip.evals.cards.card import Card
from indiclip.evals.images.items import Items
from indiclip.images import storable

CLASS_LISTS = ("classnames.txt", "classes.txt")
SKIP = "--skip-unknown leaves out the images of classes that the card does not have"
_SHOWN = 5  # classes in a line; the others are counted


class ClassNames:
    """The classes of a card, as the names in a user's data mean them.

    Args:
        card: The card.
        skip_unknown: Images of other classes are left out and counted; they are an error else.
    """

    def __init__(self, card: Card, skip_unknown: bool) -> None:
        self.card, self.skip_unknown = card, skip_unknown
        self._left_out: Counter[str] = Counter()  # name -> images

    def place(self, name: str, where: str, images: int = 1) -> int:
        """Where a class is on the card; -1 where there is none of the name, and its images are left out.

        Raises:
            ValueError: There is none, and they are not; begins with `where` and names the nearest.
        """
        place = self.card.place(name)
        if place is not None:
            return place
        if self.skip_unknown:
            self.leave_out(name, images)
            return -1
        try:
            return self.card.check_place(name, where)
        except ValueError as error:
            raise ValueError(f"{error}; {SKIP}") from error

    def leave_out(self, name: str, images: int) -> None:
        """Count images of a class that the card does not have."""
        self._left_out[storable(name)] += images

    def notes(self, where: str) -> list[str]:
        """A line that says what was left out."""
        if not self._left_out:
            return []
        names = [f"{name or 'without a name'} ({count:,})" for name, count in self._left_out.most_common()]
        images = f"{self._left_out.total():,} images of {len(names)} classes"
        return [f"{where}: left out: {images} that are not on the card {self.card.id}: {_first(names)}"]


class ClassList(NamedTuple):
    """A file with a class per line, beside images whose labels are numbers."""

    card: Card  # with the list's names, where those are better than its own
    file: Path
    names: list[str]
    places: np.ndarray  # int64 (lines,): where each line's class is on the card; -1: it is not there
    notes: list[str]


def read_class_list(card: Card, folder: Path, skip_unknown: bool = False) -> ClassList | None:
    """The class list of a folder, `classnames.txt` or `classes.txt`; None where there is none.

    Args:
        card: The card.
        folder: With the list.
        skip_unknown: Lines may be of no class of the card.

    Raises:
        ValueError: A line that is empty or no class of the card, or a duplicated one. Names the file and the line.
    """
    file = next((folder / name for name in CLASS_LISTS if (folder / name).is_file()), None)
    if file is None:
        return None
    names = [line.strip() for line in decode_text(file.read_bytes(), str(file)).rstrip().splitlines()]
    if "" in names:
        raise ValueError(f"{file}: line {names.index('') + 1} is empty; expected a class, since labels count the lines")
    if card.class_source is not None and (named := card.class_source.with_list(card, names, str(file))):
        card, notes = named
        return ClassList(card, file, names, np.arange(len(names)), notes)
    classes = ClassNames(card, skip_unknown)
    places = [classes.place(name, f"{file}: line {number}") for number, name in enumerate(names, 1)]
    known = [place for place in places if place >= 0]
    for number, place in enumerate(places):
        if place >= 0 and place in places[:number]:
            raise ValueError(
                f"{file}: line {number + 1}: {card.classes[place].id} is in line {places.index(place) + 1}"
            )
    moved = known != sorted(known)
    note = f"{file}: the classes are in another order than on the card; labels are mapped by name"
    return ClassList(card, file, names, np.array(places, dtype=np.int64), [note] if moved else [])


def missing_classes(items: Items) -> list[str]:
    """Lines that name the classes without an image to score, and those that have one and none in the gallery."""
    card = items.card
    if not card.required_fields & {"class", "classes"}:
        return []
    shown, lines = items.shown_classes, []
    missing = [one.id for place, one in enumerate(card.classes) if place not in shown]
    if missing:
        lines = [
            f"no images of {len(missing)} of {len(card.classes)} classes, which stay candidates: {_first(missing)}"
        ]
    if items.is_train is not None and "class" in card.required_fields:
        gallery = items.labels[items.is_train].tolist()
        without = [card.classes[place].id for place in sorted(shown.difference(gallery))]
        if without:
            lines.append(f"no gallery images of {len(without)} classes, which probes cannot answer: {_first(without)}")
    return lines


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def class_groups(card: Card, labels: np.ndarray) -> list[str] | None:
    """The group of each image: its class in matching, else the fact `group` where every class has one."""
    if "text" in card.required_fields:
        return [card.classes[label].id for label in labels]
    if "class" not in card.required_fields or not all("group" in one.facts for one in card.classes):
        return None
    return [str(card.classes[label].facts["group"]) for label in labels]


def draw_candidates(items: Items) -> list[str]:
    """Sets the texts that each image is matched with: its own, from the column `text`, then others of the same class.

    The others are drawn from the texts of the class's images and its fact `sample_words`, and are a function of the
    image's key and of these texts alone. There are `card.num_candidates` or, where a class has too few, all of them.

    Returns:
        A line for each class that has too few.

    Raises:
        ValueError: An image without a text.
    """
    card, labels = items.card, items.labels.tolist()
    texts = [unicodedata.normalize("NFC", cells[0].strip()) for cells in items.columns.pop("text")]
    pools: dict[int, set[str]] = defaultdict(set)
    for key, label, text in zip(items.keys, labels, texts, strict=True):
        if not text:
            raise ValueError(f"{card.id}: {key}: no text; expected what is written on the image")
        pools[label].add(text)
    for label, pool in pools.items():
        words = card.classes[label].facts.get("sample_words", {})
        pool |= {unicodedata.normalize("NFC", word) for of_language in words.values() for word in of_language}

    items.candidates = []
    for key, label, text in zip(items.keys, labels, texts, strict=True):
        others = sorted(pools[label] - {text})
        drawn = random.Random(stable_hash(key)).sample(others, min(len(others), card.num_candidates - 1))
        items.candidates.append([text, *drawn])
    return [
        f"{card.classes[label].id}: {len(pool)} different texts; its images have fewer than {card.num_candidates} "
        "candidates, so chance is higher"
        for label, pool in sorted(pools.items())
        if len(pool) < card.num_candidates
    ]
