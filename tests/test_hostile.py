"""Files from strangers: a run over shards with all that can be wrong neither stops, nor runs their code, nor grows."""

import gzip
import io
import json
import pickle
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from experiments import config, fit
from helpers import only_caption
from PIL import Image
from test_shards import png, write_tar

from indiclip.webdataset.shards import Shards
from indiclip.webdataset.tar_members import LINK, OUTSIDE


def bomb(width, height):
    """A PNG of zeros: few bytes, many pixels, all of them there."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + width)) for _ in range(height)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg(mode="RGB", orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (200, 40, 90)).convert(mode).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def link(name, to, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, to
    return member


def hostile_members(folder):
    """(members of a shard, keys of the samples that cannot be read)."""
    trap = pickle.dumps(Trap(folder / "canary"))
    python = f"import pathlib; pathlib.Path({str(folder / 'canary')!r}).touch()".encode()
    members = {}
    for key in range(8):
        members |= {f"good{key}.png": png(key * 20, (24, 16)), f"good{key}.txt": f"a scene number {key}"}
    for orientation in range(1, 9):
        members |= {f"exif{orientation}.jpg": jpeg(orientation=orientation), f"exif{orientation}.txt": "turned"}
    texts = {"none": "None", "na": "NA", "long": "दीया " * 20_000, "bom": "\ufeffdiya", "space": " x \n"}
    for key, text in texts.items():
        members |= {f"{key}.png": png(9, (24, 16)), f"{key}.txt": text}
    members |= {"cmyk.jpg": jpeg("CMYK"), "cmyk.txt": "four inks"}
    bad = {
        "utf8": {"png": png(), "txt": b"\xff\xfe broken"}, "empty": {"png": b"", "txt": "x"},
        "bomb": {"png": bomb(12_000, 12_000), "txt": "boom"}, "claims": {"png": bomb(16, 16)[:16] + struct.pack(
            ">II", 2**31 - 1, 2**31 - 1) + bomb(16, 16)[24:], "txt": "boom"},
        "pickle": {"png": trap, "txt": "x"}, "torn": {"jpg": jpeg()[:300], "txt": "x"},
        "nested": {"png": png(), "json": "[" * 200_000}, "surrogate": {"png": png(), "json": '{"text": "\\udc80"}'},
        "blank": {"png": png(), "txt": "\n"}, "nul": {"png": png(), "txt": "a\0b"},
        "svg": {"png": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "txt": "x"},
    }  # fmt: skip
    for key, parts in bad.items():
        members |= {f"{key}.{kind}": data for kind, data in parts.items()}
    members |= {
        "good0.pkl": trap, "good0.pyd": python, "good1.pth": trap, "good2.npy": trap, "__init__.py": python,
        "../escape.png": png(), "../escape.txt": "x", "/etc/absolute.png": png(), "/etc/absolute.txt": "x",
        "passwd.txt": link("passwd.txt", "/etc/passwd"), "hard.png": link("hard.png", "good0.png", tarfile.LNKTYPE),
        "device.png": link("device.png", "", tarfile.CHRTYPE), "pipe.txt": link("pipe.txt", "", tarfile.FIFOTYPE),
    }  # fmt: skip
    return members, sorted(bad)


def test_a_run_over_hostile_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("INDICLIP_CACHE", str(tmp_path / "cache"))
    members, bad = hostile_members(tmp_path)
    names = np.random.default_rng(0).permutation(list(members)).tolist()  # a sample's members lie apart
    whole = Path(write_tar(tmp_path / "a.tar", {name: members[name] for name in names})).read_bytes()
    (tmp_path / "b.tar").write_bytes(Path(write_tar(tmp_path / "x.tar", {
        f"{i}.{kind}": png(i, (24, 16)) if kind == "png" else f"number {i}" for i in range(9) for kind in ("txt", "png")
    })).read_bytes()[: 512 * 33])  # fmt: skip
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(whole))
    (tmp_path / "x.tar").unlink()
    shards = {"class_path": "indiclip.webdataset.shards.Shards", "init_args": {"urls": f"{tmp_path}/[a-c].tar*"}}
    tree = config(trainer__max_steps=14)
    tree["data"] |= {"num_workers": 2, "quarantine": 1.0, "steps_per_epoch": 14}
    tree["data"]["train"][0] |= {"dataset": shards, "batch_size": 8}
    assert fit(tmp_path, tree) == 0
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path.parent / "escape.png").exists()
    rows = [json.loads(line) for line in (tmp_path / "runs/experiment/quarantine.jsonl").read_text().splitlines()]
    by_key = {row["key"]: row for row in rows}
    assert len(by_key) == len(rows)
    cut = [key for key in by_key if key.startswith("b/")]
    assert sorted(set(by_key) - set(cut)) == sorted(f"{shard}/{key}" for shard in "ac" for key in bad)
    assert len(cut) == 1
    assert "broken tar" in by_key[cut[0]]["reason"] or "truncated tar" in by_key[cut[0]]["reason"]
    for shard, file in (("a", "a.tar"), ("c", "c.tar.gz")):
        assert {by_key[f"{shard}/{key}"]["shard"] for key in bad} == {str(tmp_path / file)}
    inventory = Shards(f"{tmp_path}/a.tar").inventory
    inventory.verify()
    left_out = {reason: count for unit, reason, count, _ in inventory.left_out() if unit == "members"}
    assert (left_out[LINK], left_out[OUTSIDE]) == (4, 4)
    assert all(left_out[f".{kind}"] == 1 for kind in ("pyd", "pth", "npy", "py"))


MEASURE = """
import sys
from indiclip.images import EncodedImage, UnreadableSample
data = open(sys.argv[1], "rb").read()
# Not ru_maxrss, which begins with what the parent had when it forked.
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
try: EncodedImage(data, "k").decode()
except UnreadableSample as error: print(error)
print(peak() - before, "KiB")
"""


@pytest.mark.parametrize("side", [12_000, 30_000])
def test_a_bomb_takes_no_memory(tmp_path, side):
    (tmp_path / "bomb").write_bytes(bomb(side, 12_000))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "bomb")], capture_output=True, text=True, check=True
    )
    reason, grown = done.stdout.splitlines()
    assert "pixels" in reason
    assert int(grown.split()[0]) < 4096  # the pixels would be 140,000 and more


def test_a_transparent_image_is_there_only_twice_while_it_is_laid_on_white(tmp_path):
    side = 3000
    Image.new("RGBA", (side, side), (9, 9, 9, 99)).save(tmp_path / "clear", "PNG", compress_level=1)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "clear")], capture_output=True, text=True, check=True
    )
    rgba = side * side * 4 / 2**10
    assert int(done.stdout.split()[0]) < 4 * rgba  # as PIL has it, on white, and twice as an array


def test_a_packed_shard_that_never_ends_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("INDICLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("INDICLIP_CACHE_GB", "0.02")
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(60_000_000)))
    with pytest.raises(ValueError, match=r"a\.tar\.gz: unpacks to more than 20,000,000 bytes \(INDICLIP_CACHE_GB\)"):
        Shards(str(tmp_path / "a.tar.gz"))
    assert not [file for file in (tmp_path / "cache").iterdir() if not file.name.startswith(".lock")]


def test_an_index_from_a_stranger_runs_nothing(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.png": png(), "0.txt": "x"})
    about = np.array([Trap(tmp_path / "canary")], dtype=object)
    np.savez(f"{path}.index.npz", about=about, rows=about, key_bytes=about, key_ends=about, allow_pickle=True)
    assert only_caption(Shards(path)[0]) == "x"
    assert not (tmp_path / "canary").exists()
