"""Which checkpoints of a folder are whole: `manifest.json` lists them with their SHA-256, in the order of saving.

A row is added before its file is put in place, and the rows of the file that it replaces go after that. So at any
instant, whatever is killed, a file with a listed hash is whole and any other one is torn.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import TypedDict

from indiclip import json_lines

NAME = "manifest.json"
_TIME = "%Y-%m-%d %H:%M:%S"


class Row(TypedDict):
    """A file that was saved, or was about to be."""

    name: str
    sha256: str
    size: int  # bytes
    step: int
    saved: str  # local time; rows are in the order of saving


def newest_good(folder: Path) -> tuple[Path | None, int, list[str]]:
    """The checkpoint that was saved last among those that are provably whole.

    Returns:
        Its path or None, its step, and why newer files were passed over.

    Raises:
        ValueError: There is a list, but it is damaged.
    """
    rows = _read(folder)
    if not rows and (folder / NAME).is_file():
        raise ValueError(
            f"{folder / NAME}: not a list of checkpoints; name one by --ckpt_path FILE, or remove the list"
        )
    proofs: dict[str, Row | str] = {}
    passed_over: list[str] = []
    for row in reversed(rows):
        file = folder / row["name"]
        if not file.is_file():  # removed, or killed before it was put in place
            continue
        if row["name"] not in proofs:
            proof = proofs[row["name"]] = _proof(file, rows)
            if isinstance(proof, str):
                passed_over.append(f"{file.name}: {proof}")
        if proofs[row["name"]] is row:
            return file, row["step"], passed_over
    return None, 0, passed_over


def last_saved(folder: Path) -> str:
    """When a checkpoint of a folder was saved last, to be compared; empty where none was."""
    return max((row["saved"] for row in _read(folder)), default="")


def unlisted(folder: Path) -> list[str]:
    """Names of checkpoints that something else than `DurableCheckpointIO` has written."""
    listed = {row["name"] for row in _read(folder)}
    return sorted(file.name for file in folder.glob("*.ckpt") if not file.is_symlink() and file.name not in listed)


def what_is_wrong(file: Path) -> str | None:
    """Why a checkpoint is torn; None where it is whole or not listed, as one that was copied from elsewhere."""
    file = file.resolve()
    rows = _read(file.parent)
    if all(row["name"] != file.name for row in rows):
        return None
    proof = _proof(file, rows)
    return proof if isinstance(proof, str) else None


def saved_at(file: Path) -> str:
    """When a checkpoint was written, for messages."""
    return time.strftime(_TIME, time.localtime(file.stat().st_mtime))


def sha256(file: Path) -> str:
    """Of what a file holds."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def announce(file: Path, digest: str, size: int, step: int) -> None:
    """List what is about to be put in place as `file`, beside what is there now."""
    rows = [row for row in _read(file.parent) if (file.parent / row["name"]).exists()]
    saved = time.strftime(_TIME)
    _write(file.parent, [*rows, Row(name=file.name, sha256=digest, size=size, step=step, saved=saved)])


def settle(file: Path) -> None:
    """Forget what `file` was before that which was announced last, now that this is in place."""
    rows = _read(file.parent)
    last = max((number for number, row in enumerate(rows) if row["name"] == file.name), default=-1)
    kept = [row for number, row in enumerate(rows) if row["name"] != file.name or number == last]
    if len(kept) < len(rows):
        _write(file.parent, kept)


def sync(folder: Path) -> None:
    """Make the names in a folder as durable as the files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _proof(file: Path, rows: list[Row]) -> Row | str:
    """The row that a file is, or what is wrong with it."""
    of_name = [row for row in reversed(rows) if row["name"] == file.name]
    size = file.stat().st_size
    if all(row["size"] != size for row in of_name):
        return f"torn: {size:,} bytes, {of_name[0]['size']:,} were written"
    digest = sha256(file)
    return next((row for row in of_name if row["sha256"] == digest), "torn: another SHA-256 than was written")


def _read(folder: Path) -> list[Row]:
    try:
        rows: list[Row] = json.loads((folder / NAME).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or damaged: then no file is proven
        return []
    return rows


def _write(folder: Path, rows: list[Row]) -> None:
    json_lines.write_whole(folder / NAME, json.dumps({"files": rows}, indent=1).encode())
    sync(folder)
