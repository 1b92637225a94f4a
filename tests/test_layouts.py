"""Layouts: the same images and labels from each, labels by name, and every mistake in a line."""

import csv
import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from layout_files import (
    CAPTIONS,
    CARD,
    COCO,
    EXPECTED,
    FOLDERS,
    IMAGES,
    KARPATHY,
    LAYOUTS,
    LIST,
    MATCHING,
    NAMED,
    RETRIEVAL,
    SHARD,
    TABLE,
    TABLE_IMAGES,
    TEXTS,
    WORDS,
    jpeg,
    tar,
    write,
)

from indiclip.evals.cards.card import load_card
from indiclip.evals.images.layouts import find_items, read_items
from indiclip.images import UnreadableSample


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "food").mkdir()
    return tmp_path / "food"


def content(items):
    """What is right about each image: its bytes and its class."""
    return [(items.images[i].data, items.card.classes[items.labels[i]].id) for i in range(len(items))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_images_and_labels(layout, card, folder):
    write(folder, LAYOUTS[layout])
    items = find_items(card(), folder.parent)
    assert sorted(content(items)) == sorted(EXPECTED)
    assert len(set(items.keys)) == 4
    assert items.is_train is None
    assert [items.groups[i] for i in np.argsort(items.labels, kind="stable")] == ["dish"] * 3 + ["sweet"]
    order = f"{folder}/classes.txt: the classes are in another order than on the card; labels are mapped by name"
    notes = {
        "reordered": [order],
        "clip-benchmark": [f"{folder}/test: left out: 1 shards that nshards.txt does not count"],
    }
    assert items.notes == notes.get(layout, [])
    # Loader processes get a pickle.
    assert [image.data for image in map(pickle.loads(pickle.dumps(items.images)).__getitem__, range(4))] == [
        data for data, _ in content(items)
    ]


def test_a_folder_that_is_not_there_is_skipped_and_an_empty_one_is_not(card, folder):
    assert find_items(card(name="other"), folder.parent) is None
    with pytest.raises(FileNotFoundError, match=r"food: no images \(jpg, .*, jpe\) of the card food"):
        find_items(card(), folder.parent)


def test_train_is_the_gallery_and_val_gives_way_to_test(card, folder):
    write(folder, {f"{split}/{name}": data for split in ("train", "val") for name, data in FOLDERS.items()})
    items = find_items(card(), folder.parent)
    assert items.is_train.tolist() == [True] * 4 + [False] * 4
    write(folder, {"test/idli/z.jpg": jpeg(9)})
    items = find_items(card(), folder.parent)
    assert items.is_train.tolist() == [False] + [True] * 4
    assert items.notes == [
        f"{folder}: `test` is scored; `val` is not used",
        "no images of 2 of 3 classes, which stay candidates: masala_dosa, ladoo",
    ]


def test_a_class_may_be_called_train(card, folder):
    content = {"task": "classification", "classes": [{"id": x, "names": {"en": x}} for x in ("train", "bus")]}
    write(folder, {"train/a.jpg": jpeg(1), "bus/a.jpg": jpeg(2)})
    items = find_items(card(content), folder.parent)
    assert (items.labels.tolist(), items.is_train) == ([1, 0], None)


def test_splits_of_tables_and_shards(card, folder, tmp_path):
    rows = "file,class,split\nx/1.jpg,idli,train\n2.jpg,idli,test\n3.jpg,idli,val\n4.jpg,ladoo,test\n"
    write(folder, {"images.csv": rows, **TABLE_IMAGES})
    items = find_items(card(), folder.parent)
    assert (items.keys, items.is_train.tolist()) == (["x/1.jpg", "2.jpg", "4.jpg"], [True, False, False])
    shards = tmp_path / "other"
    write(shards, {"train-0.tar": tar(SHARD), "test-0.tar": tar(SHARD), "classes.txt": LIST})
    items = read_items(card(), shards)
    assert items.keys[:1] + items.keys[3:4] == ["test-0/0", "train-0/0"]
    assert items.is_train.tolist() == [False] * 3 + [True] * 3


def test_some_of_the_items(card, folder):
    write(folder, {"train/idli/a.jpg": jpeg(1), **{f"test/{name}": data for name, data in FOLDERS.items()}})
    items = find_items(card(), folder.parent)
    fewer = items.select([0, 2, 3])
    assert content(fewer) == [content(items)[i] for i in (0, 2, 3)]
    assert fewer.keys == [items.keys[i] for i in (0, 2, 3)]
    assert fewer.groups == [items.groups[i] for i in (0, 2, 3)]
    assert (fewer.is_train.tolist(), len(items)) == (items.is_train[[0, 2, 3]].tolist(), 5)
    again = fewer.select([2, 0])
    assert content(again) == [content(items)[i] for i in (3, 0)]


def test_broken_images_are_found_when_they_are_read(card, folder):
    write(folder, {**FOLDERS, "idli/b.png": b"no image", "idli/c.jpg": jpeg(5)[:300], "idli/d.gif": b"GIF", ".x/a": ""})
    items = find_items(card(), folder.parent)
    assert items.notes == [f"{folder}: 6 of 7 files; left out: 1 .gif, which is not read (idli/d.gif)"]
    with pytest.raises(UnreadableSample, match=r"idli/b.png: expected the bytes of a JPEG, PNG or WebP"):
        items.images[items.keys.index("idli/b.png")]
    with pytest.raises(UnreadableSample, match=r"idli/c.jpg"):
        items.images[items.keys.index("idli/c.jpg")].decode()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {**FOLDERS, "masala_dosaa/x.jpg": jpeg(1)},
            "food/masala_dosaa: 'masala_dosaa' is no class of the card food; nearest is 'masala_dosa'",
        ),
        (
            {"images.csv": TABLE.replace("Idli", "idly"), **TABLE_IMAGES},
            "images.csv: line 4: 'idly' is no class of the card food; nearest is 'idli'; --skip-unknown leaves out",
        ),
        (
            {"images.csv": TABLE.replace("class", "clas"), **TABLE_IMAGES},
            "images.csv: no column 'class'; nearest is 'clas'",
        ),
        ({"images.csv": TABLE.replace("2.jpg", "../../etc/passwd"), **TABLE_IMAGES}, "lies outside the folder"),
        (
            {"images.csv": TABLE.replace("2.jpg", "/etc/passwd"), **TABLE_IMAGES},
            "'/etc/passwd' lies outside the folder",
        ),
        (
            {"images.csv": TABLE.replace("2.jpg", "5.jpg"), **TABLE_IMAGES},
            "1 of 4 images are not in .*food, first '5.jpg'",
        ),
        ({"images.csv": TABLE.replace("2.jpg", "3.jpg"), **TABLE_IMAGES}, "line 4: '3.jpg' is duplicated"),
        (
            {"images.csv": "file,class,split\n2.jpg,idli,tst\n", **TABLE_IMAGES},
            "line 2: the split 'tst'; expected train, val or test",
        ),
        ({"images.csv": "file,class,split\n2.jpg,idli,train\n", **TABLE_IMAGES}, "images of the split `train` only"),
        ({"a.csv": TABLE, "b.csv": TABLE}, "several tables, a.csv, b.csv"),
        ({"a.tar": tar(SHARD)}, r"a.tar: labels are numbers and there is no classnames.txt or classes.txt"),
        (
            {"a.tar": tar(SHARD), "classes.txt": "masala_dosa\nidly\n"},
            "classes.txt: line 2: 'idly' is no class .*nearest is 'idli'",
        ),
        (
            {"a.tar": tar(SHARD), "classes.txt": "masala_dosa\nmasala dosa\n"},
            "classes.txt: line 2: masala_dosa is in line 1",
        ),
        ({"a.tar": tar(SHARD), "classes.txt": "masala_dosa\n"}, "a.tar: the label 1; .*classes.txt has 1 lines"),
        (
            {"a.tar": tar(SHARD), "classes.txt": "masala_dosa\n\nidli\n"},
            "classes.txt: line 2 is empty; expected a class, since labels count the lines",
        ),
        (
            {"a.tar": tar({**NAMED, "2.cls": "idly"})},
            "a.tar: a/2: 'idly' is no class of the card food; nearest is 'idli'",
        ),
        ({"a.tar": tar(NAMED)}, r"a.tar: a/2: no label \(.cls\)"),
        ({"test/nshards.txt": "two", "classes.txt": LIST}, "nshards.txt: found 'two'; expected the number of shards"),
        (
            {"test/nshards.txt": "2", "test/0.tar": tar(SHARD)},
            "test/1.tar: no such file; .*nshards.txt counts 2 shards",
        ),
    ],
)
def test_mistakes_are_named(files, message, card, folder):
    write(folder, files)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_items(card(), folder.parent)


def test_a_file_whose_name_is_no_utf8_has_a_key_that_can_be_stored(card, folder):
    write(folder, {"idli/a.jpg": jpeg(1)})
    try:
        (folder / "idli" / "a.jpg").rename(folder / "idli" / os.fsdecode(b"caf\xe9.jpg"))
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    items = find_items(card(), folder.parent)
    assert items.keys == [r"idli/caf\xe9.jpg"]
    assert items.images[0].data == jpeg(1)


def test_links_and_outside_members_of_shards_are_not_read(card, folder):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as target:
        for name, kind in (("x.jpg", tarfile.SYMTYPE), ("../y.jpg", tarfile.REGTYPE), ("0.jpg", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "/etc/passwd", len(jpeg(1)) * (kind == tarfile.REGTYPE)
            target.addfile(info, io.BytesIO(jpeg(1)))
        info = tarfile.TarInfo("0.cls")
        info.size = 4
        target.addfile(info, io.BytesIO(b"idli"))
    write(folder, {"a.tar": stream.getvalue()})
    assert find_items(card(), folder.parent).keys == ["a/0"]


def test_pickles_in_shards_are_never_opened(card, folder):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    write(folder, {"a.tar": tar({"0.jpg": jpeg(1), "0.cls": "idli", "0.pyd": pickle.dumps(Bomb())})})
    assert len(find_items(card(), folder.parent)) == 1


def test_truncated_shards_say_what_is_lost(card, folder):
    whole = tar({**SHARD, "9.jpg": jpeg(9, (200, 200)), "9.cls": "1"})
    write(folder, {"a.tar": whole[: whole.index(jpeg(9, (200, 200))) + 100], "classes.txt": LIST})
    items = find_items(card(), folder.parent)
    assert len(items) == 3
    assert "lost: a/9.jpg: truncated tar" in items.notes[0]


@pytest.mark.parametrize("layout", MATCHING)
def test_words_are_matched_with_others_of_their_script(layout, card, folder):
    write(folder, MATCHING[layout])
    items = find_items(card(WORDS), folder.parent)
    assert [texts[0] for texts in items.candidates] == [*TEXTS.values(), "மதுரை"]
    pool = {*TEXTS.values(), "डाकघर"}
    for texts in items.candidates[:3]:
        assert len(texts) == len(set(texts)) == 3
        assert set(texts) < pool
    assert items.candidates[3] == ["மதுரை"]
    assert items.groups == ["devanagari"] * 3 + ["tamil"]
    assert items.notes == ["tamil: 1 different texts; its images have fewer than 3 candidates, so chance is higher"]
    assert find_items(card(WORDS), folder.parent).candidates == items.candidates


def test_words_without_a_text_are_named(card, folder):
    write(folder, {"devanagari/a.jpg": jpeg(1)})
    with pytest.raises(ValueError, match="food: devanagari/a.jpg: no text; expected .* in a table or a .txt beside it"):
        find_items(card(WORDS), folder.parent)
    write(folder, {"w.csv": "file,class,text\ndevanagari/a.jpg,devanagari, \n"})
    with pytest.raises(ValueError, match="food: devanagari/a.jpg: no text"):
        find_items(card(WORDS), folder.parent)


def test_real_words(data_root, card, tmp_path):
    found = json.loads((data_root / "india" / "ocr_words" / "classes.json").read_text("utf-8"))
    known = {"bengali_assamese": "bengali"}
    with (tmp_path / "words.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "class", "text"])
        for name, one in found.items():
            for entry in one["files"]:
                if not entry["text_is_romanised"]:
                    table.writerow([f"images/{name}/{entry['file']}", known.get(name, name), entry["text"]])
    (tmp_path / "images").symlink_to(data_root / "india" / "ocr_words")
    items = read_items(load_card("ocr_indic"), tmp_path)
    assert len(items) == 60
    assert all(len(texts) == 10 for texts in items.candidates)
    assert {items.images[i].kind for i in range(0, len(items), 7)} == {"JPEG"}


def test_no_group_of_images_is_called_as_another_subset_of_the_scores(card, folder):
    """A group `clean` would stand for the images that are not in the training data, and "" for all."""
    write(folder, {**FOLDERS, "clean/a.jpg": jpeg(5), "clean/a.txt": "x"})
    for name, meaning in (("clean", "the images that are not in the training data"), ("", "all images")):
        content = {**CARD, "classes": [*CARD["classes"][:2], {**CARD["classes"][2], "facts": {"group": name}}]}
        expected = f"food.yaml: ladoo: the group: found '{name}', which is what scores call {meaning}; expected another"
        with pytest.raises(ValueError, match=expected):
            read_items(card(content), folder, skip_unknown=True)
    words = {**WORDS, "classes": [{"id": "clean", "names": {"en": "clean"}}, WORDS["classes"][1]]}
    with pytest.raises(ValueError, match="clean: the group: found 'clean', which is what scores call"):
        read_items(card(words), folder, skip_unknown=True)
    water = [{"id": name, "names": {"en": name}} for name in ("clean", "dirty")]
    assert card({**CARD, "classes": water}).ids == ["clean", "dirty"]  # classes are no subsets
    for protocol, table in (
        ("in_scene", "file,word,script\na.jpg,tea,latin\na.jpg,shop,clean\n"),
        ("choices", "file,kind,en\na.jpg,object,a cup\na.jpg,object,a pot\nb.jpg,clean,a cup\nb.jpg,clean,a pot\n"),
    ):
        file = folder.parent / f"{protocol}.csv"
        write(folder.parent, {file.name: table, **IMAGES})
        with pytest.raises(ValueError, match=r"[ab].jpg: (script|kind): found 'clean', which is what scores call"):
            read_items(card({"protocols": [protocol]}, protocol), file)


@pytest.mark.parametrize("layout", RETRIEVAL)
def test_captions(layout, card, folder):
    write(folder, RETRIEVAL[layout])
    items = find_items(card({"task": "retrieval"}), folder.parent)
    assert [[text.strip() for text in texts] for texts in items.captions["en"]] == CAPTIONS
    assert [items.images[i].data for i in range(2)] == [IMAGES["a.jpg"], IMAGES["b.jpg"]]
    assert items.labels.tolist() == [-1, -1]
    hindi = [["एक डोसा"], []] if layout in ("crossmodal", "table") else None
    assert items.captions.get("hi") == hindi
    notes = {
        "coco": [f"{folder}/captions_val2017.json: 1 images without a caption"],
        "table": [f"{folder}/c.csv: 3 of 4 columns; left out: 1 not used (symbol)"],
    }
    assert items.notes == notes.get(layout, [])
    assert items.select([1]).captions["en"] == [items.captions["en"][1]]


def test_columns_and_lines_of_captions(card, folder, tmp_path):
    table = 'file,caption,en,id\na.jpg,"one\n dosa\t",a crisp dosa,17\nb.jpg,,an idli,18\n'
    write(folder, {"c.csv": table, **IMAGES})
    items = find_items(card({"task": "retrieval"}), folder.parent)
    assert items.captions == {"en": CAPTIONS}
    assert items.notes == [f"{folder}/c.csv: 3 of 4 columns; left out: 1 not used (id)"]
    # JSON may hold the line ends of Unicode as they are.
    write(tmp_path / "x", {"captions.jsonl": '{"image/key": "a", "en": {"caption": ["one\u2028dosa"]}}\n\n', **IMAGES})
    assert read_items(card({"task": "retrieval"}), tmp_path / "x").captions == {"en": [["one dosa"]]}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "food: no captions: no shards, no table, no file of captions"),
        (
            {"a.csv": "file,text\na.jpg,x\n", **IMAGES},
            "no column of captions; found .*; expected `caption`, or codes",
        ),
        (
            {"captions_a.json": "{}", "captions_b.json": "{}"},
            "which file has the captions\\? Found captions_a.json, captions_b.json",
        ),
        ({"captions_a.json": json.dumps(COCO), "a.jpg": jpeg(1)}, "1 of 2 images are not in .*food, first 'b.jpg'"),
        (
            {"captions_a.json": json.dumps({**COCO, "images": COCO["images"][1:]})},
            "2 captions of images that are not at hand, first .*annotation .*; expected their images",
        ),
        (
            {"captions_a.json": json.dumps(COCO).replace("b.jpg", "a.jpg"), "a.jpg": b""},
            "captions_a.json: the image 'a.jpg' is duplicated",
        ),
        (
            {"captions_a.json": json.dumps(COCO).replace("a.jpg", "../a.jpg"), "b.jpg": b""},
            "'../a.jpg' lies outside the folder",
        ),
        (
            {"dataset.json": json.dumps(KARPATHY).replace("test", "val")},
            r"no images of the split 'test'; found \['train', 'val'\]",
        ),
        ({"captions.jsonl": '{"image/key": "a", "hi": ["x"]}'}, r"line 1: hi: found \['x'\]; expected {\"caption\": "),
        ({"captions.jsonl": '{"image/key": '}, "captions.jsonl: line 1: broken JSON"),
        ({"a.tar": tar({"a.jpg": jpeg(1)})}, r"a.tar: a/a: no text \(.txt, .json\) beside the image"),
    ],
)
def test_mistakes_in_captions_are_named(files, message, card, folder):
    write(folder, files)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_items(card({"task": "retrieval"}), folder.parent)


def test_cifar10_as_it_lies_there(data_root, tmp_path):
    card = load_card("cifar10")
    for shard in ("test-0000.tar.gz", "test-0001.tar.gz"):
        (tmp_path / shard).symlink_to(data_root / "cifar10" / shard)
    names = (data_root / "cifar10" / "classes.txt").read_text().split()
    (tmp_path / "classes.txt").write_text("\n".join(names))
    items = read_items(card, tmp_path)
    assert np.bincount(items.labels).tolist() == [1000] * 10
    # The same shards with numbers that count another list: same labels where the names say so.
    order = np.random.default_rng(0).permutation(10)
    (tmp_path / "classes.txt").write_text("\n".join(names[i] for i in order))
    shuffled = read_items(card, tmp_path)
    assert (shuffled.labels == order[items.labels]).all()


def test_real_photos_in_class_folders(data_root, card):
    for category in ("edibles_food", "clothes_saree"):
        found = json.loads((data_root / "india" / category / "classes.json").read_text("utf-8"))
        classes = [{"id": key, "names": {"en": one["english"]}} for key, one in found.items()]
        items = find_items(card({"task": "classification", "classes": classes}, category), data_root / "india")
        assert len(items) == sum(one["n"] for one in found.values())
        assert items.notes == []
        for i in range(0, len(items), 50):
            assert items.images[i].decode().shape[2] == 3


def test_imagenet_by_synset_and_babel_beside_it(tmp_path):
    write(tmp_path / "imagenet1k", {"val/n01443537/a.jpg": jpeg(1), "val/n01440764/b.jpg": jpeg(2)})
    assert find_items(load_card("babel_imagenet"), tmp_path) is None
    assert find_items(load_card("imagenet1k"), tmp_path).labels.tolist() == [0, 1]
    write(tmp_path / "imagenet1k", {"babel_imagenet.json": '{"HI": [[1], ["सुनहरी मछली"]]}'})
    items = find_items(load_card("babel_imagenet"), tmp_path)
    assert items.card.names("hi") == {1: "सुनहरी मछली"}
    assert items.labels.tolist() == [0, 1]
    write(tmp_path / "imagenet1k", {"val/n01440765/b.jpg": jpeg(2)})
    with pytest.raises(
        ValueError, match="n01440765: 'n01440765' is no class of the card imagenet1k; nearest is 'n0144"
    ):
        find_items(load_card("imagenet1k"), tmp_path)
