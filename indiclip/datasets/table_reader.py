"""Tables of captions, images and classes: .csv, .tsv and .parquet, read alike for training, packing and scoring."""

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from indiclip.datasets.inventory import Inventory
from indiclip.datasets.languages import caption_language
from indiclip.datasets.tables import decode_text, is_text, name_in
from indiclip.datasets.text_rows import text_rows
from indiclip.images import EncodedImage, UnreadableSample
from indiclip.names import did_you_mean, reason_of, shorten

KINDS = (".csv", ".tsv", ".parquet")
OnBadRow = Literal["error", "skip"]
_ROW_GROUPS = 2  # of a Parquet file that a process keeps, for its images


class Table:
    """The rows of a table.

    Args:
        file: A file of one of the `KINDS`.
        on_bad_row: What is done where a row is malformed or cannot be used: `error` raises, `skip` leaves it out and
            counts it.
        image_column: A quote is taken for a stray one where it would swallow lines with an image's name here.

    Attributes:
        header: The columns' names.
        kept: The rows that were not left out, in order.
        inventory: The rows, used and left out.

    Raises:
        ValueError: Another kind of file, no rows, or what is wrong with a row; names the file and the line.
    """

    def __init__(self, file: Path, on_bad_row: OnBadRow = "error", image_column: str = "") -> None:
        kind = file.suffix.lower()
        if kind not in KINDS:
            raise ValueError(f"{file}: expected a {', '.join(KINDS[:-1])} or {KINDS[-1]} file")
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"on_bad_row: found {on_bad_row!r}; expected error or skip")
        self.file, self._on_bad_row, self._left_out = file, on_bad_row, Inventory()
        self.is_parquet = kind == ".parquet"
        if self.is_parquet:
            self._parquet = open_parquet(file)
            self.header: list[str] = list(self._parquet.schema_arrow.names)
            self._lines: np.ndarray = np.arange(1, self._parquet.metadata.num_rows + 1)
            self._is_kept = np.ones(len(self._lines), bool)
        else:
            self._read(image_column)
        if not len(self._lines):
            raise ValueError(f"{file}: no rows; expected a header and a row per image or text")

    def _read(self, image_column: str) -> None:
        text = decode_text(self.file.read_bytes(), str(self.file))
        lines = list(io.StringIO(text, newline=""))  # a line ends with CR, LF or both, and nowhere else
        is_csv = self.file.suffix.lower() == ".csv"
        found = list(text_rows(lines, is_csv, image_column))
        self.header = [name.strip() for name in found[0][1]] if found else []
        if any("\0" in name for name in self.header):
            raise ValueError(f"{self.file}: line {found[0][0]}: found a NUL; expected the columns' names")
        for other in ",;|\t":
            if len(self.header) == 1 and other in self.header[0]:
                expected = "commas" if is_csv else "tabs"
                raise ValueError(f"{self.file}: the header {shorten(self.header[0])} has no {expected} but {other!r}")
        self._cells = [row for _, row, _ in found[1:]]
        self._lines = np.array([line for line, _, _ in found[1:]], dtype=np.int64)
        self._is_kept = np.ones(len(self._lines), bool)
        for place, (_, row, problem) in enumerate(found[1:]):
            reason = "with a stray quote"
            if not problem and len(row) != len(self.header):
                reason = "with more or fewer columns than the header"
                columns = "1 column" if len(row) == 1 else f"{len(row)} columns"
                problem = f"found {columns}; the header has {len(self.header)}"
            elif not problem and "\0" in "".join(row):
                reason, problem = "with a NUL", "found a NUL; expected text"
            if problem:
                self.leave_out(place, reason, problem)

    @property
    def kept(self) -> list[int]:
        return np.flatnonzero(self._is_kept).tolist()

    def where(self, row: int) -> str:
        """What a row is called in messages."""
        return f"{self.file}: {'row' if self.is_parquet else 'line'} {self._lines[row]}"

    def leave_out(self, row: int, reason: str, found: str, always: bool = False) -> None:
        """A row that cannot be used; `reason` is the same for all of a kind, `found` says what is in this one.

        With `always` it is no error even where bad rows are.
        """
        if self._on_bad_row == "error" and not always:
            raise ValueError(f"{self.where(row)}: {found}")
        if self._is_kept[row]:
            self._is_kept[row] = False
            self._left_out.leave_out("rows", reason, f"{self.where(row)}: {found}")

    @property
    def inventory(self) -> Inventory:
        inventory = Inventory()
        inventory.present["rows"], inventory.used["rows"] = len(self._lines), int(self._is_kept.sum())
        inventory += self._left_out
        return inventory

    def count_columns(self, used: set[int]) -> Inventory:
        """The columns, those that are not used by name."""
        inventory, others = Inventory(), [name for place, name in enumerate(self.header) if place not in used]
        inventory.present["columns"], inventory.used["columns"] = len(self.header), len(used)
        inventory.leave_out("columns", "not used", ", ".join(name or "without a name" for name in others), len(others))
        return inventory

    def place(self, name: str) -> int:
        """Where a column is.

        Raises:
            ValueError: There is none of the name, or several.
        """
        if self.header.count(name) > 1:
            raise ValueError(f"{self.file}: {self.header.count(name)} columns are called {name!r}; expected one")
        if name not in self.header:
            raise ValueError(f"{self.file}: no column {name!r}{did_you_mean(name, self.header)}; found {self.header}")
        return self.header.index(name)

    def rows_by_image(self, names: list[str]) -> dict[str, list[int]]:
        """The kept rows by the name of their image; a row without one is an image by itself."""
        rows: dict[str, list[int]] = {}
        for row in self.kept:
            rows.setdefault(names[row] or f"\0{row}", []).append(row)
        return rows

    def caption_columns(self, required: bool = True) -> dict[int, str]:
        """The columns with captions: place -> language.

        They are called by a language, see `caption_language`, or `caption`, whose language is "".

        Raises:
            ValueError: There are none, and they are required.
        """
        tags = {place: caption_language(name) for place, name in enumerate(self.header)}
        columns = {place: tag for place, tag in tags.items() if tag or self.header[place] == "caption"}
        if required and not columns:
            expected = "expected `caption`, or codes or names of languages such as hi, hi-Latn, Tamil"
            raise ValueError(f"{self.file}: no column of captions; found {self.header}; {expected}")
        return columns

    def texts(self, place: int, child: str = "") -> list[list[str]]:
        """The texts in a column: of each row one, none where the cell is empty, or several of a list.

        Args:
            child: The field to read of a column of structs in Parquet.
        """
        texts: list[list[str]] = []
        for row, value in enumerate(self._column(place, child)):
            try:
                texts.append(list(_texts(value)))
            except ValueError as error:
                self.leave_out(row, "with a cell that is no text", f"column {self.header[place]!r}: {error}")
                texts.append([])
        return texts

    def names(self, place: int, child: str = "") -> list[str]:
        """A column with one text per row, such as a file's name or a class; "" where the cell is empty."""
        names = []
        for row, found in enumerate(self.texts(place, child)):
            if len(found) > 1:
                self.leave_out(row, "with a list", f"column {self.header[place]!r}: found a list; expected one text")
            names.append(found[0] if len(found) == 1 else "")
        return names

    def numbers(self, name: str) -> np.ndarray:
        """A column of whole numbers from 0: int32, -1 where the cell is empty or of a row that is left out."""
        place, numbers = self.place(name), np.full(len(self._lines), -1, np.int32)
        for row, value in enumerate(self._column(place)):
            # pandas writes NaN for nothing, and then 3.0 for 3.
            whole = int(value) if isinstance(value, float) and value.is_integer() else value
            text = "" if value is None or value != value else str(whole).strip()
            if text.isdecimal() and int(text) < 2**31:
                numbers[row] = int(text)
            elif text:
                expected = f"column {name!r}: found {shorten(value)}; expected a whole number from 0 to {2**31 - 1}"
                self.leave_out(row, "with a cell that is no number", expected)
        return numbers

    def images(self, name: str, folder: Path) -> "tuple[list[str], EmbeddedImages | None]":
        """The names of a column's images in their folder, and where the table holds the images themselves, these.

        Such images are called by their path; where it is missing or several rows have it, by the table's name and the
        first of the rows with the same bytes, which are of one picture.
        """
        place, paths = self.place(name), [""] * len(self._lines)
        kind = self._image_kind(name) if self.is_parquet else None
        if kind is None:
            return [name_in(folder, name) for name in self.names(place)], None
        if "path" in getattr(kind, "names", ()):
            paths = [name_in(folder, path) for path in self.names(place, "path")]
        embedded, rows_with, first = EmbeddedImages(self.file, name), Counter(paths), dict[int, int]()
        for row, path in enumerate(paths):
            if (not path or rows_with[path] > 1) and (data := embedded[row]) is not None:
                paths[row] = f"{self.file.stem}-{first.setdefault(hash(data), row):06}"
        return paths, embedded

    def _image_kind(self, name: str) -> Any:
        """The type of a Parquet column with images; None of one with text, which some programs write as bytes too."""
        from pyarrow import types

        kind = self._parquet.schema_arrow.field(name).type
        if types.is_struct(kind):
            found = str(kind.field("bytes").type) if "bytes" in kind.names else "null"
            if found != "null" and "binary" not in found:
                raise ValueError(f"{self.file}: column {name!r}: the bytes are of the type {found}; expected binary")
            return kind
        if types.is_nested(kind) or "binary" not in str(kind):
            return None
        with readable_parquet(self.file):
            cells = (cell.as_py() for batch in self._parquet.iter_batches(64, columns=[name]) for cell in batch[name])
            first = next(filter(None, cells), b"")
        return None if is_text(first.decode(errors="surrogateescape")) else kind

    def _column(self, place: int, child: str = "") -> list[Any]:
        if not self.is_parquet:
            return [row[place] if len(row) == len(self.header) else None for row in self._cells]
        name = self.header[place]
        with readable_parquet(self.file):
            table = self._parquet.read(columns=[f"{name}.{child}" if child else name])
        # Of a name with a dot there may be a column and a struct with such a field.
        nth = self.header[:place].count(name)
        column = list(map(_as_python, table.column(table.schema.get_all_field_indices(name)[nth])))
        if len(column) != len(self._lines):
            raise ValueError(f"{self.file}: broken Parquet: {len(column)} of {len(self._lines)} rows")
        return [value.get(child) if isinstance(value, dict) else value for value in column] if child else column


class EmbeddedImages:
    """The images in a column of a Parquet file: bytes, or the `{bytes, path}` of the library `datasets`.

    They are read by row group, as they are asked for: right for some thousand images, of more make shards.
    """

    def __init__(self, file: Path, column: str) -> None:
        self.file, self.column = file, column
        metadata = open_parquet(file).metadata
        sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self._starts = np.cumsum([0, *sizes])

    def __getitem__(self, row: int) -> bytes | None:
        """The bytes of an image; None where the cell has a path alone, or nothing."""
        group = int(self._starts.searchsorted(row, side="right")) - 1
        cell = _row_group(self.file, group, self.column)[row - int(self._starts[group])]
        if isinstance(cell, Mapping):  # of which Python may have no value, as of a time outside its years
            cell = cell.get("bytes")
        return cell and cell.as_py()  # type: ignore[no-any-return]

    def image(self, row: int, key: str) -> EncodedImage | None:
        """As `[row]`; raises `UnreadableSample` with the sample's key where there is no image in the bytes."""
        try:
            found = self[row]
        except ValueError as error:
            raise UnreadableSample(key, str(error), str(self.file)) from error
        return None if found is None else EncodedImage(found, key, str(self.file))


@lru_cache(maxsize=_ROW_GROUPS)
def _row_group(file: Path, group: int, column: str) -> Any:
    # Without threads, which a forked worker would not have.
    with readable_parquet(file):
        return open_parquet(file).read_row_group(group, columns=[column], use_threads=False)[column]


def open_parquet(file: Path) -> Any:
    """pyarrow's `ParquetFile`.

    Raises:
        ValueError: pyarrow is not installed, or the file is damaged.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{file}: Parquet needs the package pyarrow: pip install pyarrow") from None
    with readable_parquet(file):
        return parquet.ParquetFile(file, memory_map=True)


@contextmanager
def readable_parquet(file: Path) -> Iterator[None]:
    """What pyarrow raises over a damaged file as one line."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: broken Parquet: {reason_of(error)}") from error


def _as_python(cell: Any) -> Any:
    """The value of a cell, or why Python has none: it is no UTF-8, or a time in nanoseconds or outside its years."""
    try:
        return cell.as_py()
    except (ValueError, OverflowError) as error:
        return ValueError(str(error))


def _texts(value: Any) -> Iterator[str]:
    """The texts of a cell; raises `ValueError` with what is no text."""
    if isinstance(value, bytes):
        value = decode_text(value, "the text")
    if isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, ValueError):
        raise ValueError(f"expected text: {str(value)[:80]}")
    elif isinstance(value, str):
        if "\0" in value:
            raise ValueError("found a NUL; expected text")
        yield from [value.strip()] if is_text(value) else []
    elif value is not None and value == value:  # NaN is what pandas writes for nothing
        raise ValueError(f"found the {type(value).__name__} {shorten(value)}; expected text")
