"""Images captioned in several languages: a folder and a table."""

from __future__ import annotations

import numpy as np

from indiclip.datasets.base import SampleDataset
from indiclip.datasets.languages import language_tag
from indiclip.datasets.table_reader import OnBadRow, Table
from indiclip.datasets.tables import Strings, check_files, existing
from indiclip.images import EncodedImage, UnreadableSample, read_image
from indiclip.types import Sample


class CaptionTable(SampleDataset):
    """Images with `captions` in the languages that a table has them in; cells may be empty.

    Rows of one image make one sample with all their captions.

    Args:
        images: Folder of the image files; None where a .parquet holds the images themselves.
        table: A .csv, .tsv or .parquet file, see `indiclip.datasets.table_reader`.
        image_column: The column with the file names or images.
        languages: The columns with captions, or column -> language. None takes those that are called by a language's
            code or name (`hi`, `ta_IN`, `hi-Latn`, `Tamil`; see `caption_language`), and `caption`, whose language is
            unknown. Several columns of one language are several captions.
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
        names, self._embedded = rows.images(image_column)
        columns = _caption_columns(rows, languages)
        self.languages = list(columns.values())
        texts = {place: rows.texts(place) for place in columns}
        for row in rows.kept:
            if not names[row] and self._embedded is None:
                rows.leave_out(row, "without an image", f"no image in {image_column!r}")
            elif not any(texts[place][row] for place in columns):
                known = ", ".join(rows.header[place] for place in columns)
                rows.leave_out(row, "without a caption", f"{names[row]!r} has no caption in {known}")
            elif self._embedded is None and on_bad_row == "skip" and not (self.folder / names[row]).is_file():
                rows.leave_out(row, "without an image file", f"{names[row]!r} is not in {self.folder}")
        rows_of: dict[str, list[int]] = {}
        for row in rows.kept:
            rows_of.setdefault(names[row], []).append(row)
        if self._embedded is None:
            check_files(self.folder, list(rows_of), str(file))
        self._names, self._rows = Strings(rows_of), np.array([of_image[0] for of_image in rows_of.values()])
        found = [
            [(column, text) for column, place in enumerate(columns) for row in of_image for text in texts[place][row]]
            for of_image in rows_of.values()
        ]
        self._texts = Strings(text for of_image in found for _, text in of_image)
        self._columns = np.array([column for of_image in found for column, _ in of_image], dtype=np.int64)
        self._starts = np.cumsum([0, *map(len, found)])
        self._inventory = inventory = rows.inventory
        inventory += rows.count_columns({rows.place(image_column), *columns})
        if not rows_of:
            raise ValueError(f"{file}: no row can be used; found {'; '.join(inventory.lines())}")
        for unit, count in (("images", len(rows_of)), ("captions", len(self._texts))):
            inventory.present[unit] = inventory.used[unit] = count

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        """The file name. Reads and decodes nothing."""
        return self._names[index]

    def captions(self, index: int) -> dict[str, list[str]]:
        """All captions of an image: language -> its different texts, of the languages that it has."""
        captions: dict[str, dict[str, None]] = {}
        for place in range(*self._starts[index : index + 2].tolist()):
            captions.setdefault(self.languages[self._columns[place]], {})[self._texts[place]] = None
        return {language: list(texts) for language, texts in captions.items()}

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        key = self.key(index)
        try:
            data = self._embedded[int(self._rows[index])] if self._embedded else None
        except ValueError as error:
            raise UnreadableSample(key, str(error), str(self.folder)) from error
        if self._embedded and data is None and not (self.folder / key).is_file():
            raise UnreadableSample(key, "the cell holds no image", str(self._embedded.file))
        image = read_image(self.folder / key, key) if data is None else EncodedImage(data, key)
        return Sample(image=image, key=key, captions=self.captions(index))


def _caption_columns(table: Table, languages: list[str] | dict[str, str] | None) -> dict[int, str]:
    """Place of each column with captions -> its language."""
    if languages:
        named = languages if isinstance(languages, dict) else {name: language_tag(name) for name in languages}
        for name, language in named.items():
            if language and not language_tag(language):
                raise ValueError(f"languages: {name}: found {language!r}; expected a code such as hi or hi-Latn")
        return {table.place(name): language_tag(language) for name, language in named.items()}
    return table.caption_columns("")
