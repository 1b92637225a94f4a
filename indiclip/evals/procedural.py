"""The benchmark's generated images: words to read and colours to name. Nothing is downloaded; the same everywhere.

A card names one of these, or a function of somebody's own, by `generator:`. It is called with the card and the seed,
and may raise `MissingFonts`, which names the packages.

Images are drawn when they are asked for. Those of the gallery, which probes are trained on, share neither words nor
fonts, nor weaves and things, with those that are scored.
"""

from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset

from indiclip.evals.cards.card import Card
from indiclip.evals.images.items import Items
from indiclip.generated.base import Generated
from indiclip.generated.lettering import SCRIPTS, Lettering
from indiclip.generated.swatches import Swatches

# Images of each script and of each colour: those that are scored, and the gallery.
WORDS = {"test": 40, "train": 20}
SWATCHES = {"test": 24, "train": 12}

_NOT_PHOTOS = (
    "scores on rendered words do not predict those on photos: Tesseract matches 0.98 of 369 words that are drawn and "
    "0.76 of the same words in photos (BENCHMARKS.md)"
)


class Pictures(Dataset[Any]):
    """The images of a generated data set: uint8 (height, width, 3)."""

    def __init__(self, samples: Generated) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]["image"]


def words(card: Card, seed: int = 0, size: int = 224) -> Items:
    """For matching (`candidates`), and for telling the script; half of the words are real, half made up."""
    scripts = [script for script in card.ids if script in SCRIPTS]
    sets = [Lettering(len(scripts) * count, part, scripts, size, seed) for part, count in WORDS.items()]
    items = _items(card, sets, [words.script(i) for words in sets for i in range(len(words))])
    items.labels = np.array([card.ids.index(script) for script in items.groups or []])
    items.candidates = [words.candidates(i) for words in sets for i in range(len(words))]
    if missing := [script for script in card.ids if script not in SCRIPTS]:
        items.notes.append(f"no words are drawn in {', '.join(missing)}")
    items.notes.append(_NOT_PHOTOS)
    items.notes.append("fonts of the test words: " + ", ".join(face.family for face in sets[0].faces.values()))
    return items


def colours(card: Card, seed: int = 0, size: int = 224) -> Items:
    """Patches, cloth and things in the colours of the classes, which take turns."""
    values = {one.id: str(one.facts["hex"]) for one in card.classes}
    sets = [Swatches(values, len(values) * count, part, size, seed) for part, count in SWATCHES.items()]
    return _items(card, sets, [swatches.kind(i) for swatches in sets for i in range(len(swatches))])


def _items(card: Card, sets: list[Any], groups: list[str]) -> Items:
    """The images of a data set for testing and one for training, whose labels are their own."""
    return Items(
        card,
        ConcatDataset([Pictures(samples) for samples in sets]),
        [samples.key(i) for samples in sets for i in range(len(samples))],
        np.array([samples.label(i) for samples in sets for i in range(len(samples))]),
        is_train=np.repeat([False, True], [len(samples) for samples in sets]),
        groups=groups,
        procedural=True,
    )
