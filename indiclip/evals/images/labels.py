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
from indiclip.evals.results import check_group
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
            self._left_out[storable(name)] += images
            return -1
        try:
            return self.card.check_place(name, where)
        except ValueError as error:
            raise ValueError(f"{error}; {SKIP}") from error

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
    classes, places, line_of = ClassNames(card, skip_unknown), list[int](), dict[int, int]()
    for line, name in enumerate(names, 1):
        place = classes.place(name, f"{file}: line {line}")
        if place in line_of:
            raise ValueError(f"{file}: line {line}: {card.classes[place].id} is in line {line_of[place]}")
        if place >= 0:
            line_of[place] = line
        places.append(place)
    moved = list(line_of) != sorted(line_of)
    note = f"{file}: the classes are in another order than on the card; labels are mapped by name"
    return ClassList(card, file, names, np.array(places, dtype=np.int64), [note] if moved else [])


def missing_classes(items: Items) -> list[str]:
    """Lines that name the classes without an image to score, and those that have one and none in the gallery."""
    card = items.card
    if not card.required_fields & {"class", "classes"}:
        return []
    shown, lines = items.shown_classes, list[str]()
    missing = [one.id for place, one in enumerate(card.classes) if place not in shown]
    if missing:
        count = f"{len(missing)} of {len(card.classes)} classes"
        lines.append(f"no images of {count}, which stay candidates: {_first(missing)}")
    if items.is_train is not None and "class" in card.required_fields:
        gallery = items.labels[items.is_train].tolist()
        without = [card.classes[place].id for place in sorted(shown.difference(gallery))]
        if without:
            lines.append(f"no gallery images of {len(without)} classes, which probes cannot answer: {_first(without)}")
    return lines


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def class_groups(card: Card, labels: np.ndarray) -> list[str] | None:
    """The group of each image: its class in matching, else the fact `group` where every class has one.

    Raises:
        ValueError: A group has a name that scores have for others.
    """
    if "text" in card.required_fields:
        group_of = card.ids
    elif "class" in card.required_fields and all("group" in one.facts for one in card.classes):
        group_of = [str(one.facts["group"]) for one in card.classes]
    else:
        return None
    for group in group_of:
        check_group(group, f"{card.file}: classes")
    return [group_of[label] for label in labels]


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
            raise ValueError(
                f"{card.id}: {key}: no text; expected what is written on it, from a table or a .txt beside it"
            )
        pools[label].add(text)
    for label, pool in pools.items():
        words = card.classes[label].facts.get("sample_words", {})
        pool |= {unicodedata.normalize("NFC", word) for of_language in words.values() for word in of_language}

    ordered = {label: sorted(pool) for label, pool in pools.items()}
    items.candidates = []
    for key, label, text in zip(items.keys, labels, texts, strict=True):
        others = [other for other in ordered[label] if other != text]
        drawn = random.Random(stable_hash(key)).sample(others, min(len(others), card.num_candidates - 1))
        items.candidates.append([text, *drawn])
    return [
        f"{card.classes[label].id}: {len(pool)} different texts; its images have fewer than {card.num_candidates} "
        "candidates, so chance is higher"
        for label, pool in sorted(pools.items())
        if len(pool) < card.num_candidates
    ]
