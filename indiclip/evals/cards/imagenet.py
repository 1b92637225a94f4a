"""ImageNet-1k's classes, and their names in other languages (Babel-ImageNet).

Sources: timm's WordNet table; G. Geigle, R. Timofte, G. Glavaš, "Babel-ImageNet", 2023, whose file the user has.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from indiclip.datasets.tables import load_json
from indiclip.evals.cards.classes import Card, CardClass, ClassSource
from indiclip.names import check_whole

NUM_CLASSES = 1000
# WordNet's first name is that of another class too.
_RENAMED = {"n02012849": "crane bird", "n03126707": "construction crane", "n03710721": "tank suit"}


class ImageNet(ClassSource):
    """ImageNet-1k's classes, and their English names from a list such as CLIP's where one lies with the images."""

    def classes(self) -> tuple[CardClass, ...]:
        """By their WordNet synsets, in the usual order. Names are WordNet's first, the others are aliases."""
        from timm.data.imagenet_info import ImageNetInfo  # two seconds

        info: Any = ImageNetInfo("imagenet-1k")
        classes = []
        for place, synset in enumerate(info.label_names()):
            words = str(info.index_to_description(place)).split(", ")
            name = _RENAMED.get(synset, words[0])
            classes.append(CardClass(synset, {"en": name}, tuple(word for word in words if word != name)))
        return tuple(classes)

    def with_list(self, card: Card, names: list[str], file: str) -> tuple[Card, list[str]]:
        """The card with the English names of a list such as CLIP's, in the usual order of the classes.

        Those names are written in many ways, so that not every line is a name that WordNet knows. The order is proven
        by the lines that are: each has to stand at its own place.

        Returns:
            The card, and lines that say whose names it has and which of them are those of several classes.

        Raises:
            ValueError: Another number of lines, or another order.
        """
        if len(names) != NUM_CLASSES:
            raise ValueError(f"{file}: {len(names)} lines; expected ImageNet's {NUM_CLASSES} classes, one per line")
        known = [(place, found) for place, name in enumerate(names) if (found := card.place(name)) is not None]
        # A few names are those of two classes ("crane"); they are at one place of the two.
        moved = [(place, found) for place, found in known if place != found]
        if len(known) < NUM_CLASSES // 2 or len(moved) > NUM_CLASSES // 50:
            place, found = moved[0] if moved else (0, 0)
            raise ValueError(
                f"{file}: line {place + 1}: {names[place]!r} is class {found} ({card.ids[found]}) of ImageNet; "
                f"expected the usual order, {len(moved)} of {len(known)} known names are elsewhere"
            )
        if names in ([one.names["en"] for one in card.classes], card.ids):
            return card, []
        renamed = _with_names(card, ({"en": name} for name in names))
        return renamed, [f"English class names are those of {file}", *_shared(names, file)]


class BabelImageNet(ImageNet):
    """The same with names in other languages, of the authors' file."""

    names_file = "babel_imagenet.json"

    def with_file(self, card: Card, file: Path) -> tuple[Card, list[str]]:
        """The card with the names of the authors' file, `{"HI": [[class numbers], [names]], ...}`.

        Returns:
            The card, and lines on languages in which several classes have one name.

        Raises:
            ValueError: Another content. Names the file and the language.
        """
        content = load_json(file)
        if not isinstance(content, dict):
            raise ValueError(f"{file}: found a {type(content).__name__}; expected {{language: [[numbers], [names]]}}")
        names: list[dict[str, str]] = [{} for _ in card.classes]
        notes: list[str] = []
        for code, entry in sorted(content.items()):
            where, language = f"{file}: {code}", code.lower()
            if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, list) for part in entry)):
                raise ValueError(f"{where}: expected [[class numbers], [names]]")
            places, names_there = entry
            if len(places) != len(names_there):
                raise ValueError(f"{where}: {len(places)} class numbers and {len(names_there)} names")
            for place, name in zip(places, names_there, strict=True):
                check_whole({f"{where}: the class number": place}, 0, NUM_CLASSES - 1)
                if not isinstance(name, str) or not name.strip():
                    raise ValueError(f"{where}: the name of class {place} is {name!r}; expected text")
                names[place][language] = name
            notes += _shared(names_there, language)
        return _with_names(card, names), notes


def _with_names(card: Card, names: Iterable[dict[str, str]]) -> Card:
    """The card with more or other names of each class."""
    named = zip(card.classes, names, strict=True)
    return replace(card, classes=tuple(replace(one, names=one.names | more) for one, more in named))


def _shared(names: list[str], where: str) -> list[str]:
    """A line about classes of one name: their prompts tie, which counts against both."""
    shared = [name for name, count in Counter(names).items() if count > 1]
    line = f"{where}: {len(shared)} names are those of several classes, whose images count as missed, first"
    return [f"{line} {shared[0]!r}"] if shared else []
