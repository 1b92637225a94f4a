"""Images and texts -> embeddings: each is encoded once, and whole batches are shared out over the ranks.

A batch holds the same images on one rank as on many: how a matrix product rounds depends on its shape (and on
the number of torch's threads), and so the numbers are the same to the last digit.

Shape letters: N images, T texts, E embedding length.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from indiclip.evals.images.items import Images
from indiclip.evals.models.embedder import Embedder, View
from indiclip.images import EncodedImage, UnreadableSample
from indiclip.loading.workers import StepLoader, Workers

_TEXTS = 256  # in a batch


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

    def together(self, rows: list[Tensor], width: int) -> Tensor:
        """The batches of all ranks, in their order, as one tensor."""
        shares = self.gather(rows)
        batches = [shares[i % self.size][i // self.size] for i in range(sum(map(len, shares)))]
        return torch.cat(batches) if batches else torch.zeros(0, width)


ALONE = Ranks()


class _Batches(Dataset[tuple[dict[str, Any], dict[int, str], dict[int, str]]]):
    """Number of a batch -> `{view: batch}` of what can be read, a digest of each of these, and why others cannot."""

    def __init__(self, images: Images, embedder: Embedder, views: Sequence[View], batch_size: int) -> None:
        self.images, self.embedder, self.views, self.batch_size = images, embedder, views, batch_size
        self.num_images = len(images)  # type: ignore[arg-type]  # a Dataset, which mostly has a length

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __getitem__(self, number: int) -> tuple[dict[str, Any], dict[int, str], dict[int, str]]:
        prepared: dict[int, list[Any]] = {}
        contents: dict[int, str] = {}
        unreadable: dict[int, str] = {}
        first = number * self.batch_size
        for index in range(first, min(first + self.batch_size, self.num_images)):
            try:
                image = self.images[index]
                prepared[index] = [self.embedder.prepare(image, view) for view in self.views]
                contents[index] = content_digest(image)
            except UnreadableSample as error:
                unreadable[index] = str(error)
        of_views = zip(*prepared.values(), strict=True)
        batch = {view.name: self.embedder.collate(list(rows)) for view, rows in zip(self.views, of_views, strict=False)}
        return batch, contents, unreadable


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
    rows: dict[str, list[Tensor]] = {view.name: [] for view in views}
    contents, unreadable = dict[int, str](), dict[int, str]()
    for number, (batch, digests, failed) in zip(ranks.share(len(batches)), loader, strict=True):
        unreadable |= failed
        contents |= digests
        first = number * batch_size
        for name, found in rows.items():
            all_BE = torch.full((len(digests) + len(failed), width), torch.nan)
            if digests:
                all_BE[[index - first for index in digests]] = embedder.embed_images(batch[name])
            found.append(all_BE)
        if progress is not None:
            progress(len(digests) + len(failed))
    for digests, failed in ranks.gather((contents, unreadable)):
        contents |= digests
        unreadable |= failed
    embeddings = {name: ranks.together(found, width) for name, found in rows.items()}
    every = [contents.get(index, "") for index in range(batches.num_images)]
    return Encoded(embeddings, dict(sorted(unreadable.items())), every)


def content_digest(image: Any) -> str:
    """64 bits of an image's file, or of its pixels where it never was one."""
    content = image.data if isinstance(image, EncodedImage) else np.ascontiguousarray(image).data
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def encode_texts(embedder: Embedder, texts: Sequence[str], ranks: Ranks = ALONE) -> dict[str, Tensor]:
    """Every distinct text once: text -> unit-length float32 (E,)."""
    distinct = sorted(set(texts), key=lambda text: (len(text), text))  # so that little is padded
    batches = [distinct[first : first + _TEXTS] for first in range(0, len(distinct), _TEXTS)]
    rows = [embedder.embed_texts(batches[number]) for number in ranks.share(len(batches))]
    return dict(zip(distinct, ranks.together(rows, embedder.lengths[-1]), strict=True))


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
