"""Images and texts -> embeddings: each is encoded once, and whole batches are shared out over the ranks.

A batch holds the same images on one rank as on many: how a matrix product rounds depends on its shape (and on
the number of torch's threads), and so the numbers are the same to the last digit.

Shape letters: N images, T texts, E embedding length.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from indiclip.evals.images.items import Images
from indiclip.evals.models.embedder import Embedder, View
from indiclip.images import EncodedImage, UnreadableSample
from indiclip.loading.workers import StepLoader, Workers

_TEXTS = 256  # in a batch
_Batch = TypeVar("_Batch")


@dataclass(frozen=True)
class Ranks:
    """The processes that encode together.

    Attributes:
        rank: Of this process.
        size: How many there are.
        gather: A value -> the list of all ranks' values, on every rank.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = field(default=lambda value: [value])

    def share(self, count: int) -> range:
        """The batches of this rank."""
        return range(self.rank, count, self.size)

    def all_batches(self, batches: list[_Batch]) -> list[_Batch]:
        """What every rank made of its share -> of all batches, in their order."""
        shares = self.gather(batches)
        return [shares[i % self.size][i // self.size] for i in range(sum(map(len, shares)))]


ALONE = Ranks()


# Of a batch: `{view: ...}` of its images, a digest of each, "" of what cannot be read, and why, by the image's place.
_Prepared = tuple[dict[str, Any], list[str], dict[int, str]]


class _Batches(Dataset[_Prepared]):
    """Number of a batch -> what the model takes of the images that can be read."""

    def __init__(self, images: Images, embedder: Embedder, views: Sequence[View], batch_size: int) -> None:
        self.images, self.embedder, self.views, self.batch_size = images, embedder, views, batch_size
        self.num_images = len(images)  # type: ignore[arg-type]  # a Dataset, which mostly has a length

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __getitem__(self, number: int) -> _Prepared:
        prepared, contents, unreadable = list[list[Any]](), list[str](), dict[int, str]()
        first = number * self.batch_size
        for index in range(first, min(first + self.batch_size, self.num_images)):
            try:
                image = self.images[index]
                prepared.append([self.embedder.prepare(image, view) for view in self.views])
                contents.append(content_digest(image))
            except UnreadableSample as error:
                unreadable[index] = str(error)
                contents.append("")
        of_views = zip(self.views, zip(*prepared, strict=True), strict=False)  # nothing of a batch that cannot be read
        return {view.name: self.embedder.collate(list(rows)) for view, rows in of_views}, contents, unreadable


class Encoded(NamedTuple):
    """Images of which each was read once.

    Attributes:
        images: `{view: image_NE}`, unit-length float32, NaN for the images that cannot be read.
        unreadable: Why, by the image's place.
        contents: A digest of each image's bytes, "" of what cannot be read.
    """

    images: dict[str, Tensor]
    unreadable: dict[int, str]
    contents: list[str]


def encode_images(
    embedder: Embedder,
    images: Images,
    views: Sequence[View],
    batch_size: int = 64,
    num_workers: int = 0,
    ranks: Ranks = ALONE,
    progress: Callable[[int], None] | None = None,
) -> "Encoded":
    """Every image once for each view.

    Args:
        embedder: The model.
        images: `EncodedImage` or uint8 arrays, read when they are asked for.
        views: At which sizes and aspects.
        batch_size: Images in a batch.
        num_workers: Loader processes.
        ranks: Who encodes together.
        progress: Is told how many images were done.

    Returns:
        The same on every rank.
    """
    batches = _Batches(images, embedder, views, batch_size)
    loader: StepLoader[Any] = StepLoader(
        batches,
        batch_size=None,
        sampler=ranks.share(len(batches)),  # type: ignore[arg-type]  # any iterable that has a length
        num_workers=num_workers,
        worker_init_fn=Workers("bench", num_workers) if num_workers else None,
    )
    width = embedder.lengths[-1]
    done = list[_Prepared]()  # of this rank, with embeddings
    for batch, contents, unreadable in loader:
        is_readable_B = torch.tensor([digest != "" for digest in contents])
        of_views = {view.name: torch.full((len(contents), width), torch.nan) for view in views}
        for name, inputs in batch.items():
            of_views[name][is_readable_B] = embedder.embed_images(inputs)
        done.append((of_views, contents, unreadable))
        if progress is not None:
            progress(len(contents))

    every, empty = ranks.all_batches(done), torch.zeros(0, width)
    return Encoded(
        {view.name: torch.cat([empty, *(of_views[view.name] for of_views, _, _ in every)]) for view in views},
        {place: why for _, _, unreadable in every for place, why in unreadable.items()},
        [digest for _, contents, _ in every for digest in contents],
    )


def content_digest(image: Any) -> str:
    """64 bits of an image's file, or of its pixels where it never was one."""
    content = image.data if isinstance(image, EncodedImage) else np.ascontiguousarray(image).data
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def encode_texts(embedder: Embedder, texts: Sequence[str], ranks: Ranks = ALONE) -> dict[str, Tensor]:
    """Every distinct text once: text -> unit-length float32 (E,)."""
    distinct = sorted(set(texts), key=lambda text: (len(text), text))  # so that little is padded
    batches = [distinct[first : first + _TEXTS] for first in range(0, len(distinct), _TEXTS)]
    rows = ranks.all_batches([embedder.embed_texts(batches[number]) for number in ranks.share(len(batches))])
    return dict(zip(distinct, chain.from_iterable(rows), strict=True))


def cut_texts(embedder: Embedder, texts: Sequence[str]) -> set[str]:
    """The texts that are longer than the text tower's context, so that it does not read their ends.

    Such a text is one to which more can be added, or of whose end a letter can go, without any change to the tokens.
    """
    full = _without_change(embedder, [(text, f"{text} {text}") for text in texts])
    # A text that fills the context to its last token is not cut: with a letter less it has other tokens.
    shorter = [(text, text[:-letters]) for text in full for letters in (1, 2, 3)]
    return _without_change(embedder, shorter)


def _without_change(embedder: Embedder, pairs: Sequence[tuple[str, str]]) -> set[str]:
    """The first of each pair of texts whose tokens are the same."""
    alike = set()
    for start in range(0, len(pairs), _TEXTS):
        part = pairs[start : start + _TEXTS]
        tokens = embedder.tokenize([text for pair in part for text in pair])
        rows = torch.cat([tensor.flatten(1).long() for tensor in tokens.values()], dim=1)
        same = (rows[::2] == rows[1::2]).all(1).tolist()
        alike |= {text for (text, _), is_same in zip(part, same, strict=True) if is_same}
    return alike
