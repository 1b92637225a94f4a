"""Teachers' embeddings of augmented images, written once by `indiclip embed --views` and replayed in training.

MobileCLIP's "reinforced" data set (Vasu, Pouransari, Faghri, Vemulapalli, Tuzel, CVPR 2024, arXiv:2311.17049, section
4). The folder, `indiclip.evals.models.view_embedder` writes it:

    teachers.json                  which sources, augmentation and teachers; `done` and a digest of all that
    teachers-00000.safetensors     of the samples 0 to part_size - 1 of all sources, one after the other:
        keys                       uint8, a JSON list of their keys
        key_hashes                 uint64 (n,), 0 where a sample cannot be read
        seeds                      uint32 (n, K), of each view's augmentation
        crc32_of_pixels            uint32 (n, K), of each augmented picture
        images.0, images.1, ...    float16 or int8 (n, K, E), of each teacher
        text_hashes                uint64 (S,), ascending, of the samples' distinct captions in all languages
        texts.0, texts.1, ...      float16 or int8 (S, E)
    quarantine.jsonl               samples that cannot be read, where there are any

Rows are unit vectors; of int8 the largest number is 127, and whoever reads a row normalises it.
Shape letters: see `indiclip.types`; K views, S texts, T teachers.
"""

import hashlib
import json
import math
import mmap
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from indiclip.datasets.base import SampleDataset, fingerprint
from indiclip.datasets.tables import load_json
from indiclip.images import UnreadableSample
from indiclip.loading.transforms import Transform
from indiclip.names import check_choice, check_range, differences
from indiclip.types import Sample

RECORD = "teachers.json"
_OPEN_PARTS = 256  # at a time, each of which takes a file descriptor
_DTYPES = {"F16": np.float16, "I8": np.int8, "U8": np.uint8, "U32": np.uint32, "U64": np.uint64}  # safetensors' names
_LOOKED_AT = 4  # samples whose pixels are compared before training

DType = Literal["fp16", "int8"]
Captions = Mapping[str, Sequence[str]]


@dataclass
class MakeTeachers:
    """How a run makes its cache where there is none, as `indiclip embed --views` would.

    Args:
        models: As of `indiclip embed --model`: a run, a checkpoint, open_clip:..., each a teacher. `initial` is the run's
            own encoder before its first step: of use where that is pretrained and is not to forget.
        views: Augmentations of each image.
        dtype: Of the embeddings: `fp16` or `int8`.
        device: Where the teachers compute.
    """

    models: list[str]
    views: int = 4
    dtype: DType = "fp16"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_range({"data: teachers.make.views": self.views}, 1)
        check_choice("data: teachers.make.dtype", self.dtype, ("fp16", "int8"))
        if not self.models:
            raise ValueError("data: teachers.make.models: the list is empty; expected a teacher")


@dataclass
class TeacherCache:
    """Where a source's teachers are.

    In each step a sample's image is augmented as one of its cached views was, drawn anew: the picture that is resized
    for the student is, to the bit, the one that the teachers were given. The source's `augment` must be that of the
    cache, and is done before the image is resized, see `Transform`.

    Args:
        folder: Of `indiclip embed --views`; None is `teachers` in the run's folder, with `make`.
        texts: Which caption the teachers' text embedding is of: `own`, the one that the student gets, or a language's
            code: then it is of the image's caption in that language, whatever language the student gets. A teacher that
            knows English alone teaches all languages so.
        make: How to make the folder where it is missing.
        same_pixels: False warns, and goes on, where a replayed picture is not the one that the teachers were given,
            as on a machine whose libraries round otherwise.
    """

    folder: str | None = None
    texts: str = "own"
    make: MakeTeachers | None = None
    same_pixels: bool = True

    def __post_init__(self) -> None:
        if self.folder is None and self.make is None:
            raise ValueError("data: teachers.folder: found none; expected that of `indiclip embed --views`, or make")


class Teacher(NamedTuple):
    """What is known of a teacher.

    Attributes:
        name: As the user called it.
        weights: Which they are, in words.
        crc32_of_weights: Of all of them.
        crc32_of_token_ids: Of its tokenizer.
        logit_scale: The factor on cosines that it was trained with.
        length: Of its embeddings.
        preprocessing: How it reads images, of plain types.
    """

    name: str
    weights: str
    crc32_of_weights: str
    crc32_of_token_ids: str
    logit_scale: float
    length: int
    preprocessing: dict[str, Any]


def text_hash(text: str) -> int:
    """64 bits of a key or a caption, never 0, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()) or 1


def crc32_of_pixels(picture_CHW: Tensor) -> int:
    """Of an augmented picture and its size."""
    return zlib.crc32(picture_CHW.contiguous().numpy().tobytes(), zlib.crc32(str(tuple(picture_CHW.shape)).encode()))


def digest_of(record: Mapping[str, Any]) -> str:
    """Of the content of a cache: sources, augmentation, teachers, views and types, whatever they are called."""
    teachers = [
        {name: value for name, value in teacher.items() if name not in ("name", "weights")}
        for teacher in record["teachers"]
    ]
    sources = [{name: source[name] for name in ("samples", "crc32_of_keys")} for source in record["sources"]]
    parts = [record[name] for name in ("views", "augmentation", "dtype", "part_size")]
    return hashlib.sha256(json.dumps([teachers, sources, parts], sort_keys=True).encode()).hexdigest()[:16]


def part_file(folder: Path, number: int) -> Path:
    """The file of a part."""
    return folder / f"teachers-{number:05}.safetensors"


class Part:
    """The arrays of a part, mapped into memory.

    Args:
        file: See above.
    """

    def __init__(self, file: Path) -> None:
        with file.open("rb") as opened:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        self._arrays = {
            name: np.frombuffer(
                data, _DTYPES[of["dtype"]], math.prod(of["shape"]), begin + of["data_offsets"][0]
            ).reshape(of["shape"])
            for name, of in header.items()
            if name != "__metadata__" and math.prod(of["shape"])
        }

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def text_row(self, text: str) -> int | None:
        """The number of a caption's row."""
        hashes_S, wanted = self._arrays.get("text_hashes", np.zeros(0, np.uint64)), np.uint64(text_hash(text))
        row = int(hashes_S.searchsorted(wanted))
        return row if row < len(hashes_S) and hashes_S[row] == wanted else None


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
        ValueError: It is not whole, or of other samples, another augmentation or other pixels.
    """

    def __init__(self, cache: TeacherCache, dataset: SampleDataset, transform: Transform, key: str) -> None:
        assert cache.folder is not None
        self.folder, self.texts, self._key = Path(cache.folder).expanduser(), cache.texts, f"{key}.teachers"
        if not (self.folder / RECORD).is_file():
            raise FileNotFoundError(
                f"{self._key}.folder: {self.folder} holds no {RECORD}; expected the folder of `indiclip embed --views`"
            )
        self.record = load_json(self.folder / RECORD)
        if not self.record["done"]:
            raise ValueError(f"{self._key}.folder: {self.folder} is not complete; the same `indiclip embed` goes on")
        self._first = self._place_of(dataset)
        if lines := [line for _, line in differences(self.record["augmentation"], transform.describe())]:
            raise ValueError(
                f"{self._key}.folder: {self.folder} is of another augmentation than the source's: {lines[0]}"
            )
        self.teachers = [Teacher(**one) for one in self.record["teachers"]]
        self._longest = max(teacher.length for teacher in self.teachers)
        self._scale_T = np.array([teacher.logit_scale for teacher in self.teachers], np.float32)
        self._parts: OrderedDict[int, Part] = OrderedDict()
        self._check_pixels(dataset, transform, cache.same_pixels)

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
        text_row = part.text_row(text)
        if text_row is None:
            raise ValueError(f"{self._key}.folder: {self.folder} is of other captions: {sample['key']!r} has {text!r}")
        return Sample(
            teacher_image=self._stacked([part[f"images.{t}"][row, view] for t in range(len(self.teachers))]),
            teacher_text=self._stacked([part[f"texts.{t}"][text_row] for t in range(len(self.teachers))]),
            teacher_scale=self._scale_T,
        )

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
            self._parts[number] = Part(part_file(self.folder, number))
        self._parts.move_to_end(number)
        return self._parts[number], row

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

    def _check_pixels(self, dataset: SampleDataset, transform: Transform, same: bool) -> None:
        """Replay some views and compare their pixels with those that the teachers were given."""
        for index in np.linspace(0, len(dataset) - 1, min(_LOOKED_AT, len(dataset))).astype(int).tolist():
            key = dataset.key(index)
            try:
                found = crc32_of_pixels(transform.picture(Sample(key=key) | dataset[index], self.seed(index, key, 0)))
            except UnreadableSample:
                continue
            part, row = self._at(index)
            if found != int(part["crc32_of_pixels"][row, 0]):
                message = (
                    f"{self._key}.folder: {self.folder}: the augmented picture of {key!r} is not the one that the teachers "
                    "were given: another image, or libraries that round otherwise"
                )
                if same:
                    raise ValueError(f"{message}; with same_pixels: false the run goes on")
                warnings.warn(message, stacklevel=2)
                return
