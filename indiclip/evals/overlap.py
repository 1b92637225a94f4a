"""Which images of a benchmark are among the training shards, by picture or by caption: see `contamination`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from indiclip.data.images import UnreadableSample
from indiclip.data.shards import Shards
from indiclip.data.transforms import read_upright, upright_hw
from indiclip.data.workers import StepLoader, Workers
from indiclip.evals.bench import Bench, part_of
from indiclip.evals.contamination import UNHASHABLE, caption_hash, image_hash, near_duplicates
from indiclip.evals.items import Items
from indiclip.evals.results import data_name

_SIDE = 64  # pixels of the longer side from which a picture is hashed
_HASHED = 256  # pictures that a loader process gives back at a time


class _Hashes(NamedTuple):
    images: np.ndarray  # uint64 (N,); `UNHASHABLE` for what cannot be read, too
    captions: np.ndarray  # uint64 (N,)
    unreadable: int


class _Hasher(Dataset[tuple[list[int], list[int], int]]):
    """Number of a part -> hashes of its images and captions."""

    def __init__(self, size: int, read: Callable[[int], tuple[Any, str | None]]) -> None:
        self.size, self.read = size, read

    def __len__(self) -> int:
        return -(-self.size // _HASHED)

    def __getitem__(self, number: int) -> tuple[list[int], list[int], int]:
        images, captions, unreadable = [], [], 0
        for index in range(number * _HASHED, min((number + 1) * _HASHED, self.size)):
            try:
                image, caption = self.read(index)
                images.append(_hash(image))
            except UnreadableSample:
                images.append(UNHASHABLE)
                caption, unreadable = None, unreadable + 1
            captions.append(caption_hash(caption) if caption else UNHASHABLE)
        return images, captions, unreadable


def flag(bench: Bench, training: str | list[str], num_workers: int = 0) -> dict[str, Any]:
    """Marks in `bench.flagged` what is among the images or captions of training shards.

    Args:
        bench: Its photographs are looked for; generated images are new to any training data.
        training: Shards, as `indiclip.data.shards.Shards` takes them.
        num_workers: Processes that read.

    Returns:
        What was found, for `Result.about`.
    """
    shards = Shards(training)
    known = _hashes(len(shards), partial(_of_shards, shards), num_workers)
    found: dict[str, Any] = {"training_images": len(shards), "training_unreadable": known.unreadable, "cards": {}}
    bench.flagged = []
    for items in bench.items:
        if items.procedural:
            bench.flagged.append(np.zeros(len(items), bool))
            continue
        own = _hashes(len(items), partial(_of_items, items), num_workers)
        by_image, by_caption = near_duplicates(own.images, known.images), _by_caption(items, known.captions)
        bench.flagged.append(by_image.near_N | by_caption)
        found["cards"][data_name(items.card.id, part_of(items))] = {
            "images": len(items),
            "flagged": int(bench.flagged[-1].sum()),
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


def _hashes(size: int, read: Callable[[int], tuple[Any, str | None]], num_workers: int) -> _Hashes:
    loader: StepLoader[tuple[list[int], list[int], int]] = StepLoader(
        _Hasher(size, read),
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=Workers("hashing", num_workers) if num_workers else None,
    )
    images, captions, unreadable = [], [], 0
    for of_images, of_captions, bad in loader:
        images += of_images
        captions += of_captions
        unreadable += bad
    return _Hashes(np.array(images, np.uint64), np.array(captions, np.uint64), unreadable)


def _of_shards(shards: Shards, index: int) -> tuple[Any, str | None]:
    sample = shards[index]
    return sample["image"], sample.get("caption")


def _of_items(items: Items, index: int) -> tuple[Any, None]:
    return items.images[index], None


def _hash(image: Any) -> int:
    height, width = upright_hw(image)
    scale = min(1.0, _SIDE / max(height, width))
    small = read_upright(image, (max(1, round(height * scale)), max(1, round(width * scale))))
    return image_hash(small.permute(1, 2, 0).numpy())
