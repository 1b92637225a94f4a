"""`indiclip shards check` and `index`: hostile and damaged shards, what is said about them, and what is left behind."""

import collections
import gzip
import io
import json
import os
import pickle
import signal
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import as_they_end, forked, wait_until
from test_shards import UNREADABLE, png, write_tar

from indiclip.cli import main
from indiclip.images import UnreadableSample
from indiclip.webdataset import cache, tar_index
from indiclip.webdataset.shards import Shards


def check(*words):
    return main(["shards", "check", *map(str, words), "--workers", "0"])


def found_in(tmp_path, *shards, options=()):
    """(exit status, kind -> keys) of what a check writes."""
    out = tmp_path / "problems.jsonl"
    status = check(*shards, "--out", out, *options)
    kinds = collections.defaultdict(list)
    for line in out.read_text("utf-8").splitlines():
        entry = json.loads(line)
        kinds[f"{entry['level']}: {entry['kind']}"].append(entry["key"])
    return status, dict(kinds)


class Canary:
    """Leaves a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def bomb():
    """A PNG whose header promises 12,000 x 12,000 pixels."""
    data = bytearray(png())
    data[16:24] = (12_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def test_every_hostile_member_is_said_and_none_is_run(tmp_path, capsys):
    canary, long = tmp_path / "canary", "क" * 100_000
    cmyk = io.BytesIO()
    Image.new("CMYK", (4, 4), (9, 9, 9, 9)).save(cmyk, "JPEG")
    wide = png(1, (100, 2))
    path = write_tar(tmp_path / "a.tar", [
        ("good.png", png(0)), ("good.txt", "एक दीया"),
        ("order.txt", "text first"), ("order.png", png(2)),
        ("cmyk.jpg", cmyk.getvalue()), ("cmyk.txt", "printed"),
        ("0.pkl", pickle.dumps(Canary(canary))), ("0.pyd", b"MZ"), ("0.seg.pt", b""),
        ("link.png", special("link.png", tarfile.SYMTYPE, "/etc/passwd")),
        ("hard.txt", special("hard.txt", tarfile.LNKTYPE, "good.txt")),
        ("fifo.txt", special("fifo.txt", tarfile.FIFOTYPE)),
        ("../out.png", png(3)), ("/abs.png", png(3)),
        ("README", "x"), ("good.seg.png", png()),
        ("lost.txt", "text of a lost image"),
        ("empty.png", b""), ("empty.txt", "x"),
        ("bomb.png", bomb()), ("bomb.txt", "x"),
        ("half.png", png(4, (64, 64))[:60]), ("half.txt", "x"),
        ("none.png", png(5)), ("none.txt", "None"), ("na.png", png(6)), ("na.txt", " NA\n"),
        ("long.png", png(7)), ("long.txt", long),
        ("latin1.png", png(8)), ("latin1.txt", "café".encode("latin-1")),
        ("nul.png", png(9)), ("nul.txt", "a\x01b"),
        ("blank.png", png(10)), ("blank.txt", " "),
        ("json.png", png(11)), ("json.json", "{"),
        ("label.png", png(12)), ("label.cls", "-3"),
        ("nothing.png", png(13)),
        ("many.png", png(15)), ("many.json", '{"captions": {"en": "x", "hi": "y"}}'),
        ("odd.png", png(16)), ("odd.json", '{"captions": {"en": "x", "hi": 3}}'),
        ("wide.png", wide), ("wide.txt", "a wide one"), ("bare.png", png(14, (2, 100))),
        ("same.png", png(0)), ("same.txt", "another caption"),
        ("again.png", png(0)), ("again.txt", "एक दीया"),
        ("good.txt", "twice"),
    ])  # fmt: skip
    status, kinds = found_in(tmp_path, path)
    assert not canary.exists()
    assert status == 1
    assert {kind: [key.removeprefix("a/") for key in keys] for kind, keys in kinds.items()} == {
        "problem: unsafe member": [
            "0.pkl", "0.pyd", "0.seg.pt", "link.png", "hard.txt", "fifo.txt", "../out.png", "/abs.png",
        ],
        "problem: text without an image": [""],
        "problem: duplicate member": ["good"],
        "problem: unreadable image": ["empty", "bomb", "half"],
        "problem: unreadable caption": ["latin1", "blank", "odd"],
        "problem: unreadable JSON": ["json"],
        "problem: unreadable label": ["label"],
        "problem: nothing to learn": ["nothing", "bare"],
        "warning: left-out member": ["README", "good.seg.png"],
        "warning: placeholder caption": ["none", "na"],
        "warning: long caption": ["long"],
        "warning: control character in a caption": ["nul"],
        "warning: extreme aspect": ["wide", "bare"],
        "warning: identical image": ["same"],
        "warning: repeated sample": ["again"],
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "        8  unsafe member" in shown
    assert f"{path}: a/bomb: 12000x12000 pixels are more than the 100,000,000 allowed" in shown
    assert len(shown) < 10_000  # the long caption is not printed


def test_what_check_passes_is_what_training_reads(tmp_path):
    for number, (members, _) in enumerate(UNREADABLE.values()):
        path = write_tar(tmp_path / f"{number}.tar", {**members, "1.png": png(5), "1.txt": "good"})
        status, kinds = found_in(tmp_path, path)
        assert status == 1
        assert [key for keys in kinds.values() for key in keys] == [f"{number}/0"]
        with pytest.raises(UnreadableSample):
            Shards(path)[0]


def test_clean_shards_have_status_0_and_warnings_do_not_change_it(tmp_path, capsys):
    path = write_tar(tmp_path / "a.tar", {"0.png": png(), "0.txt": "null", "1.png": png(1), "1.cls": "3"})
    assert check(path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["clean"], found["samples"], found["problems"]) == (True, 2, {})
    example = {"kind": "placeholder caption", "shard": path, "key": "a/0", "reason": "the caption is 'null'"}
    assert found["warnings"] == {"placeholder caption": {"count": 1, "examples": [example]}}


def test_broken_shards_are_said_and_the_others_are_read(tmp_path):
    members = {f"{i}.{kind}": png(i) if kind == "png" else f"x{i}" for i in range(3) for kind in ("txt", "png")}
    whole = Path(write_tar(tmp_path / "whole.tar", members)).read_bytes()
    header = whole.index(b"1.png")
    for name, data in {
        "truncated.tar": whole[: header + 530],
        "endless.tar": whole[:header],
        "text.tar": b"no tar" * 200,
        "packed.tar.gz": gzip.compress(whole)[:-30],
        "none.tar": b"",
    }.items():
        (tmp_path / name).write_bytes(data)
    status, kinds = found_in(tmp_path, tmp_path / "*.tar*")
    assert status == 1
    assert len(kinds["problem: broken shard"]) == 5
    assert kinds["problem: text without an image"] == ["", ""]
    assert kinds["warning: repeated sample"] == ["truncated/0", "whole/0"]  # as endless/0
    assert set(kinds) == {"problem: broken shard", "problem: text without an image", "warning: repeated sample"}


def test_keys_of_two_shards_of_one_name(tmp_path):
    for folder, names in (("x", "ab"), ("y", "bc")):
        (tmp_path / folder).mkdir()
        members = {f"{name}.png": png(ord(name) + ord(folder)) for name in names}
        members |= {f"{name}.txt": "t" for name in names}
        write_tar(tmp_path / folder / "train.tar", members)
    status, kinds = found_in(tmp_path, tmp_path / "*" / "train.tar")
    assert (status, kinds) == (1, {"problem: duplicate key": ["train/b"]})


def test_every_range_of_a_shard_is_read_once_by_many_processes(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (600, 3), dtype=np.uint8)
    members = []
    for i, colour in enumerate(pictures):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), tuple(colour.tolist())).save(buffer, "PNG")
        members += [(f"{i:03}.png", buffer.getvalue()), (f"{i:03}.txt", "nan" if i % 7 == 0 else f"caption {i}")]
    path = write_tar(tmp_path / "a.tar", members)
    out = tmp_path / "out.jsonl"
    assert main(["shards", "check", path, "--out", str(out), "--workers", "2"]) == 0
    keys = [json.loads(line)["key"] for line in out.read_text().splitlines()]
    assert keys == [f"a/{i:03}" for i in range(0, 600, 7)]


def test_mistakes_are_one_line_and_status_2(tmp_path, capsys):
    for words, message in (
        (["chek"], "no command 'chek'; nearest is 'check'"),
        (["check"], "the following arguments are required: SHARDS"),
        (["check", str(tmp_path / "a.tar")], "a.tar: no such file or folder"),
        (["check", "x.tar", "--maxcharacters", "3"], "--maxcharacters: no such option; nearest is '--max_characters'"),
        (["check", "x.tar", "--workers", "0.5"], "argument --workers: found '0.5'; expected a whole number from"),
        (["index", str(tmp_path)], "is no shard; expected .tar"),
        (["stats", str(tmp_path / "*.tar")], "no such file"),
    ):
        assert main(["shards", *words]) == 2
        error = capsys.readouterr().err
        assert message in error, error
        assert error.count("\n") == 1


@pytest.fixture
def waiting(tmp_path):
    """A check whose worker waits for a shard that never answers, and the worker's id."""
    path = write_tar(tmp_path / "a.tar", {"0.png": png(), "0.txt": "x"})
    os.mkfifo(tmp_path / "b.tar")

    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it
        return main(["shards", "check", path, str(tmp_path / "b.tar"), "--workers", "2"])

    with forked(work, tmp_path) as process:
        wait_until(lambda: _children(process))
        yield process, int(_children(process)[0])


def _children(parent):
    return Path(f"/proc/{parent}/task/{parent}/children").read_text().split()


def test_ctrl_c_leaves_no_process(waiting, tmp_path):
    process, worker = waiting
    os.killpg(process, signal.SIGINT)
    assert dict(as_they_end([process], 60)) == {process: 130}
    assert (tmp_path / "err").read_text() == "indiclip shards check: stopped\n"
    assert not Path(f"/proc/{worker}").exists()


def test_a_killed_process_is_said(waiting, tmp_path):
    process, worker = waiting
    os.kill(worker, signal.SIGKILL)
    assert dict(as_they_end([process], 60)) == {process: 1}
    error = (tmp_path / "err").read_text()
    assert f"indiclip shards check: DataLoader worker (pid(s) {worker}) exited unexpectedly" in error
    assert "Traceback" not in error


def test_index_lies_beside_the_shard_and_is_built_once(tmp_path, capsys):
    members = {"0.png": png(), "0.txt": "x", "0.pkl": b""}
    path = write_tar(tmp_path / "a.tar", members)
    packed = write_tar(tmp_path / "b.tar.gz", members, "w:gz")
    for built in (2, 0):
        assert main(["shards", "index", path, packed, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found == {
            "shards": 2, "samples": 2, "built": built, "damaged": {}, "elsewhere": {},
            "inventory": {
                "members": {
                    "present": 6, "used": 4, "altered": {}, "left_out": {".pkl": {"count": 2, "example": "0.pkl"}},
                },
                "samples": {"present": 2, "used": 2, "altered": {}, "left_out": {}},
            },
        }  # fmt: skip
    assert tar_index.TarIndex.load(Path(f"{packed}.index.npz")) is not None
    assert not tar_index.find_index(path, cache.stat(path)).info.has_crc
    assert main(["shards", "index", path, "--crc"]) == 0
    assert tar_index.find_index(path, cache.stat(path)).info.has_crc


def test_index_of_a_read_only_folder_and_of_a_damaged_shard(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("INDICLIP_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    path = write_tar(folder / "a.tar", {"0.png": png(), "0.txt": "x"})
    folder.chmod(0o555)
    assert main(["shards", "index", path]) == 0
    assert f"1 indexes are in {tmp_path / 'cache'}" in capsys.readouterr().out
    assert [entry.name for entry in folder.iterdir()] == ["a.tar"]
    assert list((tmp_path / "cache").glob("a-*.index.npz"))
    folder.chmod(0o755)
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:1024])
    assert main(["shards", "index", path]) == 1
    assert "damaged: " in capsys.readouterr().out
