"""The generated parts of the benchmark as plain lists."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from indiclip.evals import procedural
from indiclip.evals.cards.card import CardClass, load_card
from indiclip.evals.procedural import colours, words
from indiclip.generated.lettering import SCRIPTS
from indiclip.generated.lettering_words import part_of


def card_of(name, ids):
    """One of our cards, with some of its classes, or more."""
    card = load_card(name)
    known = {one.id: one for one in card.classes}
    return replace(card, classes=tuple(known.get(id_, CardClass(id_, {"en": id_})) for id_ in ids))


def test_colours_and_their_gallery(monkeypatch):
    monkeypatch.setattr(procedural, "SWATCHES", {"test": 6, "train": 3})
    made = colours(card_of("indian_colours", ("kesariya", "firozi", "maroon")), size=48)
    assert len(made.images) == len(set(made.keys)) == 27
    assert made.labels.tolist() == [0, 1, 2] * 9
    assert made.is_train.tolist() == [False] * 18 + [True] * 9
    assert made.groups[:9] == ["patch"] * 3 + ["cloth"] * 3 + ["thing"] * 3
    assert made.candidates is None
    assert made.images[18].shape == (48, 48, 3)
    again = pickle.loads(pickle.dumps(made.images))  # loader processes may get them so
    assert np.array_equal(again[20], made.images[20])
    with pytest.raises(IndexError):
        made.images[27]


def test_a_card_names_its_generator():
    assert load_card("indian_colours").generator is colours
    assert load_card("ocr_indic").generator is words
    assert load_card("edibles").generator is None


@pytest.mark.usefixtures("requires_fonts")
def test_words_have_the_labels_of_the_classes_that_were_asked_for(monkeypatch):
    monkeypatch.setattr(procedural, "WORDS", {"test": 4, "train": 2})
    made = words(card_of("ocr_indic", ("tamil", "assamese", "latin")), size=64)
    assert len(made.images) == len(set(made.keys)) == len(made.candidates) == 12
    assert made.labels.tolist() == [0, 2] * 6
    assert made.groups == ["tamil", "latin"] * 6
    assert made.is_train.tolist() == [False] * 8 + [True] * 4
    missing, not_photos, fonts = made.notes
    assert (missing, fonts) == ("no words are drawn in assamese", "fonts of the test words: Noto Sans Tamil, Noto Sans")
    assert "do not predict those on photos" in not_photos
    assert all(len(set(texts)) == 10 for texts in made.candidates)
    for texts, is_train, script in zip(made.candidates, made.is_train, made.groups, strict=True):
        assert {part_of(text) for text in texts} == {"train" if is_train else "test"}
        assert set("".join(texts)) <= set(SCRIPTS[script].characters)
