"""The processes of a run are those that its trainer expects, and all of them run the same."""

import hashlib
import inspect
import json
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

import indiclip
from indiclip.distributed import gathered
from indiclip.module import MultiTask
from indiclip.training.fault_tolerance.ranks import AgreedStop

_SECONDS_TO_SAY_WHY = 2.0
_ASKED = "indiclip/asked"  # in the store: how many ranks have
_SECONDS_TO_RESOLVE = 60.0  # a cluster may come to know its first host some time after the others have started
_SECONDS_TO_MEET = 60.0  # after which it is said that ranks are waited for; torch gives up after thirty minutes
# Which Lightning reads where neither torchrun nor SLURM has started the processes.
_OF_NODES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")


def check_launch(num_nodes: int, devices: int) -> None:
    """Compare the trainer with what started this process.

    Args:
        num_nodes: The trainer's.
        devices: The trainer's, of each node.

    Raises:
        ValueError: Not so many processes were started: those that the trainer does not know of would each train for
            themselves, in one folder; others would be waited for. Or a variable by which nodes meet is wrong.
    """
    found = f"{num_nodes} x {devices}"
    if TorchElasticEnvironment.detect():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        nodes = int(os.environ.get("WORLD_SIZE", "1")) // local
        if (nodes, local) != (num_nodes, devices):
            raise ValueError(
                f"trainer.devices: torchrun started {nodes} x {local} processes (nodes x processes of each), and the "
                f"trainer has {found}; expected --trainer.num_nodes {nodes} --trainer.devices {local}"
            )
    elif SLURMEnvironment.detect():
        tasks = int(os.environ.get("SLURM_NTASKS", "1"))
        if tasks != num_nodes * devices:
            nodes = int(os.environ.get("SLURM_NNODES", "1"))
            raise ValueError(
                f"trainer.devices: SLURM started {tasks} tasks on {nodes} nodes, and the trainer has {found}; expected "
                f"--trainer.num_nodes {nodes} --trainer.devices {tasks // nodes}, with srun for each of them"
            )
    elif num_nodes > 1 and (unset := [name for name in _OF_NODES if name not in os.environ]):
        raise ValueError(  # without the port or the number each node would wait for itself
            f"trainer.num_nodes: found {num_nodes}, and not set: {', '.join(unset)}, so the nodes cannot meet; "
            "expected torchrun or srun, or MASTER_ADDR, MASTER_PORT and NODE_RANK on every node; or, on one machine, "
            "--trainer.num_nodes 1"
        )
    elif num_nodes > 1:
        _check_number("MASTER_PORT", 1, 65535)
        _check_number("NODE_RANK", 0, num_nodes - 1)
        _check_host()


def _check_number(name: str, least: int, most: int) -> None:
    found = os.environ[name]
    if not found.isdecimal() or not least <= int(found) <= most:
        raise ValueError(f"{name}: found {found!r}; expected a number from {least} to {most}")


def _check_host() -> None:
    host, end, told = os.environ["MASTER_ADDR"], time.monotonic() + _SECONDS_TO_RESOLVE, False
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:
            line = f"MASTER_ADDR: this machine knows no host {host!r} ({error})"
            if isinstance(error, UnicodeError) or time.monotonic() >= end:
                raise ValueError(f"{line}; expected that of node 0") from error
            if not told:
                seconds = f"{_SECONDS_TO_RESOLVE:.0f} s"
                print(f"indiclip: {line}; asking again for {seconds}", file=sys.stderr, flush=True)
            told = True
            time.sleep(1.0)


def explain(error: BaseException) -> str | None:
    """One line for ranks that did not meet; None for any other error. Of torch 2.15's words; 2.11 has the same."""
    if not isinstance(error, torch.distributed.DistError):
        return None
    if taken := re.search(r"failed to listen .* port: (\d+).* message: ([^.]*)", str(error)):
        return f"MASTER_PORT: rank 0 cannot listen at {taken[1]}: {taken[2]}; expected a free port"
    if nobody := re.search(r"(?:trying to connect to|any network address of) \(([^,]*), (\d+)\)", str(error)):
        return f"MASTER_ADDR, MASTER_PORT: no rank 0 was found at {nobody[1]}:{nobody[2]}"
    if missing := re.search(r"after (\d+) seconds waiting for clients. (\d+)/(\d+) clients joined", str(error)):
        return f"only {missing[2]} of {missing[3]} ranks came in {missing[1]} seconds"
    return None


def speaks(message: str, is_consequence: bool = False) -> bool:
    """Whether this process is the first of the run to say this.

    Before training every rank finds what is wrong by itself, mostly the same. Ranks that have not met yet, or whose
    store is gone, do not know of each other, and each says it.

    Args:
        message: Without what each rank says otherwise.
        is_consequence: Of another rank's end, which is said only where no rank has said why.
    """
    try:
        store = _store()
        if store is None:
            if SLURMEnvironment.detect() and os.environ.get("SLURM_PROCID", "0") != "0":
                time.sleep(_SECONDS_TO_SAY_WHY)  # srun --kill-on-bad-exit ends it when the first has said why
            return True
        is_first = _is_first(store, message, is_consequence)
        store.add(_ASKED, 1)
        return is_first
    except (KeyError, ValueError, RuntimeError):  # torch's own of a store that is gone
        return True


def _is_first(store: Store, message: str, is_consequence: bool) -> bool:
    of_start = f"indiclip/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if not is_consequence:
        store.set(f"{of_start}/why", "said")
    elif _is_set(store, f"{of_start}/why"):
        return False
    said: int = store.add(f"{of_start}/{hashlib.sha256(message.encode()).hexdigest()}", 1)
    return said == 1


def _torchrun_has_store() -> bool:
    """One that outlives the ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store() -> Store | None:
    """Which all ranks ask: torchrun's, or that over which they have met. None before they have."""
    if _torchrun_has_store():
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(host, port, is_master=False, wait_for_workers=False)
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return torch.distributed.distributed_c10d._get_default_store()  # private; torch 2.11 and 2.15 have it
    return None


def wait_for_others() -> None:
    """Let the other ranks ask, for a moment, where this process has the store: it goes with it."""
    if _torchrun_has_store() or (store := _store()) is None:
        return
    world, end = torch.distributed.get_world_size(), time.monotonic() + _SECONDS_TO_SAY_WHY
    while torch.distributed.get_rank() == 0 and store.add(_ASKED, 0) < world and time.monotonic() < end:
        time.sleep(0.05)


def _is_set(store: Store, key: str) -> bool:
    """Whether it is in a store, or is soon: the rank that ended first may still be about to say why."""
    end = time.monotonic() + _SECONDS_TO_SAY_WHY
    while not store.check([key]):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


class SameOnAllRanks(Callback):
    """Ends a run whose ranks have different code or configurations, before they wait for each other in vain.

    Args:
        config: Of the run, plain values.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self._waiting: threading.Timer | None = None

    def before_meeting(self, trainer: Trainer) -> None:
        """To be called before the trainer begins: torch waits half an hour for a rank, and says nothing."""
        if trainer.world_size > 1 and trainer.local_rank == 0:
            self._waiting = threading.Timer(_SECONDS_TO_MEET, _say_waiting, [trainer.world_size])
            self._waiting.daemon = True
            self._waiting.start()

    def on_exception(self, *_: Any) -> None:
        self._end_waiting()

    def _end_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end_waiting()
        if trainer.world_size == 1:
            return
        text = json.dumps(self.config, sort_keys=True, default=str)
        assert isinstance(pl_module, MultiTask)
        own = {"code": _code(pl_module), "configuration": hashlib.sha256(text.encode()).hexdigest()}
        for what, mine in own.items():
            digests = gathered(mine)
            others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            if others:
                raise AgreedStop(
                    trainer, f"the {what} of rank {', '.join(map(str, others))} is not that of rank 0; expected one", 2
                )


def _say_waiting(world: int) -> None:
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    print(f"indiclip: waiting for all of {world} ranks to meet at {place}", file=sys.stderr, flush=True)


def _code(module: MultiTask) -> str:
    """A digest of our Python files and of those of the heads."""
    files = sorted(Path(str(indiclip.__file__)).parent.rglob("*.py"))
    files += [Path(inspect.getfile(type(head))) for head in module.each_head()]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
