"""A folder that is written as a whole or not at all."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def check_new(out: Path) -> Path:
    """The folder's own path, behind links.

    Raises:
        FileExistsError: It holds something, or is a file.
    """
    place = out.resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise FileExistsError(f"{out}: is there already and holds something; expected a new or empty folder")
    return place


@contextmanager
def new_folder(out: Path, replaces: bool = False) -> Iterator[Path]:
    """A folder beside it, which takes its place when all is written.

    Args:
        out: Where it goes.
        replaces: What is there stays until then, and is removed afterwards.

    Raises:
        FileExistsError: See `check_new`.
        OSError: It cannot be written; names what would have been written.
    """
    place = out.resolve() if replaces else check_new(out)
    part = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.parent / f".{place.name}-{secrets.token_hex(4)}"
        part.mkdir()
        yield part
        if replaces and place.exists():
            _exchange(part, place)
        else:
            part.replace(place)
    except SafetensorError as error:  # a full disk, mostly
        raise OSError(f"{out}: cannot be written ({error})") from error
    except OSError as error:
        file = str(error.filename or part)  # a full disk names none
        if part is not None and (error.errno is None or not file.startswith(str(part))):
            raise
        within = "" if part is None else file.removeprefix(str(part))  # nobody knows that name
        raise OSError(error.errno, error.strerror, f"{out}{within}") from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def _exchange(part: Path, place: Path) -> None:
    """Put a folder in another's place, and remove that. Should the first not be possible, it is back there."""
    old = part.with_name(f"{part.name}-old")
    place.replace(old)
    try:
        part.replace(place)
    except BaseException:
        old.replace(place)
        raise
    shutil.rmtree(old, ignore_errors=True)
