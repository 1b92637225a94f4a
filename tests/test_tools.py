"""The preparation scripts on small local stand-ins: what they write is what the datasets read."""

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import only_caption
from PIL import Image

from indiclip.datasets.captions import CaptionTable
from indiclip.datasets.coco import CocoDetection
from indiclip.datasets.points import CountingPoints
from indiclip.generated.mela import Mela
from indiclip.tokenizers import ByteTokenizer, FastTokenizer
from indiclip.webdataset.shards import Shards

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

import _download  # noqa: E402
import bench_accuracy  # noqa: E402
import bench_step  # noqa: E402
import cluster_embeddings  # noqa: E402
import prepare_cifar10  # noqa: E402
import prepare_coco  # noqa: E402
import prepare_counting  # noqa: E402
import prepare_emoji  # noqa: E402
import train_tokenizer  # noqa: E402

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def encoded(kind, size=(32, 32), colour=(200, 30, 30, 255)):
    data = io.BytesIO()
    image = Image.new("RGBA", size, colour)
    (image if kind == "PNG" else image.convert("RGB")).save(data, kind)
    return data.getvalue()


def tar_of(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def zip_of(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tree(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def cifar(tmp_path):
    """Records of label and smooth planes; returns the archive and the images in order."""
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 256, (14, 2, 2, 3), dtype=np.uint8)
    images = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) for image in corners]
    records = [bytes([i % 10]) + image.transpose(2, 0, 1).tobytes() for i, image in enumerate(images)]
    files = {
        "cifar-10-batches-bin/batches.meta.txt": "\n".join([*CLASSES, "", ""]).encode(),
        "cifar-10-batches-bin/data_batch_2.bin": b"".join(records[6:10]),  # not in order in the archive
        "cifar-10-batches-bin/data_batch_1.bin": b"".join(records[:6]),
        "cifar-10-batches-bin/test_batch.bin": b"".join(records[10:]),
    }
    return tar_of(tmp_path / "cifar.tar.gz", files), images


def test_cifar10_becomes_the_shards_of_the_shared_data(cifar, tmp_path, monkeypatch):
    archive, images = cifar
    monkeypatch.setattr(prepare_cifar10, "SHARD", 4)
    prepare_cifar10.main(["--out", str(tmp_path / "data"), "--source", str(archive)])
    folder = tmp_path / "data" / "cifar10"
    assert sorted(path.name for path in folder.iterdir()) == [
        "classes.txt", "test-0000.tar.gz", "train-0000.tar.gz", "train-0001.tar.gz", "train-0002.tar.gz",
    ]  # fmt: skip
    train = Shards(str(folder / "train-{0000..0002}.tar.gz"), str(folder / "classes.txt"))
    test = Shards(str(folder / "test-*.tar.gz"), str(folder / "classes.txt"))
    assert train.classes == CLASSES
    assert [train.key(i) for i in (0, 9)] == ["train-0000/000000", "train-0002/000009"]
    assert test.key(0) == "test-0000/000000"
    for i, sample in enumerate([*train, *test]):
        assert sample["label"] == i % 10
        assert abs(np.asarray(sample["image"]).astype(int) - images[i]).mean() < 3  # JPEG, smooth pictures
    assert [only_caption(train[i]) for i in (0, 3)] == ["a photo of an airplane", "a photo of a cat"]
    before = (folder / "train-0000.tar.gz").read_bytes()
    prepare_cifar10.main(["--out", str(tmp_path / "data"), "--source", archive.as_uri()])
    assert (folder / "train-0000.tar.gz").read_bytes() == before  # the same bytes every time


def test_cifar10_has_the_members_of_the_shared_data(cifar, tmp_path, data_root):
    prepare_cifar10.main(["--out", str(tmp_path), "--source", str(cifar[0])])
    for root in (tmp_path, data_root):
        with tarfile.open(root / "cifar10" / "train-0000.tar.gz") as tar:
            heads = [(m.name, m.uid, m.mtime, m.mode) for m, _ in zip(tar, range(6), strict=False)]
        if root is tmp_path:
            ours = heads
    assert ours == heads


INSTANCES = {
    "info": {"description": "COCO"}, "licenses": [{"id": 1}], "categories": [{"id": 1, "name": "person"}],
    "images": [{"id": i, "file_name": f"{i:012d}.jpg", "width": 32, "height": 32, "license": 1} for i in (9, 4, 6)],
    "annotations": [
        {"id": 5, "image_id": 4, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0, "area": 12,
         "segmentation": [[1, 2, 4, 2, 4, 6]]},
        {"id": 7, "image_id": 9, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0, "area": 12, "segmentation": []},
    ],
}  # fmt: skip
KEYPOINTS = {"annotations": [{"id": 5, "keypoints": [1, 2, 2], "num_keypoints": 1}]}
CAPTIONS = {"annotations": [{"image_id": i, "caption": text} for i, text in ((4, "one "), (9, "nine"), (4, "two"))]}


@pytest.mark.parametrize("layout", ["folder", "zip"])
def test_coco_becomes_images_and_one_file(tmp_path, layout):
    contents = zip(prepare_coco.FILES, (INSTANCES, KEYPOINTS, CAPTIONS), strict=True)
    files = {f"annotations/{name}.json": json.dumps(content).encode() for name, content in contents}
    photos = {f"val2017/{image['file_name']}": encoded("JPEG") for image in INSTANCES["images"]}
    source = tree(tmp_path / "coco2017", photos)
    if layout == "folder":
        tree(source, files)
    else:
        (source / "annotations").mkdir()
        zip_of(source / prepare_coco.ARCHIVE, files)
    url = source.as_uri() if layout == "zip" else str(source)
    prepare_coco.main(["--out", str(tmp_path / "data"), "--source", url, "--limit", "2"])
    folder = tmp_path / "data" / "coco"
    assert sorted(path.name for path in (folder / "images").iterdir()) == ["000000000004.jpg", "000000000006.jpg"]
    dataset = CocoDetection(str(folder / "images"), str(folder / "instances.json"), masks=True)
    assert [dataset.key(i) for i in range(2)] == ["4", "6"]
    assert dataset.captions(0) == {"": ["one", "two"]}
    assert dataset[0]["boxes_xyxy"].tolist() == [[1, 2, 4, 6]]
    assert json.loads((folder / "instances.json").read_text())["annotations"][0]["num_keypoints"] == 1


def voc(width, height, objects):
    boxes = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2 in objects
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>{size}{boxes}</annotation>".encode()


def test_bccd_becomes_counting_points(tmp_path):
    cells = [
        ("RBC", 1, 2, 5, 10),
        ("RBC", 20, 20, 33, 30),
        ("WBC", 3, 3, 9, 9),
        ("RBC", 4, 4, 4, 9),
        ("RBC", 0, 0, 2, 2),
    ]
    files = {
        "master/BCCD/Annotations/BloodImage_00001.xml": voc(32, 32, cells),
        "master/BCCD/Annotations/BloodImage_00002.xml": voc(32, 32, cells[:2]),  # too few
        "master/BCCD/Annotations/BloodImage_00003.xml": voc(32, 32, cells),  # without its photo
        "master/BCCD/JPEGImages/BloodImage_00001.jpg": encoded("JPEG"),
        "master/BCCD/JPEGImages/BloodImage_00002.jpg": encoded("JPEG"),
    }
    for source in (zip_of(tmp_path / "bccd.zip", files), tree(tmp_path / "bccd", files)):
        prepare_counting.main(["--out", str(tmp_path / "data"), "--source", str(source)])
        folder = tmp_path / "data" / "counting"
        dataset = CountingPoints(str(folder / "images"), str(folder / "counting.json"))
        assert [dataset.key(i) for i in range(len(dataset))] == ["bccd_00001.jpg"]
        sample = dataset[0]
        assert sample["count_class"] == "red blood cell"
        assert sample["boxes_xyxy"].tolist() == [[1, 2, 5, 10], [20, 20, 32, 30], [0, 0, 2, 2]]  # cut at the edge
        assert sample["points_xy"].tolist() == [[3, 6], [26, 25], [1, 1]]
        assert json.loads((folder / "counting.json").read_text())[0]["other_counts"] == {"WBC": 1}


def test_counting_entries_have_the_keys_of_the_shared_data(data_root):
    theirs = json.loads((data_root / "counting" / "counting.json").read_text())[0]
    assert set(prepare_counting.entry(voc(9, 9, []), "x.jpg")) == set(theirs)


@pytest.fixture
def emoji(tmp_path):
    named = {"\N{DIYA LAMP}": "diya", "*\N{COMBINING ENCLOSING KEYCAP}": "keycap", "€": "euro", "\N{KITE}": "kite"}
    files = {}
    for language in prepare_emoji.LANGUAGES:
        entries = {symbol: {"default": ["x"], "tts": [f"{name}  {language}"]} for symbol, name in named.items()}
        if language == "ur":
            del entries["\N{KITE}"]  # no name in one language
        files[f"annotations/{language}/annotations.json"] = json.dumps(
            {"annotations": {"annotations": entries}}
        ).encode()
    for code in ("1fa94", "002a_20e3", "1fa81"):
        files[f"png/128/emoji_u{code}.png"] = encoded("PNG", (136, 128), (250, 0, 0, 0 if code == "1fa94" else 255))
    return tree(tmp_path / "source", files)


def test_emoji_become_a_caption_table(emoji, tmp_path):
    prepare_emoji.main(["--out", str(tmp_path / "data"), "--source", str(emoji)])
    folder = tmp_path / "data" / "emoji_multilingual"
    dataset = CaptionTable(str(folder / "images"), str(folder / "names.tsv"))
    assert dataset.languages == list(prepare_emoji.LANGUAGES)
    assert [dataset.key(i) for i in range(len(dataset))] == ["1fa94.jpg", "002a_20e3.jpg"]
    assert dataset.captions(0)["ta"] == ["diya ta"]
    assert np.asarray(dataset[0]["image"]).shape == (96, 96, 3)
    assert np.asarray(dataset[0]["image"]).min() >= 250  # clear, so white
    corner, middle = (np.asarray(dataset[1]["image"])[i, i] for i in (0, 48))
    assert corner.min() >= 250  # 136x128 keeps its aspect: a margin above
    assert abs(middle.astype(int) - [250, 0, 0]).max() < 10


def test_the_emoji_table_has_the_header_of_the_shared_data(emoji, tmp_path, data_root):
    prepare_emoji.main(["--out", str(tmp_path / "data"), "--source", str(emoji), "--limit", "1"])
    lines = [
        (root / "emoji_multilingual" / "names.tsv").read_text("utf-8").splitlines()
        for root in (tmp_path / "data", data_root)
    ]
    assert lines[0][0] == lines[1][0]
    assert len(lines[0]) == 2


def test_fetch_is_whole_or_nothing(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    url, target = (tmp_path / "a").as_uri(), tmp_path / "to" / "b"
    with pytest.raises(ValueError, match="MD5 is 900150983cd24fb0d6963f7d28e17f72; expected 0"):
        _download.fetch(url, target, md5="0")
    with pytest.raises(FileNotFoundError, match=r"file://.*/gone: no such file"):
        _download.fetch((tmp_path / "gone").as_uri(), target)
    assert not list((tmp_path / "to").iterdir())
    assert _download.fetch(url, target, hashlib.md5(b"abc").hexdigest()).read_bytes() == b"abc"


def test_no_network_is_one_line_that_names_the_way_out(tmp_path):
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:9/x: .*; a local copy can be given as --source"):
        _download.fetch("http://127.0.0.1:9/x", tmp_path / "x")
    command = [sys.executable, str(TOOLS / "prepare_counting.py"), "--out", str(tmp_path), "--source", "/gone.zip"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: --source: /gone.zip: no such file or folder\n"


def test_archives_are_read_never_unpacked(tmp_path):
    files = {"../../outside.jpg": b"1", "/abs/in.jpg": b"2", "b.txt": b"3"}
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    packed = tmp_path / "x.tar.gz"
    tar_of(packed, files)
    plain = tmp_path / "x.tar"
    plain.write_bytes(gzip.decompress(packed.read_bytes()))
    with tarfile.open(plain, "a") as tar:
        tar.addfile(link)
    before = set(tmp_path.parent.rglob("*"))
    for source in (packed, plain, zip_of(tmp_path / "x.zip", files)):
        assert sorted(data for _, data in _download.members(source, r"\.jpg$")) == [b"1", b"2"]
    assert set(tmp_path.parent.rglob("*")) - before == {tmp_path / "x.zip"}


def test_sources_without_the_data_are_named(tmp_path):
    empty = zip_of(tmp_path / "x.zip", {"a": b""})
    options = ["--out", str(tmp_path / "data"), "--source", str(empty)]
    with pytest.raises(FileNotFoundError, match=r"x\.zip: no JPEGImages"):
        prepare_counting.main(options)
    with pytest.raises(FileNotFoundError, match=r"x\.zip: no batches\.meta\.txt"):
        prepare_cifar10.main(options)
    tree(tmp_path / "y", {"annotations/instances_val2017.json": b"{}"})
    with pytest.raises(FileNotFoundError, match=r"no captions_val2017\.json inside"):
        prepare_coco.main(["--out", str(tmp_path / "data"), "--source", str(tmp_path / "y")])


def test_a_tokenizer_of_a_configs_captions(tmp_path):
    """It reads back what it wrote, in every script, and spends less than a third of the bytes."""
    out = tmp_path / "deep" / "mela.json"
    train_tokenizer.main(
        ["--config", "conf/quickstart.yaml", "--samples", "300", "--vocab-size", "800", "--out", str(out)]
    )
    tokenizer = FastTokenizer(str(out))
    for text in ("a marigold, 3 kites", "एक पतंग", "never seen: ஔ \U0001f6fa"):
        ids_BT, valid_BT = tokenizer([text])
        assert tokenizer._tokenizer.decode(ids_BT[0][valid_BT[0]].tolist(), skip_special_tokens=True) == text
    captions = [Mela(size=64, layout="single", languages=["en", "hi"], seed=9)[i]["captions"] for i in range(20)]
    captions = [of_image[language][0] for of_image, language in zip(captions, ["en", "hi"] * 10, strict=True)]
    _, ours = tokenizer(captions)
    _, of_bytes = ByteTokenizer()(captions)
    assert ours.sum() < of_bytes.sum() / 3
    with pytest.raises(SystemExit):
        train_tokenizer.main(["--config", "conf/quickstart.yaml", "--vocab-size", "258", "--out", str(out)])


def test_the_steps_beside_the_peer_run(tmp_path, monkeypatch, capsys):
    """The benchmark follows the heads' contract; its numbers decide nothing here, so towers and batches are small."""
    monkeypatch.chdir(TOOLS.parent)
    monkeypatch.setattr(bench_step, "SMALL", replace(bench_step.SMALL, depth=1, text_depth=1))
    sources = yaml.safe_load(Path("conf/quickstart.yaml").read_text())["data"]["train"]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"data": {"train": [s | {"batch_size": 2} for s in sources]}}))
    bench_step.contrastive(4, ByteTokenizer(77), 1, "cpu", None)
    bench_step.few_tokens(4, ByteTokenizer(77), 1, "cpu")
    bench_step.four_tasks(1, "cpu", ["--config", str(tmp_path / "small.yaml")])
    shown = capsys.readouterr().out
    assert "open_clip" in shown
    assert "of the rate" in shown
    assert "half dropped" in shown
    assert "together / sum of the tasks alone" in shown
    assert "aten::mm" in shown


def test_the_race_beside_the_peer_runs(monkeypatch, capsys):
    words = ["--seeds", "0", "--steps", "8", "--every", "2", "--batch", "2", "--images", "4", "--held-out", "8"]
    monkeypatch.setattr(sys, "argv", ["bench_accuracy", *words])
    bench_accuracy.main()
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("ours, half of the patches", "ours, label-aware", "open_clip"))


def test_the_race_ends_where_three_measurements_reach_the_target():
    curve = [(seconds, accuracy) for seconds, accuracy in enumerate([0.1, 0.6, 0.2, 0.5, 0.5, 0.6, 0.9])]
    assert bench_accuracy.seconds_to(curve, 0.5) == 3  # the mean of 0.5, 0.5 and 0.6; before it 0.4
    assert bench_accuracy.seconds_to(curve, 0.9) != bench_accuracy.seconds_to(curve, 0.9)  # never: not a number


def embeddings_of(folder, vectors, rows, samples, **record):
    """A folder as `indiclip embed` leaves it, in two parts."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    for part, chosen in enumerate(np.array_split(np.arange(len(rows)), 2)):
        np.save(folder / f"embeddings-{part:05}.npy", vectors[chosen])
        parquet.write_table(pyarrow.table({"row": rows[chosen]}), folder / f"keys-{part:05}.parquet")
    (folder / "embed.json").write_text(json.dumps({"sources": [{"samples": samples}], "done": True} | record))
    return [str(folder), "--out", str(folder / "clusters.npy")]


@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_embeddings_become_clusters_of_their_directions(tmp_path, capsys, dtype):
    """Three bundles of vectors, a few degrees wide and at right angles, found whatever the number asked for."""
    rng = np.random.default_rng(0)
    bundle = rng.integers(0, 3, 200)
    vectors = np.eye(8)[bundle] * 100 + rng.normal(0, 3, (200, 8))
    rows = np.delete(np.arange(202), [7, 100])  # two could not be read
    words = embeddings_of(tmp_path / "e", vectors.round().astype(dtype), rows, 202)
    assert cluster_embeddings.main([*words, "--clusters", "20"]) == 0
    found = np.load(tmp_path / "e" / "clusters.npy")
    assert found.dtype == np.int32
    assert found[[7, 100]].tolist() == [0, 0]
    pairs = set(zip(found[rows].tolist(), bundle.tolist(), strict=True))
    assert len(pairs) == 3 == len({cluster for cluster, _ in pairs})
    assert "3 clusters of 202 samples" in capsys.readouterr().out
    assert cluster_embeddings.main([*words, "--clusters", "20", "--merge", "1"]) == 0
    assert len(np.bincount(np.load(tmp_path / "e" / "clusters.npy"))) == 20


def test_embeddings_that_are_no_whole_source_are_refused(tmp_path, capsys):
    vectors, rows = np.eye(8, dtype=np.float32), np.arange(8)
    unfinished = embeddings_of(tmp_path / "a", vectors, rows, 8, done=False)
    two = embeddings_of(tmp_path / "b", vectors, rows, 8, sources=[{}, {}])
    few = [*embeddings_of(tmp_path / "c", vectors, rows, 8), "--clusters", "9"]
    for words, message in (
        (unfinished, "found an unfinished one; expected the finished embeddings of one source"),
        (two, "found 2 sources"),
        (few, "--clusters: found 9; expected at most 8, the embeddings"),
        (["nowhere", "--out", "x.npy"], "nowhere: no such file or folder"),
    ):
        assert cluster_embeddings.main(words) == 2
        assert message in capsys.readouterr().err
