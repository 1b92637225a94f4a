"""Which images of a benchmark are in training data, by their bytes, looks or captions: see `contamination`."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch.utils.data import Dataset

from indiclip.evals.encode import content_digest
from indiclip.evals.find import Bench
from indiclip.evals.images.items import Items
from indiclip.evals.protocols.contamination import (
    MAX_DISTANCES,
    UNHASHABLE,
    VIEWS,
    caption_hash,
    image_hashes,
    near_duplicates,
)
from indiclip.evals.reports.pictures import thumbnail
from indiclip.images import UnreadableSample
from indiclip.loading.workers import StepLoader, Workers

_SIDE = 64  # pixels of the longer side from which a picture is hashed
_HASHED = 256  # pictures that a loader process gives back at a time

Example = tuple[Any, list[str]]  # an image as `Items.images` gives it, None for a text without one; its captions


class Training(Protocol):
    """What a model was trained on: an image or none, and all its captions, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Raises UnreadableSample: training left the sample out."""


class _Hashes(NamedTuple):
    """Of N images; 0 where there is no image, or nothing to compare."""

    looks: np.ndarray  # uint64 (N, views, 2): dHash and pHash
    contents: np.ndarray  # uint64 (N,): of the bytes
    captions: np.ndarray  # uint64, of all captions
    unreadable: int
    texts: int  # without an image


class _Hasher(Dataset[_Hashes]):
    """Number of a part -> its hashes."""

    def __init__(self, size: int, read: Callable[[int], Example], views: tuple[tuple[float, bool], ...]) -> None:
        self.size, self.read, self.views = size, read, views

    def __len__(self) -> int:
        return -(-self.size // _HASHED)

    def __getitem__(self, number: int) -> _Hashes:
        places = range(number * _HASHED, min((number + 1) * _HASHED, self.size))
        looks = np.zeros((len(places), len(self.views), 2), np.uint64)
        contents, captions, unreadable, alone = np.zeros(len(places), np.uint64), list[int](), 0, 0
        for row, index in enumerate(places):
            try:
                image, texts = self.read(index)
                if image is None:
                    alone += 1
                else:
                    pixels = thumbnail(image, _SIDE)
                    looks[row] = [image_hashes(pixels, *view) for view in self.views]
                    contents[row] = int(content_digest(image), 16)
                captions += map(caption_hash, texts)
            except UnreadableSample:  # nothing is learned from its captions either
                unreadable += 1
        return _Hashes(looks, contents, np.array(captions, np.uint64), unreadable, alone)


def flag(
    bench: Bench, training: Training, num_workers: int = 0, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Marks in `Items.is_flagged` what is among the images or captions of training data.

    Args:
        bench: Of its photographs and texts those that are scored are looked for; generated images are new to any
            training data.
        training: What the model was trained on.
        num_workers: Processes that read.
        progress: Is told how many more training samples were read.

    Returns:
        What was found, for `Result.about`. `looked_for` are the kinds of match that were looked for: those that its
        images and captions, and the training data's, allow.
    """
    known = _hashes(_Hasher(len(training), training.__getitem__, VIEWS[:1]), num_workers, progress)
    found: dict[str, Any] = {
        "training_images": len(training) - known.texts,
        "training_texts": known.texts,
        "training_captions": len(known.captions),
        "training_unreadable": known.unreadable,
        "cards": {},
    }
    for items in bench.items:
        items.is_flagged = np.zeros(len(items), bool)
        if items.procedural:
            continue
        scored = items.select(np.flatnonzero(items.tested_N).tolist())
        by = _found_by(scored, known, num_workers)
        items.is_flagged[items.tested_N] = np.logical_or.reduce([by["bytes"], by["image"], by["caption"]])
        have_images = items.num_images and found["training_images"]
        can_be_found = {"bytes": have_images, "image": have_images, "caption": items.captions and len(known.captions)}
        found["cards"][items.card.id] = {
            "images": len(scored),
            "flagged": int(items.is_flagged.sum()),
            **{f"by_{way}": int(by[way].sum()) for way in can_be_found},
            "not_comparable": int(by["nothing"].sum()),
            "looked_for": [way for way, can_be in can_be_found.items() if can_be],
        }
    return found


def _found_by(items: Items, known: _Hashes, num_workers: int) -> dict[str, np.ndarray]:
    """Which images are found, bool (N,), by each way, and which have no looks to compare."""
    found = dict.fromkeys(("bytes", "image", "nothing"), np.zeros(len(items), bool))
    if items.num_images:
        own = _hashes(_Hasher(items.num_images, partial(_of_items, items), VIEWS), num_workers)
        for kind, max_distance in enumerate(MAX_DISTANCES):
            near_NV = near_duplicates(own.looks[:, :, kind].ravel(), known.looks[:, 0, kind], max_distance)
            found["image"] = found["image"] | near_NV.reshape(len(items), -1).any(1)
        found["bytes"] = near_duplicates(own.contents, known.contents, 0)
        found["nothing"] = own.looks[:, 0, 0] == UNHASHABLE
    return found | {"caption": _by_caption(items, known.captions)}


def _by_caption(items: Items, known_M: np.ndarray) -> np.ndarray:
    """Images of which any caption is a training caption, bool (N,)."""
    flagged_N = np.zeros(len(items), bool)
    for texts_N in items.captions.values():
        owner_T = np.repeat(np.arange(len(items)), [len(texts) for texts in texts_N])
        hashes_T = np.array([caption_hash(text) for texts in texts_N for text in texts], dtype=np.uint64)
        flagged_N[owner_T[near_duplicates(hashes_T, known_M, 0)]] = True
    return flagged_N


def _hashes(hasher: _Hasher, num_workers: int, progress: Callable[[int], None] | None = None) -> _Hashes:
    loader: StepLoader[_Hashes] = StepLoader(
        hasher,
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=Workers("hashing", num_workers) if num_workers else None,
    )
    parts = [hasher[len(hasher)]]  # which is empty
    for part in loader:
        parts.append(part)
        if progress:
            progress(len(part.looks))
    looks, contents, captions, unreadable, texts = zip(*parts, strict=True)
    joined = np.concatenate(looks), np.concatenate(contents), np.concatenate(captions)
    return _Hashes(*joined, sum(unreadable), sum(texts))


def _of_items(items: Items, index: int) -> Example:
    return items.images[index], []
