"""Files of one JSON object per line, and such as are replaced whole, by a run that may be killed and whose disk may be
full.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from indiclip.masking import mask


def read(file: Path) -> list[dict[str, Any]]:
    """The rows; none where there is no such file. A line that a kill tore is left out."""
    rows = []
    for line in file.read_text(errors="replace").split("\n") if file.is_file() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def append(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows, all of them or none, without secrets.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    data = _encoded(rows)
    with file.open("a+b", buffering=0) as opened:
        end = opened.seek(0, 2)
        opened.seek(max(end - 1, 0))
        if opened.read(1) not in (b"", b"\n"):  # a torn line must not swallow the next one
            data = b"\n" + data
        try:
            while data:
                data = data[opened.write(data) :]
        except OSError as error:
            opened.truncate(end)
            raise OSError(error.errno, error.strerror, str(file)) from error  # the system does not say which


def rewrite(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace the file as a whole, without secrets."""
    write_whole(file, _encoded(rows))


def write_whole(file: Path, content: bytes | memoryview) -> None:
    """Write any file as a whole or not at all, also where the machine stops.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    with open_whole(file) as opened:
        opened.write(content)


@contextmanager
def open_whole(file: Path) -> Iterator[BinaryIO]:
    """As `write_whole`, for what is written piece by piece: the file is there once all of it is.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("wb") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        part.replace(file)
    except OSError as error:
        is_other = error.filename not in (None, str(part))  # one that was read meanwhile
        raise OSError(error.errno, error.strerror, error.filename if is_other else str(file)) from error
    finally:
        with suppress(OSError):  # which would hide the first one
            part.unlink(missing_ok=True)


def _encoded(rows: Iterable[dict[str, Any]]) -> bytes:
    return mask("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)).encode(errors="surrogatepass")
