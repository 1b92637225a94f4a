"""Captions in several languages: which an image has, and what is wrong with a table."""

import pytest
from PIL import Image

from indiclip.datasets.captions import CaptionTable

TABLE = 'file\tsymbol\ten\thi\nb.png\tB\tbird\tचिड़िया\na.png\tA\ta "quoted" ant\t \n'


@pytest.fixture
def build(tmp_path):
    def make(text=TABLE, name="names.tsv", **options):
        for image in ("a.png", "b.png"):
            Image.new("RGB", (3, 2)).save(tmp_path / image)
        (tmp_path / name).write_text(text, "utf-8")
        return CaptionTable(str(tmp_path), str(tmp_path / name), **options)

    return make


def test_language_columns_are_told_by_their_codes(build):
    dataset = build()
    assert dataset.languages == ["en", "hi"]
    assert [dataset.key(i) for i in range(2)] == ["b.png", "a.png"]
    assert dataset.captions(0) == {"en": ["bird"], "hi": ["चिड़िया"]}


def test_empty_cells_are_no_captions_and_quotes_in_a_tsv_are_quotes(build):
    assert build().captions(1) == {"en": ['a "quoted" ant']}
    assert build()[1]["captions"] == {"en": ['a "quoted" ant']}
    assert build()[0].keys() == {"image", "key", "captions"}


def test_named_columns_are_taken_whatever_they_are_called(build):
    dataset = build(languages=["symbol"])
    assert [dataset[i]["captions"] for i in range(2)] == [{"": ["B"]}, {"": ["A"]}]
    assert build(languages={"symbol": "sa", "en": ""}).captions(0) == {"sa": ["B"], "": ["bird"]}
    assert list(build(languages=["hi", "en"])[0]["captions"]) == ["hi", "en"]


def test_csv_with_quotes_a_byte_order_mark_and_another_image_column(build):
    dataset = build('\ufeffpicture,en\r\nb.png,"one, two"\r\n', "names.csv", image_column="picture")
    assert dataset[0]["captions"] == {"en": ["one, two"]}


BAD = [
    (TABLE, {"languages": ["hin"]}, r"names\.tsv: no column 'hin'; nearest is 'hi'; found \['file', 'symbol'"),
    (TABLE, {"image_column": "files"}, r"no column 'files'; nearest is 'file'"),
    (TABLE, {"languages": ["hi"]}, r"line 3: 'a\.png' has no caption in hi"),
    (TABLE, {"languages": {"en": "Englsh"}}, r"languages: found the language 'Englsh'; expected a code such as hi"),
    (TABLE + "c.png\tC\tcat\t\n", {}, r"names\.tsv: 1 of 3 images are not in .*, first 'c\.png'"),
    (TABLE + "c.png\tC\n", {}, r"line 4: found 2 columns; the header has 4"),
    ("file\ttext\na.png\tx\n", {}, r"no column of captions; found \['file', 'text'\]; expected `caption`, or"),
    ("file\ten\n", {}, r"names\.tsv: no rows; expected a header and a row per image or text"),
    ("", {}, r"names\.tsv: no rows"),
]


@pytest.mark.parametrize(("text", "options", "message"), BAD)
def test_bad_tables_are_named_in_one_line(build, text, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        build(text, **options)
    assert "\n" not in str(caught.value)


def test_bad_files(build, tmp_path):
    with pytest.raises(ValueError, match=r"names\.txt: expected a \.csv, \.tsv or \.parquet file"):
        build(name="names.txt")
    (tmp_path / "names.tsv").write_bytes(b"file\ten\na.png\t\xff\n")
    with pytest.raises(ValueError, match=r"names\.tsv: line 2: found the byte 0xff; expected UTF-8"):
        CaptionTable(str(tmp_path), str(tmp_path / "names.tsv"))


def test_real_names_are_there_in_all_languages(data_root):
    folder = data_root / "emoji_multilingual"
    dataset = CaptionTable(str(folder / "images"), str(folder / "names.tsv"))
    assert dataset.languages == ["en", "hi", "bn", "ta", "te", "mr", "gu", "kn", "ml", "pa", "or", "as", "ur"]
    assert len(dataset) == 696
    for i in range(0, len(dataset), 30):
        sample = dataset[i]
        assert sample["image"].size_hw == (96, 96)
        assert list(sample["captions"]) == dataset.languages
