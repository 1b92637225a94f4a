"""Texts by language: what each kind of file gives, and which rows are held out."""

import sys
from pathlib import Path

import pytest

from indiclip.datasets.corpora import Text, read_texts

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from train_tokenizer import HOLDOUT, training_texts


def write(file, *rows):
    file.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def test_a_row_has_one_key_in_all_its_languages_and_in_all_tables(tmp_path):
    parallel = write(
        tmp_path / "a.tsv", ("id", "en", "hi", "hi-Latn"), ("1", "kite", " पतंग ", "patang"), ("2", "", "गेंदा", "")
    )
    pairs = write(tmp_path / "b.tsv", ("lang", "text", "en"), ("ta", "பட்டம்", "kite"))
    lines = tmp_path / "sanskrit.txt"
    lines.write_bytes("\ufeffagniḥ\r\n\ncafe\u0301".encode())
    assert list(read_texts([parallel, pairs, str(lines)])) == [
        Text("en", "kite", "kite"),
        Text("hi", "पतंग", "kite"),
        Text("hi-Latn", "patang", "kite"),
        Text("hi", "गेंदा", "गेंदा"),
        Text("en", "kite", "kite"),
        Text("ta", "பட்டம்", "kite"),
        Text("sanskrit", "agniḥ", "agniḥ"),
        Text("sanskrit", "caf\u00e9", "caf\u00e9"),
    ]


def test_joiners_are_kept(tmp_path):
    text = "क\u094d\u200dष ക\u0d4d\u200c"
    assert [row.text for row in read_texts([write(tmp_path / "a.tsv", ("lang", "text"), ("hi", text))])] == [text]


def test_a_tenth_is_held_out_and_the_same_rows_at_a_larger_share():
    rows = [Text("en", f"caption {i}", f"caption {i}") for i in range(5000)]
    held_out = [row for row in rows if row.is_held_out(HOLDOUT)]
    assert abs(len(held_out) - 500) < 5 * (5000 * 0.1 * 0.9) ** 0.5  # five standard deviations
    assert all(row.is_held_out(0.2) for row in held_out)
    assert not any(row.is_held_out(0) for row in rows)
    assert all(row.is_held_out(1) for row in rows)


def test_nothing_held_out_is_trained_on_under_another_key_or_in_another_language(tmp_path):
    keys = [f"key {i}" for i in range(40)]
    out = [key for key in keys if Text("en", key, key).is_held_out(0.3)]
    kept = [key for key in keys if key not in out]
    assert out
    rows = [(key, f"hi {key}") for key in keys] + [(kept[0], f"hi {out[0]}"), (kept[1], "hi two")]
    texts = training_texts([write(tmp_path / "a.tsv", ("en", "hi"), *rows)], 0.3)
    assert texts["hi"] == [*(f"hi {key}" for key in kept), "hi two"]
    assert texts["en"] == [*kept, kept[0], kept[1]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.tsv",
            b"id\tcaption\n1\tx\n",
            r"a\.tsv: no column of texts: found \['id', 'caption'\]; expected `lang` and `text`",
        ),
        ("a.tsv", b"lang\ttxt\nhi\tx\n", r"a\.tsv: no column 'text'; nearest is 'txt'"),
        ("a.tsv", b"en\thi\nx\n", r"a\.tsv: line 2: found 1 column; the header has 2"),
        (
            "a.tsv",
            b"en\thi\nx\t\xed\xa0\x80\n",
            r"a\.tsv: line 2: found the byte 0xed; expected UTF-8",
        ),
        ("a.txt", b"x\n\xed\xa0\x80\n", r"a\.txt: line 2: found the byte 0xed"),
        ("a.md", b"x", r"a\.md: expected a \.csv, \.tsv or \.parquet file"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_texts([str(tmp_path / name)]))
