"""The files of a cache of teachers' embeddings, which `indiclip.evals.models.view_embedder` writes.

    teachers.json                  see `indiclip.loading.teacher_record`
    teachers-00000.safetensors     of the samples 0 to part_size - 1 of all sources, one after the other:
        keys                       uint8, a JSON list of their keys
        key_hashes                 uint64 (n,), 0 where a sample cannot be read
        seeds                      uint32 (n, K), of each view's augmentation
        crc32_of_pixels            uint32 (n, K), of each augmented picture
        images.0, images.1, ...    float16 or int8 (n, K, E), of each teacher
        crc32_of_images            uint32 (n, K), of the rows of all teachers
        text_hashes                uint64 (S,), ascending, of the samples' distinct captions in all languages
        texts.0, texts.1, ...      float16 or int8 (S, E)
        crc32_of_texts             uint32 (S,), of the rows of all teachers
    quarantine.jsonl               samples that cannot be read, where there are any

Nothing is read that was not compared with the record, and no worker reads a whole cache for that: the record has the
checksum of each part's small arrays, which is compared when the part is opened, and these have a sum for each row of
embeddings, which is compared when it is read.

Rows are unit vectors; of int8 the largest number is 127, and whoever reads a row normalises it.
Shape letters: see `indiclip.types`; n samples of a part, K views, S texts.
"""

import hashlib
import json
import math
import mmap
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from indiclip.names import reason_of
from indiclip.types import Sample

_DTYPES = {"F16": np.float16, "I8": np.int8, "U8": np.uint8, "U32": np.uint32, "U64": np.uint64}  # safetensors' names
_ABOUT, _CHECKSUM = "about", "checksum"
_EMBEDDINGS = ("images", "texts")


class DamagedPart(ValueError):
    """A part's file is not what the record says: which part, what was found, what was expected."""


def text_hash(text: str) -> int:
    """64 bits of a key or a caption, never 0, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()) or 1


def crc32_of_pixels(picture_CHW: Tensor) -> int:
    """Of an augmented picture and its size."""
    return zlib.crc32(picture_CHW.contiguous().numpy().data, zlib.crc32(str(tuple(picture_CHW.shape)).encode()))


def texts_of(sample: Sample) -> list[str]:
    """All captions of a sample, in all languages."""
    found = [text for texts in (sample.get("captions") or {}).values() for text in texts]
    return [*found, sample["caption"]] if "caption" in sample else found


def part_file(folder: Path, number: int) -> Path:
    """The file of a part."""
    return folder / f"teachers-{number:05}.safetensors"


def with_sums(arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> bytes:
    """The content of a part's file.

    Args:
        arrays: All but `crc32_of_images` and `crc32_of_texts`.
        about: What else is said of the part, with `cache`, the identity of its cache, and `part`, its number.
    """
    images = [array for name, array in arrays.items() if name.startswith("images.")]
    texts = [array for name, array in arrays.items() if name.startswith("texts.")]
    views = [np.ascontiguousarray(array.reshape(-1, array.shape[-1])) for array in images]
    sums = {
        "crc32_of_images": _crc32_of_all(views).reshape(images[0].shape[:2]),
        "crc32_of_texts": _crc32_of_all(texts),
    }
    whole = {**arrays, **sums}
    stated = {**about, _CHECKSUM: _checksum(about, whole.items())}
    return bytes(save(whole, {_ABOUT: json.dumps(stated)}))  # one entry: safetensors has several in a random order


class Part:
    """The arrays of a part, mapped into memory.

    Args:
        file: See above.
        expected: Its `bytes` and `checksum`, as the record has them; None compares nothing but what the file says of
            itself, as while the cache is made.
        compare: False where this process has compared the checksum before.

    Attributes:
        about: What is said of the part.

    Raises:
        DamagedPart: Missing, torn, changed or another one.
    """

    def __init__(self, file: Path, expected: Mapping[str, Any] | None = None, compare: bool = True) -> None:
        self._file = file
        size = file.stat().st_size if file.is_file() else None
        if size is None or (expected is not None and size != expected["bytes"]):
            found = "no file" if size is None else f"{size:,} bytes"
            raise DamagedPart(f"{file}: found {found}; expected " + _size(expected))
        try:
            with safe_open(file, "numpy"):  # compares the header with the file's length
                pass
        except (OSError, SafetensorError) as error:
            raise DamagedPart(f"{file}: found {reason_of(error)}; expected a whole safetensors file") from error
        self._map(file)
        if compare:
            self._compare(expected)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def image_rows(self, row: int, view: int) -> list[np.ndarray]:
        """The embeddings (E,) of a sample's view by each teacher.

        Raises:
            DamagedPart: They were changed.
        """
        found = [images[row, view] for images in self._images]
        self._compare_rows(found, int(self["crc32_of_images"][row, view]), f"the embeddings of view {view}, row {row}")
        return found

    def text_rows(self, row: int) -> list[np.ndarray]:
        """The embeddings (E,) of a caption by each teacher; see `image_rows`."""
        found = [texts[row] for texts in self._texts]
        self._compare_rows(found, int(self["crc32_of_texts"][row]), f"the embeddings of the caption of row {row}")
        return found

    def compare_all(self) -> None:
        """Read all of it, as training does bit by bit.

        Raises:
            DamagedPart: The first row that was changed.
        """
        samples, views = self["crc32_of_images"].shape
        for row in range(samples):
            for view in range(views):
                self.image_rows(row, view)
        for row in range(len(self["crc32_of_texts"])):
            self.text_rows(row)

    def text_row(self, text: str) -> int | None:
        """The number of a caption's row."""
        hashes_S, wanted = self._arrays["text_hashes"], np.uint64(text_hash(text))
        row = int(hashes_S.searchsorted(wanted))
        return row if row < len(hashes_S) and hashes_S[row] == wanted else None

    def _map(self, file: Path) -> None:
        with file.open("rb") as opened:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        self.about = _stated(header.pop("__metadata__", {}).get(_ABOUT, ""))
        self._arrays: dict[str, np.ndarray] = {}
        for name, of in header.items():
            if of["dtype"] not in _DTYPES:
                expected = ", ".join(_DTYPES)
                raise DamagedPart(f"{file}: {name}: found the type {of['dtype']}; expected one of {expected}")
            dtype, numbers = np.dtype(_DTYPES[of["dtype"]]), math.prod(of["shape"])
            offset = begin + of["data_offsets"][0] if numbers else 0  # an empty one may stand at the file's end
            self._arrays[name] = np.frombuffer(data, dtype, numbers, offset).reshape(of["shape"])
        self._images, self._texts = (
            [self._arrays[key] for key in sorted(self._arrays, key=_place) if key.startswith(f"{name}.")]
            for name in _EMBEDDINGS
        )

    def _compare(self, expected: Mapping[str, Any] | None) -> None:
        stated = self.about.get(_CHECKSUM)
        if stated is None:
            raise DamagedPart(f"{self._file}: found no checksum, as of an earlier version of indiclip; expected it")
        about = {name: value for name, value in self.about.items() if name != _CHECKSUM}
        found, wanted = _checksum(about, self._arrays.items()), stated if expected is None else expected["checksum"]
        if found != wanted:
            raise DamagedPart(f"{self._file}: found the checksum {found}; expected {wanted}")

    def _compare_rows(self, rows: list[np.ndarray], expected: int, what: str) -> None:
        if (found := _crc32(rows)) != expected:
            raise DamagedPart(f"{self._file}: {what}: found the CRC-32 {found:08x}; expected {expected:08x}")


def _checksum(about: Mapping[str, Any], arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """Of a part but for its embeddings, of which there is a sum for each row among the other arrays."""
    whole = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, array in sorted(arrays, key=lambda pair: pair[0]):
        whole.update(f"{name} {array.dtype} {array.shape}".encode())
        if name.partition(".")[0] not in _EMBEDDINGS:
            whole.update(array.data)
    return whole.hexdigest()[:16]


def _stated(text: str) -> dict[str, Any]:
    """What a part says of itself; nothing where that is damaged, or of an earlier version."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _crc32(rows: Iterable[np.ndarray]) -> int:
    found = 0
    for row_E in rows:
        found = zlib.crc32(row_E.data, found)
    return found


def _crc32_of_all(of_teachers: list[np.ndarray]) -> np.ndarray:
    """Row by row of all teachers."""
    return np.array([_crc32(rows) for rows in zip(*of_teachers, strict=True)], np.uint32)


def _size(expected: Mapping[str, Any] | None) -> str:
    return "a part of the cache" if expected is None else f"{expected['bytes']:,} bytes"


def _place(name: str) -> int:
    """Of the teacher whose embeddings they are: the tenth comes behind the ninth."""
    return int(name.rpartition(".")[2]) if "." in name else -1
