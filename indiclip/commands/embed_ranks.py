"""The processes that embed together: those of `torchrun`, or the ones that `--processes` starts on this machine.

Each embeds parts of its own. They meet twice: when all are ready, so that a mistake is said once, and at the end.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from indiclip.commands.words import guarded
from indiclip.distributed import gathered, rank_and_world
from indiclip.loading.workers import end_with_the_parent

_LONGEST_DAYS = 365  # that one waits for another
_FIRST_SPEAKS_SECONDS = 1.0
_END_SECONDS = 10.0

Result = TypeVar("Result")


@contextmanager
def ranks() -> Iterator[None]:
    """Join the other processes where there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            raise ValueError("srun started several tasks that know nothing of each other; start one, with torchrun")
        yield
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // here))
    dist.init_process_group("gloo", timeout=timedelta(days=_LONGEST_DAYS))
    try:
        yield
    except RuntimeError as error:
        # Of the store, or gloo's own, whose words begin with its file: a process is gone, and has said why.
        if isinstance(error, dist.DistError) or "gloo/transport/" in str(error):
            raise RuntimeError(
                "another process has ended before its parts were done; the same command goes on"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def all_or_none(work: Callable[[], Result]) -> Result:
    """What `work` gives, unless it fails in any of the processes: then all end, and the first of them says why."""
    result, failed = None, None
    try:
        result = work()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        failed = error
    first = next(filter(None, gathered(failed)), None)
    if first is None:
        return result  # type: ignore[return-value]
    if rank_and_world()[0] == 0:
        raise first
    time.sleep(_FIRST_SPEAKS_SECONDS)  # torchrun ends all when one has ended
    raise SystemExit(1)


def launch(run: Callable[..., int], options: dict[str, Any], num_processes: int) -> int:
    """Do `run(**options)` in several processes, as torchrun would. Returns the first status that is not 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context, method = multiprocessing.get_context("spawn"), multiprocessing.get_start_method()  # CUDA survives no fork
    numbers = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes, "MASTER_PORT": port}
    processes = [
        context.Process(target=_rank, args=(run, options, method, {**numbers, "RANK": rank, "LOCAL_RANK": rank}))
        for rank in range(num_processes)
    ]
    started: list[BaseProcess] = []
    try:
        _start(processes, started)
        return _join(started)
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()
        for process in started:
            process.join(_END_SECONDS)
            process.kill()


def _start(processes: Sequence[BaseProcess], started: list[BaseProcess]) -> None:
    """Start them with Ctrl-C blocked: it is for this process, which ends the others."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for process in processes:
            process.start()
            started.append(process)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _join(processes: Sequence[BaseProcess]) -> int:
    running = list(processes)
    while running:
        wait([process.sentinel for process in running])
        for number, process in enumerate(processes):
            status = process.exitcode
            if status is None or process not in running:
                continue
            running.remove(process)
            if status < 0:
                raise RuntimeError(
                    f"process {number + 1} of {len(processes)} was killed by signal {-status}; the same command goes on"
                )
            if status:
                return status
    return 0


def _rank(run: Callable[..., int], options: dict[str, Any], method: str, numbers: dict[str, int]) -> None:
    end_with_the_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    multiprocessing.set_start_method(method, force=True)  # of loader processes
    os.environ.update({name: str(number) for name, number in numbers.items()}, MASTER_ADDR="127.0.0.1")
    sys.exit(guarded("indiclip embed", lambda: run(**options)))
