"""What the prepare_*.py scripts share: fetching files, and reading archives without ever unpacking them.

Members are read into memory and written under names that the scripts choose, so that no name in an archive can lead
out of the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.progress import Progress

from indiclip.datasets.tables import stable_hash

_TIMEOUT = 60  # seconds without a byte


def parser(description: str, source_help: str) -> argparse.ArgumentParser:
    """The options that every script has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path(os.environ.get("INDICLIP_DATA", "data")), help="the data root")
    made.add_argument("--source", help=source_help)
    return made


def run(main: Callable[[], None]) -> None:
    """Run a script; what went wrong with files or the network is one line for the user."""
    try:
        main()
    except (OSError, ValueError, EOFError, tarfile.TarError, zipfile.BadZipFile, ElementTree.ParseError) as error:
        raise SystemExit(f"error: {error}") from error


def as_url(source: str) -> str:
    """A URL as it is, a local file or folder as a file:// URL."""
    return source.rstrip("/") if "://" in source else Path(source).expanduser().resolve().as_uri()


def fetch(url: str, target: Path, md5: str | None = None) -> Path:
    """Download to `target`, unless it is there already; it appears whole or not at all.

    Raises:
        FileNotFoundError: The server, or the folder of a file:// URL, has no such file.
        ConnectionError: No network, or a refusal.
        ValueError: The checksum is another, or the download broke off.
    """
    if target.exists() and not url.startswith("file:") and (md5 is None or _md5(target) == md5):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with closing(urllib.request.urlopen(url, timeout=_TIMEOUT)) as stream, part.open("wb") as file:
            _copy(stream, file, target.name)
        if md5 and (found := _md5(part)) != md5:
            raise ValueError(f"{url}: MD5 is {found}; expected {md5}")
        part.replace(target)
    except urllib.error.URLError as error:
        if getattr(error, "code", None) == 404 or isinstance(error.reason, FileNotFoundError):
            raise FileNotFoundError(f"{url}: no such file") from error
        raise ConnectionError(f"{url}: {error.reason}; a local copy can be given as --source") from error
    finally:
        part.unlink(missing_ok=True)
    return target


def archive(source: str | None, url: str, out: Path, md5: str | None = None) -> Path:
    """The local archive or folder that the user named, else the public one, kept in `out/.downloads`."""
    if source and "://" not in source:
        path = Path(source).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"--source: {path}: no such file or folder")
        return path
    found = as_url(source) if source else url
    return download(found, out, None if source else md5)


def download(url: str, out: Path, md5: str | None = None) -> Path:
    """`fetch` into `out/.downloads`. A file is known there by its whole address: many archives are master.zip."""
    return fetch(url, out / ".downloads" / f"{stable_hash(url):016x}-{url.rsplit('/', 1)[-1]}", md5)


def members(source: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the regular files in a zip, tar or folder whose name `pattern`, a regular expression, finds."""
    wanted = re.compile(pattern)
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.is_file() and wanted.search(path.as_posix()):
                yield path.as_posix(), path.read_bytes()
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for name in sorted(archive.namelist()):
                if wanted.search(name):
                    yield name, archive.read(name)
    else:
        with tarfile.open(source) as packed:
            for member in packed:
                if member.isreg() and wanted.search(member.name):
                    yield member.name, packed.extractfile(member).read()  # type: ignore[union-attr]


def write(path: Path, content: bytes | str | Any) -> None:
    """Bytes, text, or anything else as JSON; the file appears whole or not at all."""
    if not isinstance(content, bytes | str):
        content = json.dumps(content, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(path)


def _copy(stream: Any, file: io.BufferedWriter, name: str) -> None:
    length = int(stream.headers.get("Content-Length") or 0)
    with Progress(transient=True, disable=length < 10_000_000) as progress:
        task = progress.add_task(name, total=length)
        while chunk := stream.read(1 << 20):
            file.write(chunk)
            progress.advance(task, len(chunk))
        file.flush()
    if length and file.tell() != length:
        raise ValueError(f"{name}: the download ended after {file.tell():,} of {length:,} bytes; run again")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
