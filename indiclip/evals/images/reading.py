"""What the readers of all layouts share: which images of a card are read, and the notes about those that are not."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from indiclip.datasets.tables import decode_text
from indiclip.evals.cards.card import Card
from indiclip.evals.images.splits import KINDS
from indiclip.images import storable

CLASS_LISTS = ("classnames.txt", "classes.txt")
SKIP = "--skip-unknown leaves out the images of classes that the card does not have"
_SHOWN = 5  # names in a line; the others are counted


class ClassList(NamedTuple):
    """A file with a class per line, beside images whose labels are numbers."""

    file: Path
    names: list[str]
    places: np.ndarray  # int64 (lines,): where each line's class is on the card; -1: it is not there


class Reading:
    """A card whose images are being read.

    Args:
        card: The card.
        skip_unknown: Leave out and count the images of other classes than the card's; they are an error else.

    Attributes:
        card: The card, with the names that lie beside the images.
        notes: What was left out, or is read in another way than it may seem.
    """

    def __init__(self, card: Card, skip_unknown: bool = False) -> None:
        self.card, self.skip_unknown = card, skip_unknown
        self.notes: list[str] = []
        self._left_out: Counter[str] = Counter()  # class -> images

    def label(self, name: str, where: str, images: int = 1) -> int:
        """Where a class is on the card; -1 where there is none of the name, and its images are left out.

        Classes are looked up by name and never by number: a list in another order must not count wrong.

        Raises:
            ValueError: There is none, and they are not left out; begins with `where` and names the nearest.
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

    def left_out(self, where: str) -> list[str]:
        """A line that says of which classes images were left out."""
        counts = (+self._left_out).most_common()
        if not counts:
            return []
        names = [f"{name or 'without a name'} ({count:,})" for name, count in counts]
        images = f"{self._left_out.total():,} images of {len(names)} classes"
        return [f"{where}: left out: {images} that are not on the card {self.card.id}: {listed(names)}"]

    def splits(self, names: Iterable[str], where: str) -> dict[str, bool]:
        """Name of each split to read, of all that there are -> whether it is for training: `test` is scored, or `val`
        where there is none.
        """
        kinds = {name: KINDS[name.lower()] for name in names}
        scored = "test" if "test" in kinds.values() else "val"
        chosen = {name: kind == "train" for name, kind in kinds.items() if kind in ("train", scored)}
        if left := ", ".join(f"`{name}`" for name in kinds if name not in chosen):
            self.notes.append(f"{where}: `test` is scored; {left} is not used")
        return chosen

    def class_list(self, folder: Path) -> ClassList | None:
        """The class list of a folder, `classnames.txt` or `classes.txt`; None where there is none.

        The card takes over the list's names, where those are better than its own.

        Raises:
            ValueError: A line that is empty or no class of the card, or a duplicated one. Names the file and the line.
        """
        file = next((folder / name for name in CLASS_LISTS if (folder / name).is_file()), None)
        if file is None:
            return None
        names = [line.strip() for line in decode_text(file.read_bytes(), str(file)).rstrip().splitlines()]
        if "" in names:
            line = names.index("") + 1
            raise ValueError(f"{file}: line {line} is empty; expected a class, since labels count the lines")
        source = self.card.class_source
        if source is not None and (named := source.with_list(self.card, names, str(file))):
            self.card, notes = named
            self.notes += notes
            return ClassList(file, names, np.arange(len(names)))
        places, line_of = list[int](), dict[int, int]()
        for line, name in enumerate(names, 1):
            place = self.label(name, f"{file}: line {line}", images=0)
            if place in line_of:
                raise ValueError(f"{file}: line {line}: {self.card.ids[place]} is in line {line_of[place]}")
            if place >= 0:
                line_of[place] = line
            places.append(place)
        if list(line_of) != sorted(line_of):
            self.notes.append(f"{file}: the classes are in another order than on the card; labels are mapped by name")
        return ClassList(file, names, np.array(places, dtype=np.int64))


def listed(names: list[str]) -> str:
    """The first of some names, for a line."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
