"""A user's folders as they are: everything in them is read, or left out and counted with the reason."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from layout_files import FOLDERS, IMAGES, LIST, MATCHING, SHARD, TABLE, TABLE_IMAGES, WORDS, jpeg, tar, write
from test_bench_photographs import MeanColour, photographs

from indiclip.cli import main
from indiclip.evals.images.layouts import find_items, read_items
from indiclip.evals.models import embedder

SCENES = [  # one line is not one image: Indonesian and Norwegian are languages here, whatever their codes are else
    {"image/key": "a", "image/locale": "hi", "url": "http://x", "id": {"caption": ["satu dosa"]}, "number": 7},
    {"image/key": "b", "no": {"caption": ["en idli"]}, "ta_IN": {"caption": ["ஒரு இட்லி"]}, "zz zz": {"caption": ["?"]}},
]


@pytest.fixture
def retrieval(card):
    return card({"task": "retrieval"}, "captions")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "food").mkdir()
    return tmp_path / "food"


def ids(items):
    """Each image's key and class."""
    return {key: items.card.classes[label].id for key, label in zip(items.keys, items.labels, strict=True)}


def test_deeper_folders_and_images_beside_the_classes(card, folder):
    odd = ["idli/deep/er/c.jpg", "loose.jpg", "test.png", ".hidden.jpg", "idli/._a.jpg", "idli/.DS_Store", "idli/n.gif"]
    systems = ["__MACOSX/idli/._a.jpg", "@eaDir/a.jpg", ".git/a.jpg", ".ipynb_checkpoints/a.jpg", "idli/@eaDir/a.jpg"]
    write(folder, {**FOLDERS, **{name: jpeg(20 + i) for i, name in enumerate(odd + systems)}})
    (folder / "empty").mkdir()
    items = find_items(card(), folder.parent)
    assert ids(items) == {
        **{"masala_dosa/a.jpg": "masala_dosa", "masala_dosa/b.jpg": "masala_dosa", "laddu/a.jpeg": "ladoo"},
        **{"idli/a.JPG": "idli", "idli/deep/er/c.jpg": "idli"},
    }
    assert items.notes == [
        f"{folder}: 5 of 10 files; left out: 2 in no folder of a class (loose.jpg), 2 hidden (idli/.DS_Store), "
        "1 .gif, which is not read (idli/n.gif)"
    ]


def test_a_flat_folder_of_a_split_says_what_it_holds(card, folder):
    """As the validation images of ImageNet are downloaded."""
    write(folder, {"val/1.JPEG": jpeg(1), "val/2.JPEG": jpeg(2)})
    expected = r"0 of 2 files; left out: 2 in no folder of a class \(val/1.JPEG\)"
    with pytest.raises(FileNotFoundError, match=expected):
        find_items(card(), folder.parent)
    write(folder, {f"train/{name}": data for name, data in FOLDERS.items()})
    expected = r"images of the split `train` only; there is nothing to score; .*: 4 of 6 files; left out: 2 in no"
    with pytest.raises(FileNotFoundError, match=expected):
        find_items(card(), folder.parent)


def test_a_folder_in_between_is_named_with_what_it_holds(card, folder):
    write(folder, {f"images/{name}": data for name, data in FOLDERS.items()})
    expected = "food/images: 'images' is no class of the card food; .*; found the folder of a class in it, 'idli'"
    with pytest.raises(ValueError, match=expected):
        find_items(card(), folder.parent)


def test_folders_of_one_class_are_read_together(card, folder):
    names = ["Masala Dosa", "masala_dosa", "MASALA_DOSA", "मसाला डोसा"]
    write(folder, {f"{name}/a.jpg": jpeg(shade) for shade, name in enumerate(names)})
    items = find_items(card(), folder.parent)
    assert set(ids(items).values()) == {"masala_dosa"}
    assert len(set(items.keys)) == 4


@pytest.mark.parametrize("inner", ["ladoo", "train"])
def test_a_class_or_split_in_the_folder_of_a_class_is_said(inner, card, folder):
    write(folder, {**FOLDERS, f"idli/{inner}/x.jpg": jpeg(9)})
    items = find_items(card(), folder.parent)
    assert ids(items)[f"idli/{inner}/x.jpg"] == "idli"
    where = "in folders of a class that are called by another class or a split, which counts for nothing"
    assert items.notes == [f"{folder}: 1 images lie {where}, first idli/{inner}/x.jpg"]


@pytest.mark.parametrize("test", ["Test", "testing", "val", "Validation", "dev"])
def test_splits_however_they_are_called(test, card, folder):
    write(folder, {f"{split}/{name}": data for split in ("Train", test) for name, data in FOLDERS.items()})
    items = find_items(card(), folder.parent)
    assert items.is_train.tolist() == [key.startswith("Train/") for key in items.keys]
    first, second = sorted(("Train/idli/a.JPG", f"{test}/idli/a.JPG"))
    same = "4 images are in the gallery and scored (files with the same bytes)"
    assert items.notes == [f"{same}, first {first} and {second}"]


def test_a_folder_beside_those_of_splits(card, folder):
    write(folder, {f"{split}/{name}": data for split in ("test", "idli") for name, data in FOLDERS.items()})
    expected = "food/idli: the folder lies beside test, of splits; expected folders of splits alone or classes alone"
    with pytest.raises(ValueError, match=expected):
        find_items(card(), folder.parent)
    items = find_items(card(), folder.parent, skip_unknown=True)
    assert len(items) == 4
    first = "idli/idli/a.JPG"
    assert items.notes == [f"{folder}: 4 of 8 files; left out: 4 beside the folders of splits ({first})"]


UNKNOWN = {
    "folders": {**FOLDERS, "idly/x.jpg": jpeg(8), "vada/deep/x.jpg": jpeg(9), "vada/y.jpg": jpeg(10)},
    "table": {
        "t.csv": TABLE + "5.jpg,idly\n6.jpg,vada\n7.jpg,vada\n",
        **TABLE_IMAGES, **{f"{i}.jpg": jpeg(i) for i in (5, 6, 7)},
    },
    "shards": {
        "a.tar": tar({
            **{f"{i}.jpg": jpeg(i) for i in range(1, 8)},
            **{f"{i}.cls": name for i, name in enumerate(("masala dosa", "Masala_Dosa", "idli", "laddu"), 1)},
            **{"5.cls": "idly", "6.cls": "vada", "7.cls": "vada"},
        })
    },
    "shards of numbers": {
        "classes.txt": f"idly\nvada\n{LIST}",
        "a.tar": tar({
            **{f"{i}.jpg": jpeg(i) for i in range(1, 8)},
            **{f"{i}.cls": number for i, number in enumerate("2234011", 1)},
        })
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", UNKNOWN)
def test_images_of_other_classes_stop_a_run_or_are_counted(layout, card, folder):
    write(folder, UNKNOWN[layout])
    with pytest.raises(ValueError, match=r"id[ly]{2}.*no class of the card food; nearest is 'idli'"):
        find_items(card(), folder.parent)
    items = find_items(card(), folder.parent, skip_unknown=True)
    assert sorted(ids(items).values()) == ["idli", "ladoo", "masala_dosa", "masala_dosa"]
    expected = "left out: 3 images of 2 classes that are not on the card food: vada (2), idly (1)"
    assert items.notes == [f"{folder}: {expected}"]
    assert len([items.images[i].decode() for i in range(len(items))]) == 4


@pytest.mark.parametrize("layout", MATCHING)
def test_words_of_other_scripts_are_left_out(layout, card, folder):
    """And the texts of the others stay theirs."""
    write(folder, MATCHING[layout])
    other = {**WORDS, "classes": [{"id": "kannada", "names": {"en": "Kannada"}}, *WORDS["classes"][1:]]}
    items = read_items(card(other), folder, skip_unknown=True)
    assert (items.candidates, set(ids(items).values())) == ([["மதுரை"]], {"tamil"})


def test_the_flag_through_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedder, "load_embedder", lambda *args, **options: MeanColour())
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "photos", ("idli", "samosa", "spaceship"))
    words = ["bench", "--model", "m", "--images", "photos", "--cards", "edibles", "--resamples", "9"]
    assert main(words) == 2
    assert "spaceship: 'spaceship' is no class of the card edibles" in capsys.readouterr().err
    assert main([*words, "--skip-unknown"]) == 0
    (found,) = json.loads((tmp_path / "runs/bench/m/metrics.json").read_text("utf-8"))["cards"]
    assert found["num_images"] == 6
    assert any(
        "left out: 3 images of 1 classes that are not on the card edibles: spaceship (3)" in n for n in found["notes"]
    )
    source = ["bench", "import", "photos/edibles", "--card", "edibles", "--out", "wds", "--skip_unknown"]
    assert main([*source, "--layout", "folder"]) == 0
    assert "spaceship (3)" in capsys.readouterr().out


def test_bytes_that_are_no_utf8_lose_no_scores(tmp_path, monkeypatch, capsys):
    """In the names of the folder of all, of an image and its folder, of a broken one, and of a folder of no class."""
    monkeypatch.setattr(embedder, "load_embedder", lambda *args, **options: MeanColour())
    monkeypatch.chdir(tmp_path)
    odd = os.fsdecode(b"caf\xe9")
    files = {f"idli/{odd}/{odd}.jpg": jpeg(1), f"idli/{odd}.png": b"", f"{odd}/a.jpg": b""}
    try:
        photographs(tmp_path / odd, ("idli", "samosa"))
        write(tmp_path / odd / "edibles", files)
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    (tmp_path / odd / "edibles/samosa" / f"{odd}.jpg").symlink_to("nowhere")
    words = ["bench", "--model", "m", "--images", odd, "--cards", "edibles", "--resamples", "9", "--skip-unknown"]
    assert main(words) == 0
    (found,) = json.loads((tmp_path / "runs/bench/m/metrics.json").read_text("utf-8"))["cards"]
    assert found["num_images"] == 7
    notes = "\n".join(found["notes"])
    assert r"caf\xe9 (1)" in notes
    assert r"unreadable: idli/caf\xe9.png: expected the bytes of a JPEG" in notes
    assert r"unreadable: samosa/caf\xe9.jpg: caf\xe9/edibles/samosa/caf\xe9.jpg: No such file or directory" in notes
    assert main(["bench", "import", f"{odd}/edibles", "--card", "edibles", "--out", "wds", "--skip-unknown"]) == 0
    assert r"idli/caf\xe9.png" in capsys.readouterr().out


def test_links(card, folder, tmp_path):
    """Those into the folder of another class and out of the root are their owner's; those to a folder above end."""
    write(folder, FOLDERS)
    write(tmp_path / "elsewhere", {"x.jpg": jpeg(11), "y.jpg": jpeg(12)})
    (folder / "idli/out").symlink_to(tmp_path / "elsewhere")
    (folder / "idli/up").symlink_to("..")
    (folder / "idli/higher").symlink_to(tmp_path)
    (folder / "idli/same.jpg").symlink_to("../laddu/a.jpeg")
    (folder / "idli/gone.jpg").symlink_to("nothing.jpg")
    items = find_items(card(), folder.parent)
    of_idli = ["idli/a.JPG", "idli/gone.jpg", "idli/out/x.jpg", "idli/out/y.jpg", "idli/same.jpg"]
    assert [key for key in items.keys if key.startswith("idli/")] == of_idli
    same = "1 image is in two classes (files with the same bytes), first idli/same.jpg and laddu/a.jpeg"
    assert items.notes == [same]


def test_duplicates_are_counted(card, retrieval, folder, tmp_path):
    write(folder, {
        **{"train/idli/a.jpg": jpeg(1), "test/idli/a.jpg": jpeg(1), "test/idli/b.jpg": jpeg(2)},
        **{"test/ladoo/b.jpg": jpeg(2), "test/ladoo/c.jpg": jpeg(3), "test/ladoo/d.jpg": jpeg(3)},
        **{"train/ladoo/x.jpg": jpeg(4), "train/ladoo/y.jpg": jpeg(4)},  # which is the user's affair
        **{"test/ladoo/0.jpg": b"", "train/idli/0.jpg": b""},
    })  # fmt: skip
    same = "(files with the same bytes), first"
    assert find_items(card(), folder.parent).notes == [
        "no images of 1 of 3 classes, which stay candidates: masala_dosa",
        f"1 image is in two classes {same} test/idli/b.jpg and test/ladoo/b.jpg",
        f"1 image is in the gallery and scored {same} test/idli/a.jpg and train/idli/a.jpg",
        f"1 image is scored more than once {same} test/ladoo/c.jpg and test/ladoo/d.jpg",
    ]
    copies = {f"test/idli/sub/{name}.jpg": jpeg(2) for name in "bc"}  # in two classes, and in one of them three times
    write(folder, copies)
    assert find_items(card(), folder.parent).notes[-3:] == [
        f"1 image is in two classes {same} test/idli/b.jpg and test/ladoo/b.jpg",
        f"1 image is in the gallery and scored {same} test/idli/a.jpg and train/idli/a.jpg",
        f"2 images are scored more than once {same} test/idli/b.jpg and test/idli/sub/b.jpg",
    ]
    write(tmp_path / "c", {"c.csv": "file,en\na.jpg,x\nb.jpg,y\n", "a.jpg": jpeg(1), "b.jpg": jpeg(1)})
    expected = "1 image is scored more than once (files with the same bytes), first a.jpg and b.jpg"
    assert read_items(retrieval, tmp_path / "c").notes == [expected]
    # Files of one size are compared by their bytes.
    one, other = jpeg(5), jpeg(5)[:-3] + b"x" + jpeg(5)[-2:]
    write(tmp_path / "d", {"c.csv": "file,en\na.jpg,x\nb.jpg,y\n", "a.jpg": one, "b.jpg": other})
    assert read_items(retrieval, tmp_path / "d").notes == []


def test_captions_of_several_images_are_counted(retrieval, tmp_path):
    rows = "a.jpg,a dosa,एक,test\na.jpg,food,दो,test\na.jpg,food,,test\nb.jpg,a dosa,एक,test\nc.jpg,food,दो,train\n"
    write(tmp_path / "c", {"c.csv": f"file,en,hi,split\n{rows}", **IMAGES})
    expected = "captions that several images have, of which one counts as right: en 1, hi 1; first 'a dosa'"
    assert expected in read_items(retrieval, tmp_path / "c").notes


def test_captions_of_several_images_are_counted_for_retrieval_alone(card, tmp_path):
    composed = card({"protocols": ["composed_retrieval"]}, "change")
    table = "file,en,target\na.jpg,in blue,b.jpg\nb.jpg,in blue,a.jpg\n"
    write(tmp_path / "c", {"c.csv": table, "a.jpg": jpeg(1), "b.jpg": jpeg(2)})
    assert read_items(composed, tmp_path / "c").notes == []
    (tmp_path / "c" / "c.csv").write_text(table.replace("\nb.jpg,in blue,a.jpg", ""))
    expected = r"c/c\.csv: a\.jpg: target: 'b\.jpg' is no image of the table; .* needs one of its own \(card change\)"
    with pytest.raises(ValueError, match=expected):
        read_items(composed, tmp_path / "c")


def test_classes_without_a_gallery_are_named(card, folder):
    write(folder, {**{f"test/{name}": data for name, data in FOLDERS.items()}, "train/idli/x.jpg": jpeg(9)})
    expected = "no gallery images of 2 classes, which probes cannot answer: masala_dosa, ladoo"
    assert find_items(card(), folder.parent).notes == [expected]


def test_what_lies_beside_shards_is_said(card, folder):
    write(folder, {**FOLDERS, "a.tar": tar(SHARD), "classes.txt": LIST, "annotations/x.json": "{}", "train/0.tar": b""})
    items = find_items(card(), folder.parent)
    assert len(items) == 3
    assert f"{folder}: left out: the folders idli, laddu, masala_dosa, train beside the shards" in items.notes


TABLES = {
    "windows": "\ufeff" + TABLE.replace("\n", "\r\n"),
    "utf-16": ("\ufeff" + TABLE).encode("utf-16-le"),
    "quoted": TABLE.replace("masala dosa", '"masala dosa"').replace("4.jpg", '"4, or ""four"".jpg"'),
    "spaces": TABLE.replace(",", " , "),
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("name", ["t.csv", "T.CSV"])
def test_tables_as_programs_write_them(kind, name, card, folder):
    images = {
        '4, or "four".jpg' if kind == "quoted" and file == "4.jpg" else file: data
        for file, data in TABLE_IMAGES.items()
    }
    write(folder, {name: TABLES[kind], **images, "._t.csv": b"\0\5\x16\7", "laddu/left.jpg": jpeg(9)})
    items = find_items(card(), folder.parent)
    assert list(ids(items).values()) == ["masala_dosa", "masala_dosa", "idli", "ladoo"]
    assert items.notes == []


def test_the_split_may_stand_anywhere_in_a_shards_name(card, folder):
    names = ("cifar10-train-0.tar", "cifar10_test_0.tar", "latest-0.tar")
    write(folder, {name: tar({**SHARD, "9.jpg": jpeg(i), "9.cls": "2"}) for i, name in enumerate(names)})
    write(folder, {"classes.txt": LIST})
    items = find_items(card(), folder.parent)
    assert items.keys[::4] == ["cifar10-train-0/0", "cifar10_test_0/0", "latest-0/0"]
    assert items.is_train.tolist() == [True] * 4 + [False] * 8


@pytest.mark.parametrize(
    ("written", "file", "message"),
    [
        ("a\\1.jpg", "a/1.jpg", r"first 'a\\\\1.jpg'; found 'a/1.jpg': write / for a backslash"),
        ("caf\u00e9.jpg", "cafe\u0301.jpg", "found the same letters in another Unicode normal form"),
    ],
)
def test_names_as_other_systems_write_them_are_told_apart(written, file, message, card, folder):
    write(folder, {"t.csv": f"file,class\n{written},idli\n", file: jpeg(1)})
    with pytest.raises(FileNotFoundError, match=message):
        find_items(card(), folder.parent)


def test_an_image_is_of_one_split(retrieval, tmp_path):
    write(tmp_path / "c", {"c.csv": "file,en,split\na.jpg,x,train\na.jpg,y,test\n", **IMAGES})
    with pytest.raises(ValueError, match="line 3: 'a.jpg' is of another split in an earlier row"):
        read_items(retrieval, tmp_path / "c")
    write(tmp_path / "c", {"c.csv": "file,en,split\na.jpg,x,train\nb.jpg,y,test\n"})
    expected = f"{tmp_path}/c: left out: 1 training images, which no protocol of the card uses"
    assert read_items(retrieval, tmp_path / "c").notes == [expected]


def test_columns_are_languages_as_in_training(retrieval, tmp_path):
    header = "file,ta_IN,Tamil,hi-Latn,id,url,cat,caption,language,note"
    rows = "a.jpg,ஒன்று,இரண்டு,ek dosa,17,http://x,c,एक डोसा,hi,n\nb.jpg,,,,18,http://y,c,,hi,n\nc.jpg,,,teen,19,,,,,\n"
    write(tmp_path / "c", {"c.csv": f"{header}\n{rows}", **IMAGES})
    items = read_items(retrieval, tmp_path / "c")
    assert items.keys == ["a.jpg", "c.jpg"]
    assert items.captions == {
        "ta-IN": [["ஒன்று"], []], "ta": [["இரண்டு"], []], "hi-Latn": [["ek dosa"], ["teen"]], "hi": [["एक डोसा"], []],
    }  # fmt: skip
    file = f"{tmp_path}/c/c.csv"
    assert items.notes == [
        f"{file}: 2 of 3 rows; left out: 1 without a caption ({file}: line 3: 'b.jpg' has no caption)",
        f"{file}: 6 of 10 columns; left out: 4 not used (id, url, cat, note)",
    ]


def test_keys_of_crossmodal_captions_are_languages_by_their_value(retrieval, tmp_path):
    write(tmp_path / "c", {"captions.jsonl": "".join(f"{json.dumps(one)}\n" for one in SCENES), **IMAGES})
    items = read_items(retrieval, tmp_path / "c")
    assert items.captions == {"id": [["satu dosa"], []], "no": [[], ["en idli"]], "ta-IN": [[], ["ஒரு இட்லி"]]}
    assert items.notes == [f"{tmp_path}/c/captions.jsonl: 3 of 6 keys; left out: 3 not used (url, number, zz zz)"]
    # A table of them reads back.
    command = ["bench", "import", str(tmp_path / "c"), "--card", retrieval.file, "--out", str(tmp_path / "d")]
    assert main([*command, "--layout", "folder"]) == 0
    assert read_items(retrieval, tmp_path / "d").captions == items.captions


def test_captions_of_packed_shards_keep_their_languages(retrieval, tmp_path, capsys):
    write(tmp_path / "c", {"c.csv": "file,hi,ta,caption\na.jpg,एक,ஒன்று,one\nb.jpg,दो,,two\n", **IMAGES})
    assert main(["shards", "pack", str(tmp_path / "c/c.csv"), "--out", str(tmp_path / "s"), "--name", "x"]) == 0
    captions = {"hi": [["एक"], ["दो"]], "ta": [["ஒன்று"], []], "en": [["one"], ["two"]]}
    assert read_items(retrieval, tmp_path / "c").captions == captions
    items = read_items(retrieval, tmp_path / "s")
    order = np.argsort([len(items.captions["ta"][i]) == 0 for i in range(2)])  # packed in another one
    assert items.select(order).captions == captions
    beside = {"a.jpg": jpeg(1), "a.txt": "one\ntwo\n\nthree", "a.json": '{"text": "no", "captions": {"hi": ["एक"]}}'}
    more = {"b.jpg": jpeg(2), "b.json": '{"text": "ek", "language": "hi-Latn"}'}
    write(tmp_path / "t", {"a.tar": tar({**beside, **more})})
    expected = {"hi": [["एक"], []], "en": [["one", "two", "three"], []], "hi-Latn": [[], ["ek"]]}
    assert read_items(retrieval, tmp_path / "t").captions == expected


COCO = {
    "images": [{"id": i, "file_name": f"{name}.jpg", "height": 6, "width": 9} for i, name in enumerate("abc")],
    "annotations": [
        {"id": 1, "image_id": 0, "category_id": 1, "bbox": [0, 0, 2, 2]},
        {"id": 2, "image_id": 0, "caption": "one dosa"},
        {"id": 3, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2]},
    ],
    "categories": [{"id": 1, "name": "dish"}],
}


@pytest.mark.parametrize("where", ["instances_val.json", "things.json", "annotations/instances_val.json"])
def test_one_coco_file_with_objects_and_captions(where, retrieval, tmp_path):
    content = json.loads(json.dumps(COCO))
    content["images"][0]["captions"] = ["one dosa", "a crisp dosa"]
    content["images"][2]["captions"] = [" an  idli "]
    write(tmp_path / "c", {where: json.dumps(content), **{f"images/{name}": data for name, data in IMAGES.items()}})
    items = read_items(retrieval, tmp_path / "c")
    assert (items.keys, items.captions) == (["a.jpg", "c.jpg"], {"en": [["one dosa", "a crisp dosa"], ["an idli"]]})
    file = tmp_path / "c" / where
    assert items.notes == [
        f"{file}: 1 of 3 annotations; left out: 2 objects ({file.name})",
        f"{file}: 1 images without a caption",
    ]
    assert [items.images[i].data for i in range(2)] == [IMAGES["a.jpg"], IMAGES["c.jpg"]]
    # A file beside the images is nearer than one of the same kind in `annotations`.
    if where.startswith("instances"):
        write(tmp_path / "c", {f"annotations/{where}": "{}"})
        assert read_items(retrieval, tmp_path / "c").keys == ["a.jpg", "c.jpg"]
    # What is neither is a mistake.
    content["annotations"][1] = {"id": 2, "image_id": 0, "captoin": "one dosa"}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="annotation 2 has no 'caption'; nearest is 'captoin'"):
        read_items(retrieval, tmp_path / "c")


def test_real_photos_with_objects_and_captions(data_root, retrieval):
    items = read_items(retrieval, data_root / "coco")
    content = json.loads((data_root / "coco/instances.json").read_text("utf-8"))
    captioned = {one["file_name"]: one["captions"] for one in content["images"] if one["captions"]}
    found = dict(zip(items.keys, items.captions["en"], strict=True))
    assert found == {name: [" ".join(text.split()) for text in texts] for name, texts in captioned.items()}
    assert f"{len(content['images']) - len(found)} images without a caption" in items.notes[1]


def test_a_table_or_captions_by_the_cards_name(card, retrieval, tmp_path):
    write(tmp_path, {"food.csv": TABLE, **TABLE_IMAGES})
    assert list(ids(find_items(card(), tmp_path)).values()) == ["masala_dosa", "masala_dosa", "idli", "ladoo"]
    write(tmp_path, {"captions.jsonl": '{"image/key": "2.jpg", "hi": {"caption": ["एक"]}}', "captions.txt": ""})
    assert find_items(retrieval, tmp_path).captions == {"hi": [["एक"]]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.jsonl", {"image/key": "x/../../a", "hi": {"caption": ["x"]}}, "'../a.jpg' lies outside the folder"),
        ("captions.jsonl", {"image/key": None, "hi": {"caption": ["x"]}}, "line 1: image/key is None; expected text"),
        (
            "dataset.json",
            {"images": [{"filename": "x/../../a.jpg", "split": "test", "sentences": [{"raw": "x"}]}]},
            "'../a.jpg' lies outside the folder",
        ),
        (
            "dataset.json",
            {"images": [{"filename": 7, "split": "test", "sentences": [{"raw": "x"}]}]},
            "image 1: filename is 7; expected text",
        ),
        (
            "dataset.json",
            {"images": [{"filename": "a.jpg", "split": "test", "sentences": None}]},
            "image 1: sentences is None; expected a list",
        ),
    ],
)
def test_names_in_files_of_captions(name, content, message, retrieval, tmp_path):
    write(tmp_path, {f"c/{name}": json.dumps(content), "a.jpg": jpeg(1), "c/x/b.jpg": jpeg(2)})
    with pytest.raises(ValueError, match=message):
        read_items(retrieval, tmp_path / "c")


def test_a_key_that_a_shard_has_twice_is_said(card, folder):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as target:
        for name, data in (("0.jpg", jpeg(1)), ("0.cls", b"idli"), ("0.jpg", jpeg(2)), ("0.cls", b"ladoo")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            target.addfile(info, io.BytesIO(data))
    write(folder, {"a.tar": stream.getvalue()})
    items = find_items(card(), folder.parent)
    assert (ids(items), items.images[0].data) == ({"a/0": "idli"}, jpeg(1))
    assert sum("duplicated" in note for note in items.notes) == 2
