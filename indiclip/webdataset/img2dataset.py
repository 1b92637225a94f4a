"""What img2dataset downloads: WebDataset shards, and beside each a table that says what became of every row.

Its layout (github.com/rom1504/img2dataset, `--output_format webdataset`): `00000.tar` with members `000000000.jpg`,
`.txt` (the caption, or empty) and `.json` (the row), and `00000.parquet` with all rows, also those whose image could
not be downloaded or resized: `key`, `url`, `caption`, `status`, `error_message`, `sha256` and what else the list had.
"""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from indiclip.datasets.inventory import Inventory
from indiclip.datasets.subset import Subset
from indiclip.datasets.table_reader import open_parquet, readable_parquet
from indiclip.datasets.tables import existing
from indiclip.names import did_you_mean
from indiclip.webdataset.shards import Shards

_UNIT = "rows"
_COLUMNS = ("key", "status", "error_message")
_HASHES = ("sha256", "sha512", "md5")  # of `--compute_hash`


class Img2dataset(Subset):
    """Image-text pairs of a folder that img2dataset has written, each picture once.

    Counted in the inventory, and left out: rows that failed, by their `status`; rows with an empty caption; and rows
    whose picture was there before, by the hash of the downloaded file. Of those the first in the order of the shards
    stays.

    Args:
        folder: With the shards and their tables.
        duplicates: Whether pictures may come again, such as those that stand with other captions each time.

    Raises:
        FileNotFoundError: No such folder, no shards in it, or a shard without its table.
        ValueError: A table without the columns above; one without hashes, unless duplicates may stay.
    """

    def __init__(self, folder: str, duplicates: bool = False) -> None:
        root = existing(folder)
        if not (files := sorted(root.glob("*.tar"))):
            raise FileNotFoundError(
                f"{root}: found no .tar; expected what `img2dataset --output_format webdataset` wrote"
            )
        shards = Shards([str(file) for file in files])
        self._rows, seen, indices = Inventory(), set[Any](), list[int]()
        for number, file in enumerate(files):
            table = _read_table(file.with_suffix(".parquet"), hashes=not duplicates)
            self._count_failed(table)
            samples = range(int(shards.starts[number]), int(shards.starts[number + 1]))
            of_shard = {shards.key(index).partition("/")[2]: index for index in samples}
            for key in table.row_of.keys() - of_shard.keys():
                self._rows.leave_out(_UNIT, "whose image is not in the shard", table.where(table.row_of[key]))
            for key, index in of_shard.items():
                row = table.row_of.get(key)
                if row is None:  # nothing is known of it, and nothing against it
                    self._rows.present[_UNIT] += 1
                elif why := _reason(table, row, seen):
                    self._rows.leave_out(_UNIT, why, table.where(row))
                    continue
                indices.append(index)
        self._rows.used[_UNIT] = len(indices)
        super().__init__(shards, np.array(indices, np.int64))

    @property
    def inventory(self) -> Inventory:
        """Members and samples of the shards, and rows of the tables."""
        found = Inventory()
        found += self.dataset.inventory
        found += self._rows
        return found

    def _count_failed(self, table: "_Table") -> None:
        self._rows.present[_UNIT] += len(table.status)
        failed = Counter(status for status in table.status if status != "success")
        for status, count in failed.items():
            row = table.status.index(status)
            example = f"{table.where(row)}: {table.error[row]}" if table.error[row] else table.where(row)
            self._rows.leave_out(_UNIT, status.replace("_", " "), example, count)


class _Table(NamedTuple):
    """The rows of a shard's table, those of failed downloads too."""

    name: str
    row_of: dict[str, int]  # key -> row, of those that succeeded
    status: list[str]
    error: list[str | None]
    caption: list[str | None] | None
    picture: list[Any] | None  # a hash

    def where(self, row: int) -> str:
        """For messages."""
        return f"{self.name} row {row + 1}"


def _read_table(file: Path, hashes: bool) -> _Table:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected the table that img2dataset writes beside each shard")
    names = open_parquet(file).schema_arrow.names
    for name in _COLUMNS:
        if name not in names:
            raise ValueError(
                f"{file}: found no column {name!r}{did_you_mean(name, names)}; expected img2dataset's table"
            )
    hashed = [name for name in _HASHES if name in names][:1] if hashes else []
    if hashes and not hashed:
        raise ValueError(
            f"{file}: found none of the columns {', '.join(_HASHES)}, which tell whether a picture was there before; "
            "expected img2dataset --compute_hash sha256, or duplicates: true"
        )
    captions = ["caption"] * ("caption" in names)
    with readable_parquet(file):
        found = open_parquet(file).read(columns=[*_COLUMNS, *captions, *hashed]).to_pydict()
    status = [str(one) for one in found["status"]]
    row_of = {str(key): row for row, key in enumerate(found["key"]) if status[row] == "success"}
    return _Table(
        file.name, row_of, status, found["error_message"], found.get("caption"), found[hashed[0]] if hashed else None
    )


def _reason(table: _Table, row: int, seen: set[Any]) -> str:
    """Why a row that succeeded is left out; empty where it is used, and its picture is `seen` from then on."""
    if table.caption is not None and not (table.caption[row] or "").strip():
        return "without a caption"
    if table.picture is None or table.picture[row] is None:
        return ""
    if table.picture[row] in seen:
        return "whose picture was there before"
    seen.add(table.picture[row])
    return ""
