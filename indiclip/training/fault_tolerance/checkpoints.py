"""Checkpoints that are whole or not there: written beside their place, read back, listed, then put in it.

See `manifest` for what makes a checkpoint provably whole.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol, cast, runtime_checkable

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.apply_func import apply_to_collection

from indiclip.distributed import gathered
from indiclip.lightning_internals import epoch_ends, validation_due
from indiclip.old_names import translate_checkpoint
from indiclip.pretrained.sharded import is_sharded, read_sharded
from indiclip.pretrained.weights import unreadable
from indiclip.training.fault_tolerance import manifest
from indiclip.training.fault_tolerance.ranks import AgreedStop, callbacks_of

HEADROOM = 1 << 20  # bytes beside the tensors, and that a file system takes for itself
_PLAIN = (str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device, torch.Size)
_LIGHTNING = "pytorch-lightning_version"  # entry of every checkpoint of a run


class NotSaved(OSError):
    """A checkpoint could not be saved: says which, why and what is left."""


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's plug-in for files that survive a kill at any moment, a full disk and a torn write."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; what was at `path` stays until the new one has been read back from the disk.

        Raises:
            NotSaved: The checkpoint holds something other than tensors and plain values, there is no space, the folder
                cannot be written to, or the disk gave back other bytes.
        """
        for where, kind in foreign(checkpoint):
            raise NotSaved(f"{path}: {where} is a {kind}; a checkpoint may hold tensors and plain values only")
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        part = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for left in target.parent.glob(".*.part"):  # by a killed run
                manifest.remove(left)
            _check_space(checkpoint, target)
            digest = write(checkpoint, part)
            manifest.announce(target, digest, part.stat().st_size, checkpoint.get("global_step") or 0)
            manifest.put(part, target)
        except OSError as error:
            raise NotSaved(f"{target}: not saved: {error.strerror or error}; {stays(target.parent)}") from error
        finally:
            with contextlib.suppress(OSError):  # which would hide the first one
                part.unlink(missing_ok=True)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = "cpu",
        weights_only: bool | None = True,
        place: Callable[..., torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint; never unpickles anything, whatever `weights_only` says.

        Args:
            path: Of a file, or of a folder, which any strategy reads.
            map_location: For a file's tensors.
            weights_only: Without effect.
            place: For a folder's tensors, see `read_sharded`.
        """
        try:
            if is_sharded(Path(path)):
                checkpoint = read_sharded(Path(path), place)
            else:
                checkpoint = super().load_checkpoint(path, map_location, weights_only=True)
            translate_checkpoint(checkpoint)
        except Exception as error:
            raise error if is_sharded(Path(path)) else unreadable(path, error) from error
        if _LIGHTNING not in checkpoint:  # which Lightning reads next
            raise ValueError(f"--ckpt_path: {path} is no checkpoint of IndiCLIP; expected the entry {_LIGHTNING!r}")
        return checkpoint


@runtime_checkable
class SavesLater(Protocol):
    """A strategy that trains on while it saves."""

    def finish_saving(self) -> None:
        """Wait for it. Raises NotSaved, the same on all ranks, where it failed."""

    def when_saved(self, action: Callable[[], None]) -> None:
        """Do something when what is being saved is in its place; on the first rank."""


class Checkpoints(ModelCheckpoint):
    """ModelCheckpoint for runs that are killed and go on.

    `last.ckpt` is a link that always leads to a file, the one that was saved last; and where one cannot be saved all
    ranks end together.

    Args:
        dirpath: Folder of the checkpoints; the command takes `checkpoints` in the run's folder, and no other.
        filename: Of a checkpoint, see ModelCheckpoint.
        monitor: A metric by which the best are kept, and no others but that of the last step or of a signal; None keeps
            the newest. Of a validation that is made up for (`ResumeValidation`) the metric does not count.
        mode: `min` or `max`, which of its values is best.
        save_top_k: How many are kept; -1 for all.
        every_n_train_steps: Optimizer steps between two checkpoints; None saves after each validation and at
            the end of an epoch without one. The last step is always saved.
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
            save_on_train_epoch_end=False,  # a run of `max_steps` that goes on from there would end the epoch twice
            auto_insert_metric_name=False,
            enable_version_counter=False,  # a step done again replaces its file
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._goes_on_from = -1
        for other in callbacks_of(trainer, Checkpoints):
            if other is not self and (other.dirpath, other.filename) == (self.dirpath, self.filename):
                raise ValueError(
                    f"trainer.callbacks: two Checkpoints write {self.filename!r} into {self.dirpath}, where each would "
                    "remove the other's; give one of them another filename"
                )

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **options: Any) -> None:
        every, last = self._every_n_train_steps, trainer.global_step == trainer.max_steps
        if validation_due(trainer):
            # After it: the run that goes on need not validate again.
            self._defer_save_until_validation |= last or bool(every and trainer.global_step % every == 0)
            return
        super().on_train_batch_end(trainer, *args, **options)
        # An epoch without a validation has no new value of a metric of held-out data.
        if epoch_ends(trainer) and not (self.monitor and trainer.enable_validation):
            super().on_validation_end(trainer, trainer.lightning_module)
        if last:
            self.save_now(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.global_step == self._goes_on_from:  # see ResumeValidation
            return
        super().on_validation_end(trainer, pl_module)
        if trainer.global_step == trainer.max_steps:
            self.save_now(trainer)  # where the last is none of the best

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save_now(trainer)  # of a run that ended before `max_steps`

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._goes_on_from = checkpoint["global_step"]

    def save_now(self, trainer: Trainer) -> str | None:
        """Save a checkpoint of this step, unless there is one. Returns its path; None in a `fast_dev_run`."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        if trainer.global_step == self._goes_on_from:
            return str(trainer.ckpt_path)
        self._save_this_step(trainer)
        if isinstance(trainer.strategy, SavesLater):
            try:
                trainer.strategy.finish_saving()  # what comes after this may be the end of the process
            except NotSaved as error:
                raise AgreedStop(trainer, str(error)) from error
        return self._last_checkpoint_saved

    def _save_this_step(self, trainer: Trainer) -> None:
        if self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            if self.monitor is None:
                self._save_none_monitor_checkpoint(trainer, candidates)
            else:  # under one name, for it is none of the best, which alone are removed when others take their place
                self._save_checkpoint(trainer, self.format_checkpoint_name(candidates, "stopped"))
            self._save_last_checkpoint(trainer, candidates)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        failure = None
        try:
            super()._save_checkpoint(trainer, filepath)
        except NotSaved as error:  # on the rank that writes
            failure = error
            trainer.strategy.barrier()  # where the others wait in `Trainer.save_checkpoint`
        if messages := [text for text in gathered(str(failure or "")) if text]:
            raise AgreedStop(trainer, messages[0]) from failure
        if self.save_last == "link" and self.dirpath:
            # At once: ModelCheckpoint removes the file that the link leads to before it makes a new link.
            link = Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
            self._link_checkpoint(trainer, filepath, str(link))

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        # ModelCheckpoint keeps the file that a run went on from; one for each start would fill the disk.
        return previous != current and (
            super()._should_remove_checkpoint(trainer, previous, current)
            or Path(self.dirpath or "").absolute() in Path(previous).absolute().parents
        )

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        """As ModelCheckpoint's, with no instant without a link."""
        link = Path(linkpath)

        def make() -> None:
            made = link.with_name(f".{link.name}.part")
            made.unlink(missing_ok=True)
            made.symlink_to(os.path.relpath(filepath, link.parent))
            made.replace(link)

        if trainer.is_global_zero and Path(filepath).absolute() != link.absolute():
            if isinstance(trainer.strategy, SavesLater):
                trainer.strategy.when_saved(make)
            else:
                make()
        trainer.strategy.barrier()


def stays(folder: Path) -> str:
    """Which checkpoint there is still where another could not be saved, in words."""
    with contextlib.suppress(OSError, ValueError):  # the disk may be as bad for reading
        found = manifest.newest_good(folder)[0]
        return f"the last good one is {found}" if found else "there is no earlier one"
    return "which others are good could not be read"


def foreign(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Places in a checkpoint that hold neither tensors nor plain values, and what is there."""
    # The very types: `weights_only` reads no subclass of them, such as a named tuple or a defaultdict.
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            yield from foreign(key, f"a key of {where or 'the checkpoint'}")
            yield from foreign(item, f"{where}.{key}" if where else str(key))
    elif type(value) in (list, tuple, set):
        for number, item in enumerate(value):
            yield from foreign(item, f"{where}[{number}]")
    elif type(value) not in (torch.Tensor, torch.nn.Parameter, *_PLAIN):
        yield where, f"{type(value).__module__}.{type(value).__qualname__}"


def _check_space(checkpoint: dict[str, Any], target: Path) -> None:
    storages: dict[int, int] = {}

    def add(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()

    apply_to_collection(checkpoint, torch.Tensor, add)
    needed, free = sum(storages.values()) + HEADROOM, shutil.disk_usage(target.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it needs {needed:,} bytes and the disk has {free:,} left")


def write(checkpoint: dict[str, Any], part: Path) -> str:
    """Write a file and read it back. Returns its SHA-256."""
    with part.open("wb") as file:
        writer = Hashing(file)
        try:
            torch.save(checkpoint, cast(IO[bytes], writer))  # it only writes
        except RuntimeError as error:  # torch's own, which hides what the disk said
            raise writer.error or error from None
        file.flush()
        os.fsync(file.fileno())
        written = writer.sha256.hexdigest()
    read_back(part, written)
    return written


def read_back(file: Path, written: str) -> None:
    """Raise OSError unless the disk gives back what was written, by its SHA-256."""
    with file.open("rb") as opened:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
    if (found := manifest.sha256(file)) != written:
        said = f"the disk gave back other bytes than were written (SHA-256 {found[:12]}, not {written[:12]})"
        raise OSError(errno.EIO, said)


class Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None
        self.flush: Callable[[], None] = file.flush
        self.tell, self.fileno, self.close = file.tell, file.fileno, file.close

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise
