"""Writes shards of the WebDataset format: whole or not at all, the same bytes for the same samples."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from indiclip.webdataset import cache, tar_index


class ShardWriter:
    """Writes `NAME-000000.tar`, `NAME-000001.tar`, ... with an index beside each.

    A shard has another name until it is whole and on the disk. What is open when an error ends the `with` is removed;
    finished shards stay.

    Args:
        folder: Where the shards go; made if need be.
        name: Begins their names.
        max_samples: Most samples of a shard.
        max_bytes: Most bytes of a shard; a sample that is larger has a shard of its own.

    Attributes:
        shards: The finished ones.
        num_samples: In the finished ones.

    Raises:
        FileExistsError: There are shards of this name.
        OSError: What does not fit on the disk, naming the file; by `add` and at the end.
    """

    def __init__(self, folder: Path, name: str, max_samples: int, max_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        there = [entry for entry in folder.iterdir() if re.fullmatch(re.escape(name) + r"-\d+\.tar", entry.name)]
        if there:
            raise FileExistsError(
                f"{min(there)} is there already and is not overwritten; remove it, or take another name"
            )
        self.folder, self.name, self.max_samples, self.max_bytes = folder, name, max_samples, max_bytes
        self.shards: list[Path] = []
        self.num_samples = 0
        self._tar: tarfile.TarFile | None = None
        self._samples = self._bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def add(self, key: str, members: dict[str, bytes]) -> None:
        """Write a sample.

        Args:
            key: A file name without dots, unique among all shards of this name.
            members: Extension -> content; webdataset wants them together.
        """
        size = sum(1024 + len(content) for content in members.values())
        if self._samples and (self._samples == self.max_samples or self._bytes + size > self.max_bytes):
            self._finish()
        with self._named_errors():
            self._write(key, members)
        self._samples, self._bytes = self._samples + 1, self._bytes + size

    def _write(self, key: str, members: dict[str, bytes]) -> None:
        if self._tar is None:
            self._tar = tarfile.open(self._part, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        for extension, content in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")  # its owner and times are zero: nothing of this machine
            info.size, info.mode = len(content), 0o644
            self._tar.addfile(info, io.BytesIO(content))

    @property
    def _part(self) -> Path:
        return self.folder / f".{self.name}-{len(self.shards):06}.tar.part"

    def _finish(self) -> None:
        if self._tar is None:
            return
        with self._named_errors():
            self._tar.close()
            with self._part.open("rb") as file:
                os.fsync(file.fileno())
        final = self.folder / self._part.name.removeprefix(".").removesuffix(".part")
        self._part.replace(final)
        self.num_samples += self._samples
        self._tar, self._samples, self._bytes = None, 0, 0
        self.shards.append(final)
        tar_index.build(final, cache.stat(str(final))).save(tar_index.index_path(str(final)))

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """The system does not say which file it could not write."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._part)) from error

    def _discard(self) -> None:
        if self._tar is not None and self._tar.fileobj is not None:
            with suppress(OSError):  # what is still to be written does not fit on a full disk
                self._tar.fileobj.close()  # not the tar: that would write its end
        self._part.unlink(missing_ok=True)
