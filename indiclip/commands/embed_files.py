"""The folder that `embed` writes: parts that are whole or not there, and a record that says what they are.

    embeddings-00000.npy    a row per image or caption; numpy.load(..., mmap_mode="r") opens it
    keys-00000.parquet      the same rows: key, source, row (the sample's number in the source), and what is known of it
    embed.json              model, options, sources; `done` and the rows of each part where it is finished
    quarantine.jsonl        what could not be read, where there is any: a sample has no row then, unless the reason
                            is of its captions alone

Part k has the rows of the samples `k * part_size` to `(k + 1) * part_size - 1` of all sources, one after the other.
While parts are missing, `.parts/00000.json` says that part 0 is whole: it is written last.
"""

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from indiclip import json_lines
from indiclip.datasets.tables import load_json
from indiclip.names import differences

_RECORD, _QUARANTINE, _PARTS = "embed.json", "quarantine.jsonl", ".parts"
_OWN = ("embeddings-*.npy", "keys-*.parquet", _QUARANTINE)
_OVERWRITE = "--overwrite starts anew"
_TOKENS = "crc32_of_token_ids"  # of a record's model, for captions
_MAY_CHANGE = ("model.name", "model.weights", "versions", "done", "summary", "parts")  # between two starts


class Part(NamedTuple):
    """What is known of a whole part beside its rows."""

    samples: int
    rows: int
    quarantined: list[dict[str, Any]]
    loss_sum: float  # of 1 - cosine of what is stored to what the model gave
    loss_largest: float
    unreadable_captions: Sequence[dict[str, Any]] = ()  # of images that have a row


class EmbeddingFolder:
    """Reads and writes such a folder.

    Args:
        path: Of the folder.
    """

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ImportError("keys need pyarrow, which is not installed: pip install 'indiclip[parquet]'") from error
        self.path = path

    def begin(self, record: dict[str, Any], overwrite: bool) -> None:
        """Begin, or go on where the folder has the same record.

        Args:
            record: Everything that makes up the rows, of plain types.
            overwrite: Remove what was embedded with another record.

        Raises:
            ValueError: The folder holds other files, or was begun with another record.
        """
        file = self.path / _RECORD
        others = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
        if others and not file.is_file():
            found = f"holds other files ({others[0]})"
            raise ValueError(
                f"--out {self.path}: {found}; expected a new or an empty folder, or one of `indiclip embed`"
            )
        if file.is_file() and not overwrite:
            self._check(self.record(), record)
        else:
            self._start(record)
        if not self.is_done():
            (self.path / _PARTS).mkdir(exist_ok=True)
        self._remove_leftovers()

    def _start(self, record: dict[str, Any]) -> None:
        for number in self._marked():  # first: they would count for the new record
            self._mark(number).unlink()
        json_lines.write_whole(self.path / _RECORD, _as_json({"done": False, **record}))

    def is_done(self) -> bool:
        """Whether all parts are there."""
        return bool(self.record()["done"])

    def record(self) -> dict[str, Any]:
        """What `embed.json` says."""
        found: dict[str, Any] = load_json(self.path / _RECORD)
        return found

    def is_whole(self, number: int) -> bool:
        """Whether a part is there."""
        return all(file.is_file() for file in (self._mark(number), *self._files(number)))

    def write(self, number: int, vectors_NE: np.ndarray, rows: list[dict[str, Any]], what: str, part: Part) -> None:
        """Write a part as a whole.

        Raises:
            OSError: The disk is full, or the folder cannot be written to; names the file.
        """
        embeddings, keys = self._files(number)
        array, table = io.BytesIO(), io.BytesIO()
        np.save(array, vectors_NE)
        _write_table(rows, what, table)
        json_lines.write_whole(embeddings, array.getbuffer())
        json_lines.write_whole(keys, table.getbuffer())
        json_lines.write_whole(self._mark(number), _as_json(part._asdict()))

    def finish(self, num_parts: int, damaged: list[dict[str, Any]]) -> dict[str, Any]:
        """Sum up the parts. Returns the record."""
        parts = [Part(**json.loads(self._mark(number).read_bytes())) for number in range(num_parts)]
        quarantined = [row for part in parts for row in part.quarantined]
        uncaptioned = [row for part in parts for row in part.unreadable_captions]
        num_rows = sum(part.rows for part in parts)
        summary = {
            "samples": sum(part.samples for part in parts),
            "rows": num_rows,
            "quarantined": len(quarantined),
            "unreadable_captions": len(uncaptioned),
            "damaged": len(damaged),
            "cosine_loss": {
                "mean": sum(part.loss_sum for part in parts) / max(num_rows, 1),
                "largest": max((part.loss_largest for part in parts), default=0.0),
            },
        }
        if quarantined or uncaptioned or damaged:
            json_lines.rewrite(self.path / _QUARANTINE, [*quarantined, *uncaptioned, *damaged])
        record = self.record() | {"done": True, "summary": summary, "parts": [part.rows for part in parts]}
        json_lines.write_whole(self.path / _RECORD, _as_json(record))
        self._remove_leftovers()
        return record

    def _check(self, old: dict[str, Any], record: dict[str, Any]) -> None:
        if not isinstance(old, dict) or "done" not in old:
            raise ValueError(f"{self.path / _RECORD}: not a record of `indiclip embed`")
        was, now = old.get("model", {}), record["model"]
        names = f"{was.get('name')} -> {now['name']}"
        if was.get("crc32_of_weights") != now["crc32_of_weights"]:
            raise ValueError(f"--out {self.path}: holds embeddings of other weights: {names}; {_OVERWRITE}")
        if old.get("what") == record["what"] and was.get(_TOKENS) != now.get(_TOKENS):
            # A record without it may be of any tokenizer: to go on could mix rows of two, which nobody could see later.
            other = "another tokenizer" if _TOKENS in was else "an unknown tokenizer, begun by an older version"
            raise ValueError(f"--out {self.path}: holds embeddings of {other}: {names}; {_OVERWRITE}")
        lines = [line for key, line in differences(old, record) if not key.startswith(_MAY_CHANGE)]
        if lines:
            raise ValueError(f"--out {self.path}: was begun with other options: {'; '.join(lines)}; {_OVERWRITE}")
        if old["done"]:
            missing = [
                file for number in range(len(old["parts"])) for file in self._files(number) if not file.is_file()
            ]
            if missing:
                raise FileNotFoundError(f"{missing[0]}: is missing; {_OVERWRITE}")

    def _remove_leftovers(self) -> None:
        """What a killed process left, and parts of another record."""
        record = self.record()
        whole = range(len(record["parts"])) if record["done"] else self._marked()
        kept = {file for number in whole for file in self._files(number)}
        kept |= {self.path / _QUARANTINE} if record["done"] else set()
        for pattern in (*_OWN, ".*.part"):
            for file in self.path.glob(pattern):
                if file not in kept:
                    file.unlink()
        if record["done"]:
            shutil.rmtree(self.path / _PARTS, ignore_errors=True)

    def _marked(self) -> list[int]:
        """The parts that are whole. Raises OSError where that cannot be read, which `glob` would take for none."""
        folder = self.path / _PARTS
        marks = [file for file in folder.iterdir() if file.suffix == ".json"] if folder.exists() else []
        return [int(mark.stem) for mark in marks if mark.stem.isdecimal()]

    def _mark(self, number: int) -> Path:
        return self.path / _PARTS / f"{number:05}.json"

    def _files(self, number: int) -> tuple[Path, Path]:
        return self.path / f"embeddings-{number:05}.npy", self.path / f"keys-{number:05}.parquet"


def make_folder(folder: Path) -> None:
    """Make the folder of `--out` where it is not there.

    Raises:
        ValueError: A file is in its place, or in that of a folder above it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"--out {folder}: a file is in the way; expected a folder") from error


def _write_table(rows: list[dict[str, Any]], what: str, file: io.BytesIO) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    text = [("language", pa.string()), ("text", pa.string())]
    columns = [("key", pa.string()), ("source", pa.string()), ("row", pa.int64())]
    if what == "images":
        columns += [("label", pa.string()), ("captions", pa.list_(pa.struct(text)))]
        columns += [("height", pa.int32()), ("width", pa.int32())]
    else:
        columns += text
    parquet.write_table(pa.Table.from_pylist(rows, pa.schema(columns)), file)


def _as_json(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False, indent=2) + "\n").encode(errors="backslashreplace")
