"""Reading shards while copies vanish, servers fail and the machine runs short: no sample is blamed for it."""

import errno
import gzip
import os
import re
import warnings
from pathlib import Path

import pytest
from helpers import only_caption
from test_cache import captions, copies, tar_bytes
from test_shards import open_files

from indiclip.images import UnreadableSample
from indiclip.webdataset import cache, shard_files, tar_index
from indiclip.webdataset.shards import Shards


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("INDICLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def brought(monkeypatch):
    """The URLs that were copied."""
    urls, copy = [], cache._copy
    monkeypatch.setattr(cache, "_copy", lambda url, *rest: (urls.append(url), copy(url, *rest))[1])
    return urls


def test_a_torn_copy_is_made_anew(tmp_path, place, brought):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes(1, 2)))
    assert captions(Shards(str(path))) == ["value 1", "value 2"]
    (copy,) = place.glob("*.tar")
    for torn in (copy.read_bytes()[:600], bytes(copy.stat().st_size)):
        copy.write_bytes(torn)  # as a machine that went down may leave it
        assert captions(Shards(str(path))) == ["value 1", "value 2"]
    assert len(brought) == 3


def test_a_torn_copy_is_not_indexed(tmp_path, place):
    (tmp_path / "a.tar").write_bytes(tar_bytes(1, 2))
    assert captions(Shards(f"file://{tmp_path}/a.tar")) == ["value 1", "value 2"]
    (copy,), (index,) = place.glob("*.tar"), place.glob("*.npz")
    copy.write_bytes(copy.read_bytes()[:3000])
    index.unlink()
    assert captions(Shards(f"file://{tmp_path}/a.tar")) == ["value 1", "value 2"]


def test_a_copy_is_on_the_disk_before_it_has_its_name(tmp_path, place, monkeypatch):
    fsync, seen = os.fsync, []
    monkeypatch.setattr(cache.os, "fsync", lambda file: (fsync(file), seen.append(copies(place))))
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar_bytes(1)))
    Shards(str(tmp_path / "a.tar.gz"))
    assert seen == [[]]


def test_what_is_no_shard_is_brought_once_for_all_its_samples(tmp_path, place, brought):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes(1, 2, 3)))
    tar = tmp_path / "other.tar"
    tar.write_bytes(tar_bytes(4, 5, 6))
    tar_index.build(tar, cache.stat(str(path))).save(tar_index.index_path(str(path)))
    shards = Shards(str(path))
    for index in range(3):
        with pytest.raises(UnreadableSample, match="made of another shard"):
            shards[index]
    assert len(brought) == 1
    tar_index.build(tar, cache.stat(str(path))).save(tar_index.index_path(str(path)))
    shards = Shards(str(path))
    path.write_bytes(path.read_bytes()[:-20])
    for index in range(3):
        with pytest.raises(UnreadableSample, match="broken gzip"):
            shards[index]
    assert len(brought) == 2


def remote(tmp_path, names="abc"):
    for name in names:
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(ord(name), side=100, noise=True))
    return Shards(f"file://{tmp_path}/*.tar"), (tmp_path / "a.tar").stat().st_size


def test_a_copy_that_leaves_just_before_it_is_opened_is_made_anew(tmp_path, place, monkeypatch):
    shards, _ = remote(tmp_path)
    real_open, left = os.open, 1

    def leaves(path, *rest):
        nonlocal left
        if left and str(path).startswith(str(place)) and str(path).endswith(".tar"):
            left -= 1
            Path(path).unlink()
        return real_open(path, *rest)

    monkeypatch.setattr(shard_files.os, "open", leaves)
    assert only_caption(shards[0]) == "value 97"
    assert left == 0
    left = 99
    with pytest.raises(cache.NoCopy, match="other processes keep removing it"):
        shards[1]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_machine_that_runs_short_ends_the_run_and_blames_no_sample(tmp_path, monkeypatch, number):
    (tmp_path / "a.tar").write_bytes(tar_bytes(1))
    shards = Shards(str(tmp_path / "a.tar"))

    def short(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shard_files.os, "open", short)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        shards[0]


def test_a_file_that_a_server_replaced_is_opened_again(tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(tar_bytes(1))
    shards = Shards(str(tmp_path / "a.tar"))
    pread, stale = os.pread, 0

    def read(*arguments):
        nonlocal stale
        if stale:
            stale -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return pread(*arguments)

    monkeypatch.setattr(shard_files.os, "pread", read)
    assert only_caption(shards[0]) == "value 1"
    before, stale = open_files(), 1
    assert only_caption(shards[0]) == "value 1"
    assert (stale, open_files()) == (0, before)
    stale = 9
    with pytest.raises(OSError, match="[Ss]tale"):
        shards[0]


def test_a_copy_that_another_machine_removed_is_closed(tmp_path, place, monkeypatch):
    shards, _ = remote(tmp_path)
    assert only_caption(shards[0]) == "value 97"
    before = open_files()

    def stale(descriptor):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(shard_files.os, "fstat", stale)
    assert only_caption(shards[1]) == "value 98"
    monkeypatch.undo()
    assert open_files() == before


def removed_but_open():
    links = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return sum(link.endswith("(deleted)") and ".tar" in link for link in links)


def test_copies_that_left_the_cache_leave_the_disk(tmp_path, place, monkeypatch):
    shards, size = remote(tmp_path, "abcdef")
    for copy in place.glob("*.tar"):
        copy.unlink()
    monkeypatch.setenv("INDICLIP_CACHE_GB", str(2.5 * size / 1e9))
    for index in range(6):
        assert only_caption(shards[index]) == f"value {97 + index}"
        assert removed_but_open() == 0
    assert len(copies(place)) == 2


def test_nothing_is_fetched_ahead_where_it_would_push_out_what_is_read(tmp_path, place, monkeypatch, brought):
    shards, size = remote(tmp_path, "abcde")
    for copy in place.glob("*.tar"):
        copy.unlink()
    brought.clear()
    monkeypatch.setenv("INDICLIP_CACHE_GB", str(3.9 * size / 1e9))
    with pytest.warns(UserWarning, match=r"two windows of 2 take .* raise INDICLIP_CACHE_GB or lower `window`"):
        shards.prefetch([0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shards.prefetch([1, 2])  # is said once
        assert brought == []
        monkeypatch.setenv("INDICLIP_CACHE_GB", str(4.1 * size / 1e9))
        shards.prefetch([1, 2])
        assert copies(place) == ["b", "c"]
        monkeypatch.setenv("INDICLIP_CACHE_GB", str(5.1 * size / 1e9))
        shards.prefetch([0, 1, 2, 3])  # all copies together have room
    assert copies(place) == ["a", "b", "c", "d"]
