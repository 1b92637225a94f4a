"""Batches for teachers, made in loader processes: each picture augmented K times, as every teacher reads it."""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from indiclip.encoder import Encoder
from indiclip.evals.models.digests import crc32_of_prepared, crc32_of_token_ids, crc32_of_weights
from indiclip.evals.models.embedder import Embedder, EncoderEmbedder, View, load_embedder
from indiclip.images import UnreadableSample
from indiclip.loading.source import Source
from indiclip.loading.teacher_parts import crc32_of_pixels, texts_of
from indiclip.loading.teacher_record import TeacherRecord
from indiclip.types import Sample

INITIAL = "initial"  # as a model: the run's own encoder before its first step


class ViewTeacher(NamedTuple):
    """A teacher, ready to embed.

    Attributes:
        model: The embedder.
        view: Its own preprocessing.
        about: What the record says of it.
    """

    model: Embedder
    view: View
    about: TeacherRecord


def load_teachers(
    names: Sequence[str], device: str, initial: Encoder | None = None, **options: Any
) -> list[ViewTeacher]:
    """The teachers of these names.

    Args:
        names: As of `load_embedder`, or `initial`.
        device: Where they compute.
        initial: The encoder that `initial` stands for.
        options: Of `load_embedder`.

    Raises:
        ValueError: One that embeds no text, or `initial` where there is no run.
    """
    found = []
    for name in names:
        if name == INITIAL and initial is None:
            raise ValueError(
                f"--model {INITIAL}: stands for a run's own encoder, in teachers.make.models of its config"
            )
        if name == INITIAL and initial is not None:
            model: Embedder = EncoderEmbedder(initial, INITIAL)
        else:
            model = load_embedder(name, device, **options)
        if not model.embeds_text:
            raise ValueError(f"--model {name}: embeds no text; a teacher has to embed images and their captions")
        (view,) = model.views(["native"])
        read_as = {**view._asdict(), **model.preprocessing, "crc32_of_a_plain_picture": crc32_of_prepared(model, view)}
        sums = crc32_of_weights(model), crc32_of_token_ids(model)
        about = TeacherRecord(name, model.weights, *sums, model.logit_factor, model.lengths[-1], read_as)
        found.append(ViewTeacher(model, view, about))
    return found


class ViewBatch(NamedTuple):
    """The samples `first` to `last - 1`, those that can be read augmented and prepared."""

    first: int
    last: int
    inputs: list[Any]  # of each teacher, the views of one image after those of another
    readable: list[int]
    keys: list[str]  # of all
    seeds: list[list[int]]  # as all that follows, of the readable ones
    crcs: list[list[int]]
    texts: list[str]
    quarantined: list[dict[str, Any]]


class ViewBatches(Dataset[ViewBatch | Exception]):
    """Batches by number; an error of the machine is given, not raised, so that it stays one line.

    Args:
        sources: Whose samples, one source after the other.
        teachers: Who prepares the pictures.
        views: Of each image.
        spans: The samples of each batch.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        teachers: Sequence[ViewTeacher],
        views: int,
        spans: Sequence[tuple[int, int]],
    ) -> None:
        self.sources, self.teachers, self.views, self.spans = sources, teachers, views, spans
        self._starts = np.cumsum([0, *(len(source.dataset) for source in sources)])

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, number: int) -> ViewBatch | Exception:
        torch.set_flush_denormal(True)
        try:
            return self._read(*self.spans[number])
        except (OSError, ValueError) as error:
            return error

    def _read(self, first: int, last: int) -> ViewBatch:
        batch = ViewBatch(first, last, [[] for _ in self.teachers], [], [], [], [], [], [])
        for index in range(first, last):
            source, place = self._at(index)
            key = source.dataset.key(place)
            batch.keys.append(key)
            try:
                sample = Sample(key=key) | source.dataset[place]
                seeds = [view_seed(key, view) for view in range(self.views)]
                pictures = [source.transform.picture(sample, seed) for seed in seeds]
            except UnreadableSample as error:
                batch.quarantined.append({"key": key, "row": place, "reason": error.reason})
                continue
            batch.readable.append(index)
            batch.seeds.append(seeds)
            batch.crcs.append([crc32_of_pixels(picture) for picture in pictures])
            batch.texts.extend(texts_of(sample))
            for teacher, inputs in zip(self.teachers, batch.inputs, strict=True):
                inputs += [
                    teacher.model.prepare(picture.permute(1, 2, 0).contiguous().numpy(), teacher.view)
                    for picture in pictures
                ]
        pairs = zip(self.teachers, batch.inputs, strict=True)
        return batch._replace(inputs=[teacher.model.collate(inputs) if inputs else [] for teacher, inputs in pairs])

    def _at(self, index: int) -> tuple[Source, int]:
        """The source of a sample, and the sample's number in it."""
        number = int(self._starts.searchsorted(index, side="right")) - 1
        return self.sources[number], index - int(self._starts[number])


def view_seed(key: str, view: int) -> int:
    """Of the augmentation of a view of a sample."""
    return zlib.crc32(f"augmentation:{key}:{view}".encode(errors="surrogatepass"))


def as_it_is(batch: Any) -> Any:
    """What a loader is to do with what is a batch already."""
    return batch
