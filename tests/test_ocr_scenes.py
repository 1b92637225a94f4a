"""Words cut out of photos, words looked for in whole photos, and the baseline that reads them."""

import json
import os
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import bench_tesseract
import prepare_ocr_scenes

from indiclip.evals.card_scorer import CardScorer, texts_of
from indiclip.evals.cards.card import load_card
from indiclip.evals.find import find_bench
from indiclip.evals.images.items import Items
from indiclip.evals.protocols.in_scene import InScene
from indiclip.evals.protocols.protocol import Options


def word(text, x, script="latin", height=20, **other):
    polygon = [[x, 10], [x + 30, 12], [x + 28, 10 + height], [x, 8 + height]]
    return {"polygon": polygon, "text": text, "script": script, "language": "", "text_is_romanised": False} | other


SCENES = [
    {
        "file_name": "a.png",
        "words": [
            word("Shop", 10),
            word("दुकान", 60, "devanagari"),
            word("Dokan", 110, "bengali_assamese", text_is_romanised=True),
            word("Dukan", 110, "devanagari"),  # romanised, and not marked
            word("small", 160, height=8),
            word("9876", 10),
            word("Bwkha", 60, "other"),
            word("away", 300),
        ],
    },
    {
        "file_name": "b.png",
        "words": [
            word("দোকান", 10, "Bengali"),
            word("অসম", 60, "bengali_assamese", language="Assamese"),
            word("TEA", 110),
        ],
    },
    {"file_name": "c.png", "words": [word("x", 10, text_is_romanised=True)]},
]


@pytest.fixture
def scenes(tmp_path):
    folder = tmp_path / "scenes"
    (folder / "images").mkdir(parents=True)
    for number, scene in enumerate(SCENES):
        pixels = np.random.default_rng(number).integers(0, 256, (60, 200, 3), dtype=np.uint8)
        pixels[8:33, 57:94] = (200, 10, 10)  # the second word
        Image.fromarray(pixels).save(folder / "images" / scene["file_name"])
    (folder / "scenes.json").write_text(json.dumps(SCENES), "utf-8")
    return folder


def test_words_are_cut_out_and_what_cannot_be_read_is_counted(scenes, tmp_path, capsys):
    prepare_ocr_scenes.main([str(scenes), str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "5 words (latin 2, devanagari 1, bengali 1, assamese 1)" in said
    for line in (
        "2 words with a romanised transcript",
        "1 words with a transcript in another script (devanagari written as Latin)",
        "1 words less than 16 px high",
        "1 words without a letter in the transcript",
        "1 words in a script that is not on the card (other)",
        "1 words outside of the photo",
    ):
        assert f"left out: {line}" in said
    assert not (tmp_path / "out" / "ocr_scenes" / "images" / "c.png").exists()
    bench = find_bench(tmp_path / "out", ["ocr_indic", "ocr_scenes"], procedural=False)
    crops, photos = bench.items
    found = dict(zip(crops.keys, crops.candidates, strict=True))
    assert (found["a-001.jpg"][0], found["b-001.jpg"][0]) == ("दुकान", "অসম")
    pixels = crops.images[crops.keys.index("a-001.jpg")].decode()
    # From x 60 to 90 and y 10 to 30, and a tenth of the height on all sides: all of one colour.
    assert pixels.shape == (24, 34, 3)
    assert abs(pixels.astype(int) - (200, 10, 10)).max() < 10
    assert photos.columns["word"] == [["Shop", "दुकान"], ["দোকান", "অসম", "TEA"]]


def test_the_words_drawn_have_the_shape_of_those_cut_out(scenes, tmp_path, requires_fonts):
    prepare_ocr_scenes.main([str(scenes), str(tmp_path / "out"), "--rendered", str(tmp_path / "drawn")])
    cut, drawn = (tmp_path / name / "ocr_indic" for name in ("out", "drawn"))
    assert (cut / "words.tsv").read_bytes() == (drawn / "words.tsv").read_bytes()
    for file in (cut / "images").iterdir():
        of_cut, of_drawn = (Image.open(folder / "images" / file.name) for folder in (cut, drawn))
        assert of_drawn.width / of_drawn.height == pytest.approx(of_cut.width / of_cut.height, rel=0.02)


WORDS = [["Cat", "dog", "घर"], ["DOG", "cow"], ["cow", "नल"], ["bee", "Cow", "फल"]]
SCRIPTS = [["latin", "latin", "deva"], ["latin", "latin"], ["latin", "deva"], ["latin", "latin", "deva"]]


def photos(**other):
    columns = {"word": WORDS, "script": SCRIPTS}
    keys = [f"{i}.jpg" for i in range(len(WORDS))]
    return Items(load_card("ocr_scenes"), [None] * 4, keys, np.full(4, -1), columns=columns, **other)


def test_no_word_of_a_photo_is_a_wrong_answer_to_it():
    asked = {(q.image, q.texts[0]): set(q.texts[1:]) for q in InScene().questions(photos())}
    assert asked == {
        (0, "Cat"): {"cow", "bee"}, (0, "dog"): {"cow", "bee"}, (0, "घर"): {"नल", "फल"},
        (1, "DOG"): {"Cat", "bee"}, (1, "cow"): {"Cat", "bee"},
        (2, "cow"): {"Cat", "dog", "bee"}, (2, "नल"): {"घर", "फल"},
        (3, "bee"): {"Cat", "dog"}, (3, "Cow"): {"Cat", "dog"}, (3, "फल"): {"घर", "नल"},
    }  # fmt: skip
    few = list(InScene(num_candidates=2).questions(photos()))
    assert {len(q.texts) for q in few} == {2}
    assert few == list(InScene(num_candidates=2).questions(photos()))
    with pytest.raises(ValueError, match="num_candidates: found 1; expected at least 2"):
        InScene(num_candidates=1)


def test_accuracy_in_scenes_by_hand():
    """A photo's embedding is the axis of its first word: that one is found, and another only if it is nearer by more
    than nothing than all wrong ones (ties count against it).
    """
    items = photos(is_flagged=np.array([True, False, False, False]))
    axes = {name: axis for axis, name in enumerate(["cat", "dog", "cow", "bee", "घर", "नल", "फल"])}
    texts = {text: torch.eye(7)[axes[text.split('"')[1].casefold()]] for text in texts_of(items, Options())}
    images = {"native": torch.eye(7)[[axes[words[0].casefold()] for words in WORDS]]}
    scorer = CardScorer(items, images, texts, [7], Options()).run()
    found = {(row.metric, row.subset): row for row in scorer.scores}
    assert found["acc1", ""].value == 4 / 10
    assert found["acc1", ""].num_items == 10
    # Three candidates each but for photo 2's `cow`, which has four.
    assert found["acc1", ""].chance == pytest.approx((9 / 3 + 1 / 4) / 10)
    assert (found["acc1", "deva"].value, found["acc1", "deva"].num_items) == (0, 3)
    assert (found["acc1", "clean"].value, found["acc1", "clean"].num_items) == (3 / 7, 7)


def test_a_photo_that_cannot_be_read_leaves_words_whose_embeddings_are_there():
    """Of a word that a photo has in two cases one is asked for, and the other may be drawn, or drawn no more."""
    card = replace(load_card("ocr_scenes"), protocols=(InScene(num_candidates=2),))
    words = [["Cat", "cat"], *([letter] for letter in "asdfghj")]
    columns = {"word": words, "script": [["latin"] * len(of_photo) for of_photo in words]}
    every = Items(card, [None] * 8, list("01234567"), np.full(8, -1), columns=columns)
    texts = {text: torch.ones(2) for text in texts_of(every, Options())}
    for kept in combinations(range(8), 5):
        scores = CardScorer(every.select(kept), {"native": torch.ones(5, 2)}, texts, [2], Options()).run().scores
        assert {row.num_items for row in scores} == {5}


def test_an_empty_word_is_named():
    items = photos()
    items.columns["word"] = [["Cat", " ", "x"], *WORDS[1:]]
    with pytest.raises(ValueError, match="0.jpg: word: found an empty cell"):
        InScene().check(items)


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("कि", "की", 1), ("ab", "ba", 2)],
)
def test_edit_distance(one, other, distance):
    assert bench_tesseract.edit_distance(one, other) == bench_tesseract.edit_distance(other, one) == distance


def test_what_was_read_is_matched_to_the_nearest_candidate_and_ties_count_against_it():
    matched = bench_tesseract.is_matched
    assert matched("SH0P", ["SHOP", "SHIP2", "CROW"])
    assert not matched("SHXP", ["SHOP", "SHIP"])  # one letter from both
    assert not matched("", ["SHOP", "SHIP"])
    # Distances 3 of 4 and 3 of 8: the longer one is nearer.
    assert matched("abcde", ["abcdefgh", "axyz"])


def test_scores_of_what_was_read_by_hand():
    read = [
        bench_tesseract.Read("latin", text, [word, "zzzz"]) for text, word in (("ab", "ab"), ("a", "abc"), ("", "q"))
    ]
    matching, exact, rate = bench_tesseract.scores(read)
    assert (matching.value, exact.value, rate.value) == (2 / 3, 1 / 3, 3 / 6)


FAKE = """#!{python}
import sys
from PIL import Image
if sys.argv[1] == "--list-langs":
    print("List of available languages (2):\\nLatin\\nscript/Bengali")
else:
    image, out, option, script, _, psm = sys.argv[1:]
    assert (out, option, psm) == ("stdout", "-l", "8")
    print({{"Latin": "Shop ", "Bengali": "দোকন"}}[script] if Image.open(image).width else "")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    file = tmp_path / "bin" / "tesseract"
    file.parent.mkdir()
    file.write_text(FAKE.format(python=sys.executable), "utf-8")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{file.parent}{os.pathsep}{os.environ['PATH']}")


def test_tesseract_is_asked_for_each_word_in_its_script(scenes, tmp_path, fake, capsys):
    prepare_ocr_scenes.main([str(scenes), str(tmp_path / "out")])
    capsys.readouterr()
    bench_tesseract.main(["--images", str(tmp_path / "out"), "--no-procedural", "--psm", "8"])
    said = capsys.readouterr().out
    assert "no data of Tesseract for devanagari; apt-get install tesseract-ocr-script-deva" in said
    rows = {line.split(" | ")[1]: line.split(" | ")[2:] for line in said.splitlines()[3:]}
    assert {name: cells[0] for name, cells in rows.items()} == {
        "all": "4",
        "latin": "2",
        "bengali": "1",
        "assamese": "1",
    }
    # `Shop` is read on both Latin words, `দোকন` for `দোকান`.
    assert rows["latin"][3].startswith("0.500")
    assert rows["bengali"][3].startswith("0.000")
    assert rows["bengali"][4].startswith("0.200")


def test_where_tesseract_is_missing_it_is_said_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="no `tesseract` on PATH.*apt-get install tesseract-ocr tesseract-ocr-script"):
        bench_tesseract.main(["--no-procedural"])
