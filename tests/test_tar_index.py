"""Which index is taken for a shard, and what becomes of an index that somebody made up."""

import gzip
import io
import json
import math
import os
import random
import shutil
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from helpers import only_caption
from PIL import Image
from test_shards import png, write_tar

from indiclip.datasets.coco import box_fields
from indiclip.images import EncodedImage
from indiclip.webdataset import cache, sample_columns, tar_index
from indiclip.webdataset.shards import Shards


@pytest.fixture
def shard(tmp_path, monkeypatch):
    """A shard with an index beside it."""
    monkeypatch.setenv("INDICLIP_CACHE", str(tmp_path / "cache"))
    path = write_tar(tmp_path / "a.tar", {"0.png": png(1), "0.txt": "x" * 2000, "1.png": png(2), "1.txt": "y"})
    tar_index.build(Path(path), cache.stat(path)).save(tar_index.index_path(path))
    return path


def found(path):
    return tar_index.find_index(path, cache.stat(path))


def test_no_cache_is_needed_where_an_index_lies_beside_the_shard(shard, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("INDICLIP_CACHE", str(tmp_path / "file" / "cache"))  # cannot be made
    assert [sample["key"] for sample in Shards(shard)] == ["a/0", "a/1"]
    tar_index.index_path(shard).unlink()
    assert [sample["key"] for sample in Shards(shard)] == ["a/0", "a/1"]


def test_a_tar_changed_after_its_index_was_made_is_indexed_anew(shard, tmp_path):
    """Also where it is in none of the places that the checksum is of, and length and time are the same or older,
    as those of a file that `cp -p` or `rsync -t` put there.
    """
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (Path(shard), tar_index.index_path(shard)):
        shutil.copy2(file, moved)
    assert found(str(moved / Path(shard).name)) is not None
    assert found(shard) is not None
    status, other = Path(shard).stat(), tmp_path / "other"
    for times in ((status.st_atime_ns, status.st_mtime_ns), (5, 5)):
        time.sleep(0.02)  # the clock of file systems ticks that slowly
        shutil.copy(shard, other)
        os.utime(other, ns=times)
        other.replace(shard)
        assert found(shard) is None


def test_a_shard_in_the_place_of_another_of_the_same_size_and_time_is_indexed_anew(tmp_path, monkeypatch):
    """Packed, too: the copy in the cache is of the first one."""
    monkeypatch.setenv("INDICLIP_CACHE", str(tmp_path / "cache"))
    texts = {
        "first": {"a": "one lamp", "b": "two kites, far away"},
        "then": {"a": "two kites, far away", "b": "one lamp"},
    }
    for name, packed in (("a.tar", False), ("b.tar.gz", True)):
        for found in texts.values():
            members = {}
            for key, text in found.items():
                members |= {f"{key}.png": png(), f"{key}.txt": text}
            data = Path(write_tar(tmp_path / "x", members)).read_bytes()
            data = gzip.compress(data, 0, mtime=0) if packed else data
            (tmp_path / name).write_bytes(data)
            os.utime(tmp_path / name, (7, 7))
            shards = Shards(str(tmp_path / name))
            assert {s["key"].rpartition("/")[2]: only_caption(s) for s in shards} == found


def encoded(pixels, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def arrays_of(index):
    with np.load(index) as arrays:
        return dict(arrays)


def about(**changes):
    def change(arrays):
        arrays["about"] = np.frombuffer(json.dumps(json.loads(arrays["about"].tobytes()) | changes).encode(), np.uint8)

    return change


ODD = {
    "about is a list": lambda a: a.update(about=np.frombuffer(b"[1]", np.uint8)),
    "about is no text": lambda a: a.update(about=np.full(9, 255, np.uint8)),
    "damaged is a number": about(damaged=3),
    "damaged is of singles": about(damaged=["a"]),
    "inventory is a list": about(inventory=[]),
    "sums that do not fit": about(inventory={"members": {"present": 4, "used": 3, "altered": {}, "left_out": {}}}),
    "sums of another kind": about(inventory={"members": {"present": 4, "used": 4, "altered": [], "left_out": []}}),
    "size is a list": about(shard=[[], "", "", "9:00000000", False, 0]),
    "shard without a time": about(shard=[3]),
    "fingerprint is none": about(shard=[9, "1", "", None, False, 0]),
    "fingerprint without a size": about(shard=[9, "1", "", "x:00000000", False, 0]),
    "checksums that are not there": about(shard=[9, "1", "", "9:00000000", True, 0]),
    "another version": about(version=99),
    "an earlier version": about(version=4),
    "blocks of another kind": lambda a: a.update(blocks=np.zeros(2)),
    "blocks in a table": lambda a: a.update(blocks=a["blocks"].reshape(2, 1)),
    "a single block": lambda a: a.update(blocks=a["blocks"][0]),
    "samples that go back": lambda a: a.update(blocks=a["blocks"][::-1]),
    "fewer sizes": lambda a: a.update(sizes_hw=a["sizes_hw"][:1]),
    "more labels": lambda a: a.update(labels=np.zeros(3, np.int16)),
    "fewer keys": lambda a: a.update(sample_columns.pack_keys(["0"])),
    "no keys": lambda a: a.update(key_firsts=a["key_firsts"][:0], key_ends=a["key_ends"][:0]),
    "keys that are numbers": lambda a: a.update(sample_columns.pack_keys([(), ()])),
    "keys that go beyond": lambda a: a.update(key_ends=a["key_ends"] * 2),
    "keys that begin before": lambda a: a.update(key_ends=a["key_ends"] - 100),
    "keys that are not packed": lambda a: a.update(key_data=a["key_data"][::-1]),
    "keys of no samples": lambda a: a.update(key_firsts=a["key_firsts"] + 1),
    "fractions": lambda a: a.update(key_ends=a["key_ends"].astype(float)),
    "parts of no sample": lambda a: a.update(apart=np.full(1, 7, sample_columns.APART)),
    "objects": lambda a: a.update(blocks=np.array([{}, {}])),
}


@pytest.mark.parametrize("what", ODD)
def test_an_index_with_odd_content_is_made_anew(shard, what):
    index = tar_index.index_path(shard)
    arrays = arrays_of(index)
    ODD[what](arrays)
    np.savez(index, **arrays)
    assert tar_index.TarIndex.load(index) is None
    assert [sample["key"] for sample in Shards(shard)] == ["a/0", "a/1"]


def test_what_is_no_archive_is_no_index(shard):
    index = tar_index.index_path(shard)
    with index.open("wb") as file:
        np.save(file, np.zeros(3))
    assert tar_index.TarIndex.load(index) is None


def test_an_index_that_unpacks_is_refused(shard):
    index = tar_index.index_path(shard)
    arrays = arrays_of(index)
    np.savez(index, **arrays)
    assert tar_index.TarIndex.load(index) is not None
    np.savez_compressed(index, **arrays)
    with zipfile.ZipFile(index) as archive:
        assert archive.infolist()[0].compress_type == zipfile.ZIP_DEFLATED
    assert tar_index.TarIndex.load(index) is None


@pytest.mark.parametrize("label", ["9" * 5000, "9" * 400])
def test_a_label_of_many_digits_is_one_bad_sample(tmp_path, label):
    members = {"0.png": png(), "0.json": json.dumps({"label": label, "text": "x"}), "1.png": png(), "1.txt": "good"}
    shards = Shards(write_tar(tmp_path / "a.tar", members))
    assert shards.labels.tolist() == [tar_index.BAD_LABEL, -1]
    assert only_caption(shards[1]) == "good"


def test_the_size_of_an_image_behind_long_metadata_is_indexed(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8)
    members = {"0.webp": encoded(noise, "WEBP", lossless=True), "0.txt": "x"}
    members |= {"1.jpg": encoded(noise, "JPEG", icc_profile=bytes(400_000)), "1.txt": "x"}
    shards = Shards(write_tar(tmp_path / "a.tar", members))
    assert shards.sizes_hw.tolist() == [[400, 500]] * 2


def test_boxes_that_are_not_read_are_counted_as_those_that_are():
    rng, entries = random.Random(7), []
    odd = (0, -0.0, -0.005, 1.005, 19, 20, 20.005, 23, math.nan, math.inf, 2**63, 10**400, True, "1", None)
    for _ in range(400):
        boxes = [[rng.choice(odd if rng.random() < 0.05 else (1, 2, 5.5)) for _ in range(4)] for _ in "abc"]
        more = ({}, {}, {}, {"iscrowd": rng.choice((0, 1, True, 2, "0"))}, {"class": rng.choice((2, "0", None))})
        annotations = [{"bbox": box, "class": 1} | rng.choice(more) for box in boxes]
        if rng.random() < 0.1:
            annotations[1] = rng.choice((None, {}, {"bbox": "1234"}, {"bbox": [1, 2, 3]}, {"bbox": {"a": 1}}, "bbox"))
        of_image = rng.choice((annotations, annotations, annotations, [], {}, None))
        entries.append({"height": rng.choice((20, 20, 20, 20.0, 0, True, None)), "width": 20, "annotations": of_image})
    counted, image = tar_index.Inventory(), EncodedImage(png(0, (20, 20)), "")
    read = 0
    for number, entry in enumerate(entries):
        tar_index._count_boxes(entry, str(number), counted)
        with suppress(ValueError):
            read += len(box_fields(entry, image, 2**31, masks=False, densepose=False)["boxes_xyxy"])
    counted.verify()
    assert counted.used["boxes"] == read > 50
    assert counted.present["boxes"] > 2 * read
