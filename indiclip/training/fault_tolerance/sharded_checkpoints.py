"""Checkpoints in folders, which all ranks write: in the background, beside their place, and only then put in it.

Every rank hashes what it writes and reads it back. When all have, the first adds what is no tensor and the list of all
hashes, announces the folder in the manifest, and moves it into its place.
"""

import contextlib
import errno
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult

from indiclip.pretrained.sharded import META, split
from indiclip.training.fault_tolerance import manifest
from indiclip.training.fault_tolerance.checkpoints import HEADROOM, Hashing, NotSaved, foreign, read_back, stays


@dataclass(frozen=True)
class _Written(WriteResult):
    """What a rank tells the first one of a tensor: also the SHA-256 of all files that it wrote."""

    sums: dict[str, str] = field(default_factory=dict)


class Saves:
    """One checkpoint at a time, in the background.

    Args:
        group: Of all ranks, for nothing else; its backend works on the CPU.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._pending: Future[Any] | None = None
        self._target = Path()
        self._lock = threading.Lock()
        self._actions: list[Callable[[], None]] | None = None  # None where nothing is being saved

    def begin(self, checkpoint: dict[str, Any], target: Path) -> None:
        """Copy a checkpoint, and go on; a collective. What follows a save, see `when_saved`, waits for it.

        Raises:
            NotSaved: The save before has failed; the same on all ranks.
        """
        self.finish()
        rest, shards = split(checkpoint)
        failure, content = None, io.BytesIO()
        if torch.distributed.get_rank() == 0:
            for where, kind in foreign(rest):
                failure = f"{where} is a {kind}; a checkpoint may hold tensors and plain values only"
            torch.save(rest if failure is None else {}, content)
        writer = _Writer(target, content.getbuffer(), checkpoint.get("global_step") or 0, failure, self._act)
        self._target, self._actions = target, []
        # The plan is made anew each time: it costs little, and a cached one would be of another run's shapes.
        self._pending = cast(Future[Any], async_save(dict(shards), storage_writer=writer, process_group=self._group))

    def when_saved(self, action: Callable[[], None]) -> None:
        """Do something at once, or when the checkpoint is in its place that is being saved; never if that fails."""
        with self._lock:
            if self._actions is None:
                action()
            else:
                self._actions.append(action)

    def finish(self) -> None:
        """Wait until nothing is being saved. A collective.

        Raises:
            NotSaved: It was not saved; the same on all ranks.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except CheckpointException as error:
            first, _ = next(iter(error.failures.values()))
            words = first.strerror if isinstance(first, OSError) and first.strerror else str(first)
            if torch.distributed.get_rank() == 0:  # all have ended to write
                manifest.remove(_part_of(self._target))
            raise NotSaved(f"{self._target}: not saved: {words}; {stays(self._target.parent)}") from error
        finally:
            self._actions = None

    def _act(self) -> None:
        """On the first rank, behind the save."""
        with self._lock:
            for action in self._actions or []:
                action()
            self._actions = None


class _Writer(FileSystemWriter):
    """torch's writer, but what it writes is proven before it is at `target`.

    Args:
        target: The checkpoint.
        content: Of `META`; on the first rank.
        step: Of the checkpoint.
        failure: Why it cannot be saved at all, where that is known; on the first rank.
        then: What follows on the first rank.
    """

    def __init__(
        self, target: Path, content: memoryview, step: int, failure: str | None, then: Callable[[], None]
    ) -> None:
        super().__init__(_part_of(target))
        self.part, self.target = Path(self.path), target
        self._content, self._step, self._failure, self._then = content, step, failure, then
        self.fs = self._files = _HashedFiles()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        self.part.mkdir(parents=True, exist_ok=True)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first rank, when all have planned and none has written."""
        if self._failure:
            raise ValueError(self._failure)
        folder = self.target.parent
        for left in folder.glob(".*.part"):  # by a killed run
            if left != self.part:
                manifest.remove(left)
        for left in self.part.iterdir():
            left.unlink()
        chunks = (item.tensor_data for plan in plans for item in plan.items if item.tensor_data is not None)
        needed = sum(data.chunk.sizes.numel() * data.properties.dtype.itemsize for data in chunks)
        needed, free = needed + len(self._content) + HEADROOM, shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"it needs {needed:,} bytes and the disk has {free:,} left")
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:  # type: ignore[override]
        results = super().write_data(plan, planner).wait()
        sums = self._files.sums
        for name, written in sums.items():
            read_back(self.part / name, written)
        told: Any = torch.futures.Future()
        told.set_result([_Written(r.index, r.size_in_bytes, r.storage_data, sums) for r in results])
        return cast(Future[list[WriteResult]], told)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, when all have written."""
        super().finish(metadata, results)
        with (self.part / META).open("wb") as file:
            file.write(self._content)
            file.flush()
            os.fsync(file.fileno())
        sums: dict[str, str] = {}
        for row in (row for of_rank in results for row in of_rank):
            sums |= cast(_Written, row).sums
        digest = manifest.write_sums(self.part, sums)
        manifest.announce(self.target, digest, manifest.size(self.part), self._step)
        manifest.put(self.part, self.target)
        self._then()


def _part_of(target: Path) -> Path:
    """Where a checkpoint is written before it is put in its place."""
    return target.with_name(f".{target.name}.part")


class _HashedFiles(FileSystem):
    """Files whose content is hashed while it is written."""

    def __init__(self) -> None:
        self.sums: dict[str, str] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            if mode != "wb":
                yield stream
                return
            writer = Hashing(cast(Any, stream))
            try:
                yield writer
            except RuntimeError as error:  # torch's own, which hides what the disk said
                raise writer.error or error from None
            self.sums[Path(path).name] = writer.sha256.hexdigest()
