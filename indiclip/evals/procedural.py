"""The benchmark's generated images: words to read and colours to name. Nothing is downloaded; the same everywhere.

Images are drawn when they are asked for. With a gallery (`train_per_...`) there is something to train a probe on: its
images share neither words nor fonts, nor weaves and things, with those that are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from indiclip.generated.lettering import SCRIPTS, Lettering
from indiclip.generated.swatches import Swatches
from indiclip.types import Sample

NUM_DISTRACTORS = 9


class _Generated(Protocol):
    """What both datasets have."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...
    def key(self, index: int) -> str: ...
    def label(self, index: int) -> int: ...


class Pictures(Sequence[Any]):
    """The images of some datasets in a row: uint8 (height, width, 3), drawn when they are asked for."""

    def __init__(self, *datasets: _Generated) -> None:
        self.datasets = datasets

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    def __getitem__(self, index: Any) -> Any:
        for dataset in self.datasets:
            if 0 <= index < len(dataset):
                return dataset[index]["image"]
            index -= len(dataset)
        raise IndexError("index: beyond the last picture")


@dataclass(frozen=True)
class Generated:
    """Images, and what is right about each; the fields are those of the benchmark's `Items`.

    Attributes:
        images: uint8 (height, width, 3) each.
        keys: Unique and stable.
        labels: int64 (N,): place among the classes that were asked for.
        is_train: bool (N,): the gallery, never scored; it comes last.
        groups: The script of each word; patch, cloth or thing of each colour.
        candidates: Words: texts of each image, the right one first. None for colours.
        notes: Lines to print.
    """

    images: Pictures
    keys: list[str]
    labels: NDArray[np.int64]
    is_train: NDArray[np.bool_]
    groups: list[str]
    candidates: list[list[str]] | None = None
    notes: list[str] = field(default_factory=list)


def ocr_words(
    classes: Sequence[str], size: int = 224, per_script: int = 50, seed: int = 0, train_per_script: int = 0
) -> Generated:
    """Words in the scripts of `classes`, for matching (`candidates`) and for telling the script (`labels`).

    Args:
        classes: Ids of scripts, in the order of the labels. Those that no words are drawn in are told in `notes`.
        size: Of the square images, in pixels.
        per_script: Images of each script that are scored; half of them show real words, half made-up ones.
        seed: Which words.
        train_per_script: Images of each script for a gallery.

    Raises:
        MissingFonts: Fonts or libraries are missing; names the packages.
        ValueError: None of the classes is a script that can be drawn.
    """
    drawn = [script for script in classes if script in SCRIPTS]
    if not drawn:
        raise ValueError(f"classes: expected some of {', '.join(SCRIPTS)}; found {list(classes)}")
    parts = _parts(per_script, train_per_script)
    sets = [
        Lettering(len(drawn) * count, part, drawn, size, seed, num_distractors=NUM_DISTRACTORS) for part, count in parts
    ]
    places = [list(classes).index(script) for script in drawn]
    missing = [script for script in classes if script not in SCRIPTS]
    notes = [f"no words are drawn in {', '.join(missing)}"] if missing else []
    notes.append("fonts of the test words: " + ", ".join(face.family for face in sets[0].faces.values()))
    return Generated(
        **_common(sets, places),
        groups=[words.script(i) for words in sets for i in range(len(words))],
        candidates=[words.candidates(i) for words in sets for i in range(len(words))],
        notes=notes,
    )


def colours(
    classes: Sequence[tuple[str, str]], size: int = 224, per_colour: int = 30, seed: int = 0, train_per_colour: int = 0
) -> Generated:
    """Patches, cloth and things in named colours.

    Args:
        classes: Ids and values (#RRGGBB) of the colours, in the order of the labels.
        size: Of the square images, in pixels.
        per_colour: Images of each colour that are scored; patches, cloth and things take turns.
        seed: Which images.
        train_per_colour: Images of each colour for a gallery.

    Raises:
        ValueError: Two ids or two values are alike, or one is not written as #RRGGBB.
    """
    if len(dict(classes)) < len(classes):
        raise ValueError(f"classes: expected every id once; found {[id_ for id_, _ in classes]}")
    parts = _parts(per_colour, train_per_colour)
    sets = [Swatches(dict(classes), len(classes) * count, part, size, seed) for part, count in parts]
    return Generated(
        **_common(sets, list(range(len(classes)))),
        groups=[swatches.kind(i) for swatches in sets for i in range(len(swatches))],
    )


def _parts(num_test: int, num_train: int) -> list[tuple[str, int]]:
    return [("test", num_test), ("train", num_train)] if num_train else [("test", num_test)]


def _common(sets: Sequence[_Generated], places: list[int]) -> dict[str, Any]:
    return {
        "images": Pictures(*sets),
        "keys": [each.key(i) for each in sets for i in range(len(each))],
        "labels": np.array([places[each.label(i)] for each in sets for i in range(len(each))], np.int64),
        "is_train": np.repeat(np.arange(len(sets)) == 1, [len(each) for each in sets]),
    }
