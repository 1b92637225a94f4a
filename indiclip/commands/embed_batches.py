"""Batches for `embed`, made in loader processes: which samples make one never depends on who makes it, nor on when.

Shape letters: N rows, E embedding length.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from indiclip.commands.embed_sources import Captions, Sources
from indiclip.evals.models.embedder import Embedder, View
from indiclip.evals.protocols.cosines import truncate_normalize
from indiclip.images import UnreadableSample
from indiclip.preprocessing import upright_hw

What = Literal["images", "captions"]


class Batch(NamedTuple):
    """The samples `first` to `last - 1`.

    Attributes:
        inputs: What the embedder takes: a batch of prepared images, or texts.
        rows: Of the keys' table, one for each embedding.
        quarantined: Samples that cannot be read, and why.
        unreadable_captions: Images that have a row, but captions that cannot be read, and why.
    """

    first: int
    last: int
    inputs: Any
    rows: list[dict[str, Any]]
    quarantined: list[dict[str, Any]]
    unreadable_captions: list[dict[str, Any]]


class Batches(Dataset[Batch | Exception]):
    """Batches by number; an error of the machine is given, not raised, so that it stays one line.

    Args:
        sources: Where the samples are.
        embedder: Prepares images.
        view: At which size.
        what: `images`, or `captions`, of which a sample may have any number.
        spans: The samples of each batch.
    """

    def __init__(
        self, sources: Sources, embedder: Embedder, view: View, what: What, spans: list[tuple[int, int]]
    ) -> None:
        self.sources, self.embedder, self.view, self.what, self.spans = sources, embedder, view, what, spans

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, number: int) -> Batch | Exception:
        try:
            return self._read(*self.spans[number])
        except (OSError, ValueError) as error:
            return error

    def _read(self, first: int, last: int) -> Batch:
        inputs: list[Any] = []
        rows: list[dict[str, Any]] = []
        quarantined: list[dict[str, Any]] = []
        uncaptioned: list[dict[str, Any]] = []
        for index in range(first, last):
            source, place = self.sources.at(index)
            file, row = source.place(place)
            sample = {"key": storable(source.key(place)), "source": storable(file), "row": row}
            try:
                if self.what == "captions":
                    texts = _listed(source.captions(place))
                    inputs += [text["text"] for text in texts]
                    rows += [sample | text for text in texts]
                else:
                    example = source.read(place)
                    inputs.append(self.embedder.prepare(example.image, self.view))
                    height, width = upright_hw(example.image)
                    label = None if example.label is None else storable(example.label)
                    known = {"label": label, "captions": _listed(example.captions), "height": height, "width": width}
                    rows.append(sample | known)
                    if example.unreadable_captions:
                        reason = f"its captions alone: {example.unreadable_captions}"
                        uncaptioned.append(sample | {"reason": storable(reason)})
            except UnreadableSample as error:
                quarantined.append(sample | {"reason": storable(error.reason)})
        batch = self.embedder.collate(inputs) if self.what == "images" and inputs else inputs
        return Batch(first, last, batch, rows, quarantined, uncaptioned)


def embed(embedder: Embedder, batch: Batch, what: What, length: int) -> np.ndarray:
    """Unit-length embeddings of a batch, float32 (N, length).

    Raises:
        ValueError: The model gives numbers that are not finite.
    """
    if not batch.rows:
        return np.zeros((0, length), np.float32)
    embed_some = embedder.embed_images if what == "images" else embedder.embed_texts
    vectors_NE = truncate_normalize(embed_some(batch.inputs), length)
    if not torch.isfinite(vectors_NE).all():
        worst = int((~torch.isfinite(vectors_NE)).any(1).nonzero()[0])
        raise ValueError(
            f"--model: {embedder.name} gives numbers that are not finite for {batch.rows[worst]['key']}; expected "
            "finite ones (its weights are broken, or --precision is too low for it)"
        )
    return vectors_NE.numpy()


def storable(text: str) -> str:
    """Text that Parquet can hold: bytes of a file's name that are no UTF-8 are written out."""
    return text.encode(errors="backslashreplace").decode()


def _listed(captions: Captions) -> list[dict[str, str]]:
    return [{"language": language, "text": text} for language, texts in captions.items() for text in texts]
