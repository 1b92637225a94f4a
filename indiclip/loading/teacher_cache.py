"""Teachers' embeddings of augmented images, written once by `indiclip embed --views` and replayed in training.

MobileCLIP's "reinforced" data set (Vasu, Pouransari, Faghri, Vemulapalli, Tuzel, CVPR 2024, arXiv:2311.17049, section
4).

Shape letters: see `indiclip.types`; K views, S texts, T teachers.
"""

import warnings
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from indiclip.datasets.base import SampleDataset, fingerprint
from indiclip.images import UnreadableSample
from indiclip.loading.teacher_options import TeacherCache
from indiclip.loading.teacher_parts import DamagedPart, Part, crc32_of_pixels, part_file, text_hash, texts_of
from indiclip.loading.teacher_record import PIXEL_LIBRARIES, TeacherRecord, read_record, versions_of
from indiclip.loading.transforms import Transform
from indiclip.names import differences
from indiclip.quiet import OfThisProcess
from indiclip.types import Sample

_OPEN_PARTS = 256  # at a time, each of which takes a file descriptor
_LOOKED_AT = 4  # samples that are compared before training, which compares each again
_AGAIN = "the same `indiclip embed --views`, or a new run with `teachers.make`, makes anew what is damaged"

Captions = Mapping[str, Sequence[str]]


class CachedViews:
    """The cache of one source, checked against it.

    Args:
        cache: Which.
        dataset: The source's.
        transform: The source's.
        key: Of the source in the YAML, for messages.

    Attributes:
        record: What `teachers.json` says.

    Raises:
        FileNotFoundError: No such cache.
        ValueError: It is not whole, or of other samples, another augmentation, other pixels or other captions.
    """

    def __init__(self, cache: TeacherCache, dataset: SampleDataset, transform: Transform, key: str) -> None:
        self.folder, self.texts, self._key = cache.path, cache.texts, f"{key}.teachers"
        cache.check_folder(key)
        try:
            self.record = read_record(self.folder)
        except ValueError as error:
            advice = "`indiclip embed --views` with --overwrite, or a new run with `teachers.make`, makes it anew"
            raise ValueError(f"{self._key}.folder: {error}; {advice}") from error
        if not self.record["done"]:
            raise ValueError(f"{self._key}.folder: {self.folder} is not complete; the same `indiclip embed` goes on")
        self._first = self._place_of(dataset)
        if lines := [line for _, line in differences(self.record["augmentation"], transform.describe())]:
            raise ValueError(
                f"{self._key}.folder: {self.folder} is of another augmentation than the source's: {lines[0]}"
            )
        self.teachers = [TeacherRecord(**one) for one in self.record["teachers"]]
        self._longest = max(teacher.length for teacher in self.teachers)
        self._scale_T = np.array([teacher.logit_scale for teacher in self.teachers], np.float32)
        self._parts: OrderedDict[int, Part] = OrderedDict()
        self._compared: set[int] = set()  # parts that were opened before
        self._same_pixels, self._warned = cache.same_pixels, False
        self._check_sizes()
        self._check_some(dataset, transform)

    @property
    def digest(self) -> str:
        """Of the content."""
        return str(self.record["digest"])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_parts": OrderedDict()}  # maps of files stay in their process

    def seed(self, index: int, key: str, view: int) -> int:
        """Of the augmentation of a view.

        Raises:
            UnreadableSample: It could not be read when the teachers were asked.
            ValueError: Another sample has its place in the cache.
        """
        part, row = self._at(index)
        found = int(part["key_hashes"][row])
        if not found:
            raise UnreadableSample(key, f"has no teachers' embeddings: {self.folder} could not read it")
        if found != text_hash(key):
            raise ValueError(
                f"{self._key}.folder: {self.folder} is of other samples: {key!r} is not at its place there"
            )
        return int(part["seeds"][row, view])

    def draw(self, index: int, key: str, random_seed: int) -> tuple[int, int]:
        """`(view, seed of its augmentation)` for a sample in a step; see `seed`."""
        view = zlib.crc32(f"teachers:{random_seed}".encode()) % int(self.record["views"])
        return view, self.seed(index, key, view)

    def fields(self, index: int, view: int, sample: Sample, captions: Captions, random_seed: int) -> Sample:
        """`teacher_image`, `teacher_text` and `teacher_scale` of a sample.

        Args:
            index: Of the sample in its source.
            view: As of `draw`.
            sample: With its `caption`.
            captions: All of them by language, of which one in the language of `texts` is taken.
            random_seed: Decides which, where there are several.

        Raises:
            UnreadableSample: It has no such caption.
        """
        text = sample.get("caption")
        if self.texts != "own":
            of_language = captions.get(self.texts) or ()
            text = of_language[random_seed % len(of_language)] if of_language else None
        if text is None:
            language = "" if self.texts == "own" else f" in {self.texts!r}, of data: teachers.texts"
            raise UnreadableSample(sample["key"], f"has no caption{language}")
        part, row = self._at(index)
        text_row = self._text_row(part, sample["key"], text)
        try:
            image_rows, text_rows = part.image_rows(row, view), part.text_rows(text_row)
        except DamagedPart as error:
            raise self._damaged(error) from error
        return Sample(
            teacher_image=self._stacked(image_rows),
            teacher_text=self._stacked(text_rows),
            teacher_scale=self._scale_T,
        )

    def check_picture(self, index: int, key: str, view: int, picture_CHW: Tensor) -> None:
        """Compare an augmented picture with the one that the teachers were given.

        It takes 40 microseconds for one of 224 x 224, where reading and augmenting it takes 2,200.

        Args:
            index: Of the sample in its source.
            key: Of the sample.
            view: Which was replayed.
            picture_CHW: As `Transform.picture`.

        Raises:
            ValueError: Another, which is no fault of this sample alone; without `same_pixels` it is a warning, once.
        """
        if self._warned:
            return
        part, row = self._at(index)
        found, expected = crc32_of_pixels(picture_CHW), int(part["crc32_of_pixels"][row, view])
        if found == expected:
            return
        made_with, here = self.record.get("versions", {}), versions_of(PIXEL_LIBRARIES)
        pairs = [(name, made_with[name], here.get(name, "none")) for name in PIXEL_LIBRARIES if name in made_with]
        other = [f"{name} {was}, here {now}" for name, was, now in pairs if was != now]
        versions = f" ({'; '.join(other)})" if other else ""
        message = (
            f"{self._key}.folder: {self.folder}: the augmented picture of {key!r}, view {view}, is not the one that "
            f"the teachers were given: its CRC-32 is {found:08x}; expected {expected:08x}. The cache was made from "
            f"other images or with other versions of the libraries{versions}; make it anew by `indiclip embed --views`"
        )
        if self._same_pixels:
            raise ValueError(f"{message}, or go on with same_pixels: false")
        warnings.warn(message, OfThisProcess, stacklevel=2)
        self._warned = True

    def _text_row(self, part: Part, key: str, text: str) -> int:
        row = part.text_row(text)
        if row is None:
            raise ValueError(
                f"{self._key}.folder: {self.folder} is of other captions: {key!r} has {text!r}, which the teachers "
                "were not given; make it anew by `indiclip embed --views`"
            )
        return row

    def _stacked(self, rows: list[np.ndarray]) -> np.ndarray:
        """float16 (T, E), which has the numbers of int8 exactly."""
        found_TE = np.zeros((len(rows), self._longest), np.float16)
        for teacher, row_E in enumerate(rows):
            found_TE[teacher, : len(row_E)] = row_E
        return found_TE

    def _at(self, index: int) -> tuple[Part, int]:
        number, row = divmod(self._first + index, int(self.record["part_size"]))
        if number not in self._parts:
            if len(self._parts) >= _OPEN_PARTS:
                self._parts.popitem(last=False)
            self._parts[number] = self._open(number)
        self._parts.move_to_end(number)
        return self._parts[number], row

    def _open(self, number: int) -> Part:
        try:
            part = Part(part_file(self.folder, number), self.record["parts"][number], number not in self._compared)
        except DamagedPart as error:
            raise self._damaged(error) from error
        self._compared.add(number)
        return part

    def _damaged(self, error: ValueError) -> ValueError:
        return ValueError(f"{self._key}.folder: {error}; {_AGAIN}")

    def _check_sizes(self) -> None:
        """Refuse, before training, a part that is missing or torn; what it holds is compared once it is read."""
        for number, expected in enumerate(self.record["parts"]):
            file = part_file(self.folder, number)
            if not file.is_file() or file.stat().st_size != expected["bytes"]:
                self._open(number)

    def _place_of(self, dataset: SampleDataset) -> int:
        """The number of the dataset's first sample among those of all sources of the cache."""
        own, first = fingerprint(dataset), 0
        for source in self.record["sources"]:
            if own == {name: source[name] for name in own}:
                return first
            first += int(source["samples"])
        held = "; ".join(
            f"{s['source']}, {s['samples']:,} samples ({s['crc32_of_keys']:08x})" for s in self.record["sources"]
        )
        raise ValueError(
            f"{self._key}.folder: {self.folder} is of other samples: {held}; the source has {own['samples']:,} "
            f"({own['crc32_of_keys']:08x})"
        )

    def _check_some(self, dataset: SampleDataset, transform: Transform) -> None:
        """Compare some samples before training, so that a cache that is all wrong is refused there."""
        places = np.linspace(0, len(dataset) - 1, min(_LOOKED_AT, len(dataset))).astype(int)
        for number, index in enumerate(places.tolist()):
            key, view = dataset.key(index), number % int(self.record["views"])
            try:
                sample = Sample(key=key) | dataset[index]
                picture_CHW = transform.picture(sample, self.seed(index, key, view))
            except UnreadableSample:
                continue  # training reads it again, and counts it
            self.check_picture(index, key, view, picture_CHW)
            part, _ = self._at(index)
            for text in texts_of(sample) if self.texts == "own" else sample.get("captions", {}).get(self.texts, ()):
                self._text_row(part, key, text)
