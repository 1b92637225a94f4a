"""The images of a card, read lazily, and what is right about each."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset

from indiclip.datasets.table_reader import EmbeddedImages
from indiclip.datasets.tables import Strings, check_files, stable_hash
from indiclip.evals.cards.card import Card
from indiclip.images import EncodedImage, UnreadableSample, read_image, storable
from indiclip.webdataset.shards import Shards, unreadable

# What can be pickled to a loader process, has a length, and gives an `EncodedImage` or uint8 RGB pixels (height, width,
# 3), or raises `UnreadableSample`.
Images = Dataset[Any]

# Where the images lie, below the folder of the file that names them.
_FOLDERS = ("", "images", "val2017", "val2014", "train2017", "flickr30k-images", "flickr30k_images")


@dataclass
class Items:
    """Images of a card, and what is right about each.

    Attributes:
        card: The card, with the names that lie beside the images (ImageNet's lists).
        images: `EncodedImage`, or uint8 RGB pixels (height, width, 3), read at each access, in any process.
        keys: Stable and unique.
        labels: int64 (N,), index into `card.classes`; -1 where there is none.
        captions: Language -> the captions of each image; a list may be empty. Retrieval: all are right; choices: the
            first one is.
        candidates: Matching: texts of each image, the right one first.
        columns: What else a protocol asks for, by name: the cells of each image's rows.
        is_train: bool (N,): gallery of kNN and linear probe, never scored. None: no split.
        is_flagged: bool (N,): found among the training data. None: nobody looked.
        contents: A digest of each image's bytes, "" before it was read.
        groups: What per-group tables are by, such as the script of each image.
        procedural: Whether the images are drawn, not photographed.
        notes: Lines to print: classes without images, unreadable images, labels mapped by name.
    """

    card: Card
    images: Images
    keys: list[str]
    labels: np.ndarray
    captions: dict[str, list[list[str]]] = field(default_factory=dict)
    candidates: list[list[str]] | None = None
    columns: dict[str, list[list[str]]] = field(default_factory=dict)
    is_train: np.ndarray | None = None
    is_flagged: np.ndarray | None = None
    contents: list[str] = field(default_factory=list)
    groups: list[str] | None = None
    procedural: bool = False
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.contents = self.contents or [""] * len(self.keys)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_images(self) -> int:
        """As many as there are items, or none: parallel texts have no images."""
        return len(self.images)  # type: ignore[arg-type]  # a Dataset, which mostly has a length

    @property
    def tested_N(self) -> np.ndarray:
        """bool, which images are scored: all but the gallery."""
        return np.ones(len(self), bool) if self.is_train is None else ~self.is_train

    @property
    def shown_classes(self) -> set[int]:
        """The classes, by their places on the card, that the images to score show, as any of its protocols has it."""
        return set().union(*(protocol.shown_classes(self) for protocol in self.card.protocols))

    @property
    def digest(self) -> str:
        """Of what is scored, in any order: the images' bytes, or their keys where they were not read, and what is right
        of each.
        """
        ids, rows = [*self.card.ids, ""], []
        for i in np.flatnonzero(self.tested_N).tolist():
            captions = [texts_N[i] for _, texts_N in sorted(self.captions.items())]
            candidates = self.candidates[i] if self.candidates else None
            label = ids[self.labels[i]]  # "" where it is -1
            image = self.contents[i] or (self.keys[i] if self.num_images else "")
            rows.append(repr((image, label, candidates, *captions)))
        return digest_of([*sorted(self.captions), *sorted(rows)])

    def select(self, places: Iterable[int]) -> "Items":
        """The items at these places, in this order."""
        kept = list(places)
        images = Subset(self.images, kept) if self.num_images else self.images
        columns = {name: _at(getattr(self, name), kept) for name in _OF_EACH_IMAGE}
        return replace(self, images=images, notes=list(self.notes), **columns)


_OF_EACH_IMAGE = ["keys", "labels", "captions", "candidates", "columns", "is_train", "is_flagged", "contents", "groups"]


def digest_of(values: Iterable[object]) -> str:
    """Of the values' texts, in their order."""
    return f"{stable_hash(chr(10).join(map(str, values))):016x}"


def _at(values: Any, places: list[int]) -> Any:
    """What stands at some places of an array or list, or of each one in a dict; None where there are no values."""
    if values is None:
        return None
    if isinstance(values, dict):
        return {name: _at(of_name, places) for name, of_name in values.items()}
    return values[places] if isinstance(values, np.ndarray) else [values[place] for place in places]


def by_language(of_images: list[dict[str, list[str]]]) -> dict[str, list[list[str]]]:
    """The captions of each image by language -> language -> the captions of each image, in one line each."""
    languages = dict.fromkeys(chain.from_iterable(of_images))
    return {
        language: [[" ".join(text.split()) for text in found.get(language, [])] for found in of_images]
        for language in languages
    }


class FileImages(Dataset[EncodedImage]):
    """Image files of a folder.

    Args:
        folder: What the names are relative to.
        names: Of the files.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder, self._names = folder, Strings(names)

    def __len__(self) -> int:
        return len(self._names)

    @classmethod
    def named_in(cls, file: Path, names: list[str]) -> "FileImages":
        """The images that a table or a file of captions names: beside it, or in a folder where they often lie.

        Raises:
            FileNotFoundError: Images are missing; says how many and names the first.
            ValueError: A name that leads out of the folder.
        """
        bases = [file.parent, file.parent.parent] if file.parent.name == "annotations" else [file.parent]
        folders = (base / below for base in bases for below in _FOLDERS)
        folder = next((found for found in folders if names and (found / names[0]).is_file()), file.parent)
        check_files(folder, names, str(file))
        return cls(folder, names)

    def path(self, index: int) -> Path:
        """Where an image lies."""
        return self.folder / self._names[index]

    def __getitem__(self, index: int) -> EncodedImage:
        return read_image(self.path(index), storable(self._names[index]))


class TableImages(Dataset[EncodedImage]):
    """The images that a table itself holds.

    Args:
        column: Of the table.
        rows: Key of each image -> its row.
    """

    def __init__(self, column: EmbeddedImages, rows: dict[str, int]) -> None:
        self.column, self._keys = column, Strings(rows)
        self._rows = np.array(list(rows.values()), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> EncodedImage:
        key = self._keys[index]
        image = self.column.image(int(self._rows[index]), key)
        if image is None:
            raise UnreadableSample(key, "the cell holds no image", str(self.column.file))
        return image


class ShardImages(Dataset[EncodedImage]):
    """The images of shards; their texts and labels are left alone."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> EncodedImage:
        key, shard = self.shards.key(index), self.shards.shard(index)
        with unreadable(key, shard):
            return EncodedImage(self.shards.parts(index)["image"], key, shard)
