"""Signals: finish the step, save, leave with the code that a scheduler understands, and be queued again."""

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from indiclip import json_lines
from indiclip.distributed import gathered
from indiclip.training.fault_tolerance.checkpoints import Checkpoints
from indiclip.training.fault_tolerance.ranks import AgreedStop

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_STARTS_WITHOUT_PROGRESS = 3


class Preemption:
    """Notes signals while training runs; what to do with them is decided by all ranks together.

    Args:
        max_requeues: How often a run may put itself into SLURM's queue again.

    Attributes:
        tell: Shows the user a line, from within a signal handler: without a lock, which the interrupted code may hold.
    """

    def __init__(self, max_requeues: int) -> None:
        self.max_requeues = max_requeues
        self.tell: Callable[[str], None] = write_line
        self.received = 0  # number of the first signal
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Handle the signals from now on. Lightning's own handlers, which broadcast inside of a handler, rest."""
        self.received = 0
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def restore(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def act(self, trainer: Trainer, folder: Path, received: int) -> None:
        """Save, queue again where it is asked for, and end the run; all ranks call this.

        Raises:
            AgreedStop: Always; its status is 128 + the signal's number.
        """
        name = signal.Signals(received).name
        path = save(trainer)
        words = f"{name}: saved {path}, step {trainer.global_step}" if path else f"{name}: nothing is saved"
        if received == signal.SIGUSR1 and "SLURM_JOB_ID" in os.environ:
            if trainer.is_global_zero:
                words += f"; {requeue(folder, trainer.global_step, self.max_requeues)}"
            gathered(None)  # srun ends all ranks where the first of another node has left
        elif path:
            is_of_run = folder.resolve() in Path(path).resolve().parents
            words += f"; the same command with --ckpt_path {'last' if is_of_run else path} goes on from it"
        raise AgreedStop(trainer, words, 128 + received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received and number == signal.SIGINT:
            self.restore()
            raise KeyboardInterrupt
        if not self.received:
            self.received = number
            self.tell(f"{name}: finishing the step, then saving (Ctrl-C: leave at once)")


def write_line(line: str) -> None:
    """Write to standard error. Not print: a signal handler may run in the middle of one."""
    os.write(2, f"\n{line}\n".encode())


def save(trainer: Trainer) -> str | None:
    """Save this step where the run's checkpoints are. Returns the path; None for a run that saves none."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, Checkpoints):
            return callback.save_now(trainer)
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            path = str(Path(callback.dirpath) / f"{trainer.global_step}.ckpt")
            trainer.save_checkpoint(path)
            return path
    return None


def requeue(folder: Path, step: int, most: int) -> str:
    """Put this SLURM job into the queue again. Returns what was done, in words.

    Not more than `most` times, and not when the last starts have all ended at the same step.
    """
    file = folder / "requeues.json"
    try:
        ends: list[int] = json.loads(file.read_text()) if file.is_file() else []
    except ValueError:
        return f"not queued again: {file}, which counts how often it was, is damaged"
    if len(ends) >= most:
        return f"not queued again: it was {len(ends)} times, the most allowed (max_requeues)"
    newest = [*ends, step][-_STARTS_WITHOUT_PROGRESS:]
    if len(newest) == _STARTS_WITHOUT_PROGRESS and len(set(newest)) == 1:
        return f"not queued again: the last {_STARTS_WITHOUT_PROGRESS} starts all ended at step {step}"
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if not re.fullmatch(r"[0-9_-]+", job):
        return f"not queued again: the job is called {job!r}"
    try:
        json_lines.write_whole(file, json.dumps([*ends, step]).encode())
    except OSError as error:
        return f"not queued again: {file}, which counts how often it was, cannot be written: {error.strerror}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"not queued again: scontrol requeue {job}: {getattr(error, 'stderr', None) or error}"
    return f"job {job} is queued again ({len(ends) + 1} of {most})"
