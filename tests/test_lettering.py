"""Generated words: the same everywhere, apart between parts, whole, shaped, with honest distractors."""

import pickle
import unicodedata
from functools import cache

import numpy as np
import pytest
import regex
from PIL import Image, ImageDraw

from indiclip.datasets.scripts import scripts as scripts_of
from indiclip.generated.cielab import srgb_to_lab
from indiclip.generated.lettering import INDIAN, SCRIPTS, Lettering
from indiclip.generated.lettering_draw import _ink, _written
from indiclip.generated.lettering_words import (
    PARTS,
    clusters,
    distractors,
    edit_distance,
    made_up_word,
    part_of,
)

ALL = list(SCRIPTS)
UNICODE_NAMES = {"urdu_nastaliq": "Arabic", "ol_chiki": "Ol Chiki", "meetei_mayek": "Meetei Mayek"}


def levenshtein(a: list[str], b: list[str]) -> int:
    """The definition, word for word; not the code's table."""

    @cache
    def between(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(between(i - 1, j) + 1, between(i, j - 1) + 1, between(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return between(len(a), len(b))


def words(script: str, part: str, count: int = 12) -> list[str]:
    rng = np.random.default_rng(7)
    real = SCRIPTS[script].words_of(part)
    return real + [made_up_word(rng, SCRIPTS[script], part) for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "joined", "single"),
    [
        ("क्षत्रिय", ["क्ष", "त्रि", "य"], ["क्", "ष", "त्", "रि", "य"]),
        ("बाज़ार", ["बा", "ज़ा", "र"], ["बा", "ज़ा", "र"]),
        ("தமிழ்நாடு", ["த", "மி", "ழ்", "நா", "டு"], ["த", "மி", "ழ்", "நா", "டு"]),
        ("ಶಿವಮೊಗ್ಗ", ["ಶಿ", "ವ", "ಮೊ", "ಗ್ಗ"], ["ಶಿ", "ವ", "ಮೊ", "ಗ್", "ಗ"]),
        ("بھارت", ["بھ", "ا", "ر", "ت"], ["ب", "ھ", "ا", "ر", "ت"]),
        ("ᱜᱟᱹᱭ", ["ᱜ", "ᱟᱹ", "ᱭ"], ["ᱜ", "ᱟ", "ᱹ", "ᱭ"]),
        ("ꯏꯝꯐꯥꯜ", ["ꯏ", "ꯝ", "ꯐꯥ", "ꯜ"], ["ꯏ", "ꯝ", "ꯐꯥ", "ꯜ"]),
    ],
)
def test_clusters_are_the_characters_that_a_reader_sees(text, joined, single):
    text, joined, single = (unicodedata.normalize("NFC", "\n".join(part)) for part in ([text], joined, single))
    assert clusters(text) == joined.split("\n")
    assert clusters(text, joined=False) == single.split("\n")


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("", "ab", 2), ("kitten", "sitting", 3), ("ab", "ba", 2), ("x", "x", 0)]
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == distance


@pytest.mark.parametrize("script", ALL)
def test_words_are_written_in_their_script_and_in_nfc(script):
    every = [*SCRIPTS[script].words, *words(script, "train"), *words(script, "test")]
    for word in every:
        assert scripts_of(word) == (UNICODE_NAMES.get(script, script.capitalize()),), word
        assert unicodedata.is_normalized("NFC", word), word
        assert len(clusters(word)) >= 2, f"{word}: one character has too few neighbours"
        assert unicodedata.category(word[0]) in ("Lo", "Lu"), word


@pytest.mark.parametrize("script", ALL)
def test_parts_have_no_word_in_common_and_enough_of_them(script):
    parts = {part: set(words(script, part, 50)) for part in PARTS}
    assert not parts["train"] & parts["test"]
    assert min(len(SCRIPTS[script].words_of(part)) for part in PARTS) >= 10


@pytest.mark.parametrize("script", ALL)
@pytest.mark.parametrize("part", PARTS)
def test_distractors_are_near_and_not_the_word(script, part):
    rng = np.random.default_rng(3)
    for word in words(script, part):
        others = distractors(rng, SCRIPTS[script], word, 9)
        assert len({unicodedata.normalize("NFC", text) for text in [word, *others]}) == 10
        for other in others:
            # By Unicode's own rule for characters, and by letters with their signs, however consonants join.
            by_unicode = levenshtein(regex.findall(r"\X", word), regex.findall(r"\X", other))
            by_letters = levenshtein(regex.findall(r"\P{M}\p{M}*", word), regex.findall(r"\P{M}\p{M}*", other))
            assert 1 <= by_unicode <= 2, (word, other)
            assert 1 <= by_letters <= 2, (word, other)
            assert part_of(other) == part, "a test distractor may not be a word of training"
            assert set(other) <= set(SCRIPTS[script].characters)
            assert unicodedata.is_normalized("NFC", other)


def kind_of(character: str) -> str:
    """L letter, N nukta, V virama, S vowel sign, M another sign; by Unicode's names, not by our lists."""
    if unicodedata.category(character)[0] != "M":
        return "L"
    by_class = {7: "N", 9: "V"}.get(unicodedata.combining(character))
    return by_class or ("S" if "VOWEL SIGN" in unicodedata.name(character) else "M")


@pytest.mark.parametrize("script", ALL)
def test_no_word_and_no_distractor_is_malformed(script):
    """Letters joined by viramas, at most one vowel sign, and one sign after it: else a dotted circle is drawn."""
    rng = np.random.default_rng(11)
    for part in PARTS:
        for word in words(script, part):
            for text in [word, *distractors(rng, SCRIPTS[script], word, 9)]:
                kinds = "".join(kind_of(character) for character in text)
                assert regex.fullmatch("(?:LN?(?:VLN?)*(?:V|S?M?))+", kinds), (word, text)


def test_a_word_with_too_few_neighbours_is_an_error():
    with pytest.raises(ValueError, match="latin: found .* words near 'AB'; expected 100000"):
        distractors(np.random.default_rng(0), SCRIPTS["latin"], "AB", 100_000)


@pytest.mark.parametrize("script", ALL)
def test_training_and_testing_have_different_families(script):
    assert SCRIPTS[script].fonts["train"] != SCRIPTS[script].fonts["test"]


def test_urdu_is_tested_in_nastaliq():
    assert SCRIPTS["urdu_nastaliq"].fonts["test"] == "Noto Nastaliq Urdu"


def test_twelve_scripts_of_india():
    assert len(INDIAN) == 12
    assert set(ALL) - set(INDIAN) == {"latin"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"part": "val"}, "part: found 'val'; expected one of train, test"),
        ({"scripts": ["devnagari"]}, "scripts: found 'devnagari'; nearest is 'devanagari'; expected one of "),
        ({"size": 20}, "size: expected .* at least 48 pixels; found 20"),
        ({"num_words": 0}, "num_words: expected a whole number from 1 up; found 0"),
        ({"scripts": []}, r"scripts: expected a list such as .*; found \[\]"),
        ({"seed": -1}, "seed: expected a whole number from 0 up; found -1"),
    ],
)
def test_mistakes_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        Lettering(**arguments)


@pytest.mark.usefixtures("requires_fonts")
class TestDrawn:
    def test_a_sample_is_a_pure_function_of_seed_and_index(self):
        words, again = Lettering(60, seed=4), pickle.loads(pickle.dumps(Lettering(60, seed=4)))
        for index in (41, 3, 20):
            a, b = words[index], again[index]
            assert np.array_equal(a.pop("image"), b.pop("image"))
            assert a == b
            assert words.candidates(index) == again.candidates(index)
        longer = Lettering(600, seed=4)
        assert np.array_equal(longer[3]["image"], words[3]["image"])
        other = Lettering(60, seed=5)
        assert any(other.word(index) != words.word(index) for index in range(12))

    def test_scripts_take_turns_and_every_other_word_is_real(self):
        words = Lettering(48, part="test", size=[60, 150])
        assert [words.label(i) for i in range(24)] == [*range(12), *range(12)]
        for i in range(48):
            real = words.word(i) in SCRIPTS[words.script(i)].words
            assert real == (i // 12 % 2 == 0) == (not words.is_made_up(i))
        sample = words[13]
        assert sample["image"].shape == (60, 150, 3)
        assert sample["image"].dtype == np.uint8
        assert (sample["label"], sample["caption"], sample["key"]) == (1, words.word(13), "lettering-test-0-13")
        with pytest.raises(IndexError, match="expected 0 to 47; found 48"):
            words[48]

    def test_a_real_word_comes_again_only_after_all_others(self):
        words = Lettering(1000, part="test", scripts=["meetei_mayek"])
        real = SCRIPTS["meetei_mayek"].words_of("test")
        shown = [words.word(2 * i) for i in range(2 * len(real))]
        assert sorted(shown[: len(real)]) == sorted(real) == sorted(shown[len(real) :])

    def test_the_right_word_comes_first_among_candidates(self):
        words = Lettering(26, part="test", scripts=ALL, num_distractors=5)
        for i in range(26):
            assert words.candidates(i)[0] == words[i]["caption"]
            assert len(words.candidates(i)) == 6

    @pytest.mark.parametrize("script", ALL)
    def test_candidates_look_different(self, script):
        """No two texts of an image are drawn alike: then a reader could not tell them apart either."""
        words = Lettering(12, part="test", scripts=[script])
        for i in range(12):
            pictures = {_written(text, words.faces[script], 40).tobytes() for text in words.candidates(i)}
            assert len(pictures) == 10

    @pytest.mark.parametrize("part", PARTS)
    @pytest.mark.parametrize("script", ALL)
    def test_nothing_of_a_word_is_cut_off(self, script, part):
        face = Lettering(1, part, [script]).faces[script]
        rng = np.random.default_rng(5)
        for word in words(script, part, 3)[-8:]:
            wide = Image.new("L", (1600, 600))
            ImageDraw.Draw(wide).text((400, 300), word, fill=255, font=face.at(48), anchor="ls")
            box = wide.getbbox()
            assert 0 < box[0] < box[2] < 1600
            assert np.array_equal(np.asarray(wide.crop(box)), np.asarray(_written(word, face, 48))), word
            ink = _ink(rng, word, face, (96, 128))
            assert ink.width <= 0.95 * 128
            assert ink.height <= 0.95 * 96

    def test_every_word_stands_out_from_its_ground(self):
        words = Lettering(78, part="test", scripts=ALL, size=128)
        for i in range(78):
            lightness = srgb_to_lab(words[i]["image"])[..., 0]
            low, high = np.percentile(lightness, (0.5, 99.5))
            assert high - low > 30, words.key(i)  # from 45 less blur, as seen by thin strokes


def test_who_sees_nothing_is_right_about_as_often_as_chance_and_the_word_is_not_amid_its_distractors():
    rng, hits, amid, total = np.random.default_rng(0), 0, 0, 0
    for script in ("devanagari", "tamil", "latin", "bengali"):
        for word in SCRIPTS[script].words[:40]:
            texts = [word, *distractors(rng, SCRIPTS[script], word, 9)]
            units = {unit: rng.normal(size=16) for text in texts for unit in clusters(text)}
            vectors = np.array([np.sum([units[unit] for unit in clusters(text)], axis=0) for text in texts])
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            hits += int((vectors @ rng.normal(size=16)).argmax() == 0)  # an image that says nothing
            amid += int((vectors @ vectors.sum(0)).argmax() == 0)  # the text that is like the others
            total += 1
    assert 0.05 < hits / total < 0.2
    assert amid / total < 0.1
