"""The ranks of a run end together: none is left waiting for one that is gone."""

import os
import re
import sys
import threading
from subprocess import Popen
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from indiclip.lightning_internals import take_processes

# Gloo's, the sockets' and NCCL's words for a peer that is gone.
_GONE = re.compile(r"Connection closed by peer|Connection reset by peer|Broken pipe|remote process exit")
_POLL_SECONDS = 0.5
_STARTER = "INDICLIP_STARTER"  # pid of the process that starts others


class LocalRanks(Callback):
    """Ends the ranks that Lightning started on this machine when one of them is gone.

    A rank that waits for another in a collective may do so for many minutes (NCCL), and then ignores SIGTERM. So the
    first process watches the ones it started, and those watch it. torchrun and SLURM do so by themselves. Replaces
    Lightning's own observer, which kills the first process while that is still saying why it ends.

    Args:
        grace_seconds: How long a rank may go on after another is gone, to end by itself and say why.
    """

    def __init__(self, grace_seconds: float = 10.0) -> None:
        self.grace_seconds = grace_seconds
        self._stop = threading.Event()
        # Lightning starts the other ranks with this process's environment, and they come here too.
        parent_is_rank = os.environ.get(_STARTER) == str(os.getppid())
        self._started_by_rank = parent_is_rank and os.environ.get("LOCAL_RANK", "0") != "0"
        os.environ[_STARTER] = str(os.getpid())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        children = take_processes(trainer)
        if children or self._started_by_rank:
            self._stop.clear()
            threading.Thread(target=self._watch, args=(children, os.getppid()), name="ranks", daemon=True).start()

    def teardown(self, *_: Any, **__: Any) -> None:
        self._stop.set()

    on_exception = teardown  # this rank ends by itself

    def _watch(self, children: list[Popen[Any]], parent: int) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            failed = next((child for child in children if child.poll()), None)
            if failed is None and (children or os.getppid() == parent):
                continue
            if self._stop.wait(self.grace_seconds):
                return
            for child in children:
                child.kill()
            gone = f"process {failed.pid}, status {failed.returncode}" if failed else "the first process"
            print(f"indiclip: another rank is gone ({gone}), so this one ends too", file=sys.stderr, flush=True)
            os._exit(1)  # the main thread may be in a collective for a long time yet


def explain(error: BaseException) -> str | None:
    """One line for an error that came of another rank's end; None for any other."""
    lost = isinstance(error, RuntimeError) and _GONE.search(str(error))
    if lost or isinstance(error, torch.distributed.DistNetworkError):
        return "another rank is gone, and with it the run; what that rank said is why"
    return None
