"""`indiclip embed`: every kind of source, exact files whatever happens on the way, and mistakes in one line."""

import csv
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import signal
import tarfile
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from experiments import config
from helpers import noise, tiny_encoder
from PIL import Image
from processes import as_ranks, holding, in_processes
from pyarrow import parquet

from indiclip import json_lines
from indiclip.cli import main
from indiclip.commands import embed as embed_command
from indiclip.commands import embed_ranks
from indiclip.evals.models.stored import stored
from indiclip.generated.mela import Mela

SIZES = [(24, 16), (16, 40), (32, 32), (8, 24)]
NUM_IMAGES = 23


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in a child process: with another number of threads a matrix product rounds otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_model(file, seed=0):
    encoder = tiny_encoder(seed).eval()
    state = {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()}
    torch.save({"encoder": encoder.to_config(), "state_dict": state}, file)
    return encoder


def save_as_bicubic(file, other):
    """The same weights of a model that resizes images otherwise."""
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["encoder"]["backbone"]["init_args"]["interpolation"] = "bicubic"
    torch.save(checkpoint, other)
    return other


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A model, and `.file`, where it is saved."""
    file = tmp_path_factory.mktemp("model") / "tiny.ckpt"
    encoder = save_model(file)
    encoder.file = file
    return encoder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """23 pictures of several sizes in two classes."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(NUM_IMAGES):
        file = folder / ("diya", "kite")[number % 2] / f"{number:02}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(noise(*SIZES[number % 4], number)).save(file)
    return folder


def embed(encoder, out, *words):
    return main(["embed", "--device", "cpu", *map(str, words), "--model", str(encoder.file), "--out", str(out)])


def read(out):
    """`(vectors, rows of the keys, record)` of a finished folder, with NumPy and pyarrow alone."""
    record = json.loads((out / "embed.json").read_text())
    vectors = [np.load(file, mmap_mode="r") for file in sorted(out.glob("embeddings-*.npy"))]
    keys = [parquet.read_table(file).to_pylist() for file in sorted(out.glob("keys-*.parquet"))]
    assert record["done"] is True
    assert list(map(len, vectors)) == list(map(len, keys)) == record["parts"]
    return np.concatenate(vectors), [row for part in keys for row in part], record


def content(out):
    """Every file of a folder but the lock."""
    return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.name != ".lock"}


def expected(encoder, images):
    """The oracle: each image by itself, through the encoder's own method."""
    with torch.no_grad():
        return torch.cat([encoder.embed_image(image) for image in images]).numpy()


def of_files(encoder, folder, names):
    return expected(encoder, [Image.open(folder / name) for name in names])


# Sources.


def test_a_folder_of_classes(encoder, photos, tmp_path, capsys):
    assert embed(encoder, tmp_path / "out", photos, "--batch_size", 4, "--part_size", 10) == 0
    vectors, rows, record = read(tmp_path / "out")
    names = sorted(str(file.relative_to(photos)) for file in photos.rglob("*.png"))
    assert [row["key"] for row in rows] == names
    assert [row["label"] for row in rows] == [name.split("/")[0] for name in names]
    assert {row["source"] for row in rows} == {str(photos)}
    assert [row["row"] for row in rows] == list(range(NUM_IMAGES))
    assert [(row["height"], row["width"]) for row in rows] == [SIZES[int(name[5:7]) % 4] for name in names]
    np.testing.assert_allclose(vectors, of_files(encoder, photos, names), atol=1e-5)
    assert record["parts"] == [10, 10, 3]
    assert record["model"]["weights"] == f"{encoder.file}, step 0"
    read_as = {"name": "native", "patch_size": 8, "interpolation": "bilinear", "mean": [0.5] * 3, "antialias": True}
    assert record["preprocessing"].items() >= read_as.items()
    assert record["summary"] | {"cosine_loss": 0} == {
        "samples": 23, "rows": 23, "quarantined": 0, "unreadable_captions": 0, "damaged": 0, "cosine_loss": 0,
    }  # fmt: skip
    assert sorted(content(tmp_path / "out")) == sorted(
        ["embed.json", *(f"{name}" for k in range(3) for name in (f"embeddings-0000{k}.npy", f"keys-0000{k}.parquet"))]
    )
    assert "23 embeddings of 64 numbers, fp32, in 3 parts" in capsys.readouterr().out


def test_a_flat_folder_with_texts_beside(encoder, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(noise(16, 16, number)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"दीया {number}", "utf-8")
    assert embed(encoder, tmp_path / "out", folder) == 0
    vectors, rows, _ = read(tmp_path / "out")
    np.testing.assert_allclose(vectors, of_files(encoder, folder, ["0.png", "1.png", "2.png"]), atol=1e-5)
    assert [row["captions"] for row in rows] == [[{"language": "", "text": f"दीया {number}"}] for number in range(3)]
    assert {row["label"] for row in rows} == {None}


def write_tar(file, names, photos):
    with tarfile.open(file, "w:gz" if file.suffix == ".gz" else "w") as tar:
        for number, name in enumerate(names):
            parts = {"png": (photos / name).read_bytes(), "cls": str(number % 2).encode()}
            parts |= {"json": json.dumps({"captions": {"hi": "पतंग", "en": "a kite"}}).encode()} if number == 0 else {}
            for extension, data in parts.items():
                member = tarfile.TarInfo(f"{number:03}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_shards_beside_a_folder_and_shards_of_the_same_name(encoder, photos, tmp_path):
    names = sorted(str(file.relative_to(photos)) for file in photos.rglob("*.png"))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    write_tar(tmp_path / "a" / "s-0.tar", names[:5], photos)
    write_tar(tmp_path / "a" / "s-1.tar.gz", names[5:8], photos)
    write_tar(tmp_path / "b" / "s-0.tar", names[8:10], photos)
    shards = [str(tmp_path / "a" / "s-{0.tar,1.tar.gz}"), str(tmp_path / "b" / "*.tar")]
    assert embed(encoder, tmp_path / "out", *shards, photos, "--batch_size", 4) == 0
    vectors, rows, record = read(tmp_path / "out")
    np.testing.assert_allclose(vectors, of_files(encoder, photos, names[:10] + names), atol=1e-5)
    files = ["a/s-0.tar"] * 5 + ["a/s-1.tar.gz"] * 3 + ["b/s-0.tar"] * 2
    assert [row["source"] for row in rows] == [str(tmp_path / file) for file in files] + [str(photos)] * NUM_IMAGES
    assert [row["row"] for row in rows] == [*range(5), *range(3), *range(2), *range(NUM_IMAGES)]
    assert [row["key"] for row in rows[4:10]] == ["s-0/004", "s-1/000", "s-1/001", "s-1/002", "s-0/000", "s-0/001"]
    assert [row["label"] for row in rows[:3]] == ["0", "1", "0"]
    assert rows[0]["captions"] == [{"language": "hi", "text": "पतंग"}, {"language": "en", "text": "a kite"}]
    assert rows[1]["captions"] == []
    assert [source["samples"] for source in record["sources"]] == [8, 2, 23]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "embedded", "uncaptioned"])
def test_tables(encoder, photos, tmp_path, kind):
    names = ["diya/00.png", "kite/01.png", "diya/00.png"]
    rows = [{"path": name, "hi": f"पतंग {i}", "en": f"kite {i}"} for i, name in enumerate(names)]
    table, words = tmp_path / f"t.{kind}", ["--images", photos, "--image_column", "path"]
    if kind in ("csv", "tsv", "uncaptioned"):
        table = table.with_suffix(".tsv" if kind == "tsv" else ".csv")
        rows = [{"path": row["path"]} for row in rows] if kind == "uncaptioned" else rows
        with table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        table = table.with_suffix(".parquet")
        if kind == "embedded":
            rows = [row | {"path": {"bytes": (photos / row["path"]).read_bytes(), "path": None}} for row in rows]
        parquet.write_table(pa.Table.from_pylist(rows), table)
    assert embed(encoder, tmp_path / "out", table, *words) == 0
    vectors, found, _ = read(tmp_path / "out")
    np.testing.assert_allclose(vectors, of_files(encoder, photos, names[:2]), atol=1e-5)  # rows of an image are one
    assert [row["key"] for row in found] == (["t-000000", "t-000001"] if kind == "embedded" else names[:2])
    texts = [{(one["language"], one["text"]) for one in row["captions"]} for row in found]
    both = [
        {(tag, f"{word} {i}") for i in numbers for tag, word in (("hi", "पतंग"), ("en", "kite"))}
        for numbers in ([0, 2], [1])
    ]
    assert texts == ([set(), set()] if kind == "uncaptioned" else both)


def test_a_coco_file(encoder, photos, tmp_path):
    images = [
        {"id": 7, "file_name": "diya/00.png", "height": 24, "width": 16, "captions": ["a lamp", "a diya"]},
        {"id": 9, "file_name": "kite/01.png", "height": 16, "width": 40},
        {"id": 10, "file_name": "kite/missing.png", "height": 16, "width": 40},
    ]
    boxes = [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [0, 0, 4, 4]}]
    coco = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "diya"}]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    assert embed(encoder, tmp_path / "out", tmp_path / "coco.json", "--images", photos) == 0
    vectors, rows, record = read(tmp_path / "out")
    np.testing.assert_allclose(vectors, of_files(encoder, photos, ["diya/00.png", "kite/01.png"]), atol=1e-5)
    assert [row["key"] for row in rows] == ["diya/00.png", "kite/01.png"]
    assert [one["text"] for one in rows[0]["captions"]] == ["a lamp", "a diya"]
    (lost,) = json_lines.read(tmp_path / "out" / "quarantine.jsonl")
    assert (lost["key"], lost["row"]) == ("kite/missing.png", 2)
    assert "missing.png: no such file" in lost["reason"]
    assert record["summary"]["quarantined"] == 1


def test_the_sources_of_a_config(encoder, tmp_path, capsys):
    file, out = tmp_path / "experiment.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(config()))
    dataset = Mela(num_scenes=12, size=32, layout="single")
    assert embed(encoder, out, "data.val", "--config", file, "--part_size", 5) == 0
    vectors, rows, record = read(out)
    assert record["sources"][0]["source"] == "data.val[0]"
    assert [row["key"] for row in rows] == [dataset.key(index) for index in range(12)]
    np.testing.assert_allclose(vectors, expected(encoder, [sample["image"] for sample in dataset]), atol=1e-5)
    assert embed(encoder, out, "--config", file, "--what", "captions", "--overwrite") == 0
    vectors, rows, record = read(out)
    texts = [text for sample in dataset for of_language in sample["captions"].values() for text in of_language]
    assert [row["text"] for row in rows] == 2 * texts  # data.train[0] and data.val[0]
    with torch.no_grad():
        np.testing.assert_allclose(vectors, encoder.embed_text(2 * texts).numpy(), atol=1e-5)
    assert embed(encoder, tmp_path / "other", "photos", "--config", file) == 2
    assert "photos: no source of the config; expected data.train, data.val, data.train[0]" in capsys.readouterr().err


def test_captions_each_with_its_language(encoder, photos, tmp_path):
    """Also those of tables and files that have no images."""
    (tmp_path / "t.csv").write_text("file,hi,en\nx.png,पतंग,kite\nx.png,पतंग,a kite\ny.png,,lamp\n", "utf-8")
    (tmp_path / "texts.tsv").write_text("hi\tta\nदीया\tவிளக்கு\n\tபட்டம்\n", "utf-8")
    (tmp_path / "en.txt").write_text("one\n\ntwo\n")
    sources = [tmp_path / name for name in ("t.csv", "texts.tsv", "en.txt")]
    assert embed(encoder, tmp_path / "out", *sources, "--what", "captions", "--length", 16) == 0
    vectors, rows, record = read(tmp_path / "out")
    found = [(row["key"], row["row"], row["language"], row["text"]) for row in rows]
    assert found == [
        *[
            ("x.png", 0, "hi", "पतंग"),
            ("x.png", 0, "en", "kite"),
            ("x.png", 0, "en", "a kite"),
            ("y.png", 1, "en", "lamp"),
        ],
        *[("texts-000000", 0, "hi", "दीया"), ("texts-000000", 0, "ta", "விளக்கு"), ("texts-000001", 1, "ta", "பட்டம்")],
        *[("en-000000", 0, "en", "one"), ("en-000002", 2, "en", "two")],
    ]
    with torch.no_grad():
        texts = encoder.embed_text([row["text"] for row in rows], length=16).numpy()
    np.testing.assert_allclose(vectors, texts, atol=1e-5)
    assert (record["summary"]["samples"], record["summary"]["rows"]) == (7, 9)


# What is stored.


@pytest.mark.parametrize(("dtype", "kind", "bound"), [("fp16", np.float16, 1e-6), ("int8", np.int8, 1e-4)])
def test_smaller_numbers(encoder, photos, tmp_path, capsys, dtype, kind, bound):
    assert embed(encoder, tmp_path / "whole", photos) == 0
    assert embed(encoder, tmp_path / "out", photos, "--dtype", dtype) == 0
    whole, found, record = read(tmp_path / "whole")[0], *read(tmp_path / "out")[::2]
    assert found.dtype == kind
    again = found.astype(np.float32) / np.linalg.norm(found.astype(np.float32), axis=1, keepdims=True)
    losses = 1 - (whole.astype(np.float64) * again).sum(1) / np.linalg.norm(whole.astype(np.float64), axis=1)
    assert record["decode"] == "float32(row) / norm(float32(row))"
    loss = record["summary"]["cosine_loss"]
    assert loss["mean"] == pytest.approx(losses.mean(), abs=1e-7)
    assert 0 < loss["mean"] <= loss["largest"] < bound
    assert f"lost by {dtype}: 1 - cosine is {loss['mean']:.1e} on average" in capsys.readouterr().out


def test_int8_of_hand_made_rows():
    rows = np.array([[0.6, -0.8, 0.0], [0.0, 0.0, 0.0], [1.0, 0.004, -0.0038]], np.float32)
    found, losses = stored(rows, "int8")
    assert found.tolist() == [[95, -127, 0], [0, 0, 0], [127, 1, 0]]
    cosine = (0.6 * 95 + 0.8 * 127) / np.hypot(95, 127)
    np.testing.assert_allclose(losses[:2], [1 - cosine, 0], atol=1e-8)
    assert stored(rows[:0], "int8")[0].shape == (0, 3)


@pytest.mark.parametrize(
    ("length", "said"), [(16, ""), (20, "--length 20: .* was not trained to be cut to it; its lengths are 16, 32, 64")]
)
def test_length_is_cut_and_normalised_again(encoder, photos, tmp_path, capsys, length, said):
    assert embed(encoder, tmp_path / "whole", photos) == 0
    assert embed(encoder, tmp_path / "out", photos, "--length", length) == 0
    whole, found = read(tmp_path / "whole")[0], read(tmp_path / "out")[0]
    cut = whole[:, :length] / np.linalg.norm(whole[:, :length], axis=1, keepdims=True)
    np.testing.assert_allclose(found, cut, atol=1e-6)
    assert re.search(said, capsys.readouterr().err)


def test_views_are_those_of_the_benchmark(encoder, photos, tmp_path, capsys):
    assert embed(encoder, tmp_path / "out", photos, "--view", "4") == 0
    names = [row["key"] for row in read(tmp_path / "out")[1]]
    with torch.no_grad():
        small = torch.cat([encoder.embed_image(Image.open(photos / name), max_tokens=4) for name in names])
    np.testing.assert_allclose(read(tmp_path / "out")[0], small.numpy(), atol=1e-5)
    assert embed(encoder, tmp_path / "other", photos, "--view", "big") == 2
    assert "has no view 'big'; expected native, native-square, or a number of patches" in capsys.readouterr().err


def test_a_model_of_timm_goes_on_with_the_same_random_weights(photos, tmp_path, capsys):
    words = ["embed", str(photos), "--model", "timm:test_vit", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(words) == 0
    capsys.readouterr()
    assert main(words) == 0
    assert "it was complete already" in capsys.readouterr().out
    assert main([*words, "--what", "captions", "--overwrite"]) == 2
    assert "--what captions: timm:test_vit embeds no text" in capsys.readouterr().err


# What is unreadable.


def test_unreadable_images_have_no_row_and_are_listed(encoder, photos, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):
        Image.fromarray(noise(16, 24, number)).save(folder / f"{number:02}.png")
    for number in (0, 5, 6, 7, 8):  # one of a batch of two, whole batches, whole part
        (folder / f"{number:02}.png").write_bytes((folder / f"{number:02}.png").read_bytes()[: 60 * (number != 0)])
    assert embed(encoder, tmp_path / "out", folder, "--batch_size", 2, "--part_size", 3, "--dtype", "int8") == 0
    _, rows, record = read(tmp_path / "out")
    assert [row["row"] for row in rows] == [1, 2, 3, 4, 9, 10, 11]
    assert record["parts"] == [2, 2, 0, 3]
    listed = json_lines.read(tmp_path / "out" / "quarantine.jsonl")
    assert [(row["key"], row["row"]) for row in listed] == [(f"{n:02}.png", n) for n in (0, 5, 6, 7, 8)]
    assert "expected the bytes of a JPEG, PNG or WebP, found 0" in listed[0]["reason"]
    assert listed[1]["reason"].startswith("05.png: ") or "damaged PNG" in listed[1]["reason"]
    assert "7 of 12 samples; quarantined: 5" in capsys.readouterr().out


def test_the_rest_of_a_truncated_shard_is_said(encoder, photos, tmp_path, capsys):
    names = sorted(str(file.relative_to(photos)) for file in photos.rglob("*.png"))
    write_tar(tmp_path / "s.tar", names, photos)
    data = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(data[: len(data) // 2])
    assert embed(encoder, tmp_path / "out", tmp_path / "s.tar") == 0
    _, rows, record = read(tmp_path / "out")
    assert 0 < len(rows) < NUM_IMAGES
    assert record["summary"]["damaged"] == 1
    assert json_lines.read(tmp_path / "out" / "quarantine.jsonl")[-1]["source"] == str(tmp_path / "s.tar")
    assert "lost to all samples: 1 damaged places" in capsys.readouterr().out


def test_unreadable_captions_beside_an_image_are_counted_and_the_others_read(encoder, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    beside = [
        {"txt": b"hello", "json": b"{bad"},
        {"txt": b"\xff", "json": b'{"captions": {"en": ["a kite"]}}'},
        {"txt": b"whole", "json": b'{"captions": {"en": ["a lamp"]}}'},
        {"json": b"[1]"},
        {},
    ]
    for number, parts in enumerate(beside):
        Image.fromarray(noise(16, 16, number)).save(folder / f"{number}.png")
        for extension, data in parts.items():
            (folder / f"{number}.{extension}").write_bytes(data)
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
    texts = [["hello"], ["a kite"], ["whole", "a lamp"], [], []]
    shard_config = tmp_path / "shards.yaml"
    shards = {"class_path": "indiclip.webdataset.shards.Shards", "init_args": {"urls": str(tmp_path / "s.tar")}}
    shard_config.write_text(yaml.safe_dump(config(data__train__0__dataset=shards)))
    for name, source in (("of_folder", folder), ("of_shard", tmp_path / "s.tar")):
        out = tmp_path / name
        assert embed(encoder, out, source, "--part_size", 2) == 0
        _, rows, record = read(out)
        assert [sorted(one["text"] for one in row["captions"]) for row in rows] == list(map(sorted, texts))
        assert (record["summary"]["quarantined"], record["summary"]["unreadable_captions"]) == (0, 3)
        listed = json_lines.read(out / "quarantine.jsonl")
        assert [row["row"] for row in listed] == [0, 1, 3]
        assert all(row["reason"].startswith("its captions alone: ") for row in listed)
        assert "broken JSON" in listed[0]["reason"]
        assert "the .txt" in listed[1]["reason"]
        shown = capsys.readouterr().out
        assert "5 of 5 samples; quarantined: 0" in shown
        assert "embedded, but with captions that cannot be read: 3" in shown
        assert f"every one of them: {out / 'quarantine.jsonl'}" in shown
    # Where the captions are what is embedded, such a sample is unreadable as a whole, as in training.
    for name, words in (("texts", [tmp_path / "s.tar"]), ("texts_of_config", ["data.train", "--config", shard_config])):
        assert embed(encoder, tmp_path / name, *words, "--what", "captions") == 0
        _, rows, record = read(tmp_path / name)
        assert sorted(row["text"] for row in rows) == ["a lamp", "whole"]
        lost = [row["row"] for row in json_lines.read(tmp_path / name / "quarantine.jsonl")]
        assert lost == ([0, 1, 3] if name == "texts" else [0, 1, 3, 4])  # to train on needs a caption, or a class
        assert record["summary"]["quarantined"] == len(lost)


def test_names_that_are_no_utf8(encoder, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(noise(16, 16)).save(folder / os.fsdecode(b"\xff.png"))
    assert embed(encoder, tmp_path / "out", folder) == 0
    assert read(tmp_path / "out")[1][0]["key"] == "\\udcff.png"
    assert embed(encoder, tmp_path / "out", folder) == 0


# Whatever happens on the way.

FORK = multiprocessing.get_context("fork")
WORDS = ("--batch_size", 4, "--part_size", 7, "--dtype", "int8")  # 4 parts


@pytest.fixture(scope="module")
def whole(encoder, photos, tmp_path_factory):
    """What is left of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert embed(encoder, out, photos, *WORDS) == 0
    return content(out)


def at_write(number, act, monkeypatch):
    """Do `act` at the n-th file that is written: between its bytes and its name."""
    count, write = iter(range(10**6)), json_lines.os.fsync

    def fsync(descriptor):
        write(descriptor)
        if next(count) == number:
            act()

    monkeypatch.setattr(json_lines.os, "fsync", fsync)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("moments", [(0, 1, 2), (3, 4, 2), (5, 5, 3), (11, 2, 0), (12, 13, 0), (4, 9, 1)])
def test_killed_three_times_at_any_moment(encoder, photos, tmp_path, monkeypatch, whole, moments):
    """14 files are written: the record, 3 for each of 4 parts, the record again."""
    out, statuses = tmp_path / "out", []
    for moment in moments:
        with monkeypatch.context() as patched:
            at_write(moment, kill, patched)
            done = in_processes([lambda: embed(encoder, out, photos, *WORDS)], tmp_path)
        statuses.append(done.returncode)
    assert statuses[0] == -signal.SIGKILL
    assert {*statuses} <= {-signal.SIGKILL, 0}  # a later start may have fewer files left to write
    assert embed(encoder, out, photos, *WORDS) == 0
    assert content(out) == whole


def test_what_was_whole_is_not_embedded_again(encoder, photos, tmp_path, monkeypatch, capsys, whole):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        at_write(8, kill, patched)  # parts 0 and 1 are there
        done = in_processes([lambda: embed(encoder, out, photos, *WORDS)], tmp_path)
    assert done.returncode == -signal.SIGKILL
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*-0000[01].*")}
    assert embed(encoder, out, photos, *WORDS, "--workers", 2) == 0
    assert "going on: 2 of 4 parts are there" in (shown := capsys.readouterr().out)
    assert "  9 samples in " in shown
    assert {file.name: file.stat().st_mtime_ns for file in out.glob("*-0000[01].*")} == before
    assert content(out) == whole


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_it_goes_on(encoder, photos, tmp_path, monkeypatch, whole, number, status):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        at_write(5, lambda: os.kill(os.getpid(), number), patched)

        def work():
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which what starts in the background ignores
            return embed(encoder, out, photos, *WORDS)

        assert in_processes([work], tmp_path).returncode == status
    assert [file.name for file in out.rglob("*.part")] == []
    assert embed(encoder, out, photos, *WORDS) == 0
    assert content(out) == whole


def test_a_full_disk_is_one_line(encoder, photos, tmp_path, whole):
    out = tmp_path / "out"
    out.mkdir()

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        return embed(encoder, out, photos, "--batch_size", 4, "--part_size", 7, "--dtype", "int8")

    done = in_processes([work], tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r"indiclip embed: .*keys-00000.parquet: File too large\n", done.stderr)
    assert [file.name for file in out.rglob("*.part")] == []
    assert embed(encoder, out, photos, *WORDS) == 0
    assert content(out) == whole


@pytest.mark.parametrize("killed", [False, True])
def test_two_ranks_as_torchrun_starts_them(encoder, photos, tmp_path, monkeypatch, whole, killed):
    out = tmp_path / "out"

    def work():
        if killed and os.environ["RANK"] == "1":
            at_write(1, kill, monkeypatch)
        return embed(encoder, out, photos, *WORDS)

    done = as_ranks(work, tmp_path)
    if killed:
        assert done.statuses == [1, -signal.SIGKILL]
        assert "another process has ended before its parts were done; the same command goes on" in done.stderr
        assert embed(encoder, out, photos, *WORDS) == 0
    else:
        assert done.returncode == 0
    assert content(out) == whole


class Forked:
    """In place of a context that spawns, whose processes import everything again; what those get is pickled, too."""

    def Process(self, target, args):
        return FORK.Process(target=target, args=pickle.loads(pickle.dumps(args)))


def test_processes_of_its_own(encoder, photos, tmp_path, monkeypatch, capfd, whole):
    monkeypatch.setattr(embed_ranks.multiprocessing, "get_context", {"spawn": Forked()}.get)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert embed(encoder, tmp_path / "out", photos, *WORDS, "--processes", 2) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    assert shown.out.count("23 embeddings of 64 numbers, int8, in 4 parts") == 1
    assert content(tmp_path / "out") == whole


class SecondFails:
    """In place of a context of which the second process cannot be started."""

    def __init__(self):
        self.made = []

    def Process(self, target, args):
        def start():
            raise BlockingIOError(11, "Resource temporarily unavailable")

        self.made.append(FORK.Process(target=time.sleep, args=(600,)))
        if len(self.made) == 2:
            self.made[1].start = start
        return self.made[-1]


def test_a_process_that_cannot_be_started_is_said_and_ends_the_others(monkeypatch):
    context, before = SecondFails(), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    monkeypatch.setattr(embed_ranks.multiprocessing, "get_context", {"spawn": context}.get)
    with pytest.raises(BlockingIOError, match="Resource temporarily unavailable"):
        embed_ranks.launch(print, {}, 3)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    first, _, third = context.made
    assert first.exitcode == -signal.SIGTERM
    assert third.pid is None


@pytest.mark.parametrize(
    ("error", "is_gone"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer"), True),
        (torch.distributed.DistNetworkError("Broken pipe"), True),
        (RuntimeError("the model's skip connection has 3 channels; expected 4"), False),
    ],
)
def test_only_a_process_that_is_gone_is_said_to_be(error, is_gone, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(embed_ranks.torch, "set_num_threads", lambda number: None)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(embed_ranks.dist, name, lambda *_, **__: None)
    message = "another process has ended before its parts were done" if is_gone else "the model's skip connection"
    with pytest.raises(RuntimeError, match=message), embed_ranks.ranks():
        raise error


# Words.


def half_done(encoder, out, monkeypatch, *words):
    """Killed with parts 0 and 1 whole."""
    with monkeypatch.context() as patched:
        at_write(8, kill, patched)
        assert in_processes([lambda: embed(encoder, out, *words)], out.parent).returncode == -signal.SIGKILL
    assert sorted(file.name for file in (out / ".parts").glob("*.json")) == ["00000.json", "00001.json"]


@pytest.mark.parametrize("linked", [False, True])
def test_overwrite_forgets_every_part_of_the_old_weights(encoder, photos, tmp_path, monkeypatch, linked):
    """Also where the folder of marks is a link to another place, in which nothing else is touched."""
    out, there = tmp_path / "out", tmp_path / "there"
    half_done(encoder, out, monkeypatch, photos, *WORDS)
    if linked:
        (out / ".parts").rename(there)
        (there / "mine.json").touch()
        (out / ".parts").symlink_to(there)
    other = save_model(tmp_path / "other.ckpt", seed=1)
    other.file = tmp_path / "other.ckpt"
    assert embed(other, out, photos, *WORDS, "--overwrite") == 0
    assert embed(other, tmp_path / "fresh", photos, *WORDS) == 0
    assert np.array_equal(read(out)[0], read(tmp_path / "fresh")[0])
    assert (there / "mine.json").exists() == linked


def test_overwrite_stops_where_the_marks_of_old_parts_stay(encoder, photos, tmp_path, monkeypatch, capsys):
    """The record of the old weights stays too."""
    out = tmp_path / "out"
    half_done(encoder, out, monkeypatch, photos, *WORDS)
    before = (out / "embed.json").read_bytes()
    (out / ".parts" / "00000.json").unlink()
    (out / ".parts" / "00000.json").mkdir()  # which cannot be unlinked, whoever runs this
    capsys.readouterr()
    assert embed(encoder, out, photos, *WORDS[:-1], "fp16", "--overwrite") != 0
    assert "00000.json" in capsys.readouterr().err
    assert (out / "embed.json").read_bytes() == before


def with_context_length(file, other, length):
    """The same weights with a tokenizer that cuts elsewhere."""
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["encoder"]["text"]["init_args"]["tokenizer"]["init_args"]["context_length"] = length
    torch.save(checkpoint, other)
    return SimpleNamespace(file=other)


def test_captions_by_another_tokenizer_are_not_mixed_in(encoder, photos, tmp_path, capsys):
    (tmp_path / "en.txt").write_text("one\ntwo\n")
    out, words = tmp_path / "out", (tmp_path / "en.txt", "--what", "captions")
    assert embed(encoder, out, *words) == 0
    assert embed(encoder, out, *words) == 0
    before = content(out)
    edited = with_context_length(encoder.file, tmp_path / "edited.ckpt", 99)
    capsys.readouterr()
    assert embed(edited, out, *words) == 2
    names = f"{encoder.file} -> {edited.file}"
    assert f"out: holds embeddings of another tokenizer: {names}; --overwrite" in capsys.readouterr().err
    assert content(out) == before
    record = json.loads((out / "embed.json").read_text())
    del record["model"]["crc32_of_token_ids"]  # as an older version wrote it
    (out / "embed.json").write_text(json.dumps(record))
    assert embed(encoder, out, *words) == 2
    assert "holds embeddings of an unknown tokenizer, begun by an older version: " in capsys.readouterr().err
    assert embed(encoder, out, photos) == 2
    assert "was begun with other options: what: 'captions' -> 'images'" in capsys.readouterr().err
    assert embed(encoder, tmp_path / "images", photos) == 0
    assert embed(edited, tmp_path / "images", photos) == 0  # no text is read there
    assert "crc32_of_token_ids" not in read(tmp_path / "images")[2]["model"]


def test_other_words_are_not_mixed_in(encoder, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert embed(encoder, out, photos, *WORDS) == 0
    before = content(out)
    other = save_model(tmp_path / "other.ckpt", seed=1)
    other.file = tmp_path / "other.ckpt"
    bicubic = SimpleNamespace(file=save_as_bicubic(encoder.file, tmp_path / "bicubic.ckpt"))
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    Image.fromarray(noise(16, 16)).save(fewer / "0.png")
    for model, words, message in (
        (encoder, [photos, *WORDS, "--length", 16], "was begun with other options: length: 64 -> 16; --overwrite"),
        (encoder, [photos, *WORDS[:-1], "fp16"], "dtype: 'int8' -> 'fp16'"),
        (encoder, [photos, *WORDS, "--view", "64-square"], "preprocessing.name: 'native' -> '64-square'"),
        (encoder, [photos, photos, *WORDS], "sources[1]: none -> {"),
        (bicubic, [photos, *WORDS], "preprocessing.interpolation: 'bilinear' -> 'bicubic'"),
        (encoder, [fewer, *WORDS], "sources[0].samples: 23 -> 1"),
        (other, [photos, *WORDS], f"holds embeddings of other weights: {encoder.file} -> {other.file}; --overwrite"),
    ):
        capsys.readouterr()
        assert embed(model, out, *words) == 2, message
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
        assert content(out) == before
    assert embed(other, out, fewer, "--overwrite") == 0
    assert sorted(content(out)) == ["embed.json", "embeddings-00000.npy", "keys-00000.parquet"]
    np.testing.assert_allclose(read(out)[0], of_files(other, fewer, ["0.png"]), atol=1e-5)
    (out / "keys-00000.parquet").unlink()
    assert embed(other, out, fewer) == 2
    assert "keys-00000.parquet: is missing; --overwrite starts anew" in capsys.readouterr().err


def test_mistakes_are_one_line_and_leave_nothing(encoder, photos, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "t.csv").write_text("fil,caption\na.png,x\n")
    (tmp_path / "x.zip").touch()
    (tmp_path / "empty").mkdir()
    for words, out, message in (
        ([], "out", "SOURCE: found none; expected shards, a folder, a table, a COCO .json, or --config"),
        ([tmp_path / "phots"], "out", "phots: no such file or folder"),
        ([tmp_path / "x.zip"], "out", "x.zip: expected a folder, a .csv, .tsv or .parquet table, or a COCO .json"),
        ([tmp_path / "empty"], "out", "empty: no images"),
        ([tmp_path / "t.csv"], "out", "no column 'file'; nearest is 'fil'"),
        ([tmp_path / "*.tar"], "out", "*.tar: no such file or folder"),
        ([photos, "--length", 65], "out", "--length: found 65; expected 1 to 64"),
        ([photos, "--dtype", "fp8"], "out", "--dtype: invalid choice: 'fp8'"),
        ([photos, "--part-sise", 8], "out", "--part-sise: no such option; nearest is '--part-size'"),
        (
            [photos, "--images", photos],
            "out",
            "--images: no SOURCE that it could belong to; expected one of .csv, .tsv, .parquet, .json",
        ),
        ([photos, "--workers", 0, photos], "out", "found '"),
        ([photos, "--device", "tpu"], "out", "device: 'tpu' is not available here"),
        ([photos], "mine", "holds other files (thesis.tex); expected a new or an empty folder, or one of"),
        ([photos, "--overwrite"], "mine", "holds other files (thesis.tex)"),
        ([photos], "file", "file: a file is in the way; expected a folder"),
    ):
        assert embed(encoder, tmp_path / out, *words) == 2, message
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_numbers_that_are_not_finite_are_said(encoder, photos, tmp_path, monkeypatch, capsys):
    load = embed_command.embedder.load_embedder

    def broken(*args, **options):
        model = load(*args, **options)
        next(model.encoder.backbone.parameters()).data.fill_(torch.nan)
        return model

    monkeypatch.setattr(embed_command.embedder, "load_embedder", broken)
    assert embed(encoder, tmp_path / "out", photos) == 2
    assert "gives numbers that are not finite for diya/00.png; expected finite ones" in capsys.readouterr().err
    assert list((tmp_path / "out").glob("*.npy")) == []


def test_two_commands_do_not_write_to_one_folder(encoder, photos, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with holding(tmp_path / "out", tmp_path / "other") as other:
        assert embed(encoder, tmp_path / "out", photos) == 2
    assert f"out: another process (pid {other} on " in capsys.readouterr().err
    assert embed(encoder, tmp_path / "out", photos) == 0


def test_help_has_examples_and_json_is_the_record(encoder, photos, tmp_path, capsys):
    assert main(["embed", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "indiclip embed 'shards/train-*.tar' --model runs/mela --out embeddings" in shown
    assert 'numpy.load(FILE, mmap_mode="r")' in shown
    assert embed(encoder, tmp_path / "out", photos, "--json") == 0
    assert json.loads(capsys.readouterr().out) == read(tmp_path / "out")[2]
