"""Has a model been trained on what it is asked? Benchmark images and captions found again in training data.

Images are compared by what they look like, with two hashes of 64 bits: a difference hash (dHash; N. Krawetz, "Kind of
like that", hackerfactor.com, 2013) and one of low frequencies (pHash; C. Zauner, "Implementation and benchmarking of
perceptual image hash functions", 2010). Both survive another size, encoder and a change of brightness, not a crop or a
mirror image: benchmark images are therefore looked for mirrored and without a margin, too (`VIEWS`). A border around
the training image, a crop at one side or a rotation hide it still; BENCHMARKS.md has the rates. Captions are compared
by a hash of their words.

A hash of 0 says that there is nothing to compare: a picture with almost no structure (a swatch of colour, a blank
page) or a caption without a word. Those are counted and never found, else they would all be each other's copies.

Shape letters: N benchmark items, M training items, P pairs that agree in a band of bits.
"""

import functools
import itertools
import sys
import unicodedata
from collections.abc import Iterator

import numpy as np
from PIL import Image

from indiclip.datasets.tables import stable_hash

UNHASHABLE = 0
_MIN_STEPS = 16  # of the 64 differences must be
_MIN_STEP = 2  # grey levels of 255: more than an encoder's rounding
MAX_DISTANCES = (4, 4)  # bits of dHash and pHash that may differ: see the table in BENCHMARKS.md
# How a benchmark image is looked for: without what share of its sides (half of it at either end), and mirrored or not.
VIEWS = tuple((margin, mirrored) for margin in (0.0, 0.05, 0.1) for mirrored in (False, True))
_GREY = 32  # rows and columns of which the low frequencies are taken
_LOW = 8  # of these in either direction, the mean among them
_PAIRS = 4_000_000  # compared at a time: 100 MB


def image_hashes(pixels_HW3: np.ndarray, margin: float = 0.0, mirrored: bool = False) -> tuple[int, int]:
    """dHash and pHash of a picture.

    dHash: the picture in 8 rows of 9 grey cells; a bit says that a cell is darker than its right one. pHash: the cosine
    transform of 32 x 32 grey cells; a bit says that one of the 8 x 8 lowest frequencies is above the median of them
    all. The mean is none of them, and its bit 0.

    Args:
        pixels_HW3: uint8 RGB, of any size; a JPEG may come at an eighth of its size if it then has 64 pixels or so.
        margin: Share of height and width that is left out, half of it at either end.
        mirrored: Left for right.

    Returns:
        64 bits each, the top left cell and the mean being the highest; 0 for both where fewer than 16 of the 64
        differences of dHash reach 2 grey levels.
    """
    grey = Image.fromarray(np.asarray(pixels_HW3, dtype=np.uint8)).convert("L")
    off = grey.width * margin / 2, grey.height * margin / 2
    box = (*off, grey.width - off[0], grey.height - off[1])
    cells_89, cells_GG = (
        np.asarray(grey.resize(size, Image.Resampling.LANCZOS, box), dtype=np.int16)[:, :: -1 if mirrored else 1]
        for size in ((9, 8), (_GREY, _GREY))
    )
    steps_88 = np.diff(cells_89, axis=1)
    if (np.abs(steps_88) >= _MIN_STEP).sum() < _MIN_STEPS:
        return UNHASHABLE, UNHASHABLE
    low_F = (_cosines() @ cells_GG @ _cosines().T).ravel()[1:]
    return _number(steps_88 > 0), _number(np.concatenate([[False], low_F > np.median(low_F)]))


def _number(bits: np.ndarray) -> int:
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@functools.cache
def _cosines() -> np.ndarray:
    """The first rows of the discrete cosine transform DCT-II, not normalised (8, 32)."""
    return np.cos(np.pi / _GREY * np.outer(np.arange(_LOW), np.arange(_GREY) + 0.5))


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


def near_duplicates(bench_N: np.ndarray, training_M: np.ndarray, max_distance: int) -> np.ndarray:
    """Which hashes differ from one of the training data's in few bits, bool (N,). `UNHASHABLE` is near nothing.

    Exact, and without comparing all pairs: bits are parted into `max_distance` + 1 bands, and hashes that differ in at
    most `max_distance` bits agree in one of them whole.

    Args:
        bench_N: uint64 hashes.
        training_M: uint64 hashes.
        max_distance: 0 to 63 bits: 0 for captions; for images, see `MAX_DISTANCES`.
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
    return near_N


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
