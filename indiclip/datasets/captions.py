"""Images captioned in several languages: a folder and a table."""

import json

import numpy as np

from indiclip.datasets.base import SampleDataset
from indiclip.datasets.inventory import Inventory
from indiclip.datasets.languages import declared_language, language_tag
from indiclip.datasets.table_reader import OnBadRow, Table
from indiclip.datasets.tables import Strings, check_files, existing, why_missing
from indiclip.images import UnreadableSample, read_image
from indiclip.types import Sample

CLUSTER_COLUMN = "cluster"
LANGUAGE_COLUMNS = ("language", "lang")  # of the captions of a row


class CaptionColumns:
    """The captions of a table.

    Args:
        table: The table. Its column `language` or `lang` says what the captions of a row are in that do not say it by
            their column's name.
        languages: Place of each column with captions -> its language.
        default: The language where nothing says it.

    Attributes:
        places: All columns that are used.
        inventory: The captions of all rows that were asked for.
    """

    def __init__(self, table: Table, languages: dict[int, str], default: str = "") -> None:
        self._table, self._languages, self._default = table, languages, default
        self._texts = {place: table.texts(place) for place in languages}
        of_rows = next((table.place(name) for name in LANGUAGE_COLUMNS if name in table.header), None)
        self._of_row: dict[int, str] = {}
        for row, said in enumerate([] if of_rows is None else table.names(of_rows)):
            try:
                self._of_row[row] = declared_language(said)
            except ValueError as error:
                table.leave_out(row, "in a language that is not known", str(error))
        self.places = {*languages} if of_rows is None else {*languages, of_rows}
        self.inventory = Inventory()

    def is_empty(self, row: int) -> bool:
        """Whether a row has no caption."""
        return not any(texts[row] for texts in self._texts.values())

    def of_rows(self, rows: list[int]) -> dict[str, list[str]]:
        """Language -> the different captions of one image's rows, of the languages that it has."""
        captions: dict[str, list[str]] = {}
        for place, of_column in self._languages.items():
            for row in rows:
                language = of_column or self._of_row.get(row) or self._default
                for text in self._texts[place][row]:
                    known = captions.setdefault(language, [])
                    self.inventory.present["captions"] += 1
                    if text in known:
                        self.inventory.leave_out("captions", "of the same words", self._table.where(row))
                    else:
                        known.append(text)
        self.inventory.used["captions"] += sum(map(len, captions.values()))
        return captions


class CaptionTable(SampleDataset):
    """Images with `captions` in the languages that a table has them in; cells may be empty.

    Rows of one image make one sample with all their captions. Images that a .parquet holds without a path of their own
    are read once at the start, which tells the rows of one image. A column `cluster` is the clusters' numbers, of which
    an image has that of its first row.

    Args:
        images: Folder of the image files; None where a .parquet holds the images themselves.
        table: A .csv, .tsv or .parquet file, see `indiclip.datasets.table_reader`.
        image_column: The column with the file names or images.
        languages: The columns with captions, or column -> language. None takes those that are called by a language's
            code or name (`hi`, `ta_IN`, `hi-Latn`, `Tamil`; see `caption_language`), and `caption`, whose language is
            unknown unless a column `language` or `lang` says it. Several columns of one language are several captions.
        on_bad_row: `skip` leaves out and counts rows that are malformed, without a caption or without an image file;
            `error` raises.

    Attributes:
        languages: The language of each column with captions; "" where it is unknown.

    Raises:
        FileNotFoundError: The table, the folder, or images in it are missing.
        ValueError: A column that is not in the table, or a bad row. Names the table and the line.
    """

    def __init__(
        self,
        images: str | None,
        table: str,
        image_column: str = "file",
        languages: list[str] | dict[str, str] | None = None,
        on_bad_row: OnBadRow = "error",
    ) -> None:
        file = existing(table)
        self.folder = existing(images) if images else file.parent
        rows = Table(file, on_bad_row, image_column)
        names, self._embedded = rows.images(image_column, self.folder)
        columns = _caption_columns(rows, languages)
        clusters = rows.numbers(CLUSTER_COLUMN) if CLUSTER_COLUMN in rows.header else None
        self.languages, captions = list(columns.values()), CaptionColumns(rows, columns)
        for row in rows.kept:
            if not names[row]:
                rows.leave_out(row, "without an image", f"no image in {image_column!r}")
            elif captions.is_empty(row):
                known = ", ".join(rows.header[place] for place in columns)
                rows.leave_out(row, "without a caption", f"{names[row]!r} has no caption in {known}")
            elif self._embedded is None and on_bad_row == "skip" and (why := why_missing(self.folder, names[row])):
                rows.leave_out(row, "without an image file", why)
        rows_of = rows.rows_by_image(names)
        if self._embedded is None:
            check_files(self.folder, list(rows_of), str(file))
        self._names, self._rows = Strings(rows_of), np.array([of_image[0] for of_image in rows_of.values()])
        self.clusters = None if clusters is None else clusters[self._rows]
        self._captions = Strings(json.dumps(captions.of_rows(of_image)) for of_image in rows_of.values())
        self._inventory = inventory = rows.inventory
        used = {rows.place(CLUSTER_COLUMN)} if clusters is not None else set()
        inventory += rows.count_columns({rows.place(image_column), *captions.places, *used})
        inventory += captions.inventory
        if not rows_of:
            raise ValueError(f"{file}: no row can be used; found {'; '.join(inventory.lines())}")
        inventory.present["images"] = inventory.used["images"] = len(rows_of)

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        """The file name. Reads and decodes nothing."""
        return self._names[index]

    def captions(self, index: int) -> dict[str, list[str]]:
        """All captions of an image: language -> its different texts, of the languages that it has."""
        captions: dict[str, list[str]] = json.loads(self._captions[index])
        return captions

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        key = self.key(index)
        image = self._embedded.image(int(self._rows[index]), key) if self._embedded else None
        if image is None:
            if self._embedded and (why := why_missing(self.folder, key)):
                raise UnreadableSample(key, why, str(self._embedded.file))
            image = read_image(self.folder / key, key)
        return Sample(image=image, key=key, captions=self.captions(index))


def _caption_columns(table: Table, languages: list[str] | dict[str, str] | None) -> dict[int, str]:
    """Place of each column with captions -> its language."""
    if languages:
        named = languages if isinstance(languages, dict) else {name: language_tag(name) for name in languages}
        try:
            return {table.place(name): declared_language(language) for name, language in named.items()}
        except ValueError as error:
            raise ValueError(f"languages: {error}") from None
    return table.caption_columns()
