"""The same work on many things, in processes, with a progress bar."""

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch.utils.data import Dataset

from indiclip.loading.workers import StepLoader

Job = TypeVar("Job")
Result = TypeVar("Result")
_PAUSE = 30  # seconds between lines in a log


class _Results(Dataset[Any]):
    def __init__(self, work: Callable[[Any], Any], tasks: Sequence[Any]) -> None:
        self.work, self.tasks = work, tasks

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.work(self.tasks[index])
        except (OSError, ValueError) as error:  # for the user; the DataLoader would hand over a page of traceback
            return error


def results(work: Callable[[Job], Result], tasks: Sequence[Job], workers: int | None, what: str) -> Iterator[Result]:
    """`work(task)` of every task, in order; a few are done ahead of the one that is asked for.

    A DataLoader does it, because its processes end with this one, and it notices when one of them is killed.

    Args:
        work: A function of a module.
        workers: Processes; 0 works in this one, None takes one per processor.
        what: What is done, for the progress bar, or the lines in a log.

    Raises:
        OSError, ValueError: As `work` does.
        RuntimeError: A process was killed.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers, len(tasks) - 1)  # a single task needs no process
    running = _start(work, tasks, max(workers, 0))  # before the bar starts a thread
    with progress_bar(len(tasks), what) as advance:
        for result in running:
            if isinstance(result, Exception):
                raise result
            advance(1)
            yield result


@contextmanager
def progress_bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, or a line now and then where that is no terminal.

    What it gives is called with how many more are done.
    """
    if not sys.stderr.isatty():
        yield _lines(total, what)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda number: bar.advance(task, number)


def _lines(total: int, what: str) -> Callable[[int], None]:
    done, said = 0, time.monotonic()

    def advance(number: int) -> None:
        nonlocal done, said
        done += number
        if time.monotonic() - said >= _PAUSE:
            said = time.monotonic()
            print(f"{what} {done:,} of {total:,}", file=sys.stderr, flush=True)

    return advance


class _Rate(ProgressColumn):
    """How many are done in a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


def _start(work: Callable[[Any], Any], tasks: Sequence[Any], workers: int) -> Any:
    # The processes never see Ctrl-C: this one ends them, and they do not wait for their results to be read.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more than processors, as asked for
            loader = StepLoader(_Results(work, tasks), batch_size=None, num_workers=workers, collate_fn=_as_it_is)
            return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _as_it_is(result: Any) -> Any:
    return result
