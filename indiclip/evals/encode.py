"""Images and texts -> embeddings: each is encoded once, and whole batches are shared out over the ranks.

A batch holds the same images on one rank as on many: how a matrix product rounds depends on its shape (and on
the number of torch's threads), and so the numbers are the same to the last digit.

Shape letters: N images, T texts, E embedding length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from indiclip.evals.images.items import Images
from indiclip.evals.models.embedder import Embedder, View
from indiclip.images import UnreadableSample
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


class _Batches(Dataset[tuple[dict[str, Any], list[int], dict[int, str]]]):
    """Number of a batch -> `{view: batch}` of what can be read, their indices, and why others cannot."""

    def __init__(self, images: Images, embedder: Embedder, views: Sequence[View], batch_size: int) -> None:
        self.images, self.embedder, self.views, self.batch_size = images, embedder, views, batch_size
        self.num_images = len(images)  # type: ignore[arg-type]  # a Dataset, which mostly has a length

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __getitem__(self, number: int) -> tuple[dict[str, Any], list[int], dict[int, str]]:
        prepared: dict[int, list[Any]] = {}
        unreadable: dict[int, str] = {}
        first = number * self.batch_size
        for index in range(first, min(first + self.batch_size, self.num_images)):
            try:
                image = self.images[index]
                prepared[index] = [self.embedder.prepare(image, view) for view in self.views]
            except UnreadableSample as error:
                unreadable[index] = str(error)
        of_views = zip(*prepared.values(), strict=True)
        batch = {view.name: self.embedder.collate(list(rows)) for view, rows in zip(self.views, of_views, strict=False)}
        return batch, list(prepared), unreadable


def encode_images(
    embedder: Embedder,
    images: Images,
    views: Sequence[View],
    batch_size: int = 64,
    num_workers: int = 0,
    ranks: Ranks = ALONE,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Tensor], dict[int, str]]:
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
        `({view: image_NE}, {index: reason})`, the same on every rank: unit-length float32, NaN for the images that
        cannot be read.
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
    unreadable: dict[int, str] = {}
    for number, (batch, indices, failed) in zip(ranks.share(len(batches)), loader, strict=True):
        unreadable |= failed
        first = number * batch_size
        for name, found in rows.items():
            all_BE = torch.full((len(indices) + len(failed), width), torch.nan)
            if indices:
                all_BE[[index - first for index in indices]] = embedder.embed_images(batch[name])
            found.append(all_BE)
        if progress is not None:
            progress(len(indices) + len(failed))
    for failed in ranks.gather(unreadable):
        unreadable |= failed
    return {name: ranks.together(found, width) for name, found in rows.items()}, dict(sorted(unreadable.items()))


def encode_texts(embedder: Embedder, texts: Sequence[str], ranks: Ranks = ALONE) -> dict[str, Tensor]:
    """Every distinct text once: text -> unit-length float32 (E,)."""
    distinct = sorted(set(texts), key=lambda text: (len(text), text))  # so that little is padded
    batches = [distinct[first : first + _TEXTS] for first in range(0, len(distinct), _TEXTS)]
    rows = [embedder.embed_texts(batches[number]) for number in ranks.share(len(batches))]
    return dict(zip(distinct, ranks.together(rows, embedder.lengths[-1]), strict=True))
