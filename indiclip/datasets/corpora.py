"""Texts by language: parallel tables, tables with a column of languages, plain files; and which are held out."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from indiclip.datasets.captions import LANGUAGES, column_place, read_table
from indiclip.datasets.tables import existing, stable_hash

HOLDOUT = 0.1  # share of the rows that nothing is trained on
_LANGUAGE_COLUMNS = ("lang", "language")
_COLUMN = re.compile(rf"({'|'.join(LANGUAGES)})([-_]\w+)?")  # `hi`, and `hi-Latn` for romanised Hindi


@dataclass(frozen=True)
class Text:
    """A text in Unicode NFC, its language, and the key of its row.

    The key is the row's English text, or the text itself where a row has none: a sentence then has one key in all
    its languages and in all tables.
    """

    language: str
    text: str
    key: str

    def is_held_out(self, share: float) -> bool:
        """Whether the row is one of those kept aside; the same on every machine, and as the tables grow."""
        return stable_hash(f"held-out:{self.key}") < share * 2**64


def read_texts(files: Iterable[str]) -> Iterator[Text]:
    """All texts of some files; empty cells are left out.

    A .tsv or .csv file has a column per language, called by its code (`hi`, `hi-Latn`), or the columns `lang` and
    `text`, or all of these. The language of a .txt file, a text per line, is its name.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A table without a language, a broken one, text that is not UTF-8. Names the file and the line.
    """
    for name in files:
        file = existing(name)
        for row in _lines(file) if file.suffix == ".txt" else _table(file):
            texts = {language: unicodedata.normalize("NFC", text.strip()) for language, text in row.items()}
            key = texts.get("en")
            yield from (Text(language, text, key or text) for language, text in texts.items() if text)


def training_texts(files: list[str], holdout: float) -> dict[str, list[str]]:
    """Language -> the texts to train on: of rows that are not held out, and equal to no text that is held out.

    Short texts recur under other keys ("OK"); without the second condition they would be trained on after all.
    """
    held_out = {(row.language, row.text) for row in read_texts(files) if row.is_held_out(holdout)}
    texts: dict[str, list[str]] = {}
    for row in read_texts(files):
        if not row.is_held_out(holdout) and (row.language, row.text) not in held_out:
            texts.setdefault(row.language, []).append(row.text)
    return texts


def _lines(file: Path) -> Iterator[dict[str, str]]:
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            yield {file.stem: line.decode()}
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: line {number}: not UTF-8: {error}") from error


def _table(file: Path) -> Iterator[dict[str, str]]:
    """Language -> text of each row."""
    header, rows, _ = read_table(file)
    columns = {name: place for place, name in enumerate(header) if _COLUMN.fullmatch(name)}
    of_language = next((header.index(name) for name in _LANGUAGE_COLUMNS if name in header), None)
    of_text = column_place("text", header, file) if of_language is not None else 0
    if not columns and of_language is None:
        expected = f"expected `lang` and `text`, or languages' codes such as {LANGUAGES[:3]}"
        raise ValueError(f"{file}: no column of texts: found {header}; {expected}")
    for row in rows:
        texts = {name: row[place] for name, place in columns.items()}
        if of_language is not None:
            texts[row[of_language].strip()] = row[of_text]
        yield texts
