"""Files of one JSON object per line, to which a run adds while it may be killed and its disk may be full."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read(file: Path) -> list[dict[str, Any]]:
    """The rows; none where there is no such file. A line that a kill tore is left out."""
    rows = []
    for line in file.read_text(errors="replace").split("\n") if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def append(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows, all of them or none.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(errors="surrogatepass")
    with file.open("a+b", buffering=0) as opened:
        end = opened.seek(0, 2)
        opened.seek(max(end - 1, 0))
        if opened.read(1) not in (b"", b"\n"):  # a torn line must not swallow the next one
            data = b"\n" + data
        try:
            while data:
                data = data[opened.write(data) :]
        except OSError:
            opened.truncate(end)
            raise


def rewrite(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace the file as a whole."""
    part = file.with_name(f".{file.name}.part")
    part.unlink(missing_ok=True)
    append(part, rows)
    part.replace(file)
