"""Writes shards of the WebDataset format: all of them or none, the same bytes for the same samples."""

import io
import os
import re
import shutil
import signal
import tarfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from indiclip.datasets.inventory import Inventory
from indiclip.webdataset import cache, tar_index


class ShardWriter:
    """Writes `NAME-000000.tar`, `NAME-000001.tar`, ... with an index beside each.

    They are written to the folder `.NAME.part` and leave it together when the `with` ends; an error, Ctrl-C or SIGTERM
    removes all of them. The next writer of the name removes what a killed one left.

    Args:
        folder: Where the shards go; made if need be.
        name: Begins their names.
        max_samples: Most samples of a shard.
        max_bytes: Most bytes of a shard; a sample that is larger has a shard of its own.

    Attributes:
        part: The folder `.NAME.part`: other files that are put there leave it with the shards.
        shards: The finished ones, where they will be.
        inventory: What is in them.

    Raises:
        FileExistsError: There are shards of this name.
        ValueError: Another process writes shards of this name.
        OSError: What does not fit on the disk, naming the file; by `add` and at the end.
    """

    def __init__(self, folder: Path, name: str, max_samples: int, max_bytes: int) -> None:
        self.folder, self.name, self.max_samples, self.max_bytes = folder, name, max_samples, max_bytes
        self.part = folder / f".{name}.part"
        self.shards: list[Path] = []
        self.inventory = Inventory()
        self._locks, self._has_name = ExitStack(), False
        self._tar: tarfile.TarFile | None = None
        self._samples = self._bytes = 0

    def __enter__(self) -> "ShardWriter":
        self._is_new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock(self.name)
            self._remove()
            if there := self._published(r"-\d+\.tar"):
                raise FileExistsError(
                    f"{min(there)} is there already and is not overwritten; remove it, or take another name"
                )
            self.part.mkdir()
            self._has_name = True
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.finish()
                # What other names share comes last: where it is, all is complete. An index comes after its shard, or it
                # would be taken for that of an older one.
                for file in sorted(self.part.iterdir(), key=lambda f: (not f.name.startswith(f"{self.name}-"), f)):
                    file.replace(self.folder / file.name)
        finally:
            with _undisturbed():
                self._end()

    def lock(self, what: str) -> None:
        """Keep other writers from something in the folder until the end of the `with`.

        Raises:
            ValueError: Another process has it.
        """
        file = self.folder / f".{what}.lock"
        try:
            self._locks.enter_context(FileLock(file, timeout=0))
        except Timeout as error:
            raise ValueError(f"{self.folder}: another process is writing {what} there; wait for its end") from error
        self._locks.callback(file.unlink, missing_ok=True)  # before it is let go, so that nobody else's is removed

    def add(self, key: str, members: dict[str, bytes]) -> None:
        """Write a sample.

        Args:
            key: A file name without dots, unique among all shards of this name.
            members: Extension -> content; webdataset wants them together.
        """
        size = sum(1024 + len(content) for content in members.values())
        if self._samples and (self._samples == self.max_samples or self._bytes + size > self.max_bytes):
            self.finish()
        with self._named_errors():
            if self._tar is None:
                self._tar = tarfile.open(self.part / self._file, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")  # its owner and times are zero: nothing of this machine
                info.size, info.mode = len(content), 0o644
                self._tar.addfile(info, io.BytesIO(content))
        self._samples, self._bytes = self._samples + 1, self._bytes + size

    def finish(self) -> None:
        """End the open shard."""
        if self._tar is None:
            return
        file = self.part / self._file
        with self._named_errors():
            self._tar.close()
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
            index = tar_index.build(file, cache.stat(str(file)))
            index.save(tar_index.index_path(str(file)))
        self.inventory += index.inventory
        self.shards.append(self.folder / self._file)
        self._tar, self._samples, self._bytes = None, 0, 0

    @property
    def _file(self) -> str:
        return f"{self.name}-{len(self.shards):06}.tar"

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """The system does not say which file it could not write."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.part / self._file)) from error

    def _published(self, pattern: str = r"-(\d+\.tar(\.index\.npz)?|left-out\.jsonl)") -> list[Path]:
        own = re.compile(re.escape(self.name) + pattern)
        return [entry for entry in self.folder.iterdir() if own.fullmatch(entry.name)]

    def _remove(self) -> None:
        """Remove what is not complete: what a killed writer left, or this one after an error."""
        if self.part.is_dir():
            for file in self._published() if any(self.part.iterdir()) else []:
                file.unlink()
            shutil.rmtree(self.part)

    def _end(self) -> None:
        if self._tar is not None and self._tar.fileobj is not None:
            with suppress(OSError):  # what is still to be written does not fit on a full disk
                self._tar.fileobj.close()  # not the tar: that would write its end
        if self._has_name:
            self._remove()
        self._locks.close()
        with suppress(OSError):  # there is something in it
            if self._is_new:
                self.folder.rmdir()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not end what the first one began."""
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
