"""The processes of a loader: what each of them reads, which signals they ignore, how they end.

A signal to the whole process group (Ctrl-C, or a scheduler's SIGTERM or SIGUSR1) reaches the workers too. They ignore
it, because the main process has a step to finish with what they read and a checkpoint to save. They end when it has no
more work for them, by its SIGKILL where they are stuck, and by the kernel's where it was killed itself.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import multiprocessing
import os
import re
import signal
import struct
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType, TracebackType
from typing import Any, NamedTuple, TypeVar

from torch._C import _error_if_any_worker_fails
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from indiclip.datasets.base import SampleDataset

_TO_THE_GROUP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_ASK_FOR_STACKS = signal.SIGUSR2
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_GONE_SECONDS = 2.0  # until a killed process is gone
_WHILE_READING = "(while reading"
# multiprocessing makes `pymp-12345678/listener-12345678` in it, and the path of a socket has at most 107 bytes.
_LONGEST_TMPDIR = 75
_ANSWER_SECONDS = 1.0  # until asked workers have written their stacks
_NOTE = struct.Struct("=d248s")  # since when (`time.monotonic`, 0: nothing is read), and what, cut to 248 bytes
_LIKELY = {
    signal.SIGKILL: "most likely the machine ran out of memory (fewer data.num_workers need less)",
    signal.SIGBUS: "most likely shared memory (/dev/shm) is full",
}

T_co = TypeVar("T_co", covariant=True)

# What this process reads. A worker's is a part of the memory that it shares with the main process.
_note: Any = bytearray(_NOTE.size)
_all: "weakref.WeakSet[Workers]" = weakref.WeakSet()
os.register_at_fork(after_in_child=_all.clear)  # only the process that started workers may ask whether they are alive


@contextlib.contextmanager
def reading(task: str, dataset: SampleDataset, index: int) -> Iterator[str]:
    """Note that this process reads a sample, for whoever asks why it does not end (3 microseconds). Gives its key."""
    key = dataset.key(index)
    name = f"{task} sample {key}"
    _NOTE.pack_into(_note, 0, time.monotonic(), name.encode(errors="replace"))
    try:
        yield key
    except Exception as error:
        error.add_note(f"{_WHILE_READING} {name})")  # of a worker the traceback says so to the main process
        raise
    finally:
        _NOTE.pack_into(_note, 0, 0.0, b"")


class Reading(NamedTuple):
    """What a process reads."""

    name: str  # task and sample; empty where it reads nothing
    seconds: float  # since it began


def _read_note(note: Any, offset: int = 0) -> Reading:
    since, name = _NOTE.unpack_from(note, offset)
    return Reading(name.rstrip(b"\0").decode(errors="ignore"), time.monotonic() - since) if since else Reading("", 0.0)


def own_reading() -> Reading:
    """What this process reads itself, as it does where `num_workers` is 0."""
    return _read_note(_note)


class Workers:
    """The workers of one loader, as its `worker_init_fn`: what each does first, and what can be known about them.

    Args:
        name: Of the loader, for messages.
        num_workers: Its processes.

    Attributes:
        processes: Of the newest iteration; empty before the first.

    Raises:
        ValueError: The path of the temporary folder is so long that no worker could hand over what it has read.
    """

    def __init__(self, name: str, num_workers: int) -> None:
        folder = tempfile.gettempdir()
        if len(os.fsencode(folder)) > _LONGEST_TMPDIR:
            raise ValueError(
                f"TMPDIR: {folder}: expected at most {_LONGEST_TMPDIR} bytes, since loader processes make sockets in it"
            )
        self.name = name
        self.processes: list[Any] = []
        self._notes = multiprocessing.RawArray(ctypes.c_char, num_workers * _NOTE.size)
        self._pipes = [multiprocessing.Pipe(duplex=False) for _ in range(num_workers)]  # stacks come through them
        self._thread_lives = True  # as long as the process: see end_with_the_parent
        _all.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"processes": []}  # a spawned worker has no use for its siblings

    def __call__(self, worker_id: int) -> None:
        global _note
        _note = memoryview(self._notes).cast("B")[worker_id * _NOTE.size :]
        for number in _TO_THE_GROUP:
            signal.signal(number, signal.SIG_IGN)
        to_main = self._pipes[worker_id][1]
        os.set_blocking(to_main.fileno(), False)  # where nobody reads, stacks are cut and nothing waits
        faulthandler.register(_ASK_FOR_STACKS, to_main, all_threads=True)  # in C: answers while C code holds the GIL
        if self._thread_lives:
            end_with_the_parent()
        sys.excepthook = _unless_unconnected
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*_TO_THE_GROUP, _ASK_FOR_STACKS))

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Around the start of the processes: holds signals back from them until they are set up."""
        ctypes.memset(self._notes, 0, ctypes.sizeof(self._notes))
        self._thread_lives = threading.current_thread() is threading.main_thread()
        if multiprocessing.get_start_method() != "fork":
            resource_tracker.ensure_running()  # its start would let the signals through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (*_TO_THE_GROUP, _ASK_FOR_STACKS))
        gc.freeze()  # a forked worker never collects what it was born with: an old iterator there would shut down ours
        try:
            yield
        finally:
            gc.unfreeze()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def started(self, processes: list[Any]) -> None:
        """Take charge of the processes of a new iteration."""
        self.processes = processes
        for process in processes:
            # torch, and multiprocessing when Python exits, end by SIGTERM what does not end by itself.
            process._popen.terminate = process._popen.kill

    def reading(self, worker_id: int) -> Reading:
        """What a worker reads; where it was killed, what it read then."""
        return _read_note(self._notes, worker_id * _NOTE.size)

    def label(self, worker_id: int) -> str:
        """Of a worker in messages."""
        return f"{self.name} worker {worker_id} (pid {self.processes[worker_id].pid})"

    def stacks(self) -> list[str]:
        """The stacks of each worker's threads as faulthandler writes them; empty where a worker does not answer."""
        self._answers()  # to an earlier question
        for process in self.processes:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it ended just now
                    os.kill(process.pid, _ASK_FOR_STACKS)
        time.sleep(_ANSWER_SECONDS)
        return self._answers()

    def _answers(self) -> list[str]:
        answers = []
        for from_worker, _ in self._pipes[: len(self.processes)]:
            parts = []
            while from_worker.poll() and (part := os.read(from_worker.fileno(), 1 << 16)):
                parts.append(part)
            answers.append(b"".join(parts).decode(errors="replace"))
        return answers


class StepLoader(DataLoader[T_co]):
    """A DataLoader that raises the error for a killed worker only while it waits for what that has to bring.

    torch raises it from a signal handler, wherever the main process is then: while a checkpoint is written, or inside
    of a lock, which stays locked, so that the end of the iteration waits for ever.

    Its `worker_init_fn` may be a `Workers`.
    """

    def _get_iterator(self) -> Any:
        workers = self.worker_init_fn
        if self.num_workers == 0:
            return super()._get_iterator()
        self.check_worker_number_rationality()  # type: ignore[no-untyped-call]  # as torch's does
        if threading.current_thread() is threading.main_thread():
            signal_handling._SIGCHLD_handler_set = True  # torch's own stays out
            if signal.getsignal(signal.SIGCHLD) is not _on_end_of_a_child:
                signal.signal(signal.SIGCHLD, _on_end_of_a_child)
        if not isinstance(workers, Workers):
            return _Iterator(self)
        with workers.starting():
            iterator = _Iterator(self)
        workers.started(iterator._workers)
        return iterator


class _Iterator(_MultiProcessingDataLoaderIter):
    waiting = False

    def _try_get_data(self, *args: Any, **options: Any) -> Any:
        # With a pinning thread torch looks every five seconds, and an error here could leave its queue locked.
        _Iterator.waiting = not self._pin_memory
        try:
            if self.waiting:
                _error_if_any_worker_fails()
            return super()._try_get_data(*args, **options)  # type: ignore[no-untyped-call]
        except (ConnectionError, EOFError):  # a worker that is killed has its sockets closed before it is gone
            until = time.monotonic() + _GONE_SECONDS
            while time.monotonic() < until:
                _error_if_any_worker_fails()
                time.sleep(0.01)
            raise
        finally:
            _Iterator.waiting = False


def _on_end_of_a_child(number: int, frame: FrameType | None) -> None:
    if _Iterator.waiting:
        _error_if_any_worker_fails()


def living_workers() -> list[Workers]:
    """Those of the loaders of this process of which any is alive, by name."""
    living = [workers for workers in _all if any(process.is_alive() for process in workers.processes)]
    return sorted(living, key=lambda workers: workers.name)


def kill_workers(reading_for: float = 0.0) -> None:
    """End workers of this process at once. torch waits five seconds for each that is stuck, one after the other.

    Args:
        reading_for: Only those that have been reading one sample for so many seconds. A worker that is killed while it
            hands over a batch leaves half of it in a pipe, on which torch's pinning thread, where there is one, waits.
    """
    for workers in living_workers():
        for i, process in enumerate(workers.processes):
            if workers.reading(i).seconds >= reading_for:
                process.kill()
                process.join(1.0)


atexit.register(kill_workers)  # before multiprocessing's own, which would kill them with torch's handler in place


def explain(error: BaseException) -> str | None:
    """One line for an error that came of a worker, or of a dataset; None for any other.

    Args:
        error: As torch raises it in the main process: for a worker that was killed, or with the worker's traceback as
            its text; where `num_workers` is 0, as the dataset raises it.
    """
    text = str(error)
    if any(note.startswith(_WHILE_READING) for note in getattr(error, "__notes__", [])):
        return f"{type(error).__name__}: {text} (INDICLIP_TRACEBACK=1 shows where)"
    if killed := re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", text):
        pids = {int(pid) for pid in killed[1].split(",")}
        found = [(w, i) for w in _all for i, process in enumerate(w.processes) if process.pid in pids]
        return "; ".join(_how_it_ended(*one) for one in found) or text
    if caught := re.match(r"Caught (\w+) in DataLoader worker process (\d+)\.\nOriginal Traceback", text):
        lines = text.splitlines()
        last_frame = max(number for number, line in enumerate(lines) if line.startswith("  "))
        message = " ".join(lines[last_frame + 1 :]) or caught[1]
        return f"worker {caught[2]}: {message} (INDICLIP_TRACEBACK=1 shows where)"
    return None


def _how_it_ended(workers: Workers, worker_id: int) -> str:
    status = workers.processes[worker_id].exitcode
    if status is None or status >= 0:
        how = f"ended with status {status}"
    else:
        number = signal.Signals(-status)
        how = f"was killed by {number.name}"
        if number in _LIKELY:
            how += f", {_LIKELY[number]}"
    name = workers.reading(worker_id).name
    return f"{workers.label(worker_id)} {how}; it was {f'reading {name}' if name else 'between two samples'}"


def _unless_unconnected(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print an uncaught error, but not that the main process ended while a batch was handed over to it."""
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)


def end_with_the_parent() -> None:
    """Have the kernel kill this process when its parent ends, however it ends and whatever this process does then.

    The kernel means the thread that started this process. Without Linux, and where that thread may end earlier, torch's
    own look at the parent remains: every five seconds, between two samples.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    # A fork server, where there is one, is the parent, and ends with the main process.
    if parent is not None and os.getppid() != parent.pid and multiprocessing.get_start_method() != "forkserver":
        os._exit(1)  # it ended before the kernel was asked
