"""`indiclip bench import`: there and back with the same bytes and labels; clip-benchmark reads what was written."""

import json
import tarfile

import numpy as np
import pytest
import yaml
from layout_files import CARD, FOLDERS, KARPATHY, MATCHING, TABLE, TABLE_IMAGES, WORDS, jpeg, write

from indiclip.cli import main
from indiclip.evals.cards.card import load_card
from indiclip.evals.images import convert as module
from indiclip.evals.images.convert import convert
from indiclip.evals.images.layouts import read_items


@pytest.fixture
def card(tmp_path):
    (tmp_path / "food.yaml").write_text(yaml.safe_dump(CARD, allow_unicode=True), "utf-8")
    return str(tmp_path / "food.yaml")


def content(items):
    """All that is right about each image, in no order."""
    is_train = [False] * len(items) if items.is_train is None else items.is_train.tolist()
    classes = [items.card.classes[label].id if label >= 0 else "" for label in items.labels]
    captions = [{code: texts[i] for code, texts in items.captions.items()} for i in range(len(items))]
    texts = [texts[0] for texts in items.candidates or [[""]] * len(items)]
    rows = zip([items.images[i].data for i in range(len(items))], is_train, classes, captions, texts, strict=True)
    return sorted(rows, key=repr)


def files(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_there_and_back(card, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SHARD_SAMPLES", 2)
    write(tmp_path / "a", {f"train/{name}": data for name, data in FOLDERS.items()})
    write(tmp_path / "a", {"test/idli/x.jpg": jpeg(7), "test/idli/y.jpg": jpeg(8), "test/ladoo/x.jpg": jpeg(9)})
    done = convert(str(tmp_path / "a"), card, str(tmp_path / "b"))
    assert (done.images, done.left_out) == ({"train": 4, "test": 3}, [])
    assert sorted(files(tmp_path / "b")) == [
        "classnames.txt", "test/0.tar", "test/1.tar", "test/nshards.txt", "train/0.tar", "train/1.tar",
        "train/nshards.txt", "zeroshot_classification_templates.txt",
    ]  # fmt: skip
    assert (tmp_path / "b" / "classnames.txt").read_text() == "masala dosa\nidli\nladdu\n"
    convert(str(tmp_path / "b"), card, str(tmp_path / "c"), layout="folder")
    first, second, third = (read_items(load_card(card), tmp_path / name) for name in "abc")
    assert content(first) == content(second) == content(third)
    # The same source gives the same bytes; nothing else is left in the parent folder.
    convert(str(tmp_path / "a"), card, str(tmp_path / "d"))
    assert files(tmp_path / "b") == files(tmp_path / "d")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b", "c", "d", "food.yaml"]


def test_real_photos_there_and_back(data_root, tmp_path):
    source = data_root / "india" / "edibles_food"
    found = json.loads((source / "classes.json").read_text("utf-8"))
    classes = [{"id": key, "names": {"en": one["english"]}} for key, one in found.items()]
    card = tmp_path / "dishes.yaml"
    card.write_text(yaml.safe_dump({"task": "classification", "classes": classes}), "utf-8")
    convert(str(source), str(card), str(tmp_path / "wds"))
    done = convert(str(tmp_path / "wds"), str(card), str(tmp_path / "back"), "folder")
    assert done.images["test"] == sum(one["n"] for one in found.values())
    kept = {key: sorted(file.read_bytes() for file in (source / key).iterdir()) for key in found}
    back = {key: sorted(file.read_bytes() for file in (tmp_path / "back/test" / key).iterdir()) for key in found}
    assert kept == back


def test_another_order_of_classes_gives_the_same(card, tmp_path):
    write(tmp_path / "a", FOLDERS)
    reordered = tmp_path / "reordered.yaml"
    reordered.write_text(yaml.safe_dump({**CARD, "classes": CARD["classes"][::-1]}, allow_unicode=True), "utf-8")
    convert(str(tmp_path / "a"), str(reordered), str(tmp_path / "b"))
    items = read_items(load_card(card), tmp_path / "b")
    assert content(items) == content(read_items(load_card(card), tmp_path / "a"))
    assert "labels are mapped by name" in items.notes[0]


def test_names_and_prompts_of_another_language(card, tmp_path, capsys):
    write(tmp_path / "a", FOLDERS)
    words = ["bench", "import", str(tmp_path / "a"), "--card", card, "--out", str(tmp_path / "b"), "--language"]
    assert main([*words, "hi"]) == 2
    expected = "2 classes of food have no name in 'hi', first idli; all have one in en"
    assert expected in capsys.readouterr().err
    full = tmp_path / "full.yaml"
    names = zip(("डोसा", "इडली", "लड्डू"), CARD["classes"], strict=True)
    classes = [{"id": one["id"], "names": {"en": one["names"]["en"], "hi": hindi}} for hindi, one in names]
    prompts = {"hi": ["{c} की तस्वीर।"]}
    full.write_text(yaml.safe_dump({"task": "classification", "classes": classes, "prompts": prompts}), "utf-8")
    convert(str(tmp_path / "a"), str(full), str(tmp_path / "b"), language="hi")
    assert (tmp_path / "b" / "classnames.txt").read_text("utf-8") == "डोसा\nइडली\nलड्डू\n"
    assert (tmp_path / "b" / "zeroshot_classification_templates.txt").read_text("utf-8") == "{c} की तस्वीर।\n"
    assert content(read_items(load_card(str(full)), tmp_path / "b")) == content(
        read_items(load_card(str(full)), tmp_path / "a")
    )


def test_captions_there_and_back(tmp_path):
    card = tmp_path / "photos.yaml"
    card.write_text("task: retrieval\n")
    table = "file,split,en,hi\na.jpg,test,one,एक\na.jpg,test,two,\nb.jpg,train,three,तीन\n"
    write(tmp_path / "a", {"x.csv": table, "a.jpg": jpeg(1), "b.jpg": jpeg(2)})
    convert(str(tmp_path / "a"), str(card), str(tmp_path / "b"), "folder")
    assert (tmp_path / "b" / "captions.csv").read_text("utf-8") == table
    convert(str(tmp_path / "a"), str(card), str(tmp_path / "c"), language="hi")
    first, second, third = (read_items(load_card(str(card)), tmp_path / name) for name in "abc")
    assert content(first) == content(second)
    assert third.captions == {"en": [["एक"], ["तीन"]]}  # the layout does not say the language
    assert (tmp_path / "c" / "dataset_type.txt").read_text() == "retrieval\n"
    with pytest.raises(ValueError, match="--language: found 'hid'; nearest is 'hi'; expected one of en, hi"):
        convert(str(tmp_path / "a"), str(card), str(tmp_path / "d"), language="hid")


def test_words_there_and_back_and_clip_benchmark_has_no_such_task(tmp_path):
    card = tmp_path / "words.yaml"
    card.write_text(yaml.safe_dump(WORDS, allow_unicode=True), "utf-8")
    write(tmp_path / "a", MATCHING["table"])
    convert(str(tmp_path / "a"), str(card), str(tmp_path / "b"), "folder")
    first, second = (read_items(load_card(str(card)), tmp_path / name) for name in "ab")
    assert content(first) == content(second)
    with pytest.raises(ValueError, match="clip-benchmark has no task like matching; --layout folder can hold words"):
        convert(str(tmp_path / "a"), str(card), str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_names_that_are_taken_or_unfit_for_a_file(card, tmp_path):
    images = {"1.jpg": jpeg(1), "x/1.jpg": jpeg(2), "y/1.png": jpeg(3), "a b.jpg": jpeg(4)}
    write(tmp_path / "a", {"i.csv": "file,class\n" + "".join(f"{name},idli\n" for name in images), **images})
    convert(str(tmp_path / "a"), card, str(tmp_path / "b"), "folder")
    found = {name.removeprefix("test/idli/"): data for name, data in files(tmp_path / "b").items()}
    assert found == {"1.jpg": jpeg(1), "1_2.jpg": jpeg(2), "1_3.jpg": jpeg(3), "a_b.jpg": jpeg(4)}  # by their bytes


def test_what_cannot_be_read_is_left_out_and_said(card, tmp_path, capsys):
    write(tmp_path / "a", {**FOLDERS, "idli/broken.jpg": jpeg(5, (90, 90))[:700], "idli/none.png": b"x"})
    out = tmp_path / "b"
    assert main(["bench", "import", str(tmp_path / "a"), "--card", card, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: 4 images of {card} (test 4), layout clip-benchmark" in printed
    assert "left out: 2 that cannot be read\n    idli/broken.jpg: damaged JPEG" in printed
    assert "idli/none.png: expected the bytes of a JPEG, PNG or WebP" in printed
    write(tmp_path / "c", {"idli/none.png": b"x"})
    assert main(["bench", "import", str(tmp_path / "c"), "--card", card, "--out", str(tmp_path / "d")]) == 2
    assert "none of 1 images can be read, first idli/none.png" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_nothing_is_overwritten_or_half_written(card, tmp_path, monkeypatch, capsys):
    write(tmp_path / "a", FOLDERS)
    write(tmp_path / "b", {"x": "mine"})
    words = ["bench", "import", str(tmp_path / "a"), "--card", card, "--out"]
    assert main([*words, str(tmp_path / "b")]) == 2
    assert "b is there already and not empty; nothing was written" in capsys.readouterr().err
    assert files(tmp_path / "b") == {"x": b"mine"}

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", full)
        assert main([*words, str(tmp_path / "c")]) == 1
    assert "No space left" in capsys.readouterr().err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b", "food.yaml"]
    (tmp_path / "c").mkdir()
    assert main([*words, str(tmp_path / "c")]) == 0  # an empty folder is as good as none


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layout", "foldr"], "--layout: found 'foldr'; nearest is 'folder'; expected one of folder, clip-benchmark"),
        (["--split", "train"], "--split: found 'train'"),
        (["--split", "../x"], "--split: found '../x'"),
        (["--card", "edible"], "no card 'edible'; nearest is 'edibles'"),
        (["--card", "face_attributes"], "it asks for the columns group, which an import would lose"),
        (["--lang", "hi"], "--lang: no such option; nearest is '--language'"),
    ],
)
def test_mistakes_in_the_command(flags, message, card, tmp_path, capsys):
    write(tmp_path / "a", FOLDERS)
    words = ["bench", "import", str(tmp_path / "a"), "--card", card, "--out", str(tmp_path / "b")]
    assert main([*words, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_table_as_the_source_and_a_source_that_is_not_there(card, tmp_path):
    write(tmp_path / "a", {"i.csv": TABLE, **TABLE_IMAGES})
    assert convert(str(tmp_path / "a" / "i.csv"), card, str(tmp_path / "b"), split="val").images == {"val": 4}
    assert (tmp_path / "b" / "val" / "nshards.txt").read_text() == "1\n"
    with pytest.raises(FileNotFoundError, match="c: no such file or folder"):
        convert(str(tmp_path / "c"), card, str(tmp_path / "d"))


def test_clip_benchmark_reads_what_was_written(card, tmp_path):
    builder = pytest.importorskip("clip_benchmark.datasets.builder", exc_type=ImportError)
    write(tmp_path / "a", FOLDERS)
    convert(str(tmp_path / "a"), card, str(tmp_path / "b"))
    theirs = builder.build_wds_dataset("x", lambda image: image, split="test", data_dir=str(tmp_path / "b"))
    ours = read_items(load_card(card), tmp_path / "b")
    assert theirs.classes == [one.names["en"] for one in ours.card.classes]
    assert theirs.templates == ["{c}"]
    seen = [(np.asarray(image), label) for image, label in theirs]
    assert [label for _, label in seen] == ours.labels.tolist()
    assert all((pixels.shape[:2] == ours.images[i].size_hw) for i, (pixels, _) in enumerate(seen))
    (tmp_path / "photos.yaml").write_text("task: retrieval\n")
    source = {"dataset.json": json.dumps(KARPATHY), "a.jpg": jpeg(1), "b.jpg": jpeg(2)}
    write(tmp_path / "c", source)
    convert(str(tmp_path / "c"), str(tmp_path / "photos.yaml"), str(tmp_path / "d"))
    theirs = builder.build_wds_dataset("x", lambda image: image, split="test", data_dir=str(tmp_path / "d"))
    assert [texts for _, texts in theirs] == [["one dosa", "a crisp dosa"], ["an idli"]]


def test_we_read_what_clip_benchmark_writes(card, tmp_path):
    theirs = pytest.importorskip("clip_benchmark.webdataset_builder", exc_type=ImportError)

    class Folders(list):
        classes, templates = ["laddu", "masala dosa", "idli"], ["a {c}"]

    write(tmp_path / "a", FOLDERS)
    numbers = {"masala_dosa": 1, "idli": 2, "laddu": 0}
    samples = Folders((str(tmp_path / "a" / name), numbers[name.partition("/")[0]]) for name in FOLDERS)
    theirs.convert_dataset(samples, "test", str(tmp_path / "b"), transform=theirs.path_to_bytes, verbose=False)
    assert content(read_items(load_card(card), tmp_path / "b")) == content(read_items(load_card(card), tmp_path / "a"))
