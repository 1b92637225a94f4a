"""Questions about scenes of a fair: which of a few captions is true, where one word of it is how many things there are,
their colour, what they are, or where.

A card names `questions` by `generator:`. Scenes are of one kind of thing, drawn by `indiclip.generated.mela`, whose
truth is exact, and every caption says the same in each of its languages.
"""

from collections import Counter
from dataclasses import replace
from itertools import count

import numpy as np
from numpy.random import Generator, default_rng
from torch.utils.data import Subset

from indiclip.evals.cards.card import Card
from indiclip.evals.images.items import Items
from indiclip.evals.procedural import Pictures
from indiclip.generated.mela import Mela
from indiclip.generated.mela_scene import Scene, place_of
from indiclip.generated.mela_things import COLOURS, THINGS
from indiclip.generated.mela_words import CLASSES, LANGUAGES, Group, caption

# What a caption tells beside the thing. Where a word follows the gender of the thing ("of the colour", in Hindi), a
# question about the thing would change two words: it tells no colour.
TOLD = {
    "count": {"number": True, "colour": True, "place": False},
    "colour": {"number": False, "colour": True, "place": False},
    "thing": {"number": True, "colour": False, "place": False},
    "place": {"number": False, "colour": True, "place": True},
}
PER_KIND = 100  # scenes
MOST_CANDIDATES = 4  # of a place: itself, the middle, the other side, and one that nothing is at
_COUNTS = range(2, 7)  # five, as places; beside 1, English would change the thing's ending too
_SIDES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}  # axis (x, y) and sign from the middle
_MIDDLE, _APART = 0.1, 0.2  # of the image's side: within, and beyond which, nobody doubts where a thing is
_FAIR = 7_000_000  # seeds of fairs that no training is likely to name

Statement = tuple[Group, str]  # what is there, and where


def questions(card: Card, seed: int = 0, size: int = 224) -> Items:
    """For `choices`: of each scene `card.num_candidates` captions in every language of the fair, the true one first.

    Every count and every place is right as often as the others, so that no word is a better guess than another.

    Raises:
        ValueError: More candidates than every question has.
    """
    if card.num_candidates > MOST_CANDIDATES:
        raise ValueError(f"{card.file}: num_candidates: found {card.num_candidates}; expected 2 to {MOST_CANDIDATES}")
    mela = Mela(size=size, layout="single", people=0.0, seed=_FAIR + seed)
    scenes, kinds = list[int](), list[list[str]]()
    captions: dict[str, list[list[str]]] = {language: [] for language in LANGUAGES}
    answers = Counter[str | tuple[str, str | int]]()
    for index in count():
        if len(scenes) == PER_KIND * len(TOLD):
            break
        rng = default_rng([mela.seed, index, 2])  # a stream of its own, so that a question never changes the scene
        scene = mela.scene(index)
        for kind in sorted((kind for kind in TOLD if answers[kind] < PER_KIND), key=answers.__getitem__):
            statements = ask(kind, scene, rng)[: card.num_candidates]
            if len(statements) < card.num_candidates:
                continue
            group, place = statements[0]
            answer = (kind, group.count if kind == "count" else place)
            if kind in ("count", "place") and answers[answer] == PER_KIND // 5:
                continue
            answers.update((kind, answer))
            scenes.append(index)
            kinds.append([kind])
            for language, of_scenes in captions.items():
                of_scenes.append([caption(language, [group], place, TOLD[kind]) for group, place in statements])
            break
    return Items(
        card,
        Subset(Pictures(mela), scenes),
        [mela.key(index) for index in scenes],
        np.full(len(scenes), -1),
        captions=captions,
        columns={"kind": kinds},
        procedural=True,
    )


def ask(kind: str, scene: Scene, rng: Generator) -> list[Statement]:
    """What is true of a scene, then what is not, in random order; nothing where there is nothing to ask."""
    if not len(scene.classes):
        return []
    colours = set(scene.colours)
    group = Group(CLASSES[scene.classes[0]], len(scene.classes), colours.pop() if len(colours) == 1 else "", "")
    wrong: list[Statement] = []
    place = ""
    if kind == "count" and group.count in _COUNTS:
        wrong = [(replace(group, count=other), "") for other in _COUNTS if other != group.count]
    elif kind == "colour" and group.colour:
        wrong = [(replace(group, colour=other), "") for other in COLOURS if other != group.colour]
    elif kind == "thing":
        wrong = [(replace(group, kind=other), "") for other in THINGS if other != group.kind]
    elif kind == "place":
        place, others = _places(scene)
        wrong = [(group, other) for other in others]
    return [(group, place), *(wrong[i] for i in rng.permutation(len(wrong)))] if wrong else []


def _places(scene: Scene) -> tuple[str, list[str]]:
    """Where the things are and where they are not; "" where somebody might doubt it."""
    height, width = scene.image_HW3.shape[:2]
    relative_M2 = scene.points_xy / (width, height) - 0.5
    if (np.abs(relative_M2) < _MIDDLE).all():
        return "centre", list(_SIDES)
    place = place_of(scene.points_xy, (height, width))
    if place not in _SIDES:
        return "", []
    axis, sign = _SIDES[place]
    if (relative_M2[:, axis] * sign < _APART).any():
        return "", []
    # Of the other axis, the half in which all things are is true as well, and is not asked for.
    others = [side for side, (axis, sign) in _SIDES.items() if not (relative_M2[:, axis] * sign > 0).all()]
    return place, [*others, "centre"]
