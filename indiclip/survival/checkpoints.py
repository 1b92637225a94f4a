"""Checkpoints that are whole or not there: written beside their place, read back, listed by SHA-256, then put in it.

`manifest.json` in the folder of the checkpoints lists, for each file name, the hash of the newest file and of those
before it. It is replaced before the checkpoint is, so that at any instant a file either has a hash that is listed, or
is known to be torn.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

MANIFEST = "manifest.json"
_HEADROOM = 1 << 20  # bytes beside the tensors, and that a file system takes for itself
_BLOCK = 1 << 20
_PLAIN = (str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device, torch.Size)


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's plug-in for files that survive a kill at any moment, a full disk and a torn write."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; what was at `path` stays until the new one has been read back from the disk.

        Raises:
            ValueError: The checkpoint holds something other than tensors and plain values; says where.
            OSError: No space, a read-only folder, or the disk gave back other bytes; says what is left.
        """
        for where, kind in foreign(checkpoint):
            raise ValueError(f"{path}: {where} is a {kind}; a checkpoint may hold tensors and plain values only")
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        part = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for left in target.parent.glob(".*.part"):  # by a killed run
                left.unlink(missing_ok=True)
            _check_space(checkpoint, target)
            digest = _write(checkpoint, part)
            _list(target, {"sha256": digest, "size": part.stat().st_size, "step": checkpoint.get("global_step")})
            part.replace(target)
            _sync(target.parent)
        except OSError as error:
            found = newest_good(target.parent)[0]
            stays = f"the last good one is {found}" if found else "there is no earlier one"
            raise OSError(error.errno, f"{target}: not saved: {error.strerror or error}; {stays}") from error
        finally:
            part.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint; never unpickles anything, whatever `weights_only` says."""
        return super().load_checkpoint(path, map_location, weights_only=True)


class Checkpoints(ModelCheckpoint):
    """ModelCheckpoint whose `last.ckpt` is a link that always leads to a file.

    Args:
        dirpath: Folder of the checkpoints; by default `checkpoints` in the run's folder.
        filename: Of a checkpoint, see ModelCheckpoint.
        monitor: A metric by which the best are kept; None keeps the newest.
        mode: `min` or `max`, which of its values is best.
        save_top_k: How many are kept; -1 for all.
        every_n_train_steps: Optimizer steps between two checkpoints; None saves after each validation.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str = "{step}",
        monitor: str | None = None,
        mode: str = "min",
        save_top_k: int = 1,
        every_n_train_steps: int | None = None,
    ) -> None:
        super().__init__(
            dirpath,
            filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            every_n_train_steps=every_n_train_steps,
            save_last="link",
            auto_insert_metric_name=False,
            enable_version_counter=False,  # a step done again replaces its file
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        steps = trainer.strategy.all_gather(torch.tensor(trainer.global_step, device=trainer.strategy.root_device))
        if steps.min() != steps.max():
            raise ValueError(f"--ckpt_path: the ranks go on from different steps: {steps.tolist()}")

    def save_now(self, trainer: L.Trainer) -> str:
        """Save a checkpoint of this step, unless there is one. Returns its path."""
        if self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            if self.monitor is None:
                self._save_none_monitor_checkpoint(trainer, candidates)
            else:
                self._save_checkpoint(trainer, self.format_checkpoint_name(candidates))
            self._save_last_checkpoint(trainer, candidates)
        return self._last_checkpoint_saved

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if self.save_last == "link" and self.dirpath:
            # At once: ModelCheckpoint removes the file that the link leads to before it makes a new link.
            link = Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
            self._link_checkpoint(trainer, filepath, str(link))

    @staticmethod
    def _link_checkpoint(trainer: L.Trainer, filepath: str, linkpath: str) -> None:
        """As ModelCheckpoint's, with no instant without a link."""
        if trainer.is_global_zero and Path(filepath).absolute() != Path(linkpath).absolute():
            made = Path(linkpath).with_name(f".{Path(linkpath).name}.link")
            made.unlink(missing_ok=True)
            made.symlink_to(os.path.relpath(filepath, Path(linkpath).parent))
            made.replace(linkpath)
        trainer.strategy.barrier()


def newest_good(folder: Path) -> tuple[Path | None, int, list[str]]:
    """The checkpoint of the highest step that is provably whole.

    Returns:
        Its path or None, its step, and for each newer file why it was passed over.
    """
    passed_over: list[str] = []
    entries = _read_manifest(folder)
    files = {file for file in folder.glob("*.ckpt") if not file.is_symlink()}

    def step(file: Path) -> int:
        return max((int(entry["step"] or 0) for entry in entries.get(file.name, [])), default=0)

    for file in sorted(files, key=lambda file: (step(file), file.stat().st_mtime), reverse=True):
        reason = what_is_wrong(file)
        if reason is None:
            return file, step(file), passed_over
        passed_over.append(f"{file.name}: {reason}")
    return None, 0, passed_over


def what_is_wrong(file: Path) -> str | None:
    """Why a checkpoint is not provably whole; None where it is."""
    entries = _read_manifest(file.resolve().parent).get(file.resolve().name, [])
    if not entries:
        return f"not listed in {MANIFEST}"
    size = file.stat().st_size
    if all(entry["size"] != size for entry in entries):
        return f"torn: {size:,} bytes, {entries[0]['size']:,} were written"
    digest = _hash(file)
    return None if any(entry["sha256"] == digest for entry in entries) else "torn: another SHA-256 than was written"


def saved_at(file: Path) -> str:
    """When a checkpoint was saved, for messages."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(file.stat().st_mtime))


def foreign(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Places in a checkpoint that hold neither tensors nor plain values, and what is there."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from foreign(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple | set):
        for number, item in enumerate(value):
            yield from foreign(item, f"{where}[{number}]")
    elif not isinstance(value, torch.Tensor) and type(value) not in _PLAIN:
        yield where, f"{type(value).__module__}.{type(value).__qualname__}"


def _check_space(checkpoint: dict[str, Any], target: Path) -> None:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(checkpoint)}
    needed, free = sum(storages.values()) + _HEADROOM, shutil.disk_usage(target.parent).free
    if free < needed:
        raise OSError(28, f"it needs {needed:,} bytes and the disk has {free:,} left")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _write(checkpoint: dict[str, Any], part: Path) -> str:
    """Write and read back. Returns the SHA-256."""
    with part.open("wb") as file:
        writer = _Hashing(file)
        try:
            torch.save(checkpoint, cast(IO[bytes], writer))  # it only writes
        except RuntimeError as error:  # torch's own, which hides what the disk said
            raise writer.error or error from None
        file.flush()
        os.fsync(file.fileno())
        written = writer.sha256.hexdigest()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read back from the disk, not from memory
    if (found := _hash(part)) != written:
        raise OSError(5, f"the disk gave back other bytes than were written (SHA-256 {found[:12]}, not {written[:12]})")
    return written


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None
        self.flush: Callable[[], None] = file.flush

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _read_manifest(folder: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        content: dict[str, list[dict[str, Any]]] = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or not ours: then no file is proven
        return {}
    return content


def _list(target: Path, entry: dict[str, Any]) -> None:
    """Add a file to the manifest, beside the one that it replaces."""
    files = {name: rows for name, rows in _read_manifest(target.parent).items() if (target.parent / name).exists()}
    # More than one before it: a run killed here twice leaves the file of the first entry but two.
    files[target.name] = [entry, *files.get(target.name, [])[:3]]
    made = target.parent / f".{MANIFEST}.part"
    with made.open("w") as file:
        json.dump({"files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    made.replace(target.parent / MANIFEST)
    _sync(target.parent)


def _sync(folder: Path) -> None:
    """Make the names in a folder as durable as the files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
