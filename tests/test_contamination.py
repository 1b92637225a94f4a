"""Hashes of images and captions, and the search for near duplicates against the comparison of all pairs."""

import io
import itertools
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from indiclip.evals.protocols import contamination
from indiclip.evals.protocols.contamination import (
    MAX_DISTANCES,
    UNHASHABLE,
    VIEWS,
    caption_hash,
    image_hashes,
    near_duplicates,
)
from indiclip.images import EncodedImage


def _scene(seed, height=240, width=320):
    """Blobs of colour of many sizes and some noise, as a photograph has."""
    generator = np.random.default_rng(seed)
    layers = []
    for side in (4, 8, 16, 64):
        coarse = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        layers.append(np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), float))
    return np.average(layers, axis=0, weights=[4, 2, 1, 1]).astype(np.uint8)


def _encoded(pixels, kind="JPEG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def _resized(pixels, width, height):
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def _distance(one, other):
    return (int(one) ^ int(other)).bit_count()


def image_hash(pixels):
    return image_hashes(pixels)[0]


def test_hash_of_a_picture_by_hand():
    # Row 0 rises from left to right: eight ones. The other rows fall: zeros.
    grey_89 = np.tile(np.arange(9, dtype=np.uint8)[::-1] * 20, (8, 1))
    grey_89[0] = grey_89[0, ::-1]
    assert image_hash(np.repeat(grey_89[..., None], 3, axis=2)) == 0xFF << 56


def test_hash_of_low_frequencies_is_that_of_the_textbook_sum():
    """DCT-II as its definition says it: x_uv = sum of g_rc cos(pi u (2r + 1) / 64) cos(pi v (2c + 1) / 64)."""
    pixels = _scene(3, 32, 32)
    grey = np.asarray(Image.fromarray(pixels).convert("L"), float)
    at = (2 * np.arange(32) + 1) * np.pi / 64
    low = [(grey * np.cos(u * at)[:, None] * np.cos(v * at)).sum() for u in range(8) for v in range(8)]
    expected = ["0", *("1" if x > np.median(low[1:]) else "0" for x in low[1:])]
    assert image_hashes(pixels)[1] == int("".join(expected), 2)


def test_mirrored_and_without_a_margin_are_the_hashes_of_such_pictures():
    pixels = _scene(5, 200, 400)
    assert image_hashes(pixels, mirrored=True) == image_hashes(pixels[:, ::-1])
    assert image_hashes(pixels, margin=0.1) == image_hashes(pixels[10:190, 20:380])
    both = zip(image_hashes(pixels, 0.1, True), image_hashes(pixels[10:190, 20:380][:, ::-1]), strict=True)
    assert max(_distance(*pair) for pair in both) <= 2  # PIL rounds from the left; two cells at the median may swap


CHANGED = {
    "mirror": lambda x: x[:, ::-1],
    "crop 5%": lambda x: x[6:-6, 8:-8],
    "crop 10%": lambda x: x[12:-12, 16:-16],
    "mirrored crop": lambda x: x[12:-12, 16:-16][:, ::-1],
}


@pytest.mark.parametrize("change", CHANGED)
def test_mirror_images_and_crops_are_found_by_one_of_the_views(change):
    for x in map(_scene, range(20)):
        copy = image_hashes(CHANGED[change](x))
        distances = [[_distance(*pair) for pair in zip(image_hashes(x, *view), copy, strict=True)] for view in VIEWS]
        assert (np.array(distances) <= MAX_DISTANCES).any()


VARIANTS = {
    "jpeg 90": lambda x: np.asarray(EncodedImage(_encoded(x, quality=90), "x")),
    "jpeg 40": lambda x: np.asarray(EncodedImage(_encoded(x, quality=40), "x")),
    "webp": lambda x: np.asarray(EncodedImage(_encoded(x, "WEBP", quality=60), "x")),
    "half": lambda x: _resized(x, x.shape[1] // 2, x.shape[0] // 2),
    "square": lambda x: _resized(x, 224, 224),
    "small jpeg": lambda x: np.asarray(EncodedImage(_encoded(_resized(x, 128, 96), quality=75), "x")),
    "decoded small": lambda x: EncodedImage(_encoded(x, quality=90), "x").decode((64, 72)),
    "darker": lambda x: (x * 0.8).astype(np.uint8),
    "grey": lambda x: np.repeat(np.asarray(Image.fromarray(x).convert("L"))[..., None], 3, axis=2),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_size_encoder_or_brightness_keeps_the_hash_near(variant):
    distances = [_distance(image_hash(x), image_hash(VARIANTS[variant](x))) for x in map(_scene, range(20))]
    assert max(distances) <= 4


def test_different_pictures_are_far_apart():
    hashes = [image_hash(_scene(seed)) for seed in range(60)]
    assert min(_distance(one, other) for one, other in itertools.combinations(hashes, 2)) > 8


def test_photographs_are_found_again_and_not_taken_for_each_other(data_root: Path):
    files = sorted((data_root / "coco" / "images").rglob("*.jpg"))[:40]
    if not files:
        pytest.skip("no photographs")
    photographs = [np.asarray(EncodedImage(file.read_bytes(), file.name)) for file in files]
    hashes = np.array([image_hash(x) for x in photographs], dtype=np.uint64)
    again = np.array([image_hash(VARIANTS["small jpeg"](x)) for x in photographs], dtype=np.uint64)
    assert near_duplicates(again, hashes, 4).mean() >= 0.95
    assert not near_duplicates(hashes[:20], hashes[20:], 4).any()


@pytest.mark.parametrize(
    "flat",
    [
        np.full((100, 100, 3), 200, dtype=np.uint8),  # a swatch of colour
        np.full((1, 1, 3), 7, dtype=np.uint8),
        np.repeat(np.arange(200, dtype=np.uint8)[:, None, None], 90, axis=1).repeat(
            3, axis=2
        ),  # changes downwards only
        255 - np.pad(np.full((4, 4, 3), 255, dtype=np.uint8), ((48, 48), (48, 48), (0, 0))),  # a dot on a page
        np.random.default_rng(0).integers(126, 130, (200, 200, 3), dtype=np.uint8),  # noise of a sensor
    ],
)
def test_a_picture_with_almost_no_structure_has_no_hash(flat):
    assert image_hash(flat) == UNHASHABLE


def test_what_has_no_hash_is_never_found():
    near_N = near_duplicates(np.array([0, 0, 0xFFFF, 5 << 40]), np.array([0, 5 << 40]), 4)
    assert near_N.tolist() == [False, False, False, True]


@pytest.mark.parametrize("pairs", [1, 50, 4_000_000])
@pytest.mark.parametrize("max_distance", [0, 1, 4, 7, 63])
def test_near_duplicates_are_those_of_all_pairs(monkeypatch, max_distance, pairs):
    monkeypatch.setattr(contamination, "_PAIRS", pairs)
    generator = np.random.default_rng(max_distance)
    # Of few kinds of bits, so that bands agree by chance and distances of 0 to 10 all occur.
    training_M = generator.integers(1, 2**16, 300, dtype=np.uint64) * np.uint64(0x0001000100010001)
    flips = [sum(1 << int(bit) for bit in generator.choice(64, n, replace=False)) for n in np.arange(200) % 11]
    bench_N = training_M[:200] ^ np.array(flips, dtype=np.uint64)
    oracle = [min(_distance(one, other) for other in training_M) <= max_distance for one in bench_N]
    assert near_duplicates(bench_N, training_M, max_distance).tolist() == oracle
    assert max_distance == 63 or 0 < sum(oracle) < 200


def test_nothing_to_compare_with():
    none = np.zeros(0, dtype=np.uint64)
    assert near_duplicates(np.array([3, 4]), none, 4).tolist() == [False, False]
    assert near_duplicates(none, np.array([3, 4]), 4).tolist() == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A red  kite,\nhigh up!", "a Red kite high up"),
        ("एक लाल पतंग।", "एक लाल पतंग"),  # danda
        ("auto-rickshaw", "Auto rickshaw"),
        ("café", unicodedata.normalize("NFD", "Café")),
        ("क़लम", unicodedata.normalize("NFD", "क़लम")),  # nukta
        ("क्\u200dष", "क्ष"),  # a joiner between the letters
        ("STRASSE", "straße"),
        ("broken \udce0 byte", "broken byte"),
    ],
)
def test_captions_with_the_same_words_are_the_same(one, other):
    assert caption_hash(one) == caption_hash(other) != UNHASHABLE


@pytest.mark.parametrize(
    ("one", "other"), [("कि", "की"), ("a red kite", "a kite red"), ("₹10", "10"), ("ab", "a b"), ("चाय", "चय")]
)
def test_captions_with_other_words_or_vowel_signs_are_not(one, other):
    assert caption_hash(one) != caption_hash(other)


@pytest.mark.parametrize("text", ["", " \n", "...", "।॥", "\u200d"])
def test_a_caption_without_a_word_has_no_hash(text):
    assert caption_hash(text) == UNHASHABLE
