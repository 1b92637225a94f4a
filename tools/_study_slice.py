"""Processes of a study, some at a time and for some time: a slice, after which the same command goes on."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

FORK = multiprocessing.get_context("fork")  # a new Python imports for seconds, a hundred times in a study
_GRACE = 120.0  # seconds in which a run saves


@dataclass(frozen=True)
class Task:
    """A process to start.

    Attributes:
        seconds: Of CPU that it will take.
        act: What it does.
        ended: Told the exit status; gives what went wrong, or nothing.
    """

    key: tuple[str, str, str]
    seconds: float
    act: Callable[[], None]
    ended: Callable[[int], str]


class Slice:
    """Processes, some at a time, until nothing is left, the time is over or a signal comes.

    Args:
        jobs: Processes at a time.
        minutes: From now on.

    Attributes:
        failed: What went wrong in this slice: no more of that arm is done in it, and all again in the next one.
        signal: That ended it, else 0.
    """

    def __init__(self, jobs: int, minutes: float) -> None:
        self.jobs, self.end = jobs, time.monotonic() + 60 * minutes
        self.failed: dict[tuple[str, str, str], str] = {}
        self.signal = 0
        self._running: dict[Any, tuple[Task, float]] = {}
        self._begun, self._slowdown = 0, 1.0  # wall seconds of a CPU-second, of what has ended here

    def status(self, left: int) -> int:
        """Of the command, where so many runs are left."""
        if self.signal:
            print(f"ended by {signal.Signals(self.signal).name}")
            return 128 + self.signal
        return 1 if self.failed else 3 if left else 0

    def work(self, todo: Callable[[], Iterable[Task]]) -> None:
        """Start what is to be done, and wait for it."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            ended = True
            while not self.signal and time.monotonic() < self.end:
                if ended:  # else nothing new can be done, and to list what is left reads every file of the study
                    self._fill(todo())
                if not self._running:
                    break
                multiprocessing.connection.wait([process.sentinel for process in self._running], timeout=1.0)
                ended = self._reap()
        finally:
            self._stop()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _fill(self, tasks: Iterable[Task]) -> None:
        """Start as many as may run."""
        busy = {task.key for task, _ in self._running.values()}
        without = {arm for arm, _, _ in self.failed}
        open_tasks = [task for task in tasks if task.key not in busy and task.key[0] not in without]
        while len(self._running) < self.jobs and (task := self._next(open_tasks)) is not None:
            open_tasks.remove(task)
            self._start(task)

    def _note(self, number: int, _: Any) -> None:
        self.signal = self.signal or number

    def _next(self, tasks: list[Task]) -> Task | None:
        """The first that would end in time; where none would, one for each process, which goes on later."""
        left = self.end - time.monotonic()
        fits = next((task for task in tasks if task.seconds * self._slowdown < left), None)
        return fits or (tasks[0] if tasks and self._begun < self.jobs else None)

    def _start(self, task: Task) -> None:
        self._begun += 1
        sys.stdout.flush()
        process = FORK.Process(target=task.act)
        process.start()
        self._running[process] = (task, time.monotonic())
        print(f"{time.strftime('%H:%M')} {' '.join(task.key)}: about {task.seconds:.0f} CPU-seconds", flush=True)

    def _reap(self) -> bool:
        """Note how processes ended; whether any did."""
        ended = [process for process in self._running if process.exitcode is not None]
        for process in ended:
            task, since = self._running.pop(process)
            seconds = time.monotonic() - since
            self._slowdown = max(1.0, seconds / max(task.seconds, 1.0)) if task.seconds > 30 else self._slowdown
            if wrong := task.ended(process.exitcode):
                self.failed[task.key] = wrong
                print(f"{time.strftime('%H:%M')} {wrong}", file=sys.stderr, flush=True)
        return bool(ended)

    def _stop(self) -> None:
        """End what runs: it finishes its step and saves."""
        for process in self._running:
            process.terminate()
        for process, (task, _) in self._running.items():
            process.join(_GRACE)
            if process.is_alive():
                process.kill()
                process.join()
            if process.exitcode == 0:  # it was ending anyway
                task.ended(0)
        self._running.clear()
