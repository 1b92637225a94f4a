"""The rows of .csv and .tsv files, good and bad.

.csv: commas, and quotes as in RFC 4180: what holds a comma, a quote or a line end stands in quotes, which are doubled
inside. A cell whose quote is not closed, or goes on after it, makes a bad row; the rows that follow are read.

.tsv: a line is a row and a tab ends a cell; a quote is a quote. Only what a program has quoted (pandas, Excel) is
unquoted: a cell in quotes with doubled quotes inside, or with a tab or line end. All are where the header is quoted.
"""

import csv
import re
from collections.abc import Callable, Iterator
from contextlib import suppress

from indiclip.images import is_image_name


class _Lines:
    """Lines that csv takes one by one. They end before one that is a row by itself: a stray quote is open then."""

    def __init__(self, lines: list[str]) -> None:
        self.lines, self.place, self.first = lines, 0, 0
        self.is_row: Callable[[str], bool] = lambda line: False

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if self.place == len(self.lines) or (self.place > self.first and self.is_row(self.lines[self.place])):
            raise StopIteration
        self.place += 1
        return self.lines[self.place - 1]


def text_rows(lines: list[str], is_csv: bool, image_column: str) -> Iterator[tuple[int, list[str], str]]:
    """(number of its first line, cells, what is wrong with it) of the header and each row."""
    feed, header, all_quoted = _Lines(lines), list[str](), False
    while feed.place < len(lines):
        feed.first = first = feed.place
        if not lines[first].strip("\r\n"):
            feed.place += 1
            continue
        row, problem = _quoted(feed, "," if is_csv else "\t") if is_csv or '"' in lines[first] else (None, "")
        if not is_csv:
            problem = ""
            cells = lines[first].strip("\r\n").split("\t")
            if (
                row is None
                or (header and len(row) != len(header))
                or (feed.place == first + 1 and len(row) == len(cells))
            ):
                feed.place = first + 1
                all_quoted = all_quoted or (not header and all(cell[:1] == cell[-1:] == '"' for cell in cells))
                row = [_unquoted(cell, all_quoted) for cell in cells]
        elif row is None:
            feed.place, row = first + 1, []
        if not header:
            header = row
            feed.is_row = _row_test(lines[feed.place :], header, is_csv, image_column)
        yield first + 1, row, problem


def _quoted(feed: _Lines, delimiter: str) -> tuple[list[str] | None, str]:
    """The next row by the rules of CSV, or why it is none."""
    try:
        return next(csv.reader(feed, delimiter=delimiter, strict=True)), ""
    except (csv.Error, StopIteration) as error:
        if "field limit" in str(error):
            return None, f"a cell is too long; expected at most {csv.field_size_limit():,} characters"
        return None, f"a cell opens with a quote, and nothing closes it, or text follows the closing one ({error})"


def _row_test(lines: list[str], header: list[str], is_csv: bool, image_column: str) -> Callable[[str], bool]:
    """Whether a line is a row by itself: its columns are the header's, and one names an image (or a .tsv has none).

    A name ends as an image's; where the first of `lines` does not, it is a name with the signs, letters and digits in
    the same places as the first. A caption may have lines with a comma too.
    """
    place = [name.strip() for name in header].index(image_column) if header.count(image_column) == 1 else -1

    def name_in(line: str) -> str:
        with suppress(csv.Error):  # too long
            cells = next(csv.reader([line]), []) if is_csv else line.strip("\r\n").split("\t")
            if len(cells) == len(header) > 1:
                return cells[place].rstrip(' "').lstrip('"') if place >= 0 else "" if is_csv else "-"
        return ""

    first = next(filter(None, map(name_in, lines)), "")
    return lambda line: (
        bool(name := name_in(line))
        and (is_image_name(name) or (not is_image_name(first) and _shape(name) == _shape(first)))
    )


def _shape(name: str) -> str:
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", name))


def _unquoted(cell: str, always: bool) -> str:
    inner = cell[1:-1]
    is_quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if is_quoted and (always or '""' in inner) else cell
