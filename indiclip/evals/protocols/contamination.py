"""Has a model been trained on what it is asked? Benchmark images and captions found again in training data.

Images are compared by a difference hash of 64 bits (dHash; N. Krawetz, "Kind of like that", hackerfactor.com, 2013),
which survives another size, encoder and a change of brightness; not a crop, a mirror image or a rotation. Captions are
compared by a hash of their words.

A hash of 0 says that there is nothing to compare: a picture with almost no structure (a swatch of colour, a blank
page) or a caption without a word. Those are counted and never found, else they would all be each other's copies.

Shape letters: N benchmark items, M training items, P pairs that agree in a band of bits.
"""

import functools
import itertools
import sys
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from indiclip.datasets.tables import stable_hash

UNHASHABLE = 0
_MIN_STEPS = 16  # of the 64 differences must be
_MIN_STEP = 2  # grey levels of 255: more than an encoder's rounding
_PAIRS = 4_000_000  # compared at a time: 100 MB


class Found(NamedTuple):
    """Which benchmark items are in the training data.

    Attributes:
        near_N: bool.
        unhashable: How many of the benchmark items had nothing to compare; never near.
    """

    near_N: np.ndarray
    unhashable: int


def image_hash(pixels_HW3: np.ndarray) -> int:
    """Difference hash: the picture in 8 rows of 9 grey cells; a bit says that a cell is darker than its right one.

    Args:
        pixels_HW3: uint8 RGB, of any size; a JPEG may come at an eighth of its size if it then has 64 pixels or so.

    Returns:
        64 bits, the top left cell being the highest; 0 where fewer than 16 of the 64 differences reach 2 grey levels.
    """
    grey = Image.fromarray(np.asarray(pixels_HW3, dtype=np.uint8)).convert("L")
    cells_89 = np.asarray(grey.resize((9, 8), Image.Resampling.LANCZOS), dtype=np.int16)
    steps_88 = np.diff(cells_89, axis=1)
    if (np.abs(steps_88) >= _MIN_STEP).sum() < _MIN_STEPS:
        return UNHASHABLE
    return int.from_bytes(np.packbits(steps_88 > 0).tobytes(), "big")


def caption_hash(caption: str) -> int:
    """64 bits of a caption's words, the same whatever its case, spaces and punctuation.

    Text is put into NFC and case-folded; punctuation becomes a space, and format characters (which Indian keyboards
    put between letters or not) nothing; vowel signs and symbols stay.

    Returns:
        BLAKE2b; 0 for a caption without a word.
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", caption).casefold())
    words = " ".join(folded.translate(_spaces()).split())
    return stable_hash(words) if words else UNHASHABLE


def near_duplicates(bench_N: np.ndarray, training_M: np.ndarray, max_distance: int = 4) -> Found:
    """Which hashes differ from one of the training data's in few bits.

    Exact, and without comparing all pairs: bits are parted into `max_distance` + 1 bands, and hashes that differ in at
    most `max_distance` bits agree in one of them whole.

    Args:
        bench_N: uint64 hashes.
        training_M: uint64 hashes.
        max_distance: 0 to 63 bits: 0 for captions, 4 of 64 for images.
    """
    bench, training = np.asarray(bench_N, dtype=np.uint64), np.unique(np.asarray(training_M, dtype=np.uint64))
    training = training[training != UNHASHABLE]
    near_N = np.zeros(len(bench), dtype=bool)
    # The first bit of each band, and the one after its last: as even as can be.
    edges = [64 * i // (max_distance + 1) for i in range(max_distance + 2)]
    for low, high in itertools.pairwise(edges):
        mask = np.uint64((1 << high) - (1 << low))
        order = np.argsort(training & mask)
        asked = np.flatnonzero(~near_N & (bench != UNHASHABLE))
        for places, candidates in _agreeing(bench[asked] & mask, (training & mask)[order]):
            differing = bench[asked[places]] ^ training[order[candidates]]
            near_N[asked[places[np.bitwise_count(differing) <= max_distance]]] = True
    return Found(near_N, int((bench == UNHASHABLE).sum()))


def _agreeing(asked_N: np.ndarray, sorted_M: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places (P,) in both of equal numbers, some millions at a time (one asked number's are never parted)."""
    first, after = np.searchsorted(sorted_M, asked_N, "left"), np.searchsorted(sorted_M, asked_N, "right")
    count = after - first
    total = np.concatenate([[0], np.cumsum(count)])
    start = 0
    while start < len(asked_N):
        stop = max(start + 1, int(np.searchsorted(total, total[start] + _PAIRS, "right")) - 1)
        part = slice(start, stop)
        places = np.repeat(np.arange(start, stop), count[part])
        within = np.arange(len(places)) - np.repeat(total[part] - total[start], count[part])
        yield places, first[places] + within
        start = stop


@functools.cache
def _spaces() -> dict[int, str | None]:
    """What each punctuation mark (and each half of a broken surrogate pair) and format character becomes."""
    categories = {code: unicodedata.category(chr(code)) for code in range(sys.maxunicode + 1)}
    return {
        code: None if category == "Cf" else " "
        for code, category in categories.items()
        if category in ("Cf", "Cs") or category.startswith("P")
    }
