"""Texts by language: parallel tables, tables with a column of languages, plain files."""

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from indiclip.datasets.captions import LANGUAGE_COLUMNS, CaptionColumns
from indiclip.datasets.languages import caption_language
from indiclip.datasets.table_reader import Table
from indiclip.datasets.tables import decode_text, existing, stable_hash, text_lines


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

    A table (.csv, .tsv, .parquet) has columns that are called by a language's code or name (`hi`, `hi-Latn`, `Tamil`),
    or the columns `lang` and `text`, or all of these. The language of a .txt file, a text per line, is its name.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A table without a language, a broken one, text that is not UTF-8. Names the file and the line.
    """
    for name in files:
        file = existing(name)
        for row in read_rows(file):
            texts = [
                (language, text)
                for language, found in row.items()
                for text in (unicodedata.normalize("NFC", one.strip()) for one in found)
                if text
            ]
            key = next((text for language, text in texts if language == "en"), "")
            yield from (Text(language, text, key or text) for language, text in texts)


def read_rows(file: Path) -> Iterator[dict[str, list[str]]]:
    """Language -> texts of each row of a file; see `read_texts`."""
    return _lines(file) if file.suffix.lower() == ".txt" else _table(file)


def _lines(file: Path) -> Iterator[dict[str, list[str]]]:
    for line in text_lines(decode_text(file.read_bytes(), str(file))):
        yield {file.stem: [line]}


def _table(file: Path) -> Iterator[dict[str, list[str]]]:
    """Language -> texts of each row."""
    table = Table(file)
    languages = {place: tag for place, name in enumerate(table.header) if (tag := caption_language(name))}
    if any(name in table.header for name in LANGUAGE_COLUMNS):
        languages[table.place("text")] = ""
    if not languages:
        expected = "expected `lang` and `text`, or languages' codes such as en, hi-Latn"
        raise ValueError(f"{file}: no column of texts: found {table.header}; {expected}")
    columns = CaptionColumns(table, languages)
    for row in table.kept:
        yield columns.of_rows([row])
