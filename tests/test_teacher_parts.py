"""Caches of teachers that are damaged: training says so in one line, and the same command makes them whole again."""

import json
import re
import shutil

import numpy as np
import pytest
from helpers import tiny_encoder
from safetensors.numpy import load, save
from test_teacher_cache import VIEWS, make, source, steps
from test_teacher_cache import save as save_encoder

from indiclip.evals.models.view_batches import load_teachers
from indiclip.evals.models.view_embedder import ViewEmbedder
from indiclip.loading.teacher_parts import part_file
from indiclip.loading.teacher_record import RECORD, digest_of

PART = 1  # of three, which is damaged


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two of one shape."""
    folder = tmp_path_factory.mktemp("teachers")
    return [save_encoder(tiny_encoder(seed).eval(), folder / f"{seed}.ckpt") for seed in range(2)]


@pytest.fixture(scope="module")
def caches(teachers, tmp_path_factory):
    """A cache, and that of the same samples by the other teacher."""
    folder = tmp_path_factory.mktemp("caches")
    for name, file in zip(("own", "other"), teachers, strict=True):
        make(folder / name, [file])
    return folder


def part_of(folder):
    return part_file(folder, PART)


def truncated(folder, other):
    part_of(folder).write_bytes(part_of(folder).read_bytes()[:-2000])


def emptied(folder, other):
    part_of(folder).write_bytes(b"")


def removed(folder, other):
    part_of(folder).unlink()


def replaced_by_text(folder, other):
    part_of(folder).write_bytes(b"not a part ".ljust(part_of(folder).stat().st_size))


def of_the_other_teacher(folder, other):
    shutil.copy(part_of(other), part_of(folder))


def another_part(folder, other):
    shutil.copy(part_file(folder, 0), part_of(folder))


def flipped(name, every=0):
    """One byte of an array, or every so many of them."""

    def damage(folder, other):
        data = bytearray(part_of(folder).read_bytes())
        begin = 8 + int.from_bytes(data[:8], "little")
        first, last = json.loads(data[8:begin])[name]["data_offsets"]
        for place in range(begin + first, begin + last, every or last - first):
            data[place] ^= 1
        part_of(folder).write_bytes(data)

    damage.__name__ = f"{every or 'one'}_of_{name}"
    return damage


def flipped_header(folder, other):
    """A digit of what the header says of an array's place."""
    data = part_of(folder).read_bytes()
    assert data.count(b'"data_offsets":[0,') == 1
    part_of(folder).write_bytes(data.replace(b'"data_offsets":[0,', b'"data_offsets":[8,'))


def not_a_number(folder, other):
    data = part_of(folder).read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    about = json.loads(data[8:begin])["__metadata__"]
    arrays = {name: array.copy() for name, array in load(data).items()}
    arrays["images.0"][:] = np.nan
    part_of(folder).write_bytes(save(arrays, about))


PARTS = {
    truncated: r"found [\d,]+ bytes; expected [\d,]+ bytes",
    emptied: r"found 0 bytes; expected [\d,]+ bytes",
    removed: r"found no file; expected [\d,]+ bytes",
    replaced_by_text: "found Error while deserializing header: .*; expected a whole safetensors file",
    flipped_header: "found Error while deserializing header: .*; expected a whole safetensors file",
    of_the_other_teacher: r"found the checksum \w{16}; expected \w{16}",
    another_part: r"found (the checksum \w{16}; expected \w{16}|[\d,]+ bytes; expected [\d,]+ bytes)",
    not_a_number: r"the embeddings of view \d, row \d: found the CRC-32 \w{8}; expected \w{8}",
    flipped("images.0", 7): r"the embeddings of view \d, row \d: found the CRC-32 \w{8}; expected \w{8}",
    flipped("images.0"): r"the embeddings of view 0, row 0: found the CRC-32 \w{8}; expected \w{8}",
    flipped("texts.0", 7): r"the embeddings of the caption of row \d+: found the CRC-32 \w{8}; expected \w{8}",
    flipped("seeds"): r"found the checksum \w{16}; expected \w{16}",
    flipped("crc32_of_images"): r"found the checksum \w{16}; expected \w{16}",
    flipped("keys"): r"found the checksum \w{16}; expected \w{16}",
}


def first_error(folder):
    """What the first of 40 steps says, which read every view of all samples."""

    def read():
        for number in range(40):
            steps(source(folder))[number]

    with pytest.raises(ValueError, match="teachers") as found:
        read()
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("damage", PARTS, ids=lambda damage: damage.__name__)
def test_a_damaged_part_is_refused_and_made_anew(damage, caches, teachers, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(caches / "own", folder)
    whole = part_of(folder).read_bytes()
    damage(folder, caches / "other")
    line = first_error(folder)
    assert re.search(rf"teachers.folder: {part_of(folder)}: {PARTS[damage]}; the same `indiclip embed", line), line
    job = ViewEmbedder(folder, {"data.train[0]": source()}, load_teachers(teachers[:1], "cpu"), VIEWS, part_size=5)
    job.begin()
    missing = job.missing()
    assert [*missing] == [PART]
    assert bool(missing[PART]) == (damage is not removed)
    job.write(missing)
    record = job.finish({})
    assert part_of(folder).read_bytes() == whole
    assert record == json.loads((caches / "own" / RECORD).read_text())
    assert job.missing() == {}


def edited(**entries):
    return lambda record: record | entries


def without(name):
    return lambda record: {key: value for key, value in record.items() if key != name}


def of_teacher(**entries):
    return lambda record: record | {"teachers": [record["teachers"][0] | entries]}


def of_part(**entries):
    return lambda record: record | {"parts": [record["parts"][0] | entries, *record["parts"][1:]]}


DIGEST = r"digest: found '\w{16}'; expected '\w{16}'"
RECORDS = {
    "digest": (edited(digest="0" * 16), "digest: found '0{16}'; expected"),
    "logit_scale": (of_teacher(logit_scale=3.5), DIGEST),
    "length": (of_teacher(length=999), DIGEST),
    "dtype": (edited(dtype="int8"), DIGEST),
    "views": (edited(views=5), DIGEST),
    "a part's checksum": (of_part(checksum="0" * 16), DIGEST),
    "no keys": (lambda record: {}, "done: found none; expected true or false"),
    "a list": (lambda record: [], r"found \[\]; expected keys"),
    "no part_size": (without("part_size"), "part_size: found none; expected a whole number"),
    "part_size 0": (edited(part_size=0), DIGEST),
    "views as text": (edited(views="3"), "views: found '3'; expected a whole number"),
    "done as text": (edited(done="no"), "done: found 'no'; expected true or false"),
    "a length that is none": (of_teacher(length=True), r"teachers\[0\].length: found True; expected a whole number"),
    "no teachers": (edited(teachers=[]), r"teachers: found \[\]; expected a list"),
    "a source": (edited(sources=[{"source": "x"}]), r"sources\[0\].samples: found none; expected a whole number"),
    "a part": (of_part(bytes=None), r"parts\[0\].bytes: found None; expected a whole number"),
    "an earlier version": (without("parts"), "parts: found none, as of an earlier version of indiclip"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_is_refused(name, caches, tmp_path):
    change, expected = RECORDS[name]
    shutil.copytree(caches / "own", tmp_path / "cache")
    file = tmp_path / "cache" / RECORD
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    assert re.search(f"teachers.folder: {file}: {expected}", line := first_error(tmp_path / "cache")), line


@pytest.mark.parametrize("content", [b"", b"{", b"\x9a\x9b"])
def test_a_record_that_is_no_json_is_refused(content, caches, teachers, tmp_path):
    shutil.copytree(caches / "own", tmp_path / "cache")
    file = tmp_path / "cache" / RECORD
    file.write_bytes(content)
    assert f"teachers.folder: {file}: " in first_error(tmp_path / "cache")
    with pytest.raises(ValueError, match=f"{file}: .*; --overwrite starts anew"):
        make(tmp_path / "cache", teachers[:1])


def test_a_record_whose_digest_was_changed_is_written_anew(caches, teachers, tmp_path):
    shutil.copytree(caches / "own", tmp_path / "cache")
    file = tmp_path / "cache" / RECORD
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"digest": "0" * 16}))
    with pytest.warns(UserWarning, match="digest: found '0{16}'; expected .*; it is written anew"):
        assert make(tmp_path / "cache", teachers[:1]) == whole


def test_the_digest_is_of_all_parts(caches):
    record = json.loads((caches / "own" / RECORD).read_text())
    assert digest_of(record) == record["digest"]
    assert digest_of(record | {"parts": record["parts"][::-1]}) != record["digest"]
