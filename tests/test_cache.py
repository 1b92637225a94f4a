"""Local copies of packed and remote shards: checked, bounded, shared between processes, made once."""

import errno
import fcntl
import gzip
import io
import multiprocessing
import os
import shutil
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
from experiments import config, fit
from helpers import only_caption
from PIL import Image

from indiclip.cli import main
from indiclip.images import UnreadableSample
from indiclip.loading import steps as loading_steps
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.preprocessing import Preprocessing
from indiclip.webdataset import cache, tar_index
from indiclip.webdataset.shards import Shards


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("INDICLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tar_bytes(*values, side=4, noise=False):
    """A shard with a sample per value."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i, value in enumerate(values):
            picture = io.BytesIO()
            pixels = np.random.default_rng(value).integers(0, 256, (side, side, 3)) if noise else value
            Image.fromarray(np.full((side, side, 3), pixels, np.uint8)).save(picture, "PNG")
            for name, data in ((f"{i}.png", picture.getvalue()), (f"{i}.txt", f"value {value}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def captions(shards):
    return [only_caption(sample) for sample in shards]


def copies(place):
    return sorted(file.name.rpartition("-")[0] for file in place.glob("*.tar"))


@pytest.mark.parametrize("packed", [False, True])
def test_remote_shards_are_read_from_one_copy(place, packed):
    memory, name = fsspec.filesystem("memory"), "a.tar.gz" if packed else "a.tar"
    data = tar_bytes(1, 2)
    memory.pipe(f"/one/{name}", gzip.compress(data) if packed else data)
    memory.pipe(f"/one/b{name[1:]}", gzip.compress(tar_bytes(3)) if packed else tar_bytes(3))
    shards = Shards("memory://one/*.tar" + ".gz" * packed)
    assert captions(shards) == ["value 1", "value 2", "value 3"]
    assert [shards.key(i) for i in range(3)] == ["a/0", "a/1", "b/0"]
    assert shards.sizes_hw.tolist() == [[4, 4]] * 3
    memory.rm("/one", recursive=True)
    assert captions(shards) == ["value 1", "value 2", "value 3"]
    assert copies(place) == ["a", "b"]


def test_a_url_with_file_goes_through_the_cache_and_a_changed_shard_is_copied_anew(tmp_path, place):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(1))
    assert captions(Shards(f"file://{path}")) == ["value 1"]
    path.write_bytes(tar_bytes(2))
    os.utime(path, (0, 0))
    assert captions(Shards(f"file://{path}")) == ["value 2"]
    assert copies(place) == ["a", "a"]


def test_an_index_is_enough_to_begin_and_the_copy_is_checked_against_it(tmp_path, place):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(1, 2))
    tar_index.build(path, cache.Stat(path.stat().st_size, "elsewhere")).save(tar_index.index_path(str(path)))
    shards = Shards(f"file://{path}")
    assert len(shards) == 2
    assert copies(place) == []  # nothing has been read yet
    assert captions(shards) == ["value 1", "value 2"]
    other = bytearray(path.read_bytes())
    other[600] ^= 1  # of the same length
    path.write_bytes(other)
    os.utime(path, (1, 1))
    with pytest.raises(UnreadableSample, match=r"a\.tar: its index \(\.index\.npz\) was made of another shard"):
        Shards(f"file://{path}")[0]


def test_the_copies_stay_within_the_bound_and_the_oldest_leaves(tmp_path, place, monkeypatch):
    for name in "abc":
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(ord(name), side=100, noise=True))
    size = (tmp_path / "a.tar").stat().st_size
    monkeypatch.setenv("INDICLIP_CACHE_GB", str(2.5 * size / 1e9))
    shards = Shards(f"file://{tmp_path}/{{a,b,c}}.tar")
    for name, left in (("a", ["a", "c"]), ("b", ["a", "b"]), ("a", ["a", "b"]), ("c", ["a", "c"])):
        # Each asks for its copy anew, as another process would.
        cache.local_tar(f"file://{tmp_path}/{name}.tar", cache.stat(f"file://{tmp_path}/{name}.tar"))
        assert copies(place) == left
        time.sleep(0.01)
    assert captions(shards) == ["value 97", "value 98", "value 99"]
    monkeypatch.setenv("INDICLIP_CACHE_GB", "1e-6")
    (tmp_path / "d.tar").write_bytes(tar_bytes(4))
    with pytest.raises(OSError, match=r"a shard of .* bytes exceeds the bound of 1,000 \(INDICLIP_CACHE_GB\)"):
        Shards(f"file://{tmp_path}/d.tar")


def _fetch(url, queue):
    queue.put(cache.local_tar(url, cache.stat(url)).stat().st_ino)


def test_processes_share_one_copy(tmp_path, place):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes(*range(20), side=64, noise=True)))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_fetch, args=(str(path), queue)) for _ in range(4)]
    for process in processes:
        process.start()
    inodes = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(30)
    assert len(inodes) == 1
    assert copies(place) == ["a"]


def test_what_killed_processes_left_is_overwritten_or_removed(tmp_path, place):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes(1)))
    target = cache.cached_name(str(path), cache.stat(str(path)), ".tar")
    (place / f"{target.name}-x.part").write_bytes(b"half of it")
    old = place / "other.part"
    old.write_bytes(b"of a shard that is no more")
    os.utime(old, (0, 0))
    assert captions(Shards(str(path))) == ["value 1"]
    assert not list(place.glob("*.part"))


def test_a_server_that_fails_is_asked_again_and_then_named(monkeypatch, place):
    memory = fsspec.filesystem("memory")
    memory.pipe("/two/a.tar", tar_bytes(7))
    tries, waited = [], []

    def broken(self, path, mode="rb", **options):
        tries.append(path)
        if len(tries) < failures:
            raise ConnectionError("reset by peer")
        return type(memory)._open(self, path, mode, **options)

    monkeypatch.setattr(cache.time, "sleep", waited.append)
    monkeypatch.setattr(type(memory), "open", broken)
    failures = 3
    assert captions(Shards("memory://two/a.tar")) == ["value 7"]
    assert len(tries) == 3
    memory.pipe("/two/b.tar", tar_bytes(7))
    failures = 99
    waited.clear()
    with pytest.raises(OSError, match=r"memory://two/b\.tar: no copy could be made in .*: reset by peer"):
        Shards("memory://two/b.tar")
    assert 60 <= sum(waited) <= 120  # a server starts anew in a minute
    assert waited == sorted(waited)


def test_a_signed_url_of_a_plain_tar(place):
    memory = fsspec.filesystem("memory")
    memory.pipe("/five/a.tar?signature=1", tar_bytes(1, 2))
    memory.pipe("/five/b.tar.gz?signature=1", gzip.compress(tar_bytes(3)))
    assert captions(Shards("memory://five/a.tar?signature=1")) == ["value 1", "value 2"]
    assert captions(Shards("memory://five/b.tar.gz?signature=1")) == ["value 3"]
    assert copies(place) == ["a", "b"]


def test_an_index_that_one_may_not_ask_for_is_not_there(monkeypatch, place):
    memory = fsspec.filesystem("memory")
    memory.pipe("/six/a.tar", tar_bytes(1))
    info, error = type(memory).info, PermissionError("Forbidden")  # S3, to who may not list the bucket

    def answer(self, path, **options):
        if path.endswith(".npz"):
            raise error
        return info(self, path, **options)

    monkeypatch.setattr(type(memory), "info", answer)
    assert captions(Shards("memory://six/a.tar")) == ["value 1"]
    error = ConnectionError("reset by peer")
    with pytest.raises(ConnectionError):
        Shards("memory://six/a.tar")


def test_an_index_is_fetched_once(monkeypatch, place):
    memory = fsspec.filesystem("memory")
    memory.pipe("/seven/a.tar.index.npz", b"x")
    got, get_file = [], type(memory).get_file

    def slow(self, *arguments, **options):
        got.append(arguments)
        time.sleep(0.1)  # the others ask meanwhile
        return get_file(self, *arguments, **options)

    monkeypatch.setattr(type(memory), "get_file", slow)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(cache.remote_file, ["memory://seven/a.tar.index.npz"] * 4))
    assert [file.read_bytes() for file in found] == [b"x"]
    assert len(got) == 1


def test_a_process_forked_under_a_lock_does_not_keep_it(place):
    place.mkdir()
    context = multiprocessing.get_context("fork")
    child = context.Process(target=time.sleep, args=(60,), daemon=True)
    with cache.locked(place / "a.tar"):
        child.start()
    (lock,) = place.glob(".lock-*")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where another process has it
    assert child.is_alive()
    child.kill()
    child.join(30)


def test_links_planted_in_the_cache_are_not_followed(tmp_path, place):
    """As the lock, as the copy, as the index: what they point to keeps its content, time and rights."""
    path, victim = tmp_path / "a.tar.gz", tmp_path / "victim"
    path.write_bytes(gzip.compress(tar_bytes(1)))
    victim.write_text("precious")
    victim.chmod(0o600)
    os.utime(victim, (9, 9))
    place.mkdir()
    version = cache.stat(str(path))
    for suffix in (".tar", ".index.npz"):
        cache.cached_name(str(path), version, suffix).symlink_to(victim)
    assert captions(Shards(str(path))) == ["value 1"]
    assert not any(entry.is_symlink() for entry in place.iterdir())
    copy = cache.cached_name(str(path), version, ".tar")
    (lock,) = place.glob(".lock-[0-9]*")  # not the index's
    for file in (copy, lock):
        file.unlink()
    lock.symlink_to(victim)
    with pytest.raises(
        cache.NoCopy, match=r"a\.tar\.gz: no copy could be made in .* \(INDICLIP_CACHE\): .*symbolic links"
    ):
        cache.local_tar(str(path), version)
    lock.unlink()  # two files may share a lock
    memory = fsspec.filesystem("memory")
    memory.pipe("/links/a.tar.index.npz", b"x")
    url = "memory://links/a.tar.index.npz"
    cache.cached_name(url, cache.stat(url), ".copy").symlink_to(victim)
    assert cache.remote_file(url).read_bytes() == b"x"
    assert (victim.read_text(), victim.stat().st_mtime, victim.stat().st_mode & 0o777) == ("precious", 9, 0o600)


def _as_nobody(urls, queue):
    os.umask(0o077)
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    try:
        queue.put([captions(Shards(url)) for url in urls])
    except Exception as error:
        queue.put(repr(error))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o755])
def test_a_second_user_shares_the_cache(mode, monkeypatch):
    """Reads what the first one left, copies what is missing where it may, and waits at the same locks."""
    root = Path(tempfile.mkdtemp(prefix="indiclip-test-"))  # pytest's own folders are closed to others
    try:
        root.chmod(0o755)
        place = root / "cache"
        place.mkdir()
        place.chmod(mode)
        monkeypatch.setenv("INDICLIP_CACHE", str(place))
        urls = [str(root / f"{name}.tar.gz") for name in "ab"]
        for number, url in enumerate(urls):
            Path(url).write_bytes(gzip.compress(tar_bytes(number)))
            Path(url).chmod(0o644)
        before = os.umask(0o077)
        assert captions(Shards(urls[0])) == ["value 0"]
        for number in range(cache._LOCKS):  # every lock is the first user's
            (place / f".lock-{number:02}").touch()
            (place / f".lock-{number:02}").chmod(0o644)
        os.umask(before)
        if mode == 0o755:
            urls = urls[:1]
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=_as_nobody, args=(urls, queue))
        process.start()
        assert queue.get(timeout=60) == [["value 0"], ["value 1"]][: len(urls)]
        process.join(30)
        assert [captions(Shards(url)) for url in urls] == [["value 0"], ["value 1"]][: len(urls)]
        owners = {file.stat().st_uid for file in place.glob("*.tar")}
        assert owners == ({0} if mode == 0o755 else {0, 65534})
    finally:
        shutil.rmtree(root)


def test_what_another_user_must_not_lose_stays_when_room_is_made(place, monkeypatch):
    place.mkdir()
    for name in "ab":
        (place / f"{name}.tar").write_bytes(bytes(100))
        os.utime(place / f"{name}.tar", (ord(name), ord(name)))
    unlink = Path.unlink

    def refuses(self, missing_ok=False):
        if self.name == "a.tar":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuses)
    monkeypatch.setenv("INDICLIP_CACHE_GB", "150e-9")
    cache._make_room(place, 0)
    assert [file.name for file in place.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("text", ["abc", "-1", "nan", "inf", "1,5"])
def test_a_bound_that_is_no_number_is_one_line(text, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar_bytes(1)))
    monkeypatch.setenv("INDICLIP_CACHE_GB", text)
    for command in ("check", "index", "stats"):
        assert main(["shards", command, str(tmp_path / "a.tar.gz"), "--workers", "0"]) == 2
        error = (
            f"indiclip shards {command}: INDICLIP_CACHE_GB: found {text!r}; expected a number of gigabytes, 0 or more"
        )
        assert capsys.readouterr().err.strip() == error
    shards = {"class_path": "indiclip.webdataset.shards.Shards", "init_args": {"urls": str(tmp_path / "a.tar.gz")}}
    assert fit(tmp_path, config(data__train__0__dataset=shards)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("indiclip: ")]
    assert len(lines) == 1
    assert f"INDICLIP_CACHE_GB: found {text!r}" in lines[0]


def test_a_short_answer_is_no_shard(monkeypatch, place):
    memory = fsspec.filesystem("memory")
    memory.pipe("/three/a.tar", tar_bytes(7))
    whole = memory.info("/three/a.tar")["size"]
    stat = cache.stat
    monkeypatch.setattr(cache, "stat", lambda url: cache.Stat(whole + 1, "x") if url.endswith("tar") else stat(url))
    monkeypatch.setattr(cache, "_WAITS", (0,))
    with pytest.raises(
        cache.NoCopy, match=rf"memory://three/a\.tar: .*received {whole:,} bytes; expected {whole + 1:,}"
    ):
        Shards("memory://three/a.tar")
    assert copies(place) == []


def test_a_full_disk_is_not_waited_for(monkeypatch):
    fsspec.filesystem("memory").pipe("/full/a.tar", tar_bytes(7))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))
    with pytest.raises(cache.NoCopy, match=r"memory://full/a\.tar: .*INDICLIP_CACHE.*No space left on device"):
        Shards("memory://full/a.tar")


def test_a_full_disk_names_the_file_that_did_not_fit(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.npz'"), cache.new_file(tmp_path / "a.npz"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_missing_remote_shards_and_unknown_protocols_are_named():
    with pytest.raises(FileNotFoundError, match=r"none\.tar"):
        Shards("memory://four/none.tar")
    with pytest.raises(FileNotFoundError, match=r"memory://four/\*\.tar: no such file"):
        Shards("memory://four/*.tar")
    with pytest.raises(ValueError, match=r"nosuch://bucket/a\.tar: .*nosuch"):
        Shards("nosuch://bucket/a.tar")


def test_messages_hold_no_password_and_no_signature():
    assert cache.shown("https://me:secret@host/x/a.tar?X-Signature=5") == "https://host/x/a.tar"
    assert cache.stem("https://me:secret@host/x/a.tar.gz?X-Signature=5") == "a"


def test_a_moved_shard_keeps_its_index_and_a_changed_one_does_not(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(1, 2))
    index = tar_index.build(path, cache.stat(str(path)))
    index.save(tar_index.index_path(str(path)))
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (path, tar_index.index_path(str(path))):
        shutil.copy2(file, moved)
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "build", None)  # not to be called
        assert captions(Shards(str(moved / path.name))) == ["value 1", "value 2"]
    path.write_bytes(tar_bytes(3, 4))  # as long
    assert captions(Shards(str(path))) == ["value 3", "value 4"]


def test_a_torn_or_foreign_index_is_made_anew(tmp_path, place):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(1))
    file = Path(tar_index.index_path(str(path)))
    tar_index.build(path, cache.stat(str(path))).save(file)
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    for data in (b"", whole[: len(whole) // 2], bytes(damaged), b"PK\x05\x06" + bytes(18)):
        file.write_bytes(data)
        assert tar_index.TarIndex.load(file) is None
        assert captions(Shards(str(path))) == ["value 1"]


def test_an_index_with_crc_finds_changed_bytes(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(1, 2))
    tar_index.build(path, cache.stat(str(path)), crc=True).save(tar_index.index_path(str(path)))
    shards = Shards(str(path))
    assert captions(shards) == ["value 1", "value 2"]
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 1
    path.write_bytes(data)
    with pytest.raises(UnreadableSample, match=r"a/0: the image's bytes are not those that were indexed \(CRC-32\)"):
        shards[0]
    assert only_caption(shards[1]) == "value 2"


@pytest.mark.parametrize("budget", [{"batch_size": 2}, {"batch_tokens": 8, "batch_multiple": 1, "max_tokens": 4}])
def test_the_next_windows_shards_are_fetched_while_this_ones_are_read(tmp_path, place, budget):
    for name in "abcdef":
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(1, 2, 3, 4))
    shards = Shards(f"file://{tmp_path}/*.tar")
    for copy in place.glob("*.tar"):  # made to index them
        copy.unlink()
    steps = Steps([Source("t", shards, window=2, **budget)], 0, Preprocessing(2), train=True)
    seen = []
    for step in range(24 // len(steps[0]["t"]["keys"])):
        seen += [key.split("/")[0] for key in steps[step]["t"]["keys"]]
        for thread in threading.enumerate():
            if thread.name == "prefetch":
                thread.join(30)
        ahead = set(copies(place)) - set(seen[: len(seen) // 8 * 8 + 8])
        assert len(ahead) == (2 if len(seen) <= 16 else 0)  # the window after this one
    assert sorted(seen) == sorted("abcdef" * 4)
    assert copies(place) == list("abcdef")


def test_a_shard_that_cannot_be_fetched_ahead_is_said(tmp_path, place):
    for name in "ab":
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(1, 2))
    shards = Shards(f"file://{tmp_path}/*.tar")
    for file in (*place.glob("*.tar"), *tmp_path.glob("*.tar")):
        file.unlink()
    with pytest.warns(UserWarning, match=r"a\.tar"):
        loading_steps._fetch(shards, [0, 1])
    with pytest.raises(UnreadableSample, match=r"a/0: .*No such file"):
        shards[0]


def test_what_a_web_server_answers_is_said_without_a_signature():
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # knows no request, not even GET
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_port}/a.tar"
        with pytest.raises(FileNotFoundError, match=f"^{where}: the server answers 501 Unsupported method .'GET'.$"):
            cache.stat(f"{where}?signature=secret")
        server.shutdown()
    with pytest.raises(FileNotFoundError, match=f"^{where}: Cannot connect to host 127.0.0.1"):
        cache.stat(where)


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("INDICLIP_CACHE", str(tmp_path / "file"))
    with pytest.raises(FileExistsError, match="INDICLIP_CACHE names another folder.*file'$"):
        cache.folder()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("INDICLIP_CACHE", "~/mine")
    assert cache.folder() == tmp_path / "mine"
