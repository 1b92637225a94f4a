"""A benchmark run from folders to numbers. `Shades` answers by colour: the oracle is to count the files' own."""

import io
import re

import numpy as np
import pytest
import torch
import yaml
from bench_fakes import PURE, Shades, shades_of
from layout_files import tar, write
from PIL import Image
from test_encode import in_threads

from indiclip.evals import mela_questions, procedural
from indiclip.evals.bench import run_bench
from indiclip.evals.comparison import compare
from indiclip.evals.find import find_bench
from indiclip.evals.leaderboard import row_of
from indiclip.evals.protocols.protocol import Options
from indiclip.evals.results import PHOTOGRAPHS, PROCEDURAL
from indiclip.generated.fonts import MissingFonts

OPTIONS = Options(resamples=20)
COLOURS = {
    "task": "classification",
    "prompts": {"en": ["the colour {c}"]},
    "classes": [{"id": name, "names": {"en": name}} for name in PURE],
}
WORDS = {"task": "matching", "num_candidates": 3, "classes": [{"id": c, "names": {"en": c}} for c in ("red", "blue")]}


@pytest.fixture
def card_file(tmp_path):
    """Writes a user's card and returns its file."""

    def make(name="shades", content=COLOURS):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content), "utf-8")
        return str(tmp_path / f"{name}.yaml")

    return make


@pytest.fixture
def few_generated(monkeypatch):
    """Enough of the generated images."""
    monkeypatch.setattr(procedural, "WORDS", {"test": 2, "train": 1})
    monkeypatch.setattr(procedural, "SWATCHES", {"test": 3, "train": 3})


def folders(names=tuple(PURE), count=8, prefix="test/", **options):
    """Files of which no two have the same bytes: some are one colour."""
    colours = {
        f"{prefix}{name}/{i}.png": png for name in names for i, png in enumerate(shades_of(name, count, **options))
    }
    return {name: png + name.encode() for name, png in colours.items()}


def run(bench, embedder=None, options=OPTIONS, **other):
    return run_bench(embedder or Shades(), bench, options, **other)


def did_you_mean(png):
    """Which colour a flat picture is nearest to, counted from its first pixel."""
    rgb = np.asarray(Image.open(io.BytesIO(png)))[0, 0] - 127.5
    return max(PURE, key=lambda name: rgb @ (np.array(PURE[name]) - 127.5))  # all of one length


def without(result, *names):
    """`about` without what differs from run to run."""
    return {key: value for key, value in result.about.items() if key not in ("seconds", *names)}


def test_a_run_from_folders_to_numbers(tmp_path, card_file):
    """acc1 is the share of files whose own colour is nearest; `train` is the probes' gallery and in no other number."""
    tested, gallery = folders(), folders(count=5, prefix="train/", spread=60)
    write(tmp_path / "shades", tested | gallery)
    result = run(
        find_bench(tmp_path, [card_file()]), options=Options(views=["native", "large", "native"], resamples=20)
    )
    hits = [did_you_mean(png) == key.split("/")[1] for key, png in sorted(tested.items())]
    assert 0.3 < np.mean(hits) < 0.9
    assert result.main()["shades", PHOTOGRAPHS].value == pytest.approx(np.mean(hits))
    assert [row.predicted == row.truth for row in sorted(result.predictions, key=lambda row: row.key)] == hits
    assert [row.predicted for row in result.predictions] == [
        did_you_mean(tested[row.key]) for row in result.predictions
    ]
    card = result.cards[0]
    assert (card.status, card.num_images, card.num_classes, card.of_classes) == ("scored", 48, 6, 6)
    assert result.views == ["native", "large"]  # as asked for, each once
    assert {(row.length, row.view) for row in result.scores} == {(n, v) for n in (2, 3) for v in ("native", "large")}
    assert {row.protocol for row in result.scores} == {"zero_shot", "wording", "knn", "linear_probe"}
    assert (result.about["images"], result.about["texts"]) == (78, 12)  # a prompt and a bare name of each class


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_find_together_what_one_finds(tmp_path, card_file, size):
    write(tmp_path / "shades", {**folders(), "test/red/broken.png": b"no image"})
    bench = find_bench(tmp_path, [card_file()])
    embedders = [Shades() for _ in range(size)]
    first, *others = in_threads(size, lambda ranks: run(bench, embedders[ranks.rank], ranks=ranks, batch_size=5))
    alone = run(bench, batch_size=5)
    assert others == [None] * (size - 1)
    assert (first.scores, first.predictions, first.cards) == (alone.scores, alone.predictions, alone.cards)
    assert without(first) == without(alone)
    assert sum(one.seen for one in embedders) == 48


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="photos: no such folder; expected a folder with the images of each"):
        find_bench(tmp_path / "photos")


def test_nothing_to_score(tmp_path, card_file):
    with pytest.raises(FileNotFoundError, match=r"nothing to score: .* has no folder shades; expected shades"):
        find_bench(tmp_path, [card_file()])
    (tmp_path / "test").mkdir()
    above = "looks like the images of a card itself: name the folder above it, in which it is called shades"
    with pytest.raises(FileNotFoundError, match=above):
        find_bench(tmp_path, [card_file()])
    with pytest.raises(FileNotFoundError, match="nothing to score: no folder of images was given"):
        find_bench(None, ["edibles"])
    with pytest.raises(FileNotFoundError, match="nothing to score: no folder"):
        find_bench(None, ["indian_colours"], procedural=False)


def test_skipped_cards_are_in_no_number_and_no_mean(tmp_path):
    """Two of the packaged cards, one of which has photographs: the mean is that one's."""
    write(tmp_path / "indian_gods", folders(["red", "blue"], prefix=""))
    for name, god in (("red", "ganesha"), ("blue", "shiva")):
        (tmp_path / "indian_gods" / name).rename(tmp_path / "indian_gods" / god)
    bench = find_bench(tmp_path, ["edibles", "indian_gods"])
    assert [items.card.id for items in bench.items] == ["indian_gods"]
    result = run(bench)
    assert {(card.card, card.status) for card in result.cards} == {("edibles", "skipped"), ("indian_gods", "scored")}
    assert {row.card for row in (*result.scores, *result.predictions)} == {"indian_gods"}
    assert not any("edibles" in name for name in result.logged())
    headline, main = result.headline(), result.main()["indian_gods", PHOTOGRAPHS]
    assert (headline["covered"], headline["of"]) == (1, 11)
    assert headline["mean"]["en"] == {
        "value": pytest.approx((main.value - main.chance) / (1 - main.chance)),
        "cards": 1,
    }


def test_a_folder_that_is_no_class_is_named(tmp_path, card_file):
    write(tmp_path / "shades", folders(["red"], prefix="") | {"bleu/1.png": b""})
    with pytest.raises(ValueError, match="shades/bleu: 'bleu' is no class of the card shades; nearest is 'blue'"):
        find_bench(tmp_path, [card_file()])


def test_unknown_folders_are_counted_and_the_flag_leaves_a_card_without_others(tmp_path, card_file):
    write(tmp_path / "shades", {"bleu/1.png": b"x", "rouge/1.png": b"x", "empty/notes.txt": b"x"})
    write(tmp_path / "indian_gods", {f"ganesha/{i}.png": png for i, png in enumerate(folders(["red"]).values())})
    asked = (tmp_path, [card_file(), "indian_gods"])
    named = "shades/bleu: 'bleu' is no class of the card shades; nearest is 'blue'"
    with pytest.raises(
        ValueError, match=f"{named}; --skip-unknown leaves out .*; 2 folders of .*shades are no classes"
    ):
        find_bench(*asked)
    bench = find_bench(*asked, skip_unknown=True)
    assert [items.card.id for items in bench.items] == ["indian_gods"]
    (skipped,) = bench.skipped
    assert "no images (jpg, jpeg, png, webp, jfif, jpe) of the card shades" in skipped.notes[0]
    assert "2 images of 2 classes that are not on the card shades: bleu (1), rouge (1)" in skipped.notes[0]
    with pytest.raises(FileNotFoundError, match="nothing to score: .*bleu"):
        find_bench(*asked[:1], asked[1][:1], skip_unknown=True)


def test_a_class_without_images_is_noted_and_stays_a_candidate(tmp_path, card_file):
    """The files of five classes; the oracle still answers the sixth."""
    tested = folders([name for name in PURE if name != "cyan"])
    write(tmp_path / "shades", tested)
    result = run(find_bench(tmp_path, [card_file()]))
    assert result.cards[0].notes == ["no images of 1 of 6 classes, which stay candidates: cyan"]
    assert (result.cards[0].num_classes, result.cards[0].of_classes) == (5, 6)
    score = result.main()["shades", PHOTOGRAPHS]
    assert (score.num_classes, score.chance) == (6, pytest.approx(1 / 6))
    assert score.value == pytest.approx(
        np.mean([did_you_mean(png) == key.split("/")[1] for key, png in tested.items()])
    )
    assert "cyan" in {row.predicted for row in result.predictions}


BROKEN = {"test/blue/0a.png": b"no image", "test/red/3a.png": next(shades_of("red", 1))[:45], "train/red/0a.png": b""}


def test_unreadable_images_are_named_and_the_numbers_are_those_without_them(tmp_path, card_file):
    """First, in the middle and in the gallery; with another card behind, whose rows must not move."""
    files = folders(spread=150) | folders(count=4, prefix="train/")
    write(tmp_path / "a", files | BROKEN)
    write(tmp_path / "b", folders(count=3) | folders(count=2, prefix="train/") | BROKEN)
    cards = [card_file("a"), card_file("b")]
    results = []
    for _ in range(2):
        bench = find_bench(tmp_path, cards)
        for items in bench.items:
            items.is_flagged = np.array(["4.png" in key for key in items.keys])
        results.append(run(bench, batch_size=7))
        for name in BROKEN:
            for card in ("a", "b"):
                (tmp_path / card / name).unlink(missing_ok=True)
    broken, clean = results
    assert (broken.scores, broken.predictions) == (clean.scores, clean.predictions)
    assert sum(row.flagged for row in broken.predictions) == 6
    for card in broken.cards:
        named = [note.split(": ")[:2] for note in card.notes]
        assert sorted(named) == [["not counted, unreadable", name] for name in sorted(BROKEN)]
    assert [(card.num_images, card.status) for card in broken.cards] == [(48, "scored"), (18, "scored")]
    assert [card.notes for card in clean.cards] == [[], []]


def test_many_unreadable_images_are_counted(tmp_path, card_file):
    write(tmp_path / "shades", folders() | {f"test/red/broken{i}.png": b"" for i in range(13)})
    notes = run(find_bench(tmp_path, [card_file()])).cards[0].notes
    assert len(notes) == 11
    assert notes[-1] == "not counted, unreadable: 3 more"


@pytest.mark.parametrize("content", [COLOURS, WORDS])
def test_a_card_of_which_nothing_can_be_read_is_skipped(tmp_path, card_file, content):
    """A readable gallery is nothing to score either. The other card's numbers are its own."""
    write(tmp_path / "a", {"test/red/0.png": b"", "test/red/0.txt": "x", "train/red/0.txt": "y"})
    write(tmp_path / "a/train/red", {"0.png": next(shades_of("red", 1))})
    write(tmp_path / "b", folders(prefix=""))
    result = run(find_bench(tmp_path, [card_file("a", content), card_file("b")]))
    assert [card.status for card in result.cards] == ["skipped", "scored"]
    assert result.cards[0].notes[0] == "none of the images to score can be read"
    assert {row.card for row in result.scores} == {"b"}
    assert result.scores == run(find_bench(tmp_path, [card_file("b")])).scores


def test_captions_on_a_model_without_texts_are_skipped_and_classes_are_probed(tmp_path, card_file):
    write(tmp_path / "captions", {"c.csv": "file,caption\n0.png,red\n", "0.png": next(shades_of("red", 1))})
    write(tmp_path / "shades", folders())
    cards = [card_file("captions", {"task": "retrieval"}), card_file()]
    result = run(find_bench(tmp_path, cards), Shades(embeds_text=False))
    assert [card.status for card in result.cards] == ["skipped", "scored"]
    assert "the model embeds no texts" in result.cards[0].notes[0]
    assert {(row.card, row.protocol) for row in result.scores} == {("shades", "knn"), ("shades", "linear_probe")}
    assert result.predictions == []


def test_captions_in_no_language_that_was_asked_for(tmp_path, card_file):
    write(tmp_path / "captions", {"c.csv": "file,hi\n0.png,red\n", "0.png": next(shades_of("red", 1))})
    write(tmp_path / "shades", folders())
    cards = [card_file("captions", {"task": "retrieval"}), card_file()]
    result = run(find_bench(tmp_path, cards), options=Options(["ta"], resamples=20))
    assert result.cards[0].status == "skipped"
    assert result.cards[0].notes == [
        "no image has a caption in the languages that were asked for",
        "not scored in ta: no captions",
    ]


def test_a_class_list_in_another_order_gives_the_same_numbers(tmp_path, card_file):
    """Shards whose labels are numbers, which count a list as the card has it and a shuffled one."""
    results = []
    for seed in (None, 1):
        names = list(PURE) if seed is None else np.random.default_rng(seed).permutation(list(PURE)).tolist()
        samples = [(name, png) for name in PURE for png in shades_of(name, 6)]
        members = {f"{i}.png": png for i, (_, png) in enumerate(samples)}
        members |= {f"{i}.cls": str(names.index(name)) for i, (name, _) in enumerate(samples)}
        write(tmp_path / str(seed) / "shades", {"test.tar": tar(members), "classes.txt": "\n".join(names)})
        results.append(run(find_bench(tmp_path / str(seed), [card_file()])))
    one, other = results
    assert (one.scores, one.predictions) == (other.scores, other.predictions)
    assert one.about["data"] == other.about["data"]
    assert (
        other.cards[0].notes[0].endswith("the classes are in another order than on the card; labels are mapped by name")
    )


def test_two_cards_of_one_id_are_an_error(tmp_path, card_file):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "shades.yaml").write_text(yaml.safe_dump(COLOURS))
    write(tmp_path / "shades", folders())
    cards = [card_file(), str(tmp_path / "more" / "shades.yaml")]
    with pytest.raises(ValueError, match=f"{re.escape(cards[0])} and {re.escape(cards[1])} are both called 'shades'"):
        find_bench(tmp_path, cards)


# What is generated


@pytest.mark.usefixtures("few_generated")
@pytest.mark.parametrize("has_folder", [False, True])
def test_generated_images_are_scored_and_in_no_mean(has_folder, tmp_path):
    if has_folder:
        (tmp_path / "indian_colours" / "no_colour").mkdir(parents=True)
    result = run(find_bench(tmp_path if has_folder else None, ["indian_colours"], skip_unknown=True))
    assert [(card.part, card.status) for card in result.cards] == [(PHOTOGRAPHS, "absent"), (PROCEDURAL, "scored")]
    assert {row.part for row in (*result.scores, *result.predictions)} == {PROCEDURAL}
    assert ("indian_colours", PROCEDURAL) in result.main()
    assert result.headline() == {"suite": "india", "covered": 0, "of": 11, "mean": {}}
    names = [name for name in result.logged() if name.startswith("eval/india/")]
    assert names
    assert all(name.startswith("eval/india/indian_colours_procedural/") for name in names)


def test_a_generated_card_needs_no_photographs_unless_it_is_a_category_of_india(monkeypatch):
    monkeypatch.setattr(mela_questions, "PER_KIND", 5)
    bench = find_bench(None, ["mela_questions"])
    assert [items.procedural for items in bench.items] == [True]
    assert bench.skipped == []
    with pytest.raises(FileNotFoundError, match="nothing to score: no folder of images was given"):
        find_bench(None, ["mela_questions"], procedural=False)


@pytest.mark.usefixtures("few_generated")
def test_generated_images_are_the_same_each_time_and_others_with_another_seed():
    one, again, other = (find_bench(None, ["indian_colours"], seed=seed) for seed in (3, 3, 4))
    for i in range(0, len(one.items[0]), 29):
        assert np.array_equal(one.items[0].images[i], again.items[0].images[i])
    assert not np.array_equal(one.items[0].images[0], other.items[0].images[0])
    assert one.items[0].keys == again.items[0].keys
    assert one.data == again.data != other.data
    assert list(one.data) == ["indian_colours_procedural"]


@pytest.mark.usefixtures("few_generated", "requires_fonts")
def test_generated_words_are_matched():
    bench = find_bench(None, ["ocr_indic"])
    result = run(bench, options=Options(["en"], resamples=20))
    assert {"matching", "classes"} <= {row.protocol for row in result.scores}
    tested = bench.items[0].tested_N
    assert result.cards[1].num_images == tested.sum() < len(tested)
    assert result.main()["ocr_indic", PROCEDURAL].num_items == tested.sum()


@pytest.mark.usefixtures("few_generated")
def test_missing_fonts_skip_the_words_alone(monkeypatch):
    def no_fonts(*_, **__):
        raise MissingFonts("install fonts-noto-core")

    monkeypatch.setattr(procedural, "Lettering", no_fonts)
    bench = find_bench(None, ["ocr_indic", "indian_colours"])
    assert [items.card.id for items in bench.items] == ["indian_colours"]
    notes = {(card.card, card.part): card.notes for card in bench.skipped}
    assert notes["ocr_indic", PROCEDURAL] == ["install fonts-noto-core"]


def test_a_users_card_that_is_called_like_ours_has_no_generated_part(tmp_path, card_file):
    write(tmp_path / "indian_colours", folders())
    bench = find_bench(tmp_path, [card_file("indian_colours")])
    assert [items.procedural for items in bench.items] == [False]


# Digests of the data


def digest(tmp_path, card, files, name="shades"):
    root = tmp_path / str(len(list(tmp_path.iterdir())))
    write(root / name, files)
    return find_bench(root, [card]).data[name]


def table(rows):
    return "file,class,split\n" + "".join(f"{name},{label},{split}\n" for name, label, split in rows)


def test_the_digest_is_of_the_keys_and_labels_of_what_is_scored_in_any_order(tmp_path, card_file):
    images = {f"{i}.png": png for i, png in enumerate(shades_of("red", 3))}
    rows = [("0.png", "red", "test"), ("1.png", "blue", "test"), ("2.png", "red", "train")]
    card = card_file()

    def of(rows):
        return digest(tmp_path, card, images | {"images.csv": table(rows)})

    first = of(rows)
    assert of(rows[::-1]) == first
    others = [
        [("0.png", "cyan", "test"), *rows[1:]],
        [("0.png", "blue", "test"), ("1.png", "red", "test"), rows[2]],
        [*rows[:2], ("2.png", "red", "test")],
    ]
    assert len({first, *map(of, others)}) == 4
    assert of(rows[:2]) == first  # another gallery changes the probes alone
    # The same classes in another order on the card are the same data.
    assert digest(tmp_path, card_file(content=COLOURS | {"classes": COLOURS["classes"][::-1]}), images | {
        "images.csv": table(rows)
    }) == first  # fmt: skip


def test_the_digest_is_of_captions_and_words_too(tmp_path, card_file):
    png = next(shades_of("red", 1))
    card = card_file(content={"task": "retrieval"})
    texts = ["file,en\n0.png,red\n", "file,en\n0.png,rad\n", "file,hi\n0.png,red\n"]
    assert len({digest(tmp_path, card, {"c.csv": text, "0.png": png}) for text in texts}) == 3
    card = card_file(content=WORDS)
    texts = ["file,class,text\n0.png,red,one\n", "file,class,text\n0.png,red,two\n"]
    assert len({digest(tmp_path, card, {"c.csv": text, "0.png": png}) for text in texts}) == 2


def test_runs_are_compared_and_ranked_by_their_data(tmp_path):
    """What a run says of its data is what comparisons and the leaderboard look for."""
    gods = {"red": "ganesha", "blue": "shiva"}
    files = {name.replace(old, new): png for old, new in gods.items() for name, png in folders([old]).items()}
    gallery = {name.replace("test/", "train/"): png for name, png in files.items()}
    first = next(iter(files))
    recoloured = files | {first: next(shades_of("green", 1))}
    broken = files | {first: b"no image"}
    results = []
    for name, content in (("a", files), ("b", files | gallery), ("c", recoloured), ("d", broken)):
        write(tmp_path / name / "indian_gods", content)
        results.append(run(find_bench(tmp_path / name, ["indian_gods"])))
    assert {(row.shared, row.of) for row in compare(results[0], results[1])} == {(len(files), (len(files),) * 2)}
    for other, count in ((2, len(files)), (3, len(files) - 1)):
        for row in compare(results[0], results[other]):
            assert (row.shared, row.of, row.why_not) == (len(files) - 1, (len(files), count), "")
    data = [row_of(result)["data"] for result in results]
    assert data[0]
    assert data[0] == data[1]
    assert len(set(data)) == 3


class Short(Shades):
    """Reads six bytes of a text."""

    def tokenize(self, texts):
        rows = [list(text.encode()[:6]) + [0] * (6 - len(text.encode()[:6])) for text in texts]
        return {"input_ids": torch.tensor(rows)}


def test_captions_and_prompts_that_are_cut_are_counted_by_language(tmp_path, card_file):
    pngs = list(shades_of("red", 3))
    captions = "file,en,hi\n0.png,red,लाल\n1.png,a red thing,\n2.png,red again,\n"
    write(tmp_path / "found", {"c.csv": captions} | {f"{i}.png": png for i, png in enumerate(pngs)})
    write(tmp_path / "told", folders(count=1))
    cards = [card_file("found", {"task": "retrieval"}), card_file("told", COLOURS | {"prompts": {"en": ["{c}"]}})]
    result = run(find_bench(tmp_path, cards), Short())
    notes = {card.card: [note for note in card.notes if "cut" in note] for card in result.cards}
    assert notes["found"] == ["captions longer than the text tower reads, which were cut: en 2 of 3, hi 1 of 1"]
    assert notes["told"] == ["prompts longer than the text tower reads, which were cut: en 1 of 6"]  # magenta
