"""The bytes of shards, read at random from the files or their local copies."""

import errno
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import get_worker_info

from indiclip.webdataset import cache
from indiclip.webdataset.index_set import IndexSet

_OPEN_FILES = 64  # per process; thousands of shards would exceed the usual limit of 1,024
_READ = os.O_RDONLY | os.O_CLOEXEC
_TRIES = 3  # to open a copy before another process needs its room


class ShardFiles:
    """Reads parts of shards.

    Descriptors open at first use and are left out of a pickle; children of a fork may share them, because `pread` moves
    no common position.
    """

    def __init__(self, urls: list[str], indexes: IndexSet) -> None:
        self.urls, self.indexes = urls, indexes
        self._open: OrderedDict[int, int] = OrderedDict()
        self._broken: dict[int, str] = {}
        self._warned = False

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` of the plain tar.

        Raises:
            ValueError: No tar as its index says could be made of the shard.
            OSError: They are not there, or the machine is in trouble.
        """
        try:
            data = os.pread(self._descriptor(shard), length, offset)
        except OSError as error:
            if error.errno != errno.ESTALE or shard not in self._open:
                raise
            os.close(self._open.pop(shard))  # another machine removed the file, or put another in its place
            data = os.pread(self._descriptor(shard), length, offset)
        if len(data) != length:
            raise OSError("the shard has become shorter since it was indexed")
        return data

    def path(self, shard: int) -> Path:
        """The plain tar on disk, copied there if need be.

        Raises:
            ValueError: No tar as its index says could be made of the shard.
        """
        url = self.urls[shard]
        if not cache.is_copied(url):
            return Path(url)
        info = self.indexes.shard(shard)

        def check(copy: Path) -> None:
            if cache.fingerprint(copy) != info.fingerprint:
                raise ValueError(f"{cache.shown(url)}: its index (.index.npz) was made of another shard")

        if shard in self._broken:
            raise ValueError(self._broken[shard])
        try:
            return cache.local_tar(url, info.version, check)
        except ValueError as error:  # not to be brought here again for each of its samples
            self._broken[shard] = str(error)
            raise

    def prefetch(self, shards: list[int]) -> None:
        """Make the local copies of a window, unless they would push out those of the window that is read meanwhile."""
        needed = min(2 * self._copied_bytes(shards), self._all_copied_bytes)
        if needed <= cache.limit():
            for shard in shards:
                self.path(shard)
        elif not self._warned and getattr(get_worker_info(), "id", 0) == 0:  # one says it for all
            self._warned = True
            warnings.warn(
                f"data: shards are not fetched ahead, because two windows of {len(shards)} take {needed:,} bytes and "
                f"all copies may take {cache.limit():,}; raise INDICLIP_CACHE_GB or lower `window`",
                stacklevel=2,
            )

    @cached_property
    def _all_copied_bytes(self) -> int:
        return self._copied_bytes(range(len(self.urls)))

    def _copied_bytes(self, shards: Iterable[int]) -> int:
        return sum(self.indexes.shard(shard).tar_bytes for shard in shards if cache.is_copied(self.urls[shard]))

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            opened = self._opened(shard)
            self._close_removed()  # for which this one may have been the reason
            self._open[shard] = opened
            if len(self._open) > _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        return self._open[shard]

    def _opened(self, shard: int) -> int:
        if not cache.is_copied(self.urls[shard]):
            return os.open(self.path(shard), _READ)
        for _ in range(_TRIES):
            copy = self.path(shard)
            with suppress(FileNotFoundError):
                return os.open(copy, _READ | os.O_NOFOLLOW)
        raise cache.NoCopy(f"{copy}: other processes keep removing it (INDICLIP_CACHE_GB is too small)")

    def _close_removed(self) -> None:
        """Close copies that left the cache: they take room on the disk as long as they are open."""
        for shard, descriptor in list(self._open.items()):
            if cache.is_copied(self.urls[shard]) and _is_removed(descriptor):
                os.close(self._open.pop(shard))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def _is_removed(descriptor: int) -> bool:
    try:
        return os.fstat(descriptor).st_nlink == 0
    except OSError:  # by another machine that shares the folder
        return True
