"""Which images of a benchmark are among the training shards, by picture or by caption: see `contamination`."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from indiclip.evals.bench import Bench
from indiclip.evals.images.items import Items
from indiclip.evals.protocols.contamination import UNHASHABLE, caption_hash, image_hash, near_duplicates
from indiclip.evals.reports.pictures import thumbnail
from indiclip.evals.results import name_of, part_of
from indiclip.images import UnreadableSample
from indiclip.loading.workers import StepLoader, Workers
from indiclip.webdataset.shards import Shards

_SIDE = 64  # pixels of the longer side from which a picture is hashed
_HASHED = 256  # pictures that a loader process gives back at a time


class _Hashes(NamedTuple):
    images: np.ndarray  # uint64 (N,); `UNHASHABLE` for what cannot be read, too
    captions: np.ndarray  # uint64, of all captions
    unreadable: int


class _Hasher(Dataset[_Hashes]):
    """Number of a part -> its hashes."""

    def __init__(self, size: int, read: Callable[[int], tuple[Any, list[str]]]) -> None:
        self.size, self.read = size, read

    def __len__(self) -> int:
        return -(-self.size // _HASHED)

    def __getitem__(self, number: int) -> _Hashes:
        images, captions, unreadable = list[int](), list[int](), 0
        for index in range(number * _HASHED, min((number + 1) * _HASHED, self.size)):
            try:
                image, texts = self.read(index)
                images.append(image_hash(thumbnail(image, _SIDE)))
                captions += map(caption_hash, texts)
            except UnreadableSample:  # nothing is learned from its captions either
                images.append(UNHASHABLE)
                unreadable += 1
        return _Hashes(np.array(images, np.uint64), np.array(captions, np.uint64), unreadable)


def flag(bench: Bench, training: str | list[str], num_workers: int = 0) -> dict[str, Any]:
    """Marks in `Items.is_flagged` what is among the images or captions of training shards.

    Args:
        bench: Of its photographs those that are scored are looked for; generated images are new to any training data.
        training: Shards, as `indiclip.webdataset.shards.Shards` takes them.
        num_workers: Processes that read.

    Returns:
        What was found, for `Result.about`.
    """
    shards = Shards(training)
    known = _hashes(len(shards), partial(_of_shards, shards), num_workers)
    found: dict[str, Any] = {"training_images": len(shards), "training_unreadable": known.unreadable, "cards": {}}
    for items in bench.items:
        items.is_flagged = np.zeros(len(items), bool)
        if items.procedural:
            continue
        scored = items.select(np.flatnonzero(items.tested_N).tolist())
        own = _hashes(len(scored), partial(_of_items, scored), num_workers)
        by_image, by_caption = near_duplicates(own.images, known.images), _by_caption(scored, known.captions)
        items.is_flagged[items.tested_N] = by_image.near_N | by_caption
        found["cards"][name_of(items.card.id, part_of(items.procedural))] = {
            "images": len(scored),
            "flagged": int(items.is_flagged.sum()),
            "by_image": int(by_image.near_N.sum()),
            "by_caption": int(by_caption.sum()),
            "not_comparable": by_image.unhashable,
        }
    return found


def _by_caption(items: Items, known_M: np.ndarray) -> np.ndarray:
    """Images of which any caption is a training caption, bool (N,)."""
    flagged_N = np.zeros(len(items), bool)
    for texts_N in (items.captions or {}).values():
        owner_T = np.repeat(np.arange(len(items)), [len(texts) for texts in texts_N])
        hashes_T = np.array([caption_hash(text) for texts in texts_N for text in texts], dtype=np.uint64)
        flagged_N[owner_T[near_duplicates(hashes_T, known_M, 0).near_N]] = True
    return flagged_N


def _hashes(size: int, read: Callable[[int], tuple[Any, list[str]]], num_workers: int) -> _Hashes:
    loader: StepLoader[_Hashes] = StepLoader(
        _Hasher(size, read),
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=Workers("hashing", num_workers) if num_workers else None,
    )
    nothing = np.zeros(0, np.uint64)
    images, captions, unreadable = zip((nothing, nothing, 0), *loader, strict=True)
    return _Hashes(np.concatenate(images), np.concatenate(captions), sum(unreadable))


def _of_shards(shards: Shards, index: int) -> tuple[Any, list[str]]:
    """A picture, and every caption that a step may draw for it."""
    return shards[index]["image"], [text for texts in shards.captions(index).values() for text in texts]


def _of_items(items: Items, index: int) -> tuple[Any, list[str]]:
    return items.images[index], []
