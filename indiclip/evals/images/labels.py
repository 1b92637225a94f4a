"""What follows from the labels of a card's images: groups, texts to match, and lines about classes without images."""

import random
import unicodedata
from collections import defaultdict

import numpy as np

from indiclip.datasets.tables import stable_hash
from indiclip.evals.cards.card import Card
from indiclip.evals.images.items import Items
from indiclip.evals.images.reading import listed

_FEW = 5  # classes with images, of many: a score can be high by accident


def missing_classes(items: Items) -> list[str]:
    """Lines that name the classes without an image to score, and those that have one and none in the gallery."""
    card = items.card
    if not card.required_fields & {"class", "classes"}:
        return []
    shown, lines = items.shown_classes, list[str]()
    missing = [one.id for place, one in enumerate(card.classes) if place not in shown]
    if missing:
        count = f"{len(missing)} of {len(card.classes)} classes"
        lines.append(f"no images of {count}, which stay candidates: {listed(missing)}")
    if 0 < len(shown) < _FEW < len(missing):
        lines.append(
            f"images of {len(shown)} classes alone say little: one answer for all of them has a recall of "
            f"{1 / len(shown):.2f} in the mean over these classes, far above chance"
        )
    if items.is_train is not None and "class" in card.required_fields:
        gallery = items.labels[items.is_train].tolist()
        without = [card.classes[place].id for place in sorted(shown.difference(gallery))]
        if without:
            lines.append(f"no gallery images of {len(without)} classes, which probes cannot answer: {listed(without)}")
    return lines


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
            raise ValueError(
                f"{card.id}: {key}: no text; expected what is written on it, in a table or a .txt beside it"
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
