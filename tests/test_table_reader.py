"""Tables as people and programs write them: nothing is swallowed, coerced or dropped without a word."""

import csv
import io
import json

import pyarrow as pa
import pytest
from helpers import only_caption
from PIL import Image
from pyarrow import parquet

from indiclip.cli import main
from indiclip.datasets.captions import CaptionTable
from indiclip.datasets.corpora import read_texts
from indiclip.datasets.table_reader import Table
from indiclip.images import UnreadableSample
from indiclip.webdataset.shards import Shards


@pytest.fixture
def folder(tmp_path):
    for name in "abcdefgh":
        Image.new("RGB", (3, 2), name if name == "x" else (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    return tmp_path


def write(file, content):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def read(folder, content, name="t.csv", **options):
    """Image -> captions, and the dataset."""
    dataset = CaptionTable(str(folder), str(write(folder / name, content)), **options)
    dataset.inventory.verify()
    return {dataset.key(i)[0]: dataset.captions(i) for i in range(len(dataset))}, dataset


STRAY = {
    "to the end": 'file,en\na.png,ant\nb.png,"bee\nc.png,cat\nd.png,dog\n',
    "closed by a later cell": 'file,en\na.png,ant\nb.png,"bee\nc.png,"cat, big"\nd.png,dog\n',
    "closed by another stray one": 'file,en\na.png,ant\nb.png,"bee\nc.png,cat 6"\nd.png,dog\n',
    "closed at the end of the file": 'file,en\na.png,ant\nb.png,"bee\nc.png,cat\nd.png,dog"\n',
    "text after the closing one": 'file,en\na.png,ant\nb.png,"bee" yes\nc.png,cat\nd.png,dog\n',
}


@pytest.mark.parametrize("content", STRAY.values(), ids=STRAY)
def test_a_stray_quote_takes_its_own_row_only(folder, content, capsys):
    with pytest.raises(ValueError, match=r"t\.csv: line 3: a cell opens with a quote") as caught:
        read(folder, content)
    assert "\n" not in str(caught.value)
    found, dataset = read(folder, content, on_bad_row="skip")
    assert {"a", "c", "d"} - found.keys() <= ({"c"} if "another" in content else set())
    assert "b" not in found
    assert dataset.inventory.summary()["rows"]["present"] == 4
    words = ["shards", "pack", str(folder / "t.csv"), "--out", str(folder / "out"), "--name", "x", "--workers", "0"]
    assert main(words) == 2
    assert "t.csv: line 3: a cell opens with a quote" in capsys.readouterr().err
    assert main([*words, "--on_bad_row", "skip", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["inventory"]["rows"]
    assert rows["present"] == 4
    assert rows["left_out"]["with a stray quote"]["count"] == 1


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("ending", [".png", ""])
def test_a_quote_that_a_later_row_closes_swallows_none(folder, order, ending):
    """Whatever the images are called, and whichever column names them."""
    for name in "abcde":
        (folder / f"{name}.png").rename(folder / f"{name}{ending}")
    rows = ["file en", "a ant", 'b "bee', "c cat", 'd dog"', 'e "emu\nand so, on"']
    lines = [",".join(row.replace(" ", f"{ending} ", row != rows[0]).split(" ", 1)[::order]) for row in rows]
    with pytest.raises(ValueError, match=r"t\.csv: line 3: a cell opens with a quote"):
        read(folder, "\n".join(lines))
    del lines[2], lines[3]
    found = read(folder, "\n".join(lines))[1]
    assert [found.captions(i)["en"][0] for i in range(3)] == ["ant", "cat", "emu\nand so, on"]


def test_a_caption_of_several_lines_beside_a_name_without_an_ending(folder):
    for name in ("101", "102"):
        (folder / name).write_bytes((folder / "a.png").read_bytes())
    found = read(folder, 'file,en\n101,"A dog.\nBrown, of course.\nSure, yes"\n102,y\n')[1]
    assert [found.captions(i)["en"][0] for i in range(2)] == ["A dog.\nBrown, of course.\nSure, yes", "y"]


def test_a_cell_may_hold_lines_commas_and_quotes(folder):
    rows = [["file", "en"], ["a.png", "one\ntwo, three\n\nfour"], ["b.png", 'a "b", c'], ["c.png", '6" tall']]
    for name, dialect in (("t.csv", "excel"), ("t.csv", "unix"), ("t.tsv", "excel-tab")):
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
            text = io.StringIO()
            csv.writer(text, dialect, quoting=quoting).writerows(rows)
            found, _ = read(folder, text.getvalue(), name)
            assert found == {file[0]: {"en": [caption]} for file, caption in rows[1:]}, (name, dialect, quoting)


def test_a_quote_in_a_tsv_is_a_quote_unless_it_is_doubled(folder):
    cells = {
        "a": ('6" tall', '6" tall'),
        "b": ('"The Wall" poster', '"The Wall" poster'),
        "c": ('"alone', '"alone'),
        "d": ('"all of it"', '"all of it"'),
        "e": ('"said ""no"""', 'said "no"'),
        "f": ('"one\ttwo"', "one\ttwo"),
        "g": ('"one\ntwo"', "one\ntwo"),
    }
    text = "file\ten\n" + "".join(f"{name}.png\t{cell}\n" for name, (cell, _) in cells.items())
    assert read(folder, text, "t.tsv")[0] == {name: {"en": [meant]} for name, (_, meant) in cells.items()}


ENCODINGS = [("utf-8", b""), ("utf-8-sig", b""), ("utf-16", b""), ("utf-16-be", b"\xfe\xff")]


@pytest.mark.parametrize(("encoding", "mark"), ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(folder, encoding, mark, end):
    rows = ("file,hi", "a.png,चींटी", "b.png,मक्खी")
    found, _ = read(folder, mark + end.join(rows).encode(encoding))
    assert found == {"a": {"hi": ["चींटी"]}, "b": {"hi": ["मक्खी"]}}


BROKEN = [
    ("file,en\na.png,caf\u00e9\n".encode("cp1252"), r"t\.csv: line 2: found the byte 0xe9; expected UTF-8, or UTF-16"),
    ("file,en\na.png,x\n".encode("utf-16-le"), r"t\.csv: line 1: found a NUL; expected UTF-8, or UTF-16"),
    (b"file,en\na.png,\0\n", r"t\.csv: line 2: found a NUL"),
    (b"file,\0en\na.png,x\n", r"t\.csv: line 1: found a NUL"),
    (b"", r"t\.csv: no rows"),
    (b"\n\n", r"t\.csv: no rows"),
    (b"file;en\na.png;x\n", r"t\.csv: the header 'file;en' has no commas but ';'"),
    (b"file,en\na.png,x,y\n", r"t\.csv: line 2: found 3 columns; the header has 2"),
    (b"file,file,en\na.png,a.png,x\n", r"2 columns are called 'file'; expected one"),
    (b"file,en\n,x\n", r"t\.csv: line 2: no image in 'file'"),
    (b"file,en\n../a.png,x\n", r"the image '\.\./a\.png' lies outside the folder"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_what_is_wrong_is_said_in_one_line(folder, content, message):
    (folder / "images").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read(folder, content) if b".." not in content else CaptionTable(
            str(folder / "images"), str(write(folder / "t.csv", content))
        )
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


def test_columns_are_told_by_any_tag_and_those_that_are_not_used_are_named(folder):
    header = "id,file,hi-Latn,Tamil,ta_IN,en,en,url,caption,"
    found, dataset = read(folder, f"{header}\n7,a.png,chinti,எறும்பு,எறும்பு!,ant,an ant,http://x,Ameise,\n")
    assert found["a"] == {
        "hi-Latn": ["chinti"], "ta": ["எறும்பு"], "ta-IN": ["எறும்பு!"], "en": ["ant", "an ant"], "": ["Ameise"]
    }  # fmt: skip
    assert dataset.inventory.summary()["columns"]["left_out"] == {
        "not used": {"count": 3, "example": "id, url, without a name"}
    }


def test_a_column_says_the_language_of_each_row_for_captions_that_do_not(folder):
    found, dataset = read(folder, "file,caption,en,lang\na.png,chinti,ant,hi_Latn\nb.png,bee,,\na.png,erumbu,,ta\n")
    assert found == {"a": {"hi-Latn": ["chinti"], "ta": ["erumbu"], "en": ["ant"]}, "b": {"": ["bee"]}}
    assert dataset.inventory.used["columns"] == 4


def test_rows_of_one_image_are_one_sample_with_all_their_captions(folder, capsys):
    text = "file,en\na.png,ant\nb.png,bee\na.png,an ant\na.png,ant\n"
    found, dataset = read(folder, text)
    assert found == {"a": {"en": ["ant", "an ant"]}, "b": {"en": ["bee"]}}
    assert {unit: dataset.inventory.used[unit] for unit in ("rows", "images", "captions")} == {
        "rows": 4, "images": 2, "captions": 3
    }  # fmt: skip
    repeated = dataset.inventory.summary()["captions"]["left_out"]
    assert repeated == {"of the same words": {"count": 1, "example": f"{folder / 't.csv'}: line 5"}}
    words = ["--out", str(folder / "out"), "--name", "x", "--workers", "0"]
    assert main(["shards", "pack", str(folder / "t.csv"), *words]) == 0
    shards = Shards(str(folder / "out" / "*.tar"))
    assert {shards.key(i): shards.captions(i) for i in range(len(shards))} == {
        f"x-000000/{name}": captions for name, captions in found.items()
    }


def test_rows_that_cannot_be_used_are_left_out_and_counted(folder):
    text = "file,en\na.png,ant\nz.png,zebra\nb.png,\n,x\nc.png,cat,dog\n"
    found, dataset = read(folder, text, on_bad_row="skip")
    assert found == {"a": {"en": ["ant"]}}
    left_out = dataset.inventory.summary()["rows"]["left_out"]
    assert {reason: entry["count"] for reason, entry in left_out.items()} == {
        "with more or fewer columns than the header": 1, "without an image": 1, "without an image file": 1,
        "without a caption": 1,
    }  # fmt: skip


def test_folders_with_glob_signs(tmp_path):
    folder = tmp_path / "photos [x]"
    folder.mkdir()
    Image.new("RGB", (3, 2)).save(folder / "a.png")
    assert read(folder, "file,en\na.png,ant\n")[0] == {"a": {"en": ["ant"]}}
    words = ["--out", str(folder), "--name", "x", "--workers", "0"]
    assert main(["shards", "pack", str(folder / "t.csv"), *words]) == 0
    assert len(Shards(str(folder / "x-*.tar"))) == 1
    assert len(Shards(str(folder / "x-000000.tar"))) == 1


def save(folder, columns, **types):
    table = pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})
    parquet.write_table(table, folder / "t.parquet", row_group_size=2)
    return str(folder / "t.parquet")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([b"ant", "\u0939".encode(), None], [["ant"], ["ह"], []]),
        ([["ant", "an ant"], ["bee"], []], [["ant", "an ant"], ["bee"], []]),
        ([[b"ant"], None, [None, "bee"]], None),
        (["ant", None, " "], [["ant"], [], []]),
        ([float("nan"), None, float("nan")], [[], [], []]),
    ],
)
def test_captions_in_parquet(tmp_path, texts, expected):
    if expected is None:
        texts, expected = [[b"ant"], None, [b"bee", None]], [["ant"], [], ["bee"]]
    table = Table(tmp_path / save(tmp_path, {"en": texts}))
    assert table.texts(0) == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([1, 2], r"t\.parquet: row 1: column 'en': found the int 1; expected text"),
        ([True, None], r"row 1: column 'en': found the bool True; expected text"),
        ([None, 1.5], r"row 2: column 'en': found the float 1\.5; expected text"),
        ([b"ant", b"caf\xe9"], r"row 2: column 'en': the text: line 1: found the byte 0xe9"),
        ([{"raw": "x" * 40_000}], r"row 1: column 'en': found the dict \{'raw': 'x{20,50}\.\.\.; expected text$"),
    ],
)
def test_what_is_no_text_is_never_coerced(folder, texts, message):
    table = save(folder, {"file": ["a.png", "b.png"][: len(texts)], "en": texts})
    with pytest.raises(ValueError, match=message) as caught:
        CaptionTable(str(folder), table)
    assert len(str(caught.value)) < 300
    with pytest.raises(ValueError, match=message):
        list(read_texts([table]))


def test_images_in_a_parquet_of_the_library_datasets(folder, capsys):
    """`{bytes, path}`; paths may be missing, and bytes, where the path is that of a file."""
    data = [(folder / f"{name}.png").read_bytes() for name in "abc"]
    images = [{"bytes": data[0], "path": None}, {"bytes": data[1], "path": "x.png"}, {"bytes": data[2], "path": ""}]
    table = save(folder, {"image": images, "hi": ["चींटी", "मक्खी", "बिल्ली"]})
    dataset = CaptionTable(None, table, image_column="image")
    assert [dataset.key(i) for i in range(3)] == ["t-000000", "x.png", "t-000002"]
    assert [dataset[i]["image"].data for i in (2, 0, 1)] == [data[2], data[0], data[1]]
    assert dataset.captions(1) == {"hi": ["मक्खी"]}
    named = [{"bytes": data[0], "path": "one.png"}, {"bytes": None, "path": "b.png"}]
    dataset = CaptionTable(str(folder), save(folder, {"image": named, "en": ["x", "y"]}), image_column="image")
    assert [(dataset.key(i), dataset[i]["image"].data) for i in range(2)] == [("one.png", data[0]), ("b.png", data[1])]
    words = ["--image_column", "image", "--out", str(folder / "out"), "--name", "x", "--workers", "2"]
    assert main(["shards", "pack", str(folder / "t.parquet"), *words]) == 0
    shards = Shards(str(folder / "out" / "*.tar"))
    assert {shards.key(i): shards[i]["image"].data for i in range(2)} == {
        "x-000000/one": data[0], "x-000000/b": data[1]
    }  # fmt: skip
    plain = save(folder, {"image": data, "en": ["x", "y", "z"]})
    assert CaptionTable(None, plain, image_column="image")[1]["image"].data == data[1]


def image_structs(*cells, kind=None):
    fields = [("bytes", kind or pa.binary()), ("path", pa.string())]
    return pa.array([cell and dict(zip(("bytes", "path"), cell, strict=True)) for cell in cells], pa.struct(fields))


A, B = b"\xff\xd8\xffa", b"\xff\xd8\xffb"
PICTURES = {  # cells -> the rows of each sample, by key
    "rows of one file": ([(None, "a.png"), (None, "b.png"), (None, "./a.png")], {"a.png": [0, 2], "b.png": [1]}),
    "rows of one path and one picture": ([(A, "x"), (B, "y"), (A, "x")], {"t-000000": [0, 2], "y": [1]}),
    "one path of all": ([(A, "image"), (B, "image"), (A, "image")], {"t-000000": [0, 2], "t-000001": [1]}),
    "no paths": ([(A, None), (B, ""), (A, None)], {"t-000000": [0, 2], "t-000001": [1]}),
    "one path is missing": ([(A, None), (None, "a.png"), (B, "y")], {"t-000000": [0], "a.png": [1], "y": [2]}),
    "a file and a picture of its path": ([(None, "a.png"), (B, "a.png")], {"a.png": [0], "t-000001": [1]}),
}


@pytest.mark.parametrize(("cells", "expected"), PICTURES.values(), ids=PICTURES)
def test_rows_of_one_picture_are_one_sample_whatever_their_paths(folder, cells, expected):
    table = save(folder, {"image": image_structs(*cells), "en": [str(row) for row in range(len(cells))]})
    dataset = CaptionTable(str(folder), table, image_column="image")
    assert {dataset.key(i): list(map(int, dataset.captions(i)["en"])) for i in range(len(dataset))} == expected


@pytest.mark.parametrize("path", ["../outside.png", "/outside.png", "outside.png"])
def test_a_path_of_a_struct_lies_in_the_folder_as_any_other(folder, path):
    images = folder / "images"
    images.mkdir()
    Image.new("RGB", (3, 2)).save(folder / "outside.png")
    Image.new("RGB", (3, 2)).save(images / "a.png")
    path = path.replace("/outside", f"{folder}/outside") if path[0] == "/" else path
    cells = image_structs((None, path), (None, str(images / "a.png")))
    dataset = CaptionTable(str(images), save(folder, {"image": cells, "en": ["x", "y"]}), image_column="image")
    assert dataset[1]["key"] == "a.png"
    reason = "no such file" if path == "outside.png" else "lies outside the folder"
    with pytest.raises(UnreadableSample, match=reason):
        dataset[0]


ODD_COLUMNS = [
    ({"image": image_structs(("abc", "a"), kind=pa.string())}, r"column 'image': the bytes are of the type string; ex"),
    (
        {"image": image_structs(([1], "a"), kind=pa.list_(pa.int64()))},
        r"column 'image': the bytes are of the type list<",
    ),
    ({"image": image_structs(None, (A, "a"))}, r"row 1: no image in 'image'"),
    ({"image": pa.array([None, b"a.png"])}, r"row 1: no image in 'image'"),
    ({"image": pa.array([None, None, None, b"a"])}, r"row 1: no image in 'image'"),
    (
        {"image": ["a.png"], "en": pa.array([2**62], pa.timestamp("us"))},
        r"row 1: column 'en': expected text: date value",
    ),
    ({"image": ["a.png"], "en": pa.array([2**62], pa.duration("s"))}, r"row 1: column 'en': expected text: "),
]


@pytest.mark.parametrize(("columns", "message"), ODD_COLUMNS)
def test_odd_cells_of_parquet_are_said_in_one_line(folder, columns, message):
    table = save(folder, {"en": ["x"] * len(columns["image"]), **columns})
    with pytest.raises(ValueError, match=rf"t\.parquet: {message}") as caught:
        CaptionTable(str(folder), table, image_column="image")
    assert "\n" not in str(caught.value)


def test_names_as_bytes_are_told_from_images_by_what_they_are_not_by_their_ending(folder):
    (folder / "a.png").rename(folder / "a")
    table = save(folder, {"file": pa.array([None, None, b"a", b"b.png"]), "en": list("wxyz")})
    dataset = CaptionTable(str(folder), table, on_bad_row="skip")
    assert [dataset[i]["key"] for i in range(2)] == ["a", "b.png"]
    assert dataset.inventory.summary()["rows"]["left_out"]["without an image"]["count"] == 2


def test_what_lies_beside_the_bytes_of_an_image_is_not_read(folder):
    """A time that Python has no value for, and a column called as a field of the image."""
    data, taken = (folder / "a.png").read_bytes(), pa.array([2**62], pa.timestamp("us"))
    image = pa.StructArray.from_arrays([pa.array([data]), pa.array(["x"]), taken], ["bytes", "path", "taken"])
    table = save(folder, {"image.path": ["no"], "image.bytes": ["no"], "image": image, "en": ["ant"]})
    sample = CaptionTable(None, table, image_column="image")[0]
    assert (sample["key"], sample["image"].data) == ("x", data)


def test_marks_and_utf_16_in_texts_beside_images(folder):
    """In .txt, .json and classes.txt."""
    source = folder / "source"
    source.mkdir()
    for name, text in {
        "a": "\ufeffant".encode(),
        "b": "bee".encode("utf-16"),
        "c": "caf\u00e9".encode("cp1252"),
    }.items():
        Image.new("RGB", (3, 2)).save(source / f"{name}.png")
        (source / f"{name}.txt").write_bytes(text)
    Image.new("RGB", (3, 2)).save(source / "d.png")
    (source / "d.json").write_bytes(json.dumps({"caption": "dog"}).encode("utf-16"))
    assert main(["shards", "pack", str(source), "--out", str(folder / "o"), "--name", "x", "--workers", "0"]) == 0
    shards = Shards(str(folder / "o" / "*.tar"))
    assert {shards.key(i)[-1]: only_caption(shards[i]) for i in range(3)} == {"a": "ant", "b": "bee", "d": "dog"}
    (left_out,) = (folder / "o" / "x-left-out.jsonl").read_text("utf-8").splitlines()
    assert "the .txt: line 1: found the byte 0xe9; expected UTF-8" in json.loads(left_out)["reason"]
    (folder / "classes.txt").write_bytes("kite\nमटका\n".encode("utf-16"))
    assert Shards(str(folder / "o" / "*.tar"), str(folder / "classes.txt")).classes == ["kite", "मटका"]
