"""No file that is broken in some way crashes a reader, or loses rows, images or boxes without a word."""

import csv
import io
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from indiclip.commands.sources import FolderItems, TableItems
from indiclip.datasets.captions import CaptionTable
from indiclip.datasets.folders import list_images
from indiclip.datasets.tables import is_text

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import fuzz_readers

_FILES = 500  # over all readers; `tools/fuzz_readers.py` runs as many as one has time for
NAMES = [f"{name}.png" for name in "abcd"]
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12) | st.sampled_from(
    ['"', '""', 'said "no"', '6" tall', "one, two", "one\ntwo", "a\tb", "दीया", "\ufeff", "'"]
)
CELLS = TEXTS | st.none() | st.integers() | st.floats(allow_subnormal=False) | st.booleans() | st.binary(max_size=4)
COLUMNS = st.lists(st.sampled_from(["file", "en", "hi", "ta_IN", "Tamil", "id", "caption", ""]), max_size=4)
DAMAGE = st.lists(
    st.tuples(
        st.floats(0, 1, allow_subnormal=False), st.sampled_from(['"', ",", "\t", "\n", "\r", ";", "\xe9", "\0", "x"])
    ),
    max_size=3,
)


@pytest.mark.parametrize("name", fuzz_readers.READERS)
def test_used_and_left_out_is_all_or_one_line_says_why_not(name):
    counts = fuzz_readers.run(name, -(-_FILES // len(fuzz_readers.READERS)))
    assert counts["used"]  # where a value that is not used has changed


@st.composite
def text_tables(draw):
    """(name, bytes, header, rows) of a valid file, with up to three characters put anywhere."""
    suffix = draw(st.sampled_from(["csv", "tsv"]))
    header = ["file", "en", *draw(COLUMNS)]
    rows = draw(st.lists(st.tuples(st.sampled_from(NAMES), *[TEXTS] * (len(header) - 1)), min_size=1, max_size=5))
    out = io.StringIO()
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    csv.writer(out, "excel" if suffix == "csv" else "excel-tab", quoting=quoting).writerows([header, *rows])
    text, damage = out.getvalue(), draw(DAMAGE)
    for place, character in damage:
        at = int(place * len(text))
        text = text[:at] + character + text[at:]
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252"]))
    return (
        f"t.{suffix}",
        text.encode(encoding, errors="replace"),
        None if damage or encoding == "cp1252" else (header, rows),
    )


@st.composite
def parquet_tables(draw):
    size = draw(st.integers(1, 4))
    kind = draw(st.sampled_from([TEXTS, st.lists(TEXTS, max_size=2), st.binary(max_size=4), CELLS]))
    cells = draw(st.lists(kind | st.none(), min_size=size, max_size=size))
    try:
        table = pa.table({"file": draw(st.permutations(NAMES))[:size], "en": cells})
    except (pa.ArrowException, OverflowError, UnicodeError):
        table = pa.table({"file": NAMES[:size], "en": ["x"] * size})
    out = io.BytesIO()
    parquet.write_table(table, out)
    data = out.getvalue()
    cut = draw(st.sampled_from([None, None, None, 7, len(data) // 2]))
    return "t.parquet", data[:cut], None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    for shade, name in enumerate(NAMES):
        Image.new("RGB", (2, 2), (shade, 0, 0)).save(folder / name)
    return folder


def open_caption_table(file, on_bad_row):
    return CaptionTable(str(file.parent), str(file), on_bad_row=on_bad_row)


def open_items(file, on_bad_row):
    items = TableItems(file, file.parent, "file", "en", on_bad_row)
    for index in range(len(items.keys)):
        try:
            items[index]
        except (ValueError, OSError) as error:
            assert len(str(error).splitlines()) <= 1  # noqa: PT017
    return items


READERS = {"training": open_caption_table, "packing": open_items}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@settings(max_examples=125, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=text_tables() | parquet_tables())
def test_a_table_is_counted_or_refused_in_one_line(folder, reader, on_bad_row, table):
    name, data, valid = table
    file = folder / name
    file.write_bytes(data)
    try:
        found = READERS[reader](file, on_bad_row)
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
        assert len(said.splitlines()) == 1
        assert len(said) < 1000
        assert str(file) in said
        return
    found.inventory.verify()
    assert found.inventory.present["rows"] > 0
    if valid and len(set(valid[0])) == len(valid[0]) and reader == "training" and on_bad_row == "skip":
        # Undamaged: what is given is what was written.
        header, rows = valid
        written = {
            row[0]
            for row in rows
            if any(is_text(cell) for name, cell in zip(header, row, strict=True) if name not in ("file", "id", ""))
        }
        assert {found.key(i) for i in range(len(found))} == written


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "a/", "b/", "a/deep/", "[x]/", ".hidden/", "c d/"]),
            st.sampled_from(["1", "2", "दीया", ".x", "x.y"]),
            st.sampled_from([".jpg", ".PNG", ".gif", ".txt", ".json", "", ".jfif", ".heic"]),
        ),
        unique=True,
        max_size=12,
    )
)
def test_files_of_a_folder_are_used_or_left_out(names):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for below, stem, extension in names:
            (folder / below).mkdir(parents=True, exist_ok=True)
            (folder / below / f"{stem}{extension}").write_bytes(b"x")
        images, _, inventory = list_images(folder)
        inventory.verify()
        assert inventory.present["files"] == sum(below != ".hidden/" for below, _, _ in names)
        try:
            items = FolderItems(folder, None)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017
            return
        assert [items.names[i] for i in range(len(items.names))] == images
        for index in range(len(images)):
            items[index]
