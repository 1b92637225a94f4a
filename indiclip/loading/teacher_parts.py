"""The files of a cache of teachers' embeddings, which `indiclip.evals.models.view_embedder` writes.

    teachers.json                  which sources, augmentation and teachers; `done` and a digest of the whole cache
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
Shape letters: see `indiclip.types`; n samples of a part, K views, S texts.
"""

import hashlib
import json
import math
import mmap
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from indiclip.types import Sample

RECORD = "teachers.json"
_DTYPES = {"F16": np.float16, "I8": np.int8, "U8": np.uint8, "U32": np.uint32, "U64": np.uint64}  # safetensors' names


class TeacherRecord(NamedTuple):
    """What a cache says of a teacher.

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
    return zlib.crc32(picture_CHW.contiguous().numpy().data, zlib.crc32(str(tuple(picture_CHW.shape)).encode()))


def texts_of(sample: Sample) -> list[str]:
    """All captions of a sample, in all languages."""
    found = [text for texts in (sample.get("captions") or {}).values() for text in texts]
    return [*found, sample["caption"]] if "caption" in sample else found


def digest_of(record: Mapping[str, Any], files: Iterable[Path]) -> str:
    """Of a cache: sources, augmentation, teachers, views and types, whatever they are called, and all of its parts.

    Keys alone do not tell two downloads apart whose files are numbered alike; the parts have the sums of their pixels
    and their captions.
    """
    teachers = [
        {name: value for name, value in teacher.items() if name not in ("name", "weights")}
        for teacher in record["teachers"]
    ]
    sources = [{name: source[name] for name in ("samples", "crc32_of_keys")} for source in record["sources"]]
    parts = [record[name] for name in ("views", "augmentation", "dtype", "part_size")]
    whole = hashlib.sha256(json.dumps([teachers, sources, parts], sort_keys=True).encode())
    for file in files:
        for name, array in Part(file).arrays():
            whole.update(f"{name} {array.dtype} {array.shape}".encode())
            whole.update(array.data)
    return whole.hexdigest()[:16]


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

    def arrays(self) -> list[tuple[str, np.ndarray]]:
        """All that have numbers, by name."""
        return sorted(self._arrays.items())

    def text_row(self, text: str) -> int | None:
        """The number of a caption's row."""
        hashes_S, wanted = self._arrays.get("text_hashes", np.zeros(0, np.uint64)), np.uint64(text_hash(text))
        row = int(hashes_S.searchsorted(wanted))
        return row if row < len(hashes_S) and hashes_S[row] == wanted else None
