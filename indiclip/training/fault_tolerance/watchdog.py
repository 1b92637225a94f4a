"""Reports a stalled run: what each rank is doing, what its loader's workers are reading, and all their stacks."""

import faulthandler
import itertools
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from indiclip.lightning_internals import around_saves, forget_saves
from indiclip.loading.workers import Workers, kill_workers, living_workers, own_reading
from indiclip.masking import mask
from indiclip.training.fault_tolerance.ranks import folder_of

_FRAMES = 5  # innermost ones that a line on stderr shows; the file has all
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (\S+)$', re.MULTILINE)  # as faulthandler writes it
_STDERR = 2
_STUCK_SECONDS = 1.0  # what a worker may still read, once the run has failed
_STANDARD_LIBRARY = Path(os.__file__).parent


def _hook(what: str, ended: bool = False) -> Callable[..., None]:
    """A hook that notes what the rank does now, and that a step has `ended` before."""

    def hook(self: "Watchdog", trainer: Trainer, *arguments: Any) -> None:
        batch_idx = next((argument for argument in arguments if isinstance(argument, int)), 0)
        then = what.format(step=trainer.global_step + 1, held_out=batch_idx + 1)
        (self._ended if ended else self._does)(then)

    return hook


class Watchdog(Callback):
    """Reports a rank in which no step has ended for a long time; it never ends the run.

    A report is a few lines on stderr, and all stacks in the run's folder, `watchdog-<rank>.txt`. It comes once per
    stall, again after twice the time, four times the time and so on; a line says so when the run goes on. Training
    and held-out steps count, saved checkpoints, and what calls `alive`. Where C code keeps even the watching thread
    from running (it holds the GIL), faulthandler's own thread writes this process's stacks to stderr after the same
    time.

    Args:
        timeout_seconds: Longest time without the end of a step that is not reported.

    Raises:
        ValueError: `timeout_seconds` is not above 0.
    """

    def __init__(self, timeout_seconds: float = 600.0) -> None:
        if not timeout_seconds > 0:
            raise ValueError(f"Watchdog.timeout_seconds: {timeout_seconds}; expected more than 0")
        self.timeout_seconds = timeout_seconds
        self._thread: threading.Thread | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._rank = trainer.global_rank
        self._file = folder_of(trainer) / f"watchdog-{self._rank}.txt"
        self._watched = threading.get_ident()
        self._lock = threading.Lock()  # of the next two
        self._since, self._reports = time.monotonic(), 0
        self._does("starting up")
        around_saves(trainer, self._while_saving)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join(2.0)  # it may be writing to a file system that does not answer
            self._thread = None
            forget_saves(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        kill_workers(_STUCK_SECONDS)
        self.teardown(trainer, pl_module, "")

    @contextmanager
    def _while_saving(self) -> Iterator[None]:
        doing, _ = self._state
        self._does("saving a checkpoint")
        try:
            yield
        finally:
            self._ended(doing)

    on_train_epoch_start = _hook("loading step {step}")
    on_train_batch_start = _hook("running step {step}")
    on_train_batch_end = on_validation_end = _hook("loading step {step}", ended=True)
    on_train_end = _hook("finishing", ended=True)

    on_validation_start = _hook("loading held-out step 1")
    on_validation_epoch_end = _hook("scoring the held-out steps")

    on_validation_batch_start = _hook("running held-out step {held_out}")
    on_validation_batch_end = _hook("loading what follows held-out step {held_out}", ended=True)

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_predict_end = on_train_end

    def alive(self, then: str) -> None:
        """For other callbacks that work between steps: it goes on, and this is what comes next."""
        if self._thread is not None:
            self._ended(then)

    def _does(self, what: str) -> None:
        self._state = what, time.monotonic()

    def _ended(self, then: str) -> None:
        """A step has ended, which is what the thread waits for."""
        now = time.monotonic()
        with self._lock:
            seconds, reports = now - self._since, self._reports
            self._since, self._reports = now, 0
        self._does(then)
        if reports:
            print(f"indiclip: rank {self._rank} goes on after {seconds:.0f} s: {then}", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        while not self._stop.wait(min(self.timeout_seconds / 10, 5.0)):
            faulthandler.dump_traceback_later(self.timeout_seconds, file=_STDERR)
            since = self._since
            if time.monotonic() - since < self.timeout_seconds * 2**self._reports:
                continue
            brief, whole = map(mask, self._report())
            with self._lock:
                if since != self._since:  # a step ended while the workers were asked
                    continue
                self._reports += 1
            print(brief, file=sys.stderr, flush=True)  # first: the run's folder may be what does not answer
            try:
                with self._file.open("a") as file:
                    file.write(whole)
            except OSError as error:
                print(f"  the stacks were not written: {error}", file=sys.stderr, flush=True)
        faulthandler.cancel_dump_traceback_later()

    def _report(self) -> tuple[str, str]:
        """A few lines for stderr, and all stacks for the file."""
        what, since = self._state
        now = time.monotonic()
        head = (
            f"indiclip: rank {self._rank}: no step has ended for {now - self._since:.0f} s; it has been {what} for "
            f"{now - since:.0f} s"
        )
        own = own_reading()
        if own.name:
            head += f", reading {own.name} for {own.seconds:.0f} s"
        stack = traceback.extract_stack(sys._current_frames()[self._watched])
        frames = [(frame.filename, frame.lineno, frame.name) for frame in reversed(stack)]
        brief = [head, f"  rank {self._rank} itself: {_innermost(frames)}"]
        whole = [f"{time.strftime('%Y-%m-%d %H:%M:%S')} {head}", "", *_own_stacks()]
        for workers in living_workers():
            lines, stacks = _ask(workers)
            brief += lines
            whole += stacks
        return "\n".join([*brief, f"  all stacks: {self._file}"]), "\n".join(whole) + "\n\n"


def _own_stacks() -> list[str]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    del frames[threading.get_ident()]
    return [
        f"{names.get(ident, ident)} (most recent call last):\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames.items()
    ]


def _ask(workers: Workers) -> tuple[list[str], list[str]]:
    """A line for each worker that reads and one for the rest, and every worker's stacks."""
    reading = [workers.reading(i) for i in range(len(workers.processes))]  # before the question disturbs them
    lines, whole, idle = [], [], 0
    for i, stacks in enumerate(workers.stacks()):
        stacks = re.sub(r"(?<=in _worker_loop\n)(  File .*\n?)*", "", stacks)  # the rest is how it was started
        state = f"reads {reading[i].name} for {reading[i].seconds:.0f} s" if reading[i].name else "waits for work"
        state = state if workers.processes[i].is_alive() else "is gone"
        whole += [f"{workers.label(i)} {state}", stacks or "no answer: it is stuck in the kernel, or still starts\n"]
        if state == "waits for work":
            idle += 1
            continue
        innermost = stacks.rpartition("most recent call first")[2]  # faulthandler's last is the main thread
        frames = _FRAME.findall(innermost)
        lines.append(f"  {workers.label(i)} {state}: {_innermost(frames) if frames else 'no answer'}")
    if idle:
        lines.append(f"  {idle} of {len(reading)} {workers.name} workers wait for work")
    return lines, whole


def _innermost(frames: list[Any]) -> str:
    """`function (file:line)` of the innermost calls, the innermost first, without the standard library's own."""
    frames = list(itertools.dropwhile(lambda frame: Path(frame[0]).is_relative_to(_STANDARD_LIBRARY), frames)) or frames
    return " < ".join(f"{name} ({Path(file).name}:{line})" for file, line, name in frames[:_FRAMES])
