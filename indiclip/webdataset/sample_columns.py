"""What is known of each sample of a shard, or of many, column by column: about 10 bytes, 16 with labels and checksums.

A sample whose members stand together, as every writer of the format puts them, is found by where its first header
begins; their names and lengths are in the tar. Of others there is a row with the place of each part. Keys are kept in
packed blocks, because the shard itself may be on a server; those of numbers take about 2 bytes, of random letters what
these take.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

BLOCK = 512  # bytes: the unit of a tar
PARTS = ("image", "txt", "json")
# A sample whose members do not stand together, and where each part is; length -1: none.
APART = np.dtype(
    [("sample", "<i8"), *[(f"{part}{what}", kind) for part in PARTS for what, kind in (("", "<i8"), ("_bytes", "<i4"))]]
)
KINDS: dict[str, np.dtype[Any]] = {
    "blocks": np.dtype("<u4"),
    "sizes_hw": np.dtype("<i2"),
    "labels": np.dtype("<i4"),
    "crcs": np.dtype("<u4"),
    "key_data": np.dtype("u1"),
    "key_firsts": np.dtype("<i8"),
    "key_ends": np.dtype("<i8"),
    "apart": APART,
}
NARROW_LABELS = np.dtype("<i2")  # where that holds them
LONGEST_SIDE = 2**15 - 1  # pixels
MOST_BLOCKS = 2**32
_KEY_CHARACTERS = 1024  # of a packed block of keys, at least
_MOST_KEY_BYTES = 2**23  # of an unpacked one; a name has at most a MiB, and each byte may be escaped


@dataclass
class SampleColumns:
    """Samples in the order of their shards.

    Attributes:
        blocks: Of 512 bytes, before the first header of a sample in its shard.
        sizes_hw: Height and width of each image as stored; 0 where its header cannot be read, or above `LONGEST_SIDE`.
        labels: The class of each; -1: none. Empty where none has one.
        crcs: CRC-32 of each image's bytes; empty where they were not computed.
        key_data: JSON lists of keys, each by zlib without a header.
        key_firsts: The first sample of each list; no list goes beyond a shard.
        key_ends: Where in `key_data` each list ends.
        apart: Samples whose members do not stand together, in order.
    """

    blocks: np.ndarray
    sizes_hw: np.ndarray
    labels: np.ndarray
    crcs: np.ndarray
    key_data: np.ndarray
    key_firsts: np.ndarray
    key_ends: np.ndarray
    apart: np.ndarray

    def __post_init__(self) -> None:
        self._unpacked = -1, list[str]()  # the block of keys that was asked for last

    def __len__(self) -> int:
        return len(self.blocks)

    def check_kinds(self) -> None:
        """Check kinds and lengths, without a look at what is in the columns.

        Raises:
            ValueError: They are not those of one table.
        """
        for name, kind in KINDS.items():
            column: np.ndarray = getattr(self, name)
            kinds = (kind, NARROW_LABELS) if name == "labels" else (kind,)
            rest = (2,) if name == "sizes_hw" else ()
            if column.dtype not in kinds or column.shape[:1] + rest != column.shape:
                raise ValueError(f"{name}: found {column.dtype} {column.shape}; expected {kind} (samples, {rest})")
        for name in ("sizes_hw", "labels", "crcs"):
            number, may_lack = len(getattr(self, name)), name != "sizes_hw"
            if number != len(self) and (number or not may_lack):
                raise ValueError(f"{name}: found {number:,} samples; expected {len(self):,}")

    def check(self) -> None:
        """Check also what is in the columns of one shard.

        Raises:
            ValueError: They are not those of one table, samples go back, or there is not one key for each.
        """
        self.check_kinds()
        firsts, ends, apart = (column.tolist() for column in (self.key_firsts, self.key_ends, self.apart["sample"]))
        if (self.blocks[1:] <= self.blocks[:-1]).any():
            raise ValueError("blocks: they go back")
        if apart != sorted(set(apart)) or any(not 0 <= sample < len(self) for sample in apart):
            raise ValueError("apart: no such samples")
        if ends[-1:] != [len(self.key_data)][: len(ends)]:
            raise ValueError("key_ends: not of these keys")
        lists = [_unpack(self.key_data[begin:end].tobytes()) for begin, end in pairwise([0, *ends])]
        if firsts != np.cumsum([0, *map(len, lists)])[:-1].tolist() or sum(map(len, lists)) != len(self):
            raise ValueError("key_firsts: not one key for each sample")

    def key(self, sample: int) -> str:
        """The key of a sample.

        Raises:
            ValueError: What is kept is no list of keys.
        """
        number = int(np.searchsorted(self.key_firsts, sample, side="right")) - 1
        if self._unpacked[0] != number:
            begin = int(self.key_ends[number - 1]) if number else 0
            packed = self.key_data[begin : int(self.key_ends[number])].tobytes()
            self._unpacked = number, _unpack(packed)
        keys, place = self._unpacked[1], sample - int(self.key_firsts[number])
        if place >= len(keys):
            raise ValueError(f"index: found {len(keys)} keys; expected one for sample {sample:,}")
        return keys[place]

    def parts_apart(self, sample: int) -> dict[str, tuple[int, int]] | None:
        """(offset, length) of each part in the shard, where the members of a sample do not stand together."""
        place = int(np.searchsorted(self.apart["sample"], sample)) if len(self.apart) else 0
        if place == len(self.apart) or self.apart["sample"][place] != sample:
            return None
        row = self.apart[place].tolist()[1:]
        places = zip(PARTS, row[::2], row[1::2], strict=True)
        return {part: (offset, length) for part, offset, length in places if length >= 0}


def pack_keys(keys: Sequence[str]) -> dict[str, np.ndarray]:
    """The columns of keys."""
    packed, firsts, first, characters = list[bytes](), list[int](), 0, 0
    for place, key in enumerate(keys, start=1):
        characters += len(key)
        if characters >= _KEY_CHARACTERS or place == len(keys):
            text = json.dumps(list(keys[first:place]), ensure_ascii=False, separators=(",", ":"))
            deflate = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
            packed.append(deflate.compress(text.encode(errors="surrogatepass")) + deflate.flush())
            firsts.append(first)
            first, characters = place, 0
    return {
        "key_data": np.frombuffer(b"".join(packed), np.uint8),
        "key_firsts": np.array(firsts, np.int64),
        "key_ends": np.cumsum([len(block) for block in packed], dtype=np.int64),
    }


def _unpack(packed: bytes) -> list[str]:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        text = inflate.decompress(packed, _MOST_KEY_BYTES)
        keys = json.loads(text.decode(errors="surrogatepass"))
    except (zlib.error, ValueError) as error:
        raise ValueError(f"index: broken keys: {error}") from error
    if not isinstance(keys, list) or not set(map(type, keys)) <= {str}:
        raise ValueError("index: broken keys: no list of texts")
    return keys
