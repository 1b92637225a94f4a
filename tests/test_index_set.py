"""One index for all shards: mapped and shared, about 10 bytes a sample, made by one process, and never out of date."""

import io
import json
import multiprocessing
import os
import pickle
import random
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import only_caption
from test_shards import png, write_tar

from indiclip.webdataset import cache, index_set, sample_columns, tar_index
from indiclip.webdataset.sample_columns import SampleColumns, pack_keys
from indiclip.webdataset.shards import Shards
from indiclip.webdataset.tar_members import sample_at


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The cache folder; every index is large enough to be mapped."""
    monkeypatch.setenv("INDICLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index_set, "MAPPED", 1)
    return tmp_path / "cache"


@pytest.fixture
def urls(tmp_path):
    """Three shards, whose times of change are not just now."""
    data = tmp_path / "data"
    data.mkdir()
    members: list[dict[str, object]] = [
        {"0.png": png(1), "0.txt": "a", "0.cls": "3", "1.png": png(2), "1.json": json.dumps({"caption": "b"})},
        {"x.txt": "no image"},
        {"b/2.png": png(3, (5, 7)), "b/2.txt": "c", "3.png": png(4), "3.cls": "70000"},
    ]
    return [write_tar(data / f"{name}.tar", each) for name, each in zip("abc", members, strict=True)]


def settle(urls):
    """Wait until no file was changed in the last two seconds."""
    time.sleep(max(0, 2.05 - (time.time() - max(Path(url).stat().st_ctime for url in urls))))


def sets(place):
    return sorted(place.glob("set-*"))


def told(shards):
    """All that is known of the samples."""
    return (
        [shards.key(i) for i in range(len(shards))],
        [shards.parts(i) for i in range(len(shards))],
        shards.labels.tolist(),
        shards.sizes_hw.tolist(),
        shards.starts.tolist(),
        shards.inventory.summary(),
        shards.damaged,
    )


def test_it_is_mapped_and_says_what_the_indexes_in_memory_say(urls, place, monkeypatch):
    mapped = Shards(urls)
    assert isinstance(mapped.labels, np.memmap)
    assert mapped.labels.tolist() == [3, -1, -1, 70000]
    assert mapped.sizes_hw.tolist()[2] == [7, 5] or mapped.sizes_hw.tolist()[2] == [5, 7]
    assert [mapped.key(i) for i in range(4)] == ["a/0", "a/1", "c/b/2", "c/3"]
    assert [only_caption(mapped[i]) for i in range(3)] == ["a", "b", "c"]
    monkeypatch.setattr(index_set, "MAPPED", 100)
    monkeypatch.setattr(index_set, "_VERSION", 99)  # which the mapped one is not of
    small = Shards(urls)
    monkeypatch.undo()
    assert not isinstance(small.labels, np.memmap)
    assert len(sets(place)) == 1
    assert told(small) == told(mapped)
    for shards in (small, mapped):
        again = pickle.loads(pickle.dumps(shards))
        assert told(again) == told(shards)
    assert isinstance(again.labels, np.memmap)  # a spawned worker maps it too
    assert len(pickle.dumps(mapped)) < 3000


def test_labels_take_two_bytes_or_none(urls, place):
    assert Shards(urls).labels.dtype == np.int32
    assert Shards(urls[:1]).labels.dtype == np.int16
    none = Shards(write_tar(Path(urls[0]).parent / "d.tar", {"0.png": png(), "0.txt": "x"}))
    assert none.labels.tolist() == [-1]
    assert (sets(place)[0].stat().st_mode & 0o777, (sets(place)[0] / "about.json").stat().st_mode & 0o777) == (
        0o755,
        0o644,
    )
    assert {(folder / "labels").stat().st_size for folder in sets(place)} == {0, 4, 16}


def test_a_start_reads_no_index_of_a_shard(urls, place, monkeypatch):
    settle(urls)
    first = told(Shards(urls))
    for name in ("find_index", "build"):
        monkeypatch.setattr(tar_index, name, None)
    monkeypatch.setattr(cache, "fingerprint", None)
    assert told(Shards(urls)) == first


def test_a_change_of_a_shard_or_of_an_index_beside_it_is_seen(urls, place):
    settle(urls)
    assert only_caption(Shards(urls)[0]) == "a"
    (old,) = sets(place)
    for text in "qrst":  # of the same length, and as fast as it goes
        status = Path(urls[0]).stat()
        write_tar(Path(urls[0]), {"0.png": png(1), "0.txt": text, "0.cls": "3", "1.png": png(2), "1.txt": "b"})
        os.utime(urls[0], ns=(status.st_atime_ns, status.st_mtime_ns))
        assert only_caption(Shards(urls)[0]) == text
    assert len(sets(place)) == 5  # a run may map one of a former state
    os.utime(old, (5, 5))
    shards = Shards(urls[:])
    assert not shards._index.has_crc.any()
    tar_index.build(Path(urls[2]), cache.stat(urls[2]), crc=True).save(tar_index.index_path(urls[2]))
    shards = Shards(urls)
    assert shards._index.has_crc.tolist() == [False, False, True]
    assert shards._index.columns.crcs.tolist()[:2] == [0, 0]
    assert [only_caption(shards[i]) for i in range(3)] == ["t", "b", "c"]
    assert old not in sets(place)


@pytest.mark.parametrize("what", ["torn", "longer", "about", "digest", "version", "a link", "no column"])
def test_a_torn_or_foreign_index_is_made_anew(urls, place, what, tmp_path):
    settle(urls)
    first = told(Shards(urls))
    (folder,) = sets(place)
    about, blocks = folder / "about.json", folder / "blocks"
    if what == "torn":
        blocks.write_bytes(blocks.read_bytes()[:-4])
    elif what == "longer":
        blocks.write_bytes(blocks.read_bytes() + bytes(4))
    elif what == "about":
        about.write_text(about.read_text()[:50])
    elif what == "digest":
        about.write_text(about.read_text().replace('"max_label": 70000', '"max_label": 60000'))
    elif what == "version":
        text = about.read_text().partition("\n")[2].replace('"version": 1', '"version": 9')
        about.write_text(f"{index_set._digest(text)}\n{text}")
    elif what == "a link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        (folder / "sizes_hw").unlink()
    assert index_set.load(folder) is None
    assert told(Shards(urls)) == first
    if what != "a link":
        assert index_set.load(folder) is not None


def start(urls, builds, results):
    build = tar_index.build

    def counted(*arguments):
        with builds.get_lock():
            builds.value += 1
        time.sleep(0.1)
        return build(*arguments)

    tar_index.build = counted
    results.put(told(Shards(urls)))


def test_one_process_makes_it_and_the_others_wait(urls, place):
    settle(urls)
    context = multiprocessing.get_context("fork")
    builds, results = context.Value("i", 0), context.Queue()
    ranks = [context.Process(target=start, args=(urls, builds, results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert all(each == found[0] for each in found)
    assert builds.value == 3
    assert len(sets(place)) == 1
    assert not list(place.glob("*.making"))


def test_what_a_killed_process_left_is_removed(urls, place):
    settle(urls)
    shards = told(Shards(urls))
    (folder,) = sets(place)
    folder.rename(f"{folder}-abc.making")
    assert told(Shards(urls)) == shards
    assert sets(place) == [folder]


def test_a_cache_that_cannot_be_written_to_costs_memory_only(urls, place, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_set.os, "fsync", full)
    shards = Shards(urls)
    assert not isinstance(shards.labels, np.memmap)
    assert only_caption(shards[2]) == "c"


def many(file, count, key=str, members=("jpg", "txt"), kind=tarfile.USTAR_FORMAT, **more):
    """A shard of samples that have their keys as image."""
    with tarfile.open(file, "w", format=kind) as tar:
        for i in range(count):
            for name in members:
                data = b"x" * 40 if name == "txt" else b"7" if name == "cls" else key(i).encode()
                member = tarfile.TarInfo(f"{key(i)}.{name}")
                member.size = len(data)
                for attribute, value in more.items():
                    setattr(member, attribute, value)
                tar.addfile(member, io.BytesIO(data))
    return str(file)


@pytest.mark.slow
@pytest.mark.parametrize("crc", [False, True])
def test_a_sample_takes_sixteen_bytes_on_disk_and_mapped(tmp_path, place, crc):
    """Also with labels, checksums, and keys of numbers with gaps, as of a web crawl of which a third failed."""
    numbers = sorted(random.Random(0).sample(range(30_000), 20_000))
    for shard in range(2):
        path = many(tmp_path / f"{shard}.tar", 20_000, lambda i, s=shard: f"{s}{numbers[i]:08}", ("jpg", "txt", "cls"))
        index = tar_index.build(Path(path), cache.stat(path), crc)
        index.save(tar_index.index_path(path))
        assert tar_index.index_path(path).stat().st_size < (16.5 if crc else 12.5) * 20_000
    shards = Shards(str(tmp_path / "*.tar"))
    (folder,) = sets(place)
    on_disk = sum(file.stat().st_size for file in folder.iterdir())
    assert on_disk < (16.5 if crc else 12.5) * len(shards)
    assert len(shards._index.columns.apart) == 0
    assert shards.key(39_999) == f"1/1{numbers[-1]:08}"
    for i in random.Random(1).sample(range(40_000), 100):
        assert shards.parts(i) == {"image": shards.key(i).partition("/")[2].encode(), "txt": b"x" * 40}


LAYOUTS = {
    "plain": {},
    "GNU": {"kind": tarfile.GNU_FORMAT},
    "pax with times": {"kind": tarfile.PAX_FORMAT, "mtime": 1.5},
    "long names": {"kind": tarfile.GNU_FORMAT, "key": lambda i: f"{'folder/' * 30}{i}"},
    "long pax names": {"kind": tarfile.PAX_FORMAT, "key": lambda i: f"{'dossier é/' * 20}{i}"},
    "prefixes": {"key": lambda i: f"{'folder/' * 20}{i}"},
    "letters": {"key": lambda i: f"क{i}"},
    "upper case": {"members": ("JPG", "Txt", "CLS")},
    "what is not read": {"members": ("npy", "jpg", "mp3", "txt")},
    "two images": {"members": ("jpg", "png", "txt")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_of_usual_tars_need_no_row(tmp_path, place, layout):
    """And are what tarfile reads."""
    path = many(tmp_path / "a.tar", 300, **LAYOUTS[layout])
    shards = Shards(path)
    with tarfile.open(path) as tar:
        files = {member.name.lower(): tar.extractfile(member).read() for member in tar}
    assert len(shards) == 300
    assert len(shards._index.columns.apart) == 0
    for i in range(300):
        key = shards.key(i).removeprefix("a/")
        assert shards.parts(i) == {"image": files[f"{key}.jpg"], "txt": files[f"{key}.txt"]}


def test_samples_whose_members_are_apart_are_read_too(tmp_path, place):
    """In any order, with much between them."""
    rng, names = random.Random(0), [f"{i}.{kind}" for i in range(60) for kind in ("png", "txt")]
    rng.shuffle(names)
    members: dict[str, object] = {name: png(int(name[:-4])) if name.endswith("png") else name for name in names}
    members |= {"60.png": png(60), "60.bin": "b" * 200_000, "60.txt": "60.txt", "61.png": png(61), "61.txt": "61.txt"}
    shards = Shards(write_tar(tmp_path / "a.tar", members))
    columns = shards._index.columns
    assert len(shards) == 62
    assert columns.parts_apart(60) is not None
    assert columns.parts_apart(61) is None
    for i in range(62):
        number = shards.key(i).removeprefix("a/")
        assert shards.parts(i) == {"image": png(int(number)), "txt": f"{number}.txt".encode()}


def test_another_sample_in_its_place_is_not_given(tmp_path, place):
    path = many(tmp_path / "a.tar", 3)
    shards = Shards(path)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data.replace(b"1.jpg", b"9.jpg").replace(b"2.jpg", b"2.gif"))
    assert shards.parts(0)["image"] == b"0"
    for i, reason in ((1, "another sample, '9', there than was indexed"), (2, "another sample, '2', there")):
        with pytest.raises(ValueError, match=reason):
            shards.parts(i)


def test_damaged_headers_are_errors_and_end():
    """Any bytes changed; what is found lies in the data, or there is a `ValueError`."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("0.jpg", "0.txt"):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = 700, 1.5
            tar.addfile(member, io.BytesIO(bytes(700)))
    data, rng = file.getvalue()[:5120], random.Random(0)
    assert set(sample_at(data, 0, len(data))[1]) == {"jpg", "txt"}
    for _ in range(3000):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            changed[rng.choice((0, 1, 2, 5, 6, 7)) * 512 + rng.randrange(512)] = rng.choice((0, 45, 48, 55, 255))
        try:
            _, parts = sample_at(bytes(changed), 0, len(changed))
        except ValueError:
            continue
        assert all(offset > 0 and length >= 0 for offset, length in parts.values())


def columns(**changes):
    found = {name: np.empty((0, 2) if name == "sizes_hw" else 0, kind) for name, kind in sample_columns.KINDS.items()}
    return SampleColumns(**(found | changes))


def test_keys_of_any_letters_come_back():
    rng = random.Random(0)
    keys = ["".join(rng.choices('a0/"\\\n\0é𝄞\udc80', k=rng.randrange(30))) for _ in range(3000)] + ["k" * 2**20]
    packed = columns(**pack_keys(keys))
    for i in rng.sample(range(3001), 3001):
        assert packed.key(i) == keys[i]
    broken = columns(**pack_keys(keys) | {"key_data": packed.key_data[::-1]})
    with pytest.raises(ValueError, match="broken keys"):
        broken.key(5)


def test_keys_do_not_unpack_to_any_size():
    bomb = pack_keys(["0" * 2**26])
    assert len(bomb["key_data"]) < 2**17
    with pytest.raises(ValueError, match="broken keys"):
        columns(**bomb).key(0)
