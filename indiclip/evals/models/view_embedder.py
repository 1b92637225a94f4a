"""Writes teachers' embeddings of augmented images and of captions: the folder that `indiclip.loading.teacher_cache`
reads, in parts that are whole or not there.

Each sample's picture is augmented K times by its source's own transform, from seeds that are a function of the sample's
key; every teacher then reads the same augmented pictures through its own preprocessing.
Shape letters: see `indiclip.loading.teacher_cache`.
"""

import json
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from indiclip import json_lines
from indiclip.datasets.base import fingerprint
from indiclip.datasets.tables import load_json
from indiclip.evals.models.stored import stored
from indiclip.evals.models.view_batches import ViewBatch, ViewBatches, ViewTeacher, as_it_is
from indiclip.loading.source import Source
from indiclip.loading.teacher_options import DType
from indiclip.loading.teacher_parts import DamagedPart, Part, part_file, text_hash, with_sums
from indiclip.loading.teacher_record import RECORD, digest_of, identity_of, read_record
from indiclip.loading.workers import StepLoader, Workers
from indiclip.names import differences

_BYTES = {"fp16": 2, "int8": 1}
_SHOWN = 5  # damaged parts that are named
_MAY_CHANGE = ("done", "digest", "summary", "versions", "parts")  # between two starts, beside a teacher's name


class _Embedded(NamedTuple):
    batch: ViewBatch
    images: list[np.ndarray]  # (M, K, E) of each teacher; M of the images can be read


@dataclass
class ViewEmbedder:
    """Makes such a folder.

    Args:
        folder: New, empty, or one that was begun with the same arguments.
        sources: By their keys in the YAML; with the augmentation of the first, which all must have.
        teachers: Who embeds.
        views: K.
        dtype: Of the embeddings.
        part_size: Samples in a part.
        batch_size: Images in a batch.
        num_workers: Loader processes.
    """

    folder: Path
    sources: Mapping[str, Source]
    teachers: Sequence[ViewTeacher]
    views: int
    dtype: DType = "fp16"
    part_size: int = 8192
    batch_size: int = 64
    num_workers: int = 0

    def __post_init__(self) -> None:
        keys, sources = list(self.sources), list(self.sources.values())
        for source in sources:
            source.transform.at_full_size = True  # as it is in training, where `teachers` is set
        augmentations = [source.transform.describe() for source in sources]
        for key, other in zip(keys, augmentations, strict=True):
            if other != augmentations[0]:
                raise ValueError(f"{key}.augment: is another than that of {keys[0]}; expected a cache for each")
        if self.views > 1 and not augmentations[0]:
            raise ValueError(f"{keys[0]}.augment: found none, so that {self.views} views would be the same picture")
        self._starts = np.cumsum([0, *(len(source.dataset) for source in sources)])
        self.record: dict[str, Any] = {
            "what": "teachers' embeddings of augmented images and of captions",
            "views": self.views,
            "augmentation": augmentations[0],
            "dtype": self.dtype,
            "part_size": self.part_size,
            "batch_size": self.batch_size,
            "sources": [{"source": key, **fingerprint(source.dataset)} for key, source in self.sources.items()],
            "teachers": [teacher.about._asdict() for teacher in self.teachers],
        }

    def __len__(self) -> int:
        """Samples of all sources."""
        return int(self._starts[-1])

    @property
    def num_parts(self) -> int:
        return -(-len(self) // self.part_size)

    def begin(self, overwrite: bool = False) -> None:
        """Make the folder ready, or see that it was begun with the same arguments.

        Raises:
            ValueError: It was begun otherwise, or holds other files.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / RECORD
        others = sorted(entry.name for entry in self.folder.iterdir() if not entry.name.startswith("."))
        if file.is_file() and not overwrite:
            self._go_on()
            return
        if others and not file.is_file():
            raise ValueError(
                f"{self.folder}: holds other files ({others[0]}); expected a new or an empty folder, or one of "
                "`indiclip embed --views`"
            )
        for old in [*self.folder.glob("teachers-*.safetensors"), self.folder / "quarantine.jsonl"]:
            old.unlink(missing_ok=True)
        self._write({"done": False, **self.record})

    def _go_on(self) -> None:
        try:
            self._check(read_record(self.folder, compare=False))
        except ValueError as error:
            raise ValueError(f"{error}; --overwrite starts anew") from error
        try:
            read_record(self.folder)
        except ValueError as error:
            warnings.warn(f"{error}; it is written anew", stacklevel=2)

    def _check(self, old: dict[str, Any]) -> None:
        for was, now in zip(old["teachers"], self.record["teachers"], strict=False):
            if was["crc32_of_weights"] != now["crc32_of_weights"]:
                words = f"{was['name']} ({was['crc32_of_weights']}) -> {now['name']} ({now['crc32_of_weights']})"
                raise ValueError(f"{self.folder}: holds embeddings of another teacher: {words}")
        found = [(key, line) for key, line in differences(old, self.record) if not key.endswith((".name", ".weights"))]
        if lines := [line for key, line in found if key.partition(".")[0] not in _MAY_CHANGE]:
            raise ValueError(f"{self.folder}: was begun otherwise: {'; '.join(lines)}")

    def missing(self, numbers: Iterable[int] | None = None) -> dict[int, str]:
        """Parts that have to be made, with what is wrong of one that is there; all that are there are read.

        Args:
            numbers: Those that are looked at; None is all.
        """
        found = {}
        recorded = self._recorded()
        for number in range(self.num_parts) if numbers is None else numbers:
            if not part_file(self.folder, number).exists():
                found[number] = ""
                continue
            try:
                self._compare(number, recorded[number] if recorded else None)
            except DamagedPart as error:
                found[number] = str(error)
        return found

    def is_done(self) -> bool:
        """Whether the record says so, and is whole."""
        try:
            return bool(read_record(self.folder)["done"])
        except ValueError:
            return False

    def reopen(self, missing: Mapping[int, str]) -> None:
        """Note that parts will be made anew, so that nobody trains with the others meanwhile; tell the damaged ones.

        Args:
            missing: As of `missing`.
        """
        self._write({"done": False, **self.record})
        damaged = [damage for _, damage in sorted(missing.items()) if damage]
        for damage in damaged[:_SHOWN]:
            warnings.warn(f"{damage}; it is made anew", stacklevel=2)
        if len(damaged) > _SHOWN:
            warnings.warn(f"and {len(damaged) - _SHOWN:,} more damaged parts are made anew", stacklevel=2)

    def _recorded(self) -> list[dict[str, Any]]:
        """The sums of the parts, where the record is whole."""
        try:
            found: list[dict[str, Any]] = read_record(self.folder).get("parts", [])
        except ValueError:
            return []  # each part tells by itself which one it is, and of what cache
        return found

    def _compare(self, number: int, recorded: dict[str, Any] | None) -> None:
        """Raise DamagedPart where a part is not whole, or not this one of this cache."""
        file, expected = part_file(self.folder, number), self._names(number)
        part = Part(file, recorded)
        found = {name: part.about.get(name) for name in expected}
        if found != expected:
            raise DamagedPart(f"{file}: found {found}; expected {expected}")
        part.compare_all()

    def _names(self, number: int) -> dict[str, Any]:
        return {"cache": identity_of(self.record), "part": number}

    def samples(self, number: int) -> range:
        """Those of a part."""
        return range(number * self.part_size, min((number + 1) * self.part_size, len(self)))

    def write(self, numbers: Collection[int], advance: Callable[[int], None] = lambda _: None) -> None:
        """Embed and write parts.

        Args:
            numbers: Which.
            advance: Called with how many more samples are done.
        """
        step = max(1, self.batch_size // self.views)
        spans = [
            (first, min(first + step, self.samples(number).stop))
            for number in numbers
            for first in self.samples(number)[::step]
        ]
        loader: StepLoader[Any] = StepLoader(
            ViewBatches(list(self.sources.values()), self.teachers, self.views, spans),
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=as_it_is,
            worker_init_fn=Workers("embed", self.num_workers) if self.num_workers else None,
        )
        batches = iter(loader) if spans else iter(())
        for number in numbers:
            of_part: list[_Embedded] = []
            for _ in range(-(-len(self.samples(number)) // step)):
                batch: ViewBatch | Exception = next(batches)
                if isinstance(batch, Exception):
                    raise batch
                of_part.append(self._embed(batch))
                advance(batch.last - batch.first)
            self._write_part(number, of_part)

    def finish(self, versions: Mapping[str, str] | None) -> dict[str, Any]:
        """Sum up the parts. Returns the record.

        Args:
            versions: Of the libraries that made them; None keeps those of the record.
        """
        quarantined: list[dict[str, Any]] = []
        parts, losses = list[dict[str, Any]](), [0.0]
        for number in range(self.num_parts):
            file = part_file(self.folder, number)
            about = Part(file).about
            quarantined += about["quarantined"]
            losses.append(about["cosine_loss"])
            parts.append({"bytes": file.stat().st_size, "checksum": about["checksum"]})
        of_images = self.views * _BYTES[self.dtype] * sum(teacher.about.length for teacher in self.teachers)
        summary = {
            "samples": len(self),
            "quarantined": len(quarantined),
            "bytes_per_sample": round(sum(part["bytes"] for part in parts) / len(self), 1),
            "of_them_for_images": of_images,
            "largest_cosine_loss": max(losses),
        }
        if quarantined:
            json_lines.rewrite(self.folder / "quarantine.jsonl", quarantined)
        if versions is None:
            versions = load_json(self.folder / RECORD).get("versions", {})
        record = {"done": True, **self.record, "summary": summary, "versions": dict(versions), "parts": parts}
        record["digest"] = digest_of(record)
        self._write(record)
        return record

    def _write(self, record: dict[str, Any]) -> None:
        text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
        json_lines.write_whole(self.folder / RECORD, text.encode(errors="backslashreplace"))

    def _embed(self, batch: ViewBatch) -> _Embedded:
        images = [
            teacher.model.embed_images(prepared).numpy() if batch.readable else np.zeros((0, teacher.about.length))
            for teacher, prepared in zip(self.teachers, batch.inputs, strict=True)
        ]
        for teacher, image_NE in zip(self.teachers, images, strict=True):
            _check_finite(teacher, image_NE)
        return _Embedded(batch, [image_NE.reshape(len(batch.readable), self.views, -1) for image_NE in images])

    def _write_part(self, number: int, parts: list[_Embedded]) -> None:
        span, batches = self.samples(number), [part.batch for part in parts]
        rows = np.array([index - span.start for batch in batches for index in batch.readable], np.int64)
        hashes_N, seeds_NK = np.zeros(len(span), np.uint64), np.zeros((len(span), self.views), np.uint32)
        crcs_NK = np.zeros_like(seeds_NK)
        keys = [key for batch in batches for key in batch.keys]
        hashes_N[rows] = np.array([text_hash(keys[row]) for row in rows], np.uint64)
        seeds_NK[rows] = np.array([seeds for batch in batches for seeds in batch.seeds]).reshape(-1, self.views)
        crcs_NK[rows] = np.array([crcs for batch in batches for crcs in batch.crcs]).reshape(-1, self.views)
        of_hash = {text_hash(text): text for batch in batches for text in batch.texts}
        texts = [of_hash[hashed] for hashed in sorted(of_hash)]
        arrays: dict[str, Any] = {
            "keys": np.frombuffer(json.dumps(keys, ensure_ascii=False).encode(errors="backslashreplace"), np.uint8),
            "key_hashes": hashes_N,
            "seeds": seeds_NK,
            "crc32_of_pixels": crcs_NK,
            "text_hashes": np.array(sorted(of_hash), np.uint64),
        }
        lost = 0.0
        for t, teacher in enumerate(self.teachers):
            image_MKE = np.concatenate([part.images[t] for part in parts])
            found, losses = stored(image_MKE.reshape(-1, teacher.about.length).astype(np.float32), self.dtype)
            all_NKE = np.zeros((len(span), self.views, teacher.about.length), found.dtype)
            all_NKE[rows] = found.reshape(image_MKE.shape)
            arrays[f"images.{t}"] = all_NKE
            text_SE = teacher.model.embed_texts(texts).numpy()
            _check_finite(teacher, text_SE)
            arrays[f"texts.{t}"], text_losses = stored(text_SE, self.dtype)
            lost = max(lost, float(losses.max(initial=0)), float(text_losses.max(initial=0)))
        quarantined = [row for batch in batches for row in batch.quarantined]
        about = {"quarantined": quarantined, "cosine_loss": lost, **self._names(number)}
        json_lines.write_whole(part_file(self.folder, number), with_sums(arrays, about))


def _check_finite(teacher: ViewTeacher, rows_NE: np.ndarray) -> None:
    if not np.isfinite(rows_NE).all():
        raise ValueError(f"--model {teacher.about.name}: gives numbers that are not finite")
