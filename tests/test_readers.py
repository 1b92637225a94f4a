"""Kinds of odd files that every reader meets, through the commands: nothing is lost, coerced or joined silently."""

import json
import re

import pyarrow as pa
import pytest
import yaml
from experiments import config, fit
from helpers import only_caption
from PIL import Image
from pyarrow import parquet
from test_annotation_files import annotation, folder, write  # noqa: F401 (a fixture)
from test_coco import CONTENT, image
from test_shards import png, write_tar

from indiclip.cli import main
from indiclip.datasets.captions import CaptionTable
from indiclip.datasets.points import CountingPoints
from indiclip.webdataset.box_shards import BoxShards
from indiclip.webdataset.shards import Shards


def check(place, class_path, **init):
    """`indiclip check` of one source."""
    dataset = {"class_path": f"indiclip.{class_path}", "init_args": init}
    tree = config(data__train__0__dataset=dataset, data__train__0__batch_size=1, data__val=[])
    (place / "experiment.yaml").write_text(yaml.safe_dump(tree))
    return main(["check", "--config", str(place / "experiment.yaml"), "--workers", "0"])


def pack(source, *words):
    out = source.parent / "out"
    return main(["shards", "pack", str(source), "--out", str(out), "--name", "x", "--workers", "0", *words])


def one_line(capsys, message):
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.splitlines()) == 1
    return True


TWICE = '"images": [], "images": '


def test_a_key_that_an_object_has_twice_is_refused(folder, tmp_path, capsys):  # noqa: F811
    """Python takes the last one: the first list of images would be gone."""
    write(folder)
    file = folder / "instances.json"
    file.write_text(file.read_text().replace('"images": ', TWICE))
    words = {"images": str(folder), "annotations": str(file), "captioned": True}
    assert check(folder, "datasets.coco.CocoDetection", **words) == 2
    one_line(capsys, r"instances\.json: broken JSON: the key 'images' is duplicated in an object; expected it once")
    assert pack(file) == 2
    one_line(capsys, r"instances\.json: broken JSON: the key 'images' is duplicated")
    members = {"0.png": png(), "0.json": '{"caption": "a", "caption": "b"}', "1.png": png(1), "1.txt": "x"}
    path = write_tar(tmp_path / "a.tar", members)
    assert main(["shards", "check", path, "--workers", "0"]) == 1
    assert "a/0: broken JSON: the key 'caption' is duplicated" in capsys.readouterr().out


ALIKE = {
    r"category 'kite' is duplicated, 2 times": lambda c: c["categories"].append({"id": 91, "name": "kite "}),
    r"category 'caf\u00e9' is duplicated, 2 times": lambda c: c["categories"].extend(
        [{"id": 91, "name": "caf\u00e9"}, {"id": 92, "name": "cafe\u0301"}]
    ),
}


@pytest.mark.parametrize("message", ALIKE)
def test_names_that_read_alike_are_refused_by_training_and_packing(message, folder, capsys):  # noqa: F811
    content = write(folder)
    content["categories"][0]["name"] = "kite"
    write(folder, content, ALIKE[message])
    words = {"images": str(folder), "annotations": str(folder / "instances.json"), "captioned": True}
    assert check(folder, "datasets.coco.CocoDetection", **words) == 2
    one_line(capsys, message)
    assert pack(folder / "instances.json") == 2
    one_line(capsys, message)


def test_class_files_end_a_line_at_line_ends_only_and_have_each_name_once(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.png": png(), "0.cls": "1"})
    file = tmp_path / "classes.txt"
    for content in ("kite\u2028red\r\nlamp\r\n", "kite\u2028red\rlamp", "kite\u2028red\nlamp\n"):
        file.write_bytes(content.encode())
        assert Shards(path, str(file)).classes == ["kite\u2028red", "lamp"]
    file.write_text("caf\u00e9\ncafe\u0301\n", "utf-8")
    with pytest.raises(ValueError, match=r"classes\.txt: class 'caf\u00e9' is duplicated"):
        Shards(path, str(file))


def test_one_picture_by_two_paths_is_one_picture(tmp_path, capsys):
    for name in "abc":
        Image.new("RGB", (8, 8), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    (tmp_path / "t.csv").write_text("file,caption\na.png,ant\n./a.png,an ant\nb.png,bee\n")
    dataset = CaptionTable(str(tmp_path), str(tmp_path / "t.csv"))
    assert {dataset.key(i): dataset.captions(i)[""] for i in range(2)} == {"a.png": ["ant", "an ant"], "b.png": ["bee"]}
    entries = [
        {"file_name": name, "class_name": "cow", "count": 1, "points": [[1, 1]]} for name in ("a.png", "./a.png")
    ]
    (tmp_path / "c.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"c\.json: image 'a\.png' is duplicated"):
        CountingPoints(str(tmp_path), str(tmp_path / "c.json"))
    entries[1] |= {"file_name": "b.png", "class_name": "cow "}
    (tmp_path / "c.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"c\.json: class 'cow' is duplicated"):
        CountingPoints(str(tmp_path), str(tmp_path / "c.json"))


@pytest.mark.parametrize("nothing", [" ", "\u00a0\u3000", "\u200b", " \ufeff\u200d "])
def test_a_caption_of_nothing_visible_is_none(nothing, folder, capsys):  # noqa: F811
    (folder / "t.csv").write_text(f"file,caption\na.png,{nothing}\nb.png,bee\n", "utf-8")
    for name in "ab":
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    assert check(folder, "datasets.captions.CaptionTable", images=str(folder), table=str(folder / "t.csv")) == 2
    one_line(capsys, r"t\.csv: line 2: 'a\.png' has no caption in caption")
    write(folder, change=image(captions=[nothing]))
    words = {"images": str(folder), "annotations": str(folder / "instances.json"), "captioned": True}
    assert check(folder, "datasets.coco.CocoDetection", **words) == 2
    one_line(capsys, r"instances\.json: image 30: a caption is .*; expected text")
    path = write_tar(folder / "a.tar", {"0.png": png(), "0.txt": nothing, "1.png": png(1), "1.txt": "x"})
    assert main(["shards", "check", path, "--workers", "0"]) == 1
    assert re.search(r"a/0: the caption is .*; expected text", capsys.readouterr().out)


def test_a_row_in_an_unknown_language_is_said(folder, capsys):  # noqa: F811
    names = ("a", "b", "c")
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    (folder / "t.csv").write_text("file,caption,language\na.png,ant,Hindi\nb.png,bee,klingon\nc.png,cat,und\n")
    words = {"images": str(folder), "table": str(folder / "t.csv")}
    said = r"t\.csv: line 3: found the language 'klingon'; expected a code such as hi or hi-Latn"
    assert check(folder, "datasets.captions.CaptionTable", **words) == 2
    one_line(capsys, said)
    assert pack(folder / "t.csv") == 2
    one_line(capsys, said)
    assert check(folder, "datasets.captions.CaptionTable", on_bad_row="skip", **words) == 0
    assert re.search(rf"2 of 3 rows; left out: 1 in a language that is not known \(.*{said}", capsys.readouterr().out)
    parts = {f"{i}.{kind}": png(i) if kind == "png" else "x" for i in range(3) for kind in ("png", "txt")}
    said = [{"language": "klingon"}, {"lang": 5}, {"language": "und"}]
    parts |= {f"{i}.json": json.dumps(entry) for i, entry in enumerate(said)}
    assert main(["shards", "check", write_tar(folder / "a.tar", parts), "--workers", "0"]) == 1
    shown = capsys.readouterr().out
    assert re.search(
        r"2  unreadable caption\n.*a/0: found the language 'klingon'.*\n.*a/1: found the language 5;", shown
    )


def test_a_cell_longer_than_csv_takes_is_called_that(tmp_path, capsys):
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    long = "x" * 200_000
    for content in (f"file,caption\na.png,{long}\nb.png,bee\n", f'file,caption\na.png,"ant\nb.png,{long}\nc.png,cat\n'):
        (tmp_path / "t.csv").write_text(content)
        for bad, count in (("error", None), ("skip", 1)):
            words = {"images": str(tmp_path), "table": str(tmp_path / "t.csv"), "on_bad_row": bad}
            assert check(tmp_path, "datasets.captions.CaptionTable", **words) == (0 if count else 2)
            shown = capsys.readouterr()
            assert len(shown.err.splitlines()) == (0 if count else 1)
            if long in content.splitlines()[1]:
                assert "a cell is too long; expected at most 131,072 characters" in (shown.out + shown.err)


def save(file, columns):
    parquet.write_table(pa.table(columns), file)
    return file


def test_parquet_as_other_programs_write_it(tmp_path, capsys):
    """Names as bytes, images and words in a dictionary, text that is no UTF-8, times in nanoseconds."""
    for name in "ab":
        Image.new("RGB", (8, 8), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    data = [(tmp_path / f"{name}.png").read_bytes() for name in "ab"]
    words = {"images": str(tmp_path), "table": str(tmp_path / "t.parquet")}
    texts = pa.array(["ant", "bee"])
    for file, keys in (
        (pa.array([b"a.png", b"b.png"]), ["a.png", "b.png"]),
        (pa.array(["a.png", "b.png"]).dictionary_encode(), ["a.png", "b.png"]),
        (pa.array(data).dictionary_encode(), ["t-000000", "t-000001"]),
        (pa.array(data, pa.large_binary()), ["t-000000", "t-000001"]),
    ):
        for caption in (texts, texts.dictionary_encode(), texts.cast(pa.large_string()), texts.cast(pa.binary())):
            dataset = CaptionTable(
                **words | {"table": str(save(tmp_path / "t.parquet", {"file": file, "caption": caption}))}
            )
            assert [dataset.key(i) for i in range(2)] == keys
            assert [dataset[i]["image"].data for i in range(2)] == data
            assert [dataset.captions(i) for i in range(2)] == [{"": ["ant"]}, {"": ["bee"]}]
    names = pa.array(["a.png", "b.png"])
    broken = pa.array([b"caf\xe9", b"bee"]).view(pa.string())
    save(tmp_path / "t.parquet", {"file": names, "caption": broken})
    assert check(tmp_path, "datasets.captions.CaptionTable", **words) == 2
    one_line(capsys, r"t\.parquet: row 1: column 'caption': expected text: 'utf-8' codec can't decode byte 0xe9")
    assert check(tmp_path, "datasets.captions.CaptionTable", **words, on_bad_row="skip") == 0
    assert "1 of 2 rows; left out: 1 with a cell that is no text" in capsys.readouterr().out
    for kind in (pa.timestamp("ns"), pa.duration("ns")):
        save(tmp_path / "t.parquet", {"file": names, "caption": pa.array([1_577_836_800_000_000_001] * 2, kind)})
        assert check(tmp_path, "datasets.captions.CaptionTable", **words) == 2
        one_line(capsys, r"t\.parquet: row 1: column 'caption': expected text: Nanosecond")


def test_texts_beside_images_are_found_in_capitals_and_counted_once(tmp_path, capsys):
    source = tmp_path / "photos"
    source.mkdir()
    for name in ("A.PNG", "b.png"):
        Image.new("RGB", (8, 8), (ord(name[0]), 0, 0)).save(source / name, "PNG")
    (source / "A.TXT").write_text("ant")
    (source / "b.Json").write_text('{"caption": "bee"}')
    (source / "b.json").write_text('{"caption": "another"}')
    assert pack(source) == 0
    assert re.search(r"4 of 5 files; left out: 1 text beside another of its name \(b\.json\)", capsys.readouterr().out)
    shards = Shards(str(tmp_path / "out" / "*.tar"))
    assert {shards.key(i)[-1]: only_caption(shards[i]) for i in range(2)} == {"A": "ant", "b": "bee"}


def test_what_a_sample_holds_that_is_left_out_is_counted(folder, capsys):  # noqa: F811
    """Boxes and captions of images that cannot be packed, and captions that an image has twice."""
    write(folder)
    (folder / "a.png").write_bytes(b"torn")
    captions = [{"image_id": i, "caption": text} for i, text in ((7, "x"), (7, "y"), (30, "z"), (30, "z"), (999, "w"))]
    write(folder, {"annotations": captions}, name="captions.json")
    assert pack(folder / "instances.json", "--captions", str(folder / "captions.json"), "--json") == 0
    found = json.loads(capsys.readouterr().out)["inventory"]
    bad = CONTENT["annotations"][0]["image_id"]
    boxes = sum(entry["image_id"] == bad for entry in CONTENT["annotations"])
    assert found["boxes"]["present"] == len(CONTENT["annotations"])
    assert found["boxes"]["left_out"]["of samples that are left out"]["count"] == boxes
    assert found["captions"]["present"] == 5
    assert {reason: one["count"] for reason, one in found["captions"]["left_out"].items()} == {
        "of images that are not at hand": 1,
        "of the same words": 1,
        "of samples that are left out": 2 if bad == 7 else 1,
    }
    for unit in found.values():
        assert unit["present"] == unit["used"] + sum(one["count"] for one in unit["left_out"].values())


def test_a_label_that_training_refuses_is_not_packed(tmp_path, capsys):
    source = tmp_path / "photos"
    source.mkdir()
    for i, label in enumerate(("3", "3.0", "true", "-1", "1e9", '"3"', '"\u0969"')):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(source / f"{i}.png")
        (source / f"{i}.json").write_text(f'{{"caption": "x", "label": {label}}}')
    assert pack(source) == 0
    assert "1 of 7 samples; left out: 6 with unusable texts, classes or boxes" in capsys.readouterr().out
    assert main(["shards", "check", str(tmp_path / "out" / "*.tar"), "--workers", "0"]) == 0


def test_a_box_of_no_class_is_of_an_unreadable_image(tmp_path, capsys):
    entry = {"id": 1, "width": 8, "height": 8, "annotations": [{"id": 1, "bbox": [1, 1, 4, 4], "class": "0"}]}
    members = {"0.png": png(0, (8, 8)), "0.json": json.dumps(entry), "1.png": png(1, (8, 8))}
    entry["annotations"][0]["class"] = 0
    path = write_tar(tmp_path / "a.tar", members | {"1.json": json.dumps(entry).encode("utf-16")})
    boxes = BoxShards(path, ["kite"]).inventory.summary()["boxes"]
    assert (boxes["present"], boxes["used"]) == (2, 1)
    assert main(["shards", "check", path, "--workers", "0"]) == 1
    assert "1 of 2 boxes; left out: 1 of an unreadable image (" in capsys.readouterr().out


def test_a_coco_file_without_its_images_says_what_to_pass(folder, tmp_path, capsys):  # noqa: F811
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "instances.json"
    write(folder, name="annotations/instances.json")
    assert pack(file) == 1
    shown = capsys.readouterr().out
    assert "0 of 3 samples; left out: 3 without an image file (" in shown
    assert f"expected the images in {file.parent}; --images says where else they are" in shown
    assert not (file.parent / "out").exists()
    assert pack(file, "--images", str(folder)) == 0


def test_huge_numbers_are_one_line(folder, capsys):  # noqa: F811
    write(folder, change=annotation(bbox=[1e308, 1, 1e308, 3]))
    words = {"images": str(folder), "annotations": str(folder / "instances.json"), "captioned": True}
    assert check(folder, "datasets.coco.CocoDetection", **words) == 2
    one_line(capsys, r"annotation 1: the box \[x, y, width, height\] = \[1e\+308, 1\.0, 1e\+308, 3\.0\] lies outside")


def test_a_single_caption_is_in_captions_as_of_every_reader(tmp_path):
    members = {"0.png": png(), "0.txt": "x", "1.png": png(1), "1.cls": "0"}
    path = write_tar(tmp_path / "a.tar", members)
    shards = Shards(path, ["kite"], "a {}")
    assert [shards[i]["captions"] for i in range(2)] == [{"": ["x"]}, {"": ["a kite"]}]
    assert "caption" not in shards[0]


def test_with_skip_no_row_ends_the_run(tmp_path, capsys):
    """Names that lead out of the folder or are longer than the system takes are rows without an image file."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    names = ["a.png", "../a.png", "/a.png", "x" * 5000, "sub", "./a.png"]
    (tmp_path / "sub").mkdir()
    (tmp_path / "T.CSV").write_text("file,caption\n" + "".join(f"{name},ant {i}\n" for i, name in enumerate(names)))
    words = {"images": str(tmp_path), "table": str(tmp_path / "T.CSV"), "on_bad_row": "skip"}
    assert check(tmp_path, "datasets.captions.CaptionTable", **words) == 0
    shown = capsys.readouterr().out
    assert "2 of 6 rows; left out: 4 without an image file (" in shown
    assert "  1 images\n" in shown
    assert pack(tmp_path / "T.CSV") == 0


def test_a_sample_without_what_its_heads_need_is_unreadable_for_check_and_fit(folder, capsys):  # noqa: F811
    parts = {f"{i}.{kind}": png(i) if kind == "png" else f"kite {i}" for i in range(4) for kind in ("png", "txt")}
    path = write_tar(folder / "a.tar", parts | {"m.png": png(9), "m.cls": "0"})
    assert check(folder, "webdataset.shards.Shards", urls=str(path)) == 0
    assert re.search(r"4 of 5 samples read; left out: 1 has no caption, .* \(a/m: ", capsys.readouterr().out)
    dataset = {"class_path": "indiclip.webdataset.shards.Shards", "init_args": {"urls": str(path)}}
    tree = config(data__train__0__dataset=dataset, data__train__0__batch_size=5, data__val=[])
    assert fit(folder, tree) == 0
    quarantine = next((folder / "runs").rglob("quarantine*.json*")).read_text()
    assert "a/m" in quarantine
    assert "has no caption" in quarantine


def test_a_source_without_one_usable_box_passes_nothing(folder, capsys):  # noqa: F811
    def normalise(content):
        for box in content["annotations"]:
            box["bbox"] = [0.1, 0.2, 0.5, 0.5]

    write(folder, change=normalise)
    words = {"images": str(folder), "annotations": str(folder / "instances.json")}
    said = r"none of the boxes can be used: 0 of \d boxes; left out: \d thinner than a pixel, .*: normalised\?"
    assert check(folder, "datasets.coco.CocoDetection", **words) == 2
    one_line(capsys, rf"data\.train\[0\]: {said}")
    assert pack(folder / "instances.json") == 2
    one_line(capsys, rf"instances\.json: {said}")
