"""The generated parts of the benchmark as plain lists."""

import pickle

import numpy as np
import pytest

from indiclip.evals.procedural import colours, ocr_words
from indiclip.generated.lettering import SCRIPTS
from indiclip.generated.lettering_words import part_of

PAIRS = [("kesariya", "#FF9933"), ("firozi", "#40E0D0"), ("maroon", "#800000")]


def test_colours_and_their_gallery():
    made = colours(PAIRS, size=48, per_colour=6, train_per_colour=3)
    assert len(made.images) == len(set(made.keys)) == 27
    assert made.labels.tolist() == [0, 1, 2] * 9
    assert made.is_train.tolist() == [False] * 18 + [True] * 9
    assert made.groups[:9] == ["patch"] * 3 + ["cloth"] * 3 + ["thing"] * 3
    assert made.candidates is None
    assert made.images[18].shape == (48, 48, 3)
    again = pickle.loads(pickle.dumps(made.images))  # loader processes may get them so
    assert np.array_equal(again[20], made.images[20])
    for beyond in (27, -1):
        with pytest.raises(IndexError):
            made.images[beyond]


def test_a_colour_twice_is_an_error():
    with pytest.raises(ValueError, match="every id once"):
        colours([*PAIRS, ("maroon", "#000000")])


def test_no_script_that_can_be_drawn_is_an_error():
    with pytest.raises(ValueError, match=r"expected some of devanagari.*; found \['assamese'\]"):
        ocr_words(["assamese"])


@pytest.mark.usefixtures("requires_fonts")
def test_words_have_the_labels_of_the_classes_that_were_asked_for():
    classes = ["tamil", "assamese", "latin"]
    made = ocr_words(classes, size=64, per_script=4, train_per_script=2)
    assert len(made.images) == len(set(made.keys)) == len(made.candidates) == 12
    assert made.labels.tolist() == [0, 2] * 6
    assert made.groups == ["tamil", "latin"] * 6
    assert made.is_train.tolist() == [False] * 8 + [True] * 4
    assert made.notes == ["no words are drawn in assamese", "fonts of the test words: Noto Sans Tamil, Noto Sans"]
    assert all(len(set(texts)) == 10 for texts in made.candidates)
    for texts, is_train, script in zip(made.candidates, made.is_train, made.groups, strict=True):
        assert {part_of(text) for text in texts} == {"train" if is_train else "test"}
        assert set("".join(texts)) <= set(SCRIPTS[script].characters)
