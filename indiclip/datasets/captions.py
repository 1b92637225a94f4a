"""Images captioned in several languages: a folder and a table."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from indiclip.datasets.base import SampleDataset
from indiclip.datasets.tables import Strings, check_files, existing
from indiclip.images import read_image
from indiclip.names import did_you_mean
from indiclip.types import Sample

# Columns that are taken for captions where none are named: English and the languages of the Eighth Schedule of the
# Constitution of India, by their ISO 639 codes.
LANGUAGES = (
    *("en", "as", "bn", "brx", "doi", "gu", "hi", "kn", "ks", "kok", "mai", "ml"),
    *("mni", "mr", "ne", "or", "pa", "sa", "sat", "sd", "ta", "te", "ur"),
)


class CaptionTable(SampleDataset):
    """Images with `captions` in the languages that a table has them in; cells may be empty.

    Args:
        images: Folder of the image files.
        table: A .tsv (no quoting) or .csv file with a header row.
        image_column: The column with the file names.
        languages: The columns with captions; None takes every column called by the code of an Indian language or `en`.
            One with characters that no code has (`caption_hi`) is trained on, but counted in no language.

    Attributes:
        languages: The columns with captions.

    Raises:
        FileNotFoundError: The table, the folder, or images in it are missing.
        ValueError: A column that is not in the table, a row of another length, without any caption, or of an image
            that was there before. Names the table and the line.
    """

    def __init__(
        self,
        images: str,
        table: str,
        image_column: str = "file",
        languages: list[str] | None = None,
    ) -> None:
        self.folder, file = existing(images), existing(table)
        header, rows, lines = read_table(file)
        names = [row[column_place(image_column, header, file)] for row in rows]
        self.languages = list(languages) if languages else [name for name in header if name in LANGUAGES]
        if not self.languages:
            raise ValueError(f"{file}: no column is called by a language's code {LANGUAGES}; found {header}")
        places = [column_place(language, header, file) for language in self.languages]
        first_line: dict[str, int] = {}
        for name, row, line in zip(names, rows, lines, strict=True):
            if name in first_line:
                raise ValueError(f"{file}: line {line}: {name!r} was in line {first_line[name]} already")
            if not any(row[place].strip() for place in places):
                raise ValueError(f"{file}: line {line}: {name!r} has no caption in {', '.join(self.languages)}")
            first_line[name] = line
        check_files(self.folder, names, str(file))
        self._names = Strings(names)
        self._captions = [Strings(row[place].strip() for row in rows) for place in places]
        self._filled = np.array([[bool(row[place].strip()) for place in places] for row in rows])

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        """The file name. Reads and decodes nothing."""
        return self._names[index]

    def captions(self, index: int) -> dict[str, list[str]]:
        """All captions of an image: language -> its texts, of the languages that it has."""
        return {self.languages[i]: [self._captions[i][index]] for i in np.flatnonzero(self._filled[index])}

    def __getitem__(self, index: int) -> Sample:
        key = self.key(index)
        return Sample(image=read_image(self.folder / key, key), key=key, captions=self.captions(index))


def read_table(file: Path) -> tuple[list[str], list[list[str]], list[int]]:
    """Header, rows, and the rows' line numbers, of a .tsv (no quoting) or .csv file. "None" and "NA" are texts.

    Raises:
        ValueError: Another kind of file, a row of another length, no rows. Names the table and the line.
    """
    if file.suffix not in (".tsv", ".csv"):
        raise ValueError(f"{file}: expected a .tsv or .csv file")
    rows, lines = [], []
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            # A quote inside a TSV is a quote: captions hold them.
            unquoted = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
            reader = unquoted if file.suffix == ".tsv" else csv.reader(stream)
            header = next(reader, [])
            for row in filter(None, reader):
                if len(row) != len(header):
                    found = f"line {reader.line_num} has {len(row)} columns"
                    raise ValueError(f"{file}: {found}; the header has {len(header)}")
                rows.append(row)
                lines.append(reader.line_num)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: broken table: {error}") from error
    if not rows:
        raise ValueError(f"{file}: no rows; expected a header and a row per image")
    return header, rows, lines


def column_place(name: str, header: list[str], file: Path) -> int:
    """Where a table's column is."""
    if name not in header:
        raise ValueError(f"{file}: no column {name!r}{did_you_mean(name, header)}; found {header}")
    return header.index(name)
