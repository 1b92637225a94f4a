"""Which checkpoints of a folder are whole: `manifest.json` lists them with their SHA-256, in the order of saving.

A row is added before its file is put in place, and the rows of the file that it replaces go after that. So at any
instant, whatever is killed, a file with a listed hash is whole and any other one is torn. A checkpoint may be a folder
of files, whose hash is that of the list of their hashes.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from indiclip import json_lines
from indiclip.pretrained.sharded import SUMS

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
        if not file.exists():  # removed, or killed before it was put in place
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
    """Of what a file holds; of a folder that of its list of hashes, made anew."""
    if file.is_dir():
        return hashlib.sha256(_sums(file, {}).encode()).hexdigest()
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def size(file: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(part.stat().st_size for part in (file.iterdir() if file.is_dir() else [file]))


def write_sums(folder: Path, known: Mapping[str, str]) -> str:
    """Write a folder's list of hashes, as `sha256sum --check` reads it. Returns the list's own SHA-256.

    Args:
        known: SHA-256 of files, by name; others are read.
    """
    lines = _sums(folder, known).encode()
    json_lines.write_whole(folder / SUMS, lines)
    sync(folder)
    return hashlib.sha256(lines).hexdigest()


def _sums(folder: Path, known: Mapping[str, str]) -> str:
    files = sorted(file for file in folder.iterdir() if file.name != SUMS)
    return "".join(f"{known.get(file.name) or sha256(file)}  {file.name}\n" for file in files)


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


def put(part: Path, file: Path) -> None:
    """Move what was announced into its place. What is there stays whole and listed until then."""
    before = file.with_name(f"before-{file.name}")
    if file.is_dir() or (file.exists() and part.is_dir()):  # which cannot be replaced in one step
        remove(before)
        rows = _read(file.parent)
        # Under both names, so that it is known under the one it has.
        others = [Row(**{**row, "name": before.name}) for row in rows if row["name"] == file.name]
        _write(file.parent, [*others, *rows])
        file.rename(before)
    part.replace(file)
    sync(file.parent)
    settle(file)
    remove(before)


def remove(file: Path) -> None:
    """Remove a checkpoint; a folder goes at once, so that none is half there."""
    if file.is_dir() and not file.is_symlink():
        gone = file if file.suffix == ".part" else file.with_name(f".{file.name}.gone.part")
        if gone != file:
            file.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    else:
        file.unlink(missing_ok=True)


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
    found = size(file)
    if all(row["size"] != found for row in of_name):
        return f"torn: {found:,} bytes, {of_name[0]['size']:,} were written"
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
