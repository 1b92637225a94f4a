"""Labels, by name and never by number: a list of classes in another order must not count wrong."""

import random
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from indiclip.datasets.tables import decode_text, stable_hash
from indiclip.evals.cards.card import Card
from indiclip.evals.cards.imagenet import is_imagenet, with_class_list

CLASS_LISTS = ("classnames.txt", "classes.txt")


class ClassList(NamedTuple):
    """A file with a class per line, beside images whose labels are numbers."""

    card: Card  # with the list's names, where those are better than its own
    file: Path
    places: np.ndarray  # int64 (lines,): where each line's class is on the card
    notes: list[str]


def read_class_list(card: Card, folder: Path) -> ClassList | None:
    """The class list of a folder, `classnames.txt` or `classes.txt`; None where there is none.

    Raises:
        ValueError: A line that is empty or no class of the card, or a duplicated one. Names the file and the line.
    """
    file = next((folder / name for name in CLASS_LISTS if (folder / name).is_file()), None)
    if file is None:
        return None
    names = [line.strip() for line in decode_text(file.read_bytes(), str(file)).rstrip().splitlines()]
    if "" in names:
        raise ValueError(f"{file}: line {names.index('') + 1} is empty; expected a class, since labels count the lines")
    if is_imagenet(card):
        card, notes = with_class_list(card, names, str(file))
        return ClassList(card, file, np.arange(len(names)), notes)
    places = [card.check_place(name, f"{file}: line {number}") for number, name in enumerate(names, 1)]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise ValueError(
                f"{file}: line {number + 1}: {card.classes[place].id} is in line {places.index(place) + 1}"
            )
    moved = places != sorted(places)
    note = f"{file}: the classes are in another order than on the card; labels are mapped by name"
    return ClassList(card, file, np.array(places, dtype=np.int64), [note] if moved else [])


def map_labels(numbers: np.ndarray, found: ClassList | None, where: str) -> np.ndarray:
    """Numbers that count a list's lines from 0 -> indices into the card's classes.

    Args:
        numbers: Whole numbers (N,).
        found: The list.
        where: Names the images' file or folder in errors.

    Returns:
        int64 (N,).

    Raises:
        ValueError: There is no list, or a number is over its end.
    """
    if found is None:
        raise ValueError(
            f"{where}: labels are numbers and there is no {' or '.join(CLASS_LISTS)} beside the shards; "
            "expected one, with a class per line in the order of the numbers"
        )
    if numbers.max() >= len(found.places):
        raise ValueError(f"{where}: the label {numbers.max()}; {found.file} has {len(found.places)} lines")
    return np.asarray(found.places[numbers], dtype=np.int64)


def missing_classes(card: Card, labels: np.ndarray) -> list[str]:
    """A line that names the classes of a card without any image."""
    there = set(labels.tolist())
    missing = [one.id for place, one in enumerate(card.classes) if place not in there]
    if not missing:
        return []
    shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
    return [f"no images of {len(missing)} of {len(card.classes)} classes, which stay candidates: {shown}"]


def class_groups(card: Card, labels: np.ndarray) -> list[str] | None:
    """The group of each image: its class in matching, else the fact `group` where every class has one."""
    if "text" in card.required_fields:
        return [card.classes[label].id for label in labels]
    if not card.classes or not all("group" in one.facts for one in card.classes):
        return None
    return [str(card.classes[label].facts["group"]) for label in labels]


def draw_candidates(
    card: Card, texts: list[str], keys: list[str], labels: np.ndarray
) -> tuple[list[list[str]], list[str]]:
    """The texts that each image is matched with: its own first, then others of the same class.

    The others are drawn from the texts of the class's images and its fact `sample_words`, and are a function of the
    image's key and of these texts alone.

    Returns:
        For each image `card.num_candidates` texts or, where a class has too few, all of them; and a line per such
        class.
    """
    texts = [unicodedata.normalize("NFC", text.strip()) for text in texts]
    pools: dict[int, set[str]] = defaultdict(set)
    for label, text in zip(labels.tolist(), texts, strict=True):
        pools[label].add(text)
    for label in pools:
        words = card.classes[label].facts.get("sample_words", {})
        pools[label] |= {unicodedata.normalize("NFC", word) for of_language in words.values() for word in of_language}
    ordered = {label: sorted(pool) for label, pool in pools.items()}
    candidates = []
    for key, label, text in zip(keys, labels.tolist(), texts, strict=True):
        pool, own = ordered[label], ordered[label].index(text)
        others = pool[:own] + pool[own + 1 :]
        drawn = random.Random(stable_hash(key)).sample(others, min(len(others), card.num_candidates - 1))
        candidates.append([text, *drawn])
    notes = [
        f"{card.classes[label].id}: {len(pool)} different texts; its images have fewer than {card.num_candidates} "
        "candidates, so chance is higher"
        for label, pool in sorted(ordered.items())
        if len(pool) < card.num_candidates
    ]
    return candidates, notes
