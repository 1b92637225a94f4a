"""Shards that were valid once: bytes flipped, cut, repeated, members of odd names.

Property: the index accounts for every member and stays inside of the file, or a line says what is wrong; what it lists
is read or said to be unreadable.

INDICLIP_FUZZ is the number of files (default 200).
"""

import io
import os
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_shards import png

from indiclip.images import UnreadableSample
from indiclip.webdataset import cache, tar_index
from indiclip.webdataset.box_shards import BoxShards
from indiclip.webdataset.shards import Shards

FILES = settings(
    max_examples=int(os.environ.get("INDICLIP_FUZZ", "200")),
    deadline=5000,  # milliseconds: no file makes it go on without end
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
BOXES = ("[0, 0, 3, 3]", "[0, 0, 0, 3]", "[0, 0, 99, 3]", '"1234"', "[NaN, 0, 1, 1]", "null")
JSONS = ['{"caption": "a kite", "label": 1}', "[", "[]", '{"annotations": 3, "height": 4, "width": 4}']
JSONS += [
    f'{{"height": 4, "width": 4, "annotations": [{{"id": 1, "bbox": {box}, "class": 0}}], "captions": ["x"]}}'
    for box in BOXES
]
CONTENTS = {
    "png": st.sampled_from([png(7), png(200, (30, 2)), png()[:30], b""]),
    "txt": st.sampled_from([b"a diya", b"", b"\xff\xfe", "दीया".encode()]),
    "json": st.sampled_from([text.encode() for text in JSONS]),
    "cls": st.sampled_from([b"0", b"-1", b"x", b"9" * 30]),
    "pkl": st.just(b"x"),
}
ODD = st.one_of(
    st.sampled_from(["../a", "/a", "a/../b", ".hidden", "a.b.c", "x" * 150, "y/" * 60 + "z", "ळ" * 80, "a\nb", ""]),
    st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"]), max_size=8),
)


@st.composite
def members(draw):
    key = draw(st.one_of(st.sampled_from("01"), ODD))
    kind = draw(st.sampled_from(sorted(CONTENTS)))
    info = tarfile.TarInfo(f"{key}.{kind}" if draw(st.integers(0, 9)) else key)
    if not draw(st.integers(0, 9)):
        info.type = draw(
            st.sampled_from([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"S", b"7"])
        )
        info.linkname = "/etc/passwd"
    return info, draw(CONTENTS[kind])


@st.composite
def tars(draw):
    buffer = io.BytesIO()
    form = draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for info, content in draw(st.lists(members(), min_size=1, max_size=8)):
            info.size = len(content) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(content))
    data = bytearray(buffer.getvalue())
    for what in draw(st.lists(st.sampled_from(["flip", "size", "cut", "repeat", "drop", "add"]), max_size=3)):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        block = place // 512 * 512
        if what == "flip" and data:
            data[place] ^= draw(st.integers(1, 255))
        elif what == "size" and len(data) >= block + 512:  # a header whose sum fits, with another size
            number = draw(st.sampled_from([b"77777777777\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"00000000001\0"]))
            data[block + 124 : block + 136] = number
            data[block + 148 : block + 156] = b" " * 8
            data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])
        elif what == "cut":
            del data[place:]
        elif what == "repeat":
            data[block:block] = data[block : block + 1536]
        elif what == "drop":
            del data[block : block + 512]
        elif what == "add":
            data += draw(st.binary(max_size=600))
    return bytes(data)


def tried(kind, function, *arguments):
    """(what a function gives, None), or (None, its exception)."""
    try:
        return function(*arguments), None
    except kind as error:
        return None, error


@FILES
@given(tars())
def test_every_member_is_accounted_for_or_a_line_says_why_not(tmp_path, data):
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    index, mistake = tried(ValueError, tar_index.build, path, cache.stat(str(path)))
    if mistake is not None:
        assert str(mistake).startswith("no tar: ")
        assert "\n" not in str(mistake)
        return
    index.inventory.verify()
    columns = index.columns
    assert index.inventory.used["samples"] == len(index) == len({columns.key(i) for i in range(len(index))})
    for place in range(len(index)):
        for offset, length in (columns.parts_apart(place) or {}).values():
            assert offset >= 512
            assert offset + length <= len(data)
    assert index.info.end <= len(data)
    index.save(tmp_path / "a.npz")
    loaded = tar_index.TarIndex.load(tmp_path / "a.npz")
    assert loaded.inventory.summary() == index.inventory.summary()
    if not len(index):
        with pytest.raises(ValueError, match="no images in 1 shards"):
            Shards(str(path))
        return
    shards = Shards(str(path))
    for number in range(len(shards)):
        _, unreadable = tried(UnreadableSample, lambda number=number: shards[number]["image"].decode())
        assert unreadable is None or unreadable.key == shards.key(number)
    boxed, read, unreadable = BoxShards(str(path), ["kite", "diya"]), 0, None
    boxed.inventory.verify()
    for number in range(len(boxed)):
        sample, failed = tried(UnreadableSample, boxed.__getitem__, number)
        read, unreadable = read + (0 if failed else len(sample["boxes_xyxy"])), unreadable or failed
    assert boxed.inventory.used["boxes"] == read or (unreadable and boxed.inventory.used["boxes"] > read)
