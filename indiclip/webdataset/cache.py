"""Local copies of packed and remote shards, in a bounded folder that all processes of a machine share.

A plain `.tar` on disk is read where it is. Anything else is brought whole into the folder `INDICLIP_CACHE` (else
~/.cache/indiclip), and what has not been read for longest leaves when the copies exceed `INDICLIP_CACHE_GB` (100).
"""

import errno
import fcntl
import gzip
import math
import os
import re
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from indiclip.datasets.tables import stable_hash
from indiclip.masking import mask, without_secrets
from indiclip.names import shorten

SUFFIX = re.compile(r"\.(tar|tar\.gz|tgz)$")
_LOCKS = 64  # lock files in the folder; two copies that share one wait for each other
_WAITS = (1, 2, 4, 8, 16, 32)  # seconds between tries; a server that is started anew takes a minute
_BLOCK = 1 << 20
_SAMPLED = 1 << 14
NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_ABANDONED = 3600.0  # seconds after which the rest of a killed process's copy is removed


class NoCopy(OSError):
    """No local copy of a shard can be made: its server does not answer, or the disk is full. No sample is to blame."""


class Stat(NamedTuple):
    """What tells one version of a shard from another."""

    size: int  # bytes; -1 where a server does not say
    stamp: str  # time of change, or a server's tags
    crc: str = ""  # of some of its bytes: a file of the same size and time may have taken its place


def is_remote(url: str) -> bool:
    """Whether fsspec opens it: `s3://`, `gs://`, `https://`, `file://` and the like."""
    return "://" in url


def is_packed(url: str) -> bool:
    """Whether it is a `.tar.gz`; a signature may follow the name."""
    return not shown(url).endswith(".tar")


def is_copied(url: str) -> bool:
    """Whether it is read from a local copy."""
    return is_remote(url) or is_packed(url)


def shown(url: str) -> str:
    """A URL for messages, without a password or a signature."""
    return without_secrets(url) if is_remote(url) else url


def stem(url: str) -> str:
    """The shard's name without folder and `.tar`."""
    return SUFFIX.sub("", shown(url).rpartition("/")[2])


def stat(url: str) -> Stat:
    """Size and version of a shard.

    Raises:
        FileNotFoundError: It is not there.
    """
    if not is_remote(url):
        changed = Path(url).stat().st_ctime_ns  # no program can set it, as `cp -p` and rsync set st_mtime
        size, _, crc = fingerprint(Path(url)).partition(":")
        return Stat(int(size), str(changed), crc)
    try:
        info = _filesystem(url)[0].info(url)
    except FileNotFoundError as error:  # which fsspec says whatever a web server answers, or if none does
        raise FileNotFoundError(f"{shown(url)}: {_reason(error)}") from error
    tags = ("ETag", "etag", "mtime", "LastModified", "updated", "ino", "created")
    size = info.get("size")
    return Stat(-1 if size is None else int(size), " ".join(str(info[name]) for name in tags if name in info))


def fingerprint(file: Path) -> str:
    """The size, and the CRC-32 of 16 KiB at the start, middle and end: tells whether an index may belong to a tar."""
    size, crc = file.stat().st_size, 0
    with file.open("rb") as opened:
        for place in (0, size // 2, max(0, size - _SAMPLED)):
            crc = zlib.crc32(os.pread(opened.fileno(), _SAMPLED, place), crc)
    return f"{size}:{crc:08x}"


def _reason(error: FileNotFoundError) -> str:
    cause = error.__cause__
    if status := getattr(cause, "status", None):  # the answer's own text has the whole URL, a signature too
        return f"the server answers {status} {getattr(cause, 'message', '')}"
    return mask(str(cause or error.strerror or "no such file"))


def folder() -> Path:
    """The cache folder, made if need be."""
    found = Path(os.environ.get("INDICLIP_CACHE") or "~/.cache/indiclip").expanduser()
    try:
        found.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; INDICLIP_CACHE names another folder", str(found)) from error
    return found


def cached_name(url: str, version: Stat, suffix: str) -> Path:
    """Where something made of this version of a shard lies in the cache folder."""
    where = url if is_remote(url) else str(Path(url).resolve())
    identity = stable_hash(":".join(map(str, (where, *version))))
    name = re.sub(r"[^\w.-]", "_", stem(url))[:80]
    return folder() / f"{name}-{identity:016x}{suffix}"


def local_tar(url: str, version: Stat, check: Callable[[Path], None] = lambda _: None) -> Path:
    """A plain tar on disk: the shard itself, or its copy, which is made if it is not there.

    Args:
        check: Called with the copy, before others see a new one; raises if it is not what was expected.

    Raises:
        ValueError: Broken gzip, or what `check` raises.
        NoCopy: It cannot be read whole after several tries, or the folder is full or not to be written to.
    """
    if not is_copied(url):
        return Path(url)
    target = cached_name(url, version, ".tar")

    size = -1 if is_packed(url) else version.size
    if _is_at_hand(target, size, check):
        return target
    try:
        with locked(target):
            if not _is_at_hand(target, size, check):  # else another process has made it meanwhile
                _make(target, url, version, check)
    except (NoCopy, ValueError, FileNotFoundError):
        raise
    except OSError as error:  # of the folder, as when it is another user's
        raise NoCopy(
            f"{shown(url)}: no copy could be made in {target.parent} (INDICLIP_CACHE): {mask(str(error))}"
        ) from error
    return target


def _is_at_hand(copy: Path, size: int, check: Callable[[Path], None]) -> bool:
    try:
        # Somebody may have put a link in its place; a machine that went down may have left half of it.
        if copy.is_symlink() or not copy.is_file() or size not in (-1, copy.stat().st_size):
            return False
        check(copy)
        with suppress(PermissionError):  # another user's
            os.utime(copy, follow_symlinks=False)  # read just now: the last to be removed
    except (FileNotFoundError, ValueError):
        return False
    return True


def _make(target: Path, url: str, version: Stat, check: Callable[[Path], None]) -> None:
    _make_room(target.parent, max(version.size, 0))
    for left in target.parent.glob(f"{target.name}-*.part"):  # by a killed process: this one has the lock
        with suppress(PermissionError):  # another user's
            left.unlink(missing_ok=True)
    with new_file(target) as part:
        _copy(url, version, part)
        check(part)
    _make_room(target.parent, 0, keep=target)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """An empty file beside the target, which becomes it where nothing is raised; every user may read it."""
    descriptor, name = tempfile.mkstemp(".part", f"{target.name}-", target.parent)  # nobody can plant a link there
    part = Path(name)
    try:
        os.fchmod(descriptor, 0o644)
        os.close(descriptor)
        yield part
        part.replace(target)
    except OSError as error:
        if error.errno and not error.filename:  # as of a full disk
            error.filename = str(target)
        raise
    finally:
        part.unlink(missing_ok=True)


def _copy(url: str, version: Stat, part: Path) -> None:
    packed = is_packed(url)
    for wait in (*_WAITS, None):
        try:
            with _open(url) as source, part.open("wb") as target:
                plain = gzip.GzipFile(fileobj=source) if packed else source
                left = limit()
                while block := plain.read(_BLOCK):
                    left -= len(block)
                    if left < 0:  # a small file may unpack to any size
                        raise ValueError(f"{shown(url)}: unpacks to more than {limit():,} bytes (INDICLIP_CACHE_GB)")
                    target.write(block)
                if not packed and version.size not in (-1, target.tell()):
                    raise OSError(f"received {target.tell():,} bytes; expected {version.size:,}")
                target.flush()
                os.fsync(target.fileno())
            break
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{shown(url)}: broken gzip: {error}") from error
        except (FileNotFoundError, ValueError):
            raise
        except Exception as error:  # each of fsspec's servers has errors of its own
            is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if wait is None or is_full or not is_remote(url):
                raise NoCopy(
                    f"{shown(url)}: no copy could be made in {part.parent} (INDICLIP_CACHE): {mask(str(error))}"
                ) from error
            time.sleep(wait)


def _open(url: str) -> IO[bytes]:
    return _filesystem(url)[0].open(url, "rb") if is_remote(url) else Path(url).open("rb")  # type: ignore[no-any-return]


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec  # takes a while, and most shards are files

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # the package of a protocol is not installed; an unknown protocol
        raise ValueError(f"{shown(url)}: {mask(str(error))}") from error
    return filesystem, path


def remote_glob(pattern: str) -> list[str]:
    """The URLs that a pattern with `*` stands for, sorted."""
    filesystem, path = _filesystem(pattern)
    return sorted(filesystem.unstrip_protocol(found) for found in filesystem.glob(path))


def remote_file(url: str) -> Path | None:
    """A small remote file's newest copy in the cache folder; None where there is no such file."""
    try:
        version = stat(url)
    except (TimeoutError, ConnectionError):
        raise
    except OSError:  # S3 and GCS say "forbidden" of what is not there to those who may not list
        return None
    copy = cached_name(url, version, ".copy")
    with locked(copy):
        if copy.is_symlink() or not copy.exists():
            filesystem, path = _filesystem(url)
            with new_file(copy) as part:
                filesystem.get_file(path, str(part))
    return copy


@contextmanager
def locked(target: Path, family: str = "") -> Iterator[None]:
    """One process at a time makes this file; the system lets go of the lock of a killed one.

    Locks of one family are few, and a process that holds one must not ask for another of them.

    The lock may be another user's file, so that it is only read; it is never written to, and a link is not followed.
    """
    file = target.parent / f".lock-{family}{stable_hash(target.name) % _LOCKS:02}"
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        lock = os.open(file, flags | os.O_RDWR | os.O_CREAT, 0o644)  # to write: NFS locks nothing else
    except PermissionError:
        lock = os.open(file, flags | os.O_RDONLY)
    try:
        with suppress(PermissionError):
            os.fchmod(lock, 0o644)  # whatever the umask
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough: a process that was forked meanwhile holds it too
        os.close(lock)


def limit() -> int:
    """Most bytes of all copies together.

    Raises:
        ValueError: INDICLIP_CACHE_GB is no such number.
    """
    text = os.environ.get("INDICLIP_CACHE_GB") or "100"
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = math.nan
    if not 0 <= gigabytes < math.inf:
        raise ValueError(f"INDICLIP_CACHE_GB: found {shorten(text)}; expected a number of gigabytes, 0 or more")
    return int(gigabytes * 1e9)


def _make_room(place: Path, needed: int, keep: Path | None = None) -> None:
    """Remove copies, those read longest ago first, until `needed` more bytes are within the bound.

    Raises:
        NoCopy: The shard alone exceeds the bound.
    """
    most = limit()
    if needed > most:
        raise NoCopy(f"{place}: a shard of {needed:,} bytes exceeds the bound of {most:,} (INDICLIP_CACHE_GB)")
    copies = []
    for file in place.glob("*"):
        with suppress(FileNotFoundError, PermissionError):  # another process removed it; it is another user's
            status = file.lstat()
            if file.suffix == ".tar":
                copies.append((status.st_mtime, status.st_size, file))
            elif file.suffix == ".part" and time.time() - status.st_mtime > _ABANDONED:
                file.unlink()
    total = needed + sum(size for _, size, _ in copies)
    for _, size, file in sorted(copies):
        if total <= most:
            break
        if file != keep:
            with suppress(PermissionError):  # another user's
                file.unlink(missing_ok=True)  # who reads it now holds it open
                total -= size
