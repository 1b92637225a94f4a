"""Processes that tests start. All of them are ended with the test, however it ends.

- `on_ranks`: a function of ours on each rank of a gloo group, for what it returns. A rank that raises is an error here.
- `in_processes`, `as_ranks`: commands, for their exit statuses, what they print and leave behind, or to be killed.
- `two_ranks`: `indiclip fit` on two ranks, as torchrun or as Lightning starts them.
- `forked`: one process, for a test that does something to it while it runs; `holding`: one that has a folder's lock.

They fork, since a new Python imports for seconds. One that must be new (another start method, the end of the
interpreter) is started by `subprocess`, with the variables of `environment`.
"""

import contextlib
import faulthandler
import gc
import os
import pickle
import secrets
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from indiclip.loading.workers import end_with_the_parent
from indiclip.training.cli import run
from indiclip.training.run_folder import lock

TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Ended:
    """What processes did together. Each was the leader of a process group, of which nothing lives any more.

    Attributes:
        statuses: Of each process, as `subprocess` gives them.
        stdout: What all of them wrote.
        stderr: Likewise.
    """

    statuses: list[int]
    stdout: str
    stderr: str

    @property
    def returncode(self) -> int:
        """The status with which every process ended."""
        first, *others = self.statuses
        assert all(other == first for other in others), f"statuses {self.statuses}\n{self.stderr[-3000:]}"
        return first


@contextlib.contextmanager
def forked(work: Callable[[], int], folder: Path) -> Iterator[int]:
    """The id of a process that exits with what `work` returns or raises; it is killed at the end of the block.

    It leads a session of its own, all of which is killed with it. What it writes is added to the files `out` and `err`
    of the folder.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        _exit_with(work, folder)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # it has ended, and was asked for its status
            if os.waitpid(process, os.WNOHANG) == (0, 0):
                os.kill(process, signal.SIGKILL)  # it may not have had its session yet
                os.waitpid(process, 0)


def _exit_with(work: Callable[[], int], folder: Path) -> NoReturn:
    """Nothing that is raised may leave this function: the process would go on as a second pytest."""
    status = 1
    try:
        gc.freeze()  # an old loader, were it collected here, would end the workers of the parent
        os.setsid()
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        end_with_the_parent()
        faulthandler.enable(sys.stderr)  # of a process that C++ aborts, its stacks are all that there is
        torch.set_num_threads(1)
        status = _status(work)
    except BaseException:
        sys.stderr.write(traceback.format_exc())  # at once: several processes write to this file
    finally:
        try:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):  # such as a full disk, on purpose
                    stream.flush()
        finally:
            os._exit(status)


def _status(work: Callable[[], int]) -> int:
    """As Python's own of a script that ends with `sys.exit(work())`."""
    try:
        code: Any = work()
    except SystemExit as end:
        code = end.code
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def as_they_end(processes: list[int], seconds: float = 240.0) -> Iterator[tuple[int, int]]:
    """Each of forked processes with its status, as `subprocess` gives it, in the order in which they end.

    Raises:
        TimeoutError: Some run for longer than so many seconds.
    """
    running, end = set(processes), time.monotonic() + seconds
    while running:
        for process in sorted(running):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                running.remove(process)
                yield process, os.waitstatus_to_exitcode(status)
        if running and time.monotonic() > end:
            raise TimeoutError(f"{len(running)} of {len(processes)} processes still run after {seconds} s")
        time.sleep(0.02)


@contextlib.contextmanager
def holding(folder: Path, output: Path) -> Iterator[int]:
    """The id of a process that has a folder's lock, until the end of the block."""
    output.mkdir()
    held = output / "held"

    def hold() -> int:
        lock(folder)
        held.touch()
        while True:
            time.sleep(1)

    with forked(hold, output) as process:
        wait_until(held.exists)
        yield process


def in_processes(works: list[Callable[[], int]], folder: Path) -> Ended:
    """What processes did together, one for each of `works`. It is an error where a child of theirs outlives them."""
    output = Path(tempfile.mkdtemp(prefix="output", dir=folder))
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(forked(work, output)) for work in works]
        try:
            statuses = dict(as_they_end(processes))
            wait_until(lambda: not any(living(process) for process in processes))
        except (TimeoutError, AssertionError) as error:
            error.add_note((output / "err").read_text()[-3000:])
            raise
    out, err = ((output / name).read_text() for name in ("out", "err"))
    return Ended([statuses[process] for process in processes], out, err)


def alone(backend: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The test, whose first argument is `tmp_path`, in a process of its own, where torch compiles with this backend.

    Once a process has compiled a backward pass, none that is forked from it can run one.
    """

    def decorated(test: Callable[..., None]) -> Callable[..., None]:
        def work(*args: Any, **arguments: Any) -> int:
            torch.compile = partial(torch.compile, backend=backend)
            torch._inductor.config.compile_threads = 1  # its workers would outlive this process
            test(*args, **arguments)
            return 0

        @wraps(test)
        def in_a_process(tmp_path: Path, **arguments: Any) -> None:
            done = in_processes([partial(work, tmp_path, **arguments)], tmp_path)
            assert done.statuses == [0], done.stderr[-3000:]

        return in_a_process

    return decorated


def as_ranks(work: Callable[[], int], folder: Path, world: int = 2) -> Ended:
    """What `work` did in each of `world` processes that know what torchrun tells those of one machine."""
    port = free_port()
    names = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_RUN_ID": "none"}
    names |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0", "MASTER_PORT": str(port)}

    def rank_work(rank: int) -> int:
        os.environ.update(names | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        return work()

    return in_processes([partial(rank_work, rank) for rank in range(world)], folder)


def free_port() -> int:
    """One that Linux gives nobody who asks for any (32,768 and above): it is seconds until the first rank listens."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as chosen, contextlib.suppress(OSError):
            chosen.bind(("", port))
            return port


def two_ranks(folder: Path, tree: dict[str, Any], *flags: str, started_by: str = "torchrun") -> tuple[Ended, Path]:
    """What `indiclip fit` did on two ranks, and the run's folder.

    Where Lightning starts the second rank, which costs the imports twice, the status is the first one's alone.
    """
    tree["trainer"] |= {"devices": 2, "accelerator": "cpu"}
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(tree))
    words = ["fit", "--config", str(file), "--runs", str(folder / "runs"), *flags]
    if started_by == "torchrun":
        return as_ranks(lambda: run(words), folder), folder / "runs" / "experiment"
    return in_processes([lambda: command(*words)], folder), folder / "runs" / "experiment"


def command(*words: str) -> NoReturn:
    """Go on as `indiclip` in a new Python."""
    os.execve(sys.executable, [sys.executable, "-m", "indiclip.cli", *words], environment())


def environment() -> dict[str, str]:
    """Variables for a new Python that has the tests' and our modules at hand."""
    paths = [str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def on_ranks(world: int, function: Callable[[int], Any], folder: Path, seconds: float = 120.0) -> list[Any]:
    """What `function(rank)` gives in each of `world` processes of one gloo group.

    Raises:
        RuntimeError: One of them raised, and with it ends the call; the message has its traceback.
    """
    output = Path(tempfile.mkdtemp(prefix="ranks", dir=folder))

    def work(rank: int) -> int:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        address = f"file://{output}/meet"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
        (output / f"{rank}").write_bytes(pickle.dumps(function(rank)))
        torch.distributed.destroy_process_group()
        return 0

    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(forked(partial(work, rank), output)) for rank in range(world)]
        for process, status in as_they_end(processes, seconds):
            if status:
                error = (output / "err").read_text()
                raise RuntimeError(f"rank {processes.index(process)} ended with status {status}\n{error}")
    return [pickle.loads((output / f"{rank}").read_bytes()) for rank in range(world)]


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    """Look every 50 ms whether something is so; it is an error where it is not after so many seconds."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    assert true()


def alive(process: int) -> bool:
    """Whether a process runs. One that has ended and waits to be asked for its status is not alive."""
    return _group(process) is not None


def living(group: int) -> list[int]:
    """The processes of a process group that are alive."""
    everyone = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [process for process in everyone if _group(process) == group]


def _group(process: int) -> int | None:
    """The process group of a process that is alive."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the latter where it ends while it is read
        state, _, group, *_ = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
        return None if state in b"ZX" else int(group)
    return None
