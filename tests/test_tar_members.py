"""The members of a tar: those that tarfile and GNU tar see, and an end to every tar that somebody made up."""

import io
import os
import re
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
from test_shards import png, write_tar

from indiclip.webdataset.shards import Shards
from indiclip.webdataset.tar_members import members


def block(name="x", size=0, kind=tarfile.REGTYPE, attributes=None):
    """A member's header, preceded by one with attributes where there are any."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.pax_headers = size, kind, attributes or {}
    return info.tobuf(tarfile.PAX_FORMAT if attributes else tarfile.GNU_FORMAT)


def padded(data):
    return data + bytes(-len(data) % 512)


def member(name, data):
    return block(name, len(data)) + padded(data)


END = bytes(1024)
GOOD = member("0.png", png()) + member("0.txt", b"x")


def read(path, data):
    path.write_bytes(data)
    damaged = []
    found = [(name, found.offset_data, found.size) for name, found in members(path, damaged)]
    return found, damaged


def of_tarfile(path):
    with tarfile.open(path) as tar:
        return [(m.name.removeprefix("./"), m.offset_data, m.size) for m in tar if not m.isdir() and not m.issparse()]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_places_and_sizes_are_those_of_tarfile(tmp_path, layout):
    folder, link = tarfile.TarInfo("folder/"), tarfile.TarInfo("link.txt")
    folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "0.txt" * 30
    if layout == tarfile.USTAR_FORMAT:
        link.linkname = "0.txt"
    names = ["./0.txt", "folder-" * 11 + "/" + "x" * 60 + ".txt", "दीया/मटका.png", "बड़ा/" * 8 + "n.png", "last.cls"]
    contents = [(name, os.urandom(number * 300)) for number, name in enumerate(names)]
    path = write_tar(tmp_path / "a.tar", [("", folder), *contents, ("", link), ("end", b"1")], format=layout)
    damaged = []
    found = [(name, found.offset_data, found.size) for name, found in members(tmp_path / "a.tar", damaged)]
    assert (found, damaged) == (of_tarfile(path), [])
    assert len(found) == 7


@pytest.mark.skipif(not shutil.which("tar"), reason="needs GNU tar")
@pytest.mark.parametrize("layout", [["gnu"], ["pax", "--sparse-version=1.0"], ["pax", "--sparse-version=0.1"]])
def test_what_follows_a_file_with_holes_is_found(tmp_path, layout):
    with (tmp_path / "holes.png").open("wb") as file:
        for place in range(40):  # more than the header holds
            file.seek(place << 20)
            file.write(bytes([1 + place]))
    (tmp_path / "z.txt").write_text("after")
    command = ["tar", "-cSf", "a.tar", "--format", *layout, "holes.png", "z.txt"]
    if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("another tar")
    damaged = []
    found = list(members(tmp_path / "a.tar", damaged))
    assert [header.type for _, header in found] == [tarfile.GNUTYPE_SPARSE, tarfile.REGTYPE]
    ((name, place, size),) = of_tarfile(tmp_path / "a.tar")
    assert (found[1][0], found[1][1].offset_data, found[1][1].size) == (name, place, size)
    assert damaged == []


NAMES = [b"L", b"K", b"x", b"g", b"X"]


def crafted():
    """What comes after two good members -> the reason that is given."""
    yield block(size=-1024), "a size of -1,024 bytes"
    yield block(size=-1), "a size of -1 bytes"
    for size in ("-4096", "-1"):
        yield block(attributes={"size": size}), f"a size of {int(size):,} bytes"
    yield block(attributes={"size": "many"}), "invalid literal"
    yield block(attributes={"size": "9" * 5000}), "Exceeds the limit"
    for record in (b"0 path=", b"2 2 2 2 path="):
        yield block(kind=b"x", size=len(record)) + padded(record), f"attributes with a record of {record[:1].decode()}"
    yield block(size=2**60), "truncated tar"
    for kind in NAMES:
        yield block(kind=kind, size=600 * 2**20) + bytes(2**20), r"a name or attributes of 629,145,600 bytes"
        yield block(kind=kind, size=-512), "a name or attributes of -512 bytes"
    yield END + GOOD, "data behind its end mark at byte 2,048"
    yield END + bytes(2**21) + b"x", "data behind its end mark"


@pytest.mark.parametrize(("data", "reason"), crafted())
def test_crafted_headers_end_the_tar_and_are_said(tmp_path, data, reason):
    found, damaged = read(tmp_path / "a.tar", GOOD + data + (b"" if data[:1024] == END else END))
    assert [name for name, _, _ in found] == ["0.png", "0.txt"]
    ((_, said),) = damaged
    assert re.search(reason, said), said


def test_thousands_of_names_for_one_member_are_no_recursion(tmp_path):
    names = b"".join(block(kind=b"L", size=9) + padded(f"{i:05}.txt".encode()) for i in range(5000))
    attributes = b"".join(block(attributes={"path": f"{i}.png"})[:1024] for i in range(5000))
    found, damaged = read(tmp_path / "a.tar", names + member("", b"x") + attributes + member("", b"y") + END)
    assert [name for name, _, _ in found] == ["04999.txt", "4999.png"]
    assert damaged == []


def test_attributes_that_say_nothing_to_us_are_passed_over(tmp_path):
    others = {
        "SCHILY.xattr.user." + "x" * 255: "=\n\0é" * 99,
        "mtime": "1.5",
        "path": "दीया.txt",
        "comment": "12 size=7",
    }
    found, damaged = read(tmp_path / "a.tar", block("x", 1, attributes=others) + padded(b"y") + END)
    assert [(name, size) for name, _, size in found] == [("दीया.txt", 1)]
    assert damaged == []


def test_a_link_with_a_size_has_no_data(tmp_path):
    link = block("0.jpg", size=2**40, kind=tarfile.LNKTYPE)
    (tmp_path / "a.tar").write_bytes(link + GOOD + END)
    shards = Shards(str(tmp_path / "a.tar"))
    assert (len(shards), shards.damaged) == (1, [])


def test_two_tars_in_one_file_are_said(tmp_path):
    (tmp_path / "a.tar").write_bytes(GOOD + END + GOOD.replace(b"0.", b"1.") + END)
    (lost,) = Shards(str(tmp_path / "a.tar")).damaged
    assert (lost.key, lost.reason.split(":")[0]) == ("a/0.txt", "broken tar")
    assert "data behind its end mark" in lost.reason


@pytest.mark.parametrize("seed", range(8))
def test_any_header_ends_and_keeps_within_the_file(tmp_path, seed):
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=int(rng.integers(3))) as tar:
        for number in range(12):
            info = tarfile.TarInfo(("long-" * 12 + "/") * int(rng.integers(2)) + "y" * 50 + f"{number}.png")
            info.size, info.type = int(rng.integers(2000)), bytes(rng.choice([b"0", b"0", b"1", b"5", b"S"]))
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    whole = buffer.getvalue()
    fields = [*range(100, 160), *range(257, 265), *range(386, 500)]
    values = [0, 0xFF, 0x80, *b"01257KLSgx"]
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 6)):
            begin = int(rng.integers(len(data) // 512)) * 512
            data[begin + int(rng.choice(fields))] = rng.choice(values)
            data[begin + 148 : begin + 156] = b" " * 8
            data[begin + 148 : begin + 156] = f"{sum(data[begin : begin + 512]):06o}\0 ".encode()
        found, _ = read(tmp_path / "a.tar", GOOD + data)
        places = [place for _, place, _ in found]
        assert places == sorted(places)
        assert all(size >= 0 for _, _, size in found)
