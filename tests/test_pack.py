"""`indiclip shards pack`: webdataset reads the same samples, the same bytes every time, and nothing half done."""

import csv
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tarfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import webdataset
from helpers import only_caption
from PIL import Image
from processes import as_they_end, forked, wait_until

from indiclip.cli import main
from indiclip.commands.sources import unique_keys
from indiclip.commands.words import run_command
from indiclip.datasets.captions import CaptionTable
from indiclip.webdataset import cache, tar_index
from indiclip.webdataset.box_shards import BoxShards
from indiclip.webdataset.shard_writer import ShardWriter
from indiclip.webdataset.shards import Shards

ROOT = Path(__file__).parent.parent


def pack(source, out, *words, name="train"):
    return main(["shards", "pack", str(source), "--out", str(out), "--name", name, "--workers", "0", *map(str, words)])


def save(path, value=0, size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def digest(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.tar"))}


def left_out(folder, name="train"):
    lines = (folder / f"{name}-left-out.jsonl").read_text("utf-8").splitlines()
    return {entry["name"]: entry["reason"] for entry in map(json.loads, lines)}


@pytest.fixture
def pairs(tmp_path):
    """25 images with captions beside them."""
    for i in range(25):
        save(tmp_path / "photos" / f"{i}.png", i).with_suffix(".txt").write_text(f"caption {i} दीया\n", "utf-8")
    return tmp_path / "photos"


def test_webdataset_reads_what_was_packed(pairs, tmp_path):
    assert pack(pairs, tmp_path / "out", "--samples", 10) == 0
    urls = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    assert [Path(url).name for url in urls] == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert sorted(sample["__key__"] for sample in theirs) == sorted(map(str, range(25)))
    for sample in theirs:
        assert sample["png"] == (pairs / f"{sample['__key__']}.png").read_bytes()
        assert sample["txt"] == (pairs / f"{sample['__key__']}.txt").read_bytes()
    keys = [int(sample["__key__"]) for sample in theirs]
    assert keys != sorted(keys)  # shards are read in windows: their order is that of training
    ours = Shards(urls)
    assert [only_caption(sample) for sample in ours] == [f"caption {key} दीया" for key in keys]
    for url in urls:
        assert tar_index.find_index(url, cache.stat(url)) is not None


def test_the_same_files_give_the_same_bytes(pairs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pairs, copy)
    for i, file in enumerate(sorted(copy.iterdir(), reverse=True)):
        os.utime(file, (i, i))
        file.chmod(0o600)
    assert pack(pairs, tmp_path / "a", "--samples", 7) == 0
    command = ["pack", str(copy), "--out", str(tmp_path / "b"), "--name", "train", "--samples", "7", "--workers", "3"]
    assert main(["shards", *command]) == 0
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert len(digest(tmp_path / "a")) == 4
    assert pack(pairs, tmp_path / "c", "--samples", 7, "--seed", 1) == 0
    assert digest(tmp_path / "a") != digest(tmp_path / "c")
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as tar:
        assert {(m.uid, m.gid, m.uname, m.mtime, m.mode) for m in tar} == {(0, 0, "", 0, 0o644)}


def test_folders_of_classes_and_a_second_split_with_the_same_numbers(tmp_path, capsys):
    for name in ("घड़ा", "diya", "kite.v2"):
        for i in range(3):
            save(tmp_path / "train" / name / f"{i}.jpg", 7 * i)
    save(tmp_path / "val" / "kite.v2" / "0.PNG", 9)
    out = tmp_path / "out"
    assert pack(tmp_path / "train", out) == 0
    assert pack(tmp_path / "val", out, name="val") == 0
    assert (out / "classes.txt").read_text("utf-8") == "diya\nkite.v2\nघड़ा\n"
    shards = Shards(str(out / "train-*.tar"), str(out / "classes.txt"), "a {}")
    captions = {sample["key"].split("/")[1]: only_caption(sample) for sample in shards}
    assert captions["kite_v2_0"] == "a kite.v2"
    assert np.bincount(shards.labels).tolist() == [3, 3, 3]
    assert Shards(str(out / "val-*.tar"), str(out / "classes.txt"))[0]["label"] == 1
    save(tmp_path / "other" / "lamp" / "0.jpg")
    assert pack(tmp_path / "other", out, name="test") == 2
    assert "'lamp' is not among the 3 classes of classes.txt" in capsys.readouterr().err
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "diya"}]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    assert pack(tmp_path / "coco.json", out, name="test") == 2
    assert "classes.txt names other classes than" in capsys.readouterr().err
    save(tmp_path / "lines" / "a\nb" / "0.jpg")
    assert pack(tmp_path / "lines", tmp_path / "new") == 2
    assert r"the class 'a\nb' is no line of text" in capsys.readouterr().err


def test_a_table_keeps_none_and_na_and_declares_the_language(tmp_path):
    rows = {"a.png": "None", "sub/b.png": "NA", "c.png": "nan", "d.png": 'said "no"', "e.png": "दो, दीये"}
    for value, name in enumerate(rows):
        save(tmp_path / "images" / name, value)
    with (tmp_path / "t.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("path", "hi", "note"), *((name, text, "") for name, text in rows.items())])
    words = ("--images", tmp_path / "images", "--image_column", "path", "--caption_column", "hi")
    assert pack(tmp_path / "t.csv", tmp_path / "out", *words) == 0
    shards = Shards(str(tmp_path / "out" / "*.tar"))
    found = {sample["key"].split("/")[1]: only_caption(sample) for sample in shards}
    assert found == {"a": "None", "sub_b": "NA", "c": "nan", "d": 'said "no"', "e": "दो, दीये"}
    assert {shards.parts(i)["json"] for i in range(5)} == {b'{"language":"hi"}'}


def test_what_cannot_be_read_is_left_out_and_listed(tmp_path, capsys):
    folder = tmp_path / "images"
    for name in ("good", "blank", "other"):
        save(folder / f"{name}.png", len(name))
    save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "half.png").write_bytes((folder / "good.png").read_bytes()[:50])
    (folder / "text.jpg").write_text("no image")
    names = ["good", "blank", "link", "half", "../secret", "missing", "good"]
    lines = ["file\tcaption", *(f"{name}.png\t{'' if name == 'blank' else 'x'}" for name in names)]
    table = folder / "t.tsv"
    table.write_text("\n".join([*lines, f"{tmp_path}/secret.png\tx", "text.jpg\tx", "\tx"]))
    assert pack(table, tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "2 of 9 samples; left out: " in shown  # two rows are of one image
    assert "3 of 10 rows; left out: 7 of samples that are left out" in shown
    assert re.search(r"4 without an image file \(t.tsv: line \d+: ", shown)
    assert re.search(r"2 with an unreadable image \(t.tsv: line \d+: ", shown)
    reasons = left_out(tmp_path / "out")
    expected = {
        3: "the caption is empty; expected text",
        5: "damaged PNG: ",
        6: "'../secret.png' lies outside the folder",
        7: "missing.png: no such file",
        9: f"'{tmp_path}/secret.png' lies outside the folder",
        10: "expected the bytes of a JPEG, PNG or WebP, found 8",
        11: "no image is named",
    }
    assert reasons.keys() == {f"t.tsv: line {number}" for number in expected}
    for number, message in expected.items():
        assert message in reasons[f"t.tsv: line {number}"]
    assert {s["key"].split("/")[1] for s in Shards(str(tmp_path / "out" / "*.tar"))} == {"good", "link"}


def test_nothing_is_overwritten_and_mistakes_are_one_line(pairs, tmp_path, capsys):
    assert pack(pairs, tmp_path / "out") == 0
    assert pack(pairs, tmp_path / "out", name="tra") == 0  # of another name
    before = digest(tmp_path / "out")
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.csv").write_text("file,captoin\na.png,x\n")
    (tmp_path / "t.zip").touch()
    (tmp_path / "coco.json").write_text('{"images": [], "annotations": []}')
    save(pairs.parent / "both" / "a.png")
    save(pairs.parent / "both" / "class" / "a.png")
    for source, words, message in (
        (pairs, [], "train-000000.tar is there already and is not overwritten"),
        (tmp_path / "empty", ["--name", "x"], "empty: no images (jpg, jpeg, png, webp, jfif, jpe) in it or below it"),
        (tmp_path / "nosuch", ["--name", "x"], "nosuch: no such file or folder"),
        (
            tmp_path / "t.csv",
            ["--name", "x"],
            "no column of captions; found ['file', 'captoin']; expected `caption`, or",
        ),
        (tmp_path / "t.zip", ["--name", "x"], "expected a folder, a .csv, .tsv or .parquet table, or a COCO .json"),
        (tmp_path / "coco.json", ["--name", "x"], "no list 'categories'"),
        (tmp_path / "both", ["--name", "x"], "images in the folder and in 1 folders of it; expected either"),
        (pairs, ["--name", "a/b"], "--name: found 'a/b'"),
        (pairs, ["--name", "x", "--size", "5 apples"], "argument --size: found '5 apples'; expected a size such as"),
        (pairs, ["--name", "x", "--smaples", "5"], "--smaples: no such option; nearest is '--samples'"),
        (pairs, ["--nmae", "x"], "--nmae: no such option; nearest is '--name'"),  # an option that must be there
    ):
        assert pack(source, tmp_path / "out", *words) == 2, message
        error = capsys.readouterr().err
        assert message in error, error
        assert error.count("\n") == 1
    assert digest(tmp_path / "out") == before


def test_size_bounds_a_shard_and_a_larger_sample_has_its_own(tmp_path):
    with ShardWriter(tmp_path, "s", max_samples=100, max_bytes=20_000) as writer:
        for i, size in enumerate((8_000, 8_000, 8_000, 50_000, 10)):
            writer.add(str(i), {"jpg": bytes(size)})
    found = []
    for shard in writer.shards:
        with tarfile.open(shard) as tar:
            found.append(tar.getnames())
    assert found == [["0.jpg", "1.jpg"], ["2.jpg"], ["3.jpg"], ["4.jpg"]]
    writer.inventory.verify()
    assert writer.inventory.present["members"] == 5  # of no sample: the bytes are no images


def noise_pairs(folder, count):
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"noise {i}")


def test_a_full_disk_leaves_nothing(tmp_path, capsys):
    noise_pairs(tmp_path / "photos", 12)  # of 50 kB
    (tmp_path / "used").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, limits[1]))
        assert pack(tmp_path / "photos", tmp_path / "out", "--samples", 2) == 0  # each shard fits
        assert pack(tmp_path / "photos", tmp_path / "full", "--samples", 4) == 1
        assert pack(tmp_path / "photos", tmp_path / "used", "--samples", 4) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert ".train.part/train-000000.tar: File too large\n" in error
    assert not (tmp_path / "full").exists()
    assert list((tmp_path / "used").iterdir()) == []


def classes_of_one_photo(folder, count):
    noise_pairs(folder, 1)
    (folder / "0.txt").unlink()
    for i in range(count):
        (folder / "diya").mkdir(exist_ok=True)
        (folder / "diya" / f"{i}.png").hardlink_to(folder / "0.png")
    (folder / "diya" / "torn.png").write_bytes(b"torn")
    (folder / "0.png").unlink()
    return folder


@contextmanager
def started(photos, out, folder):
    """The id of a process whose pack has written some of its many shards; what it prints is in the folder."""
    folder.mkdir()

    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it
        return pack(photos, out, "--samples", "1", "--workers", "2")

    with forked(work, folder) as process:
        wait_until((out / ".train.part" / "train-000002.tar.index.npz").exists)
        yield process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_pack_leaves_nothing(number, tmp_path):
    out = tmp_path / "out"
    with started(classes_of_one_photo(tmp_path / "photos", 3000), out, tmp_path / "printed") as process:
        workers = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        os.killpg(process, number)
        assert dict(as_they_end([process], 60)) == {process: 128 + number}
    assert "Traceback" not in (tmp_path / "printed" / "err").read_text()
    assert (tmp_path / "printed" / "out").read_text() == ""
    assert workers
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert not out.exists()


def test_what_a_killed_pack_left_is_no_obstacle(tmp_path):
    photos, out = classes_of_one_photo(tmp_path / "photos", 500), tmp_path / "out"
    with started(photos, out, tmp_path / "printed") as process:
        os.killpg(process, signal.SIGKILL)
    assert not list(out.glob("[!.]*"))  # nothing that a glob of shards finds
    assert pack(photos, out, "--samples", 200) == 0
    assert pack(photos, tmp_path / "other", "--samples", 200) == 0
    assert digest(out) == digest(tmp_path / "other")
    names = ["classes.txt", "train-left-out.jsonl"]
    names += [f"train-00000{i}.tar{end}" for i in range(3) for end in ("", ".index.npz")]
    assert sorted(entry.name for entry in out.iterdir()) == sorted(names)


@pytest.mark.parametrize("after", range(6))
def test_a_pack_that_ends_while_its_shards_appear_leaves_nothing(after, pairs, tmp_path, monkeypatch):
    """By an error: of a full disk, or Ctrl-C. By a kill: the next one of the name removes what there is."""
    out, replace, moved, written = tmp_path / "out", Path.replace, [], {}

    def ends(self, target):
        if target.parent == out:
            written.update({file.name: file.read_bytes() for file in self.parent.iterdir()})
            if len(moved) == after:
                raise KeyboardInterrupt
            moved.append(self)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", ends)
    assert pack(pairs, out, "--samples", 10) == 130
    assert len(moved) == after
    assert not out.exists()
    monkeypatch.undo()
    out.mkdir()  # as a kill would leave it
    (out / ".train.part").mkdir()
    (out / ".train.lock").touch()
    for number, (name, data) in enumerate(sorted(written.items())):
        (out / name if number < after else out / ".train.part" / name).write_bytes(data)
    assert pack(pairs, out, "--samples", 10) == 0
    assert len(Shards(str(out / "*.tar"))) == 25
    assert not list(out.glob(".*"))


def test_of_two_packs_of_one_name_one_is_refused(pairs, tmp_path, capsys):
    photos, out = classes_of_one_photo(tmp_path / "photos_of_classes", 3000), tmp_path / "out"
    with started(photos, out, tmp_path / "printed") as process:
        assert pack(pairs, out) == 2
        assert "another process is writing train there; wait for its end" in capsys.readouterr().err
        assert pack(photos, out, name="val") == 2
        assert "another process is writing classes.txt there; wait for its end" in capsys.readouterr().err
        assert pack(pairs, out, name="pairs") == 0  # without classes, of another name
        os.killpg(process, signal.SIGINT)
        assert dict(as_they_end([process], 60)) == {process: 130}
    assert len(Shards(str(out / "pairs-*.tar"))) == 25
    assert not list(out.glob("train*")), "the other one stopped"
    assert not list(out.glob(".*"))
    assert not (out / "classes.txt").exists()


def test_thin_boxes_are_counted_when_packed_checked_and_read(tmp_path, capsys):
    save(tmp_path / "0.jpg", size=(40, 30))
    boxes = [[1, 1, 9, 9], [5, 5, 0.5, 9], [5, 5, 9, 0], [30, 20, 10.4, 10.4]]
    coco = {
        "images": [{"id": 1, "file_name": "0.jpg", "width": 40, "height": 30}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 7, "bbox": box, "iscrowd": 0} for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 7, "name": "diya"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    out = tmp_path / "out"
    assert pack(tmp_path / "coco.json", out) == 0
    said = ["2 of 4 boxes, 1 of them clipped to the image (", "; left out: 2 thinner than a pixel ("]
    shown = capsys.readouterr().out
    assert all(text in shown for text in said)
    urls = str(out / "*.tar")
    dataset = BoxShards(urls, str(out / "classes.txt"))
    dataset.inventory.verify()
    assert dataset.inventory.used["boxes"] == len(dataset[0]["boxes_xyxy"]) == 2
    for command in ("check", "stats", "index"):
        assert main(["shards", command, urls]) == 0
        shown = capsys.readouterr().out
        assert all(text in shown for text in said)
    assert "boxes" not in Shards(urls).inventory.present  # which it does not give


def test_keys_are_safe_file_names_without_dots_and_unique():
    names = ["a.b", "a_b", "x/y", "x_y", "दीया", "../..", "a b", "CON:1", "\ud800x", ""]
    keys = unique_keys(names)
    expected = ["a_b", "a_b_1", "x_y", "x_y_1", "दीया", "_", "a_b_2", "CON_1", "x", "__1"]
    assert [keys[i] for i in range(len(keys))] == expected


def test_parquet_has_missing_values_and_texts_that_look_like_them(tmp_path, capsys, monkeypatch):
    save(tmp_path / "a.png")
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"file": ["a.png", "a.png", None], "caption": ["NA", None, "x"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    assert pack(tmp_path / "t.parquet", tmp_path / "out") == 0
    assert [only_caption(sample) for sample in Shards(str(tmp_path / "out" / "*.tar"))] == ["NA"]
    assert set(left_out(tmp_path / "out").values()) == {"no image is named"}
    assert re.search(
        r"1 of 3 rows; left out: 1 without a caption .*, 1 of samples that are left out", capsys.readouterr().out
    )
    (tmp_path / "t.parquet").write_bytes(b"no parquet")
    assert pack(tmp_path / "t.parquet", tmp_path / "out", name="x") == 2
    assert "t.parquet: broken Parquet: " in capsys.readouterr().err


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").touch()
    assert pack(tmp_path / "t.parquet", tmp_path / "out") == 2
    assert "Parquet needs the package pyarrow: pip install pyarrow" in capsys.readouterr().err


def test_what_a_left_out_sample_is_made_of_is_left_out_too(tmp_path, capsys):
    for i, text in enumerate(["a kite", "", "a diya"]):
        save(tmp_path / "folder" / f"{i}.png", i).with_suffix(".txt").write_text(text)
    (tmp_path / "t.csv").write_text("file,caption\n0.png,a kite\n0.png,one kite\n1.png,\n1.png,\n2.png,a diya\n")
    images = [
        {"id": i, "file_name": f"{i}.png", "height": 4, "width": 4 + i // 2, "captions": ["a kite", "a kite", f"{i}"]}
        for i in range(3)
    ]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 2, 2]} for i in range(3)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "kite"}]}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    for source, said in (
        ("folder", {"samples": (3, 2), "files": (6, 4), "captions": (2, 2)}),
        ("t.csv", {"samples": (3, 2), "rows": (5, 3), "captions": (3, 3)}),
        ("coco.json", {"samples": (3, 2), "boxes": (3, 2), "captions": (9, 4)}),
    ):
        folder = () if source == "folder" else ("--images", tmp_path / "folder")
        capsys.readouterr()
        assert pack(tmp_path / source, tmp_path / "out", *folder, "--json", name=source.split(".")[0]) == 0
        units = json.loads(capsys.readouterr().out)["inventory"]
        assert {unit: (units[unit]["present"], units[unit]["used"]) for unit in said} == said
    assert main(["shards", "check", str(tmp_path / "out" / "coco-000000.tar"), "--workers", "0"]) == 0
    assert "\n  4 captions\n" in capsys.readouterr().out


def test_a_text_goes_with_the_last_of_its_images_and_a_pipe_is_not_waited_for(tmp_path, capsys):
    folder = tmp_path / "folder"
    for name in ("x.png", "x.webp", "y.png", "y.webp", "z.png"):
        save(folder / name).with_suffix(".txt").write_text(name)
    for name in ("x.png", "x.webp", "y.png"):
        (folder / name).write_text("no image")
    (folder / "z.txt").unlink()
    os.mkfifo(folder / "z.txt")
    assert pack(folder, tmp_path / "out", "--json") == 0
    units = json.loads(capsys.readouterr().out)["inventory"]
    assert {unit: (units[unit]["present"], units[unit]["used"]) for unit in ("files", "samples")} == {
        "files": (8, 2), "samples": (5, 1),
    }  # fmt: skip
    assert left_out(tmp_path / "out")["z.png"] == "the caption is ''; expected text"


@pytest.mark.parametrize("header", ["file,caption,caption", "file,caption,hi", "file,hi,caption,en", "file,id,caption"])
def test_a_table_is_packed_with_the_captions_that_training_takes(header, tmp_path):
    save(tmp_path / "a.png")
    cells = [f"text {number}" for number in range(header.count(","))]
    (tmp_path / "t.csv").write_text(f"{header}\na.png,{','.join(cells)}\n")
    assert pack(tmp_path / "t.csv", tmp_path / "out") == 0
    expected = CaptionTable(str(tmp_path), str(tmp_path / "t.csv")).captions(0)
    assert Shards(str(tmp_path / "out" / "*.tar")).captions(0) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[
            ("iscrowd", "0"),
            ("bbox", ["1", 2, 3, 4]),
            ("captions", "x"),
            ("width", "4"),
            ("bbox", [0, float("nan"), 2, 2]),
        ],
        *[("segmentation", "abc"), ("segmentation", None), ("segmentation", [[1, 2, 3]]), ("dp_x", "x")],
    ],
)
def test_a_value_of_the_wrong_type_is_an_error_of_packing_too(tmp_path, capsys, key, value):
    save(tmp_path / "a.png")
    image = {"id": 7, "file_name": "a.png", "height": 4, "width": 4}
    box = {"id": 8, "image_id": 7, "category_id": 1, "bbox": [0, 0, 2, 2]}
    (image if key in ("captions", "width") else box)[key] = value
    content = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "kite"}]}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    assert pack(tmp_path / "coco.json", tmp_path / "out") == 2
    assert re.search(rf"coco\.json: (image 7|annotation 8): .*({key}|box|polygon|dp_masks)", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_words_that_make_no_sense_are_one_line(tmp_path, capsys):
    pairs = save(tmp_path / "photos" / "0.png").with_suffix(".txt")
    pairs.write_text("a kite")
    for words, message in (
        (["more.csv"], "found 'more.csv' too; expected one SOURCE"),
        (["--size", "0"], "--size: found '0'; expected a size such as 500MB"),
    ):
        assert pack(pairs.parent, tmp_path / "out", *words) == 2
        assert re.search(message, capsys.readouterr().err)
    pairs.write_bytes(b"a\0kite")
    assert pack(pairs.parent, tmp_path / "out") == 1
    assert r"the caption is 'a\x00kite'; expected text" in capsys.readouterr().out


def test_behind_two_dashes_nothing_is_an_option(tmp_path, capsys):
    assert run_command(["shards", "pack", "--out", str(tmp_path / "out"), "--name", "x", "--", "--odd"]) == 2
    error = capsys.readouterr().err
    assert "--odd" in error
    assert "no such option" not in error
