"""Elastic training on this machine's CPU: two nodes, of which one is killed and comes back, or two processes of one.

    python tools/try_two_nodes.py              # as root, with ip (apt-get install iproute2); two minutes
    python tools/try_two_nodes.py --one-node   # two processes of one torchrun, one killed; any user

A node is a network namespace with an address of its own; a pair of virtual network cards joins the two. On each runs
the line of conf/cluster/elastic.yaml with one process. In the middle of training everything on the second node gets
SIGKILL: torchrun goes on with the first alone, from the last checkpoint. Later the second node comes back, and both go
on, again from the last checkpoint, to the end. Then the samples of every step and the weights are compared with those
of a process that nobody disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import _small_run
from _small_run import STEPS, wait_until

ELASTIC = Path(__file__).resolve().parent.parent / "conf" / "cluster" / "elastic.yaml"
PORT = "29400"


class Node:
    """A network namespace, or the machine itself.

    Args:
        name: Of the namespace and of its network card; empty for the machine itself.
        address: Of the card.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, folder: Path, torchrun: list[str]) -> None:
        """Run torchrun on it, with the words that are this node's own."""
        words = [sys.executable, "-m", "torch.distributed.run", *torchrun, "--max-restarts", "5", "-m", "indiclip"]
        words += ["fit", "--config", str(folder / "experiment.yaml"), "--config", str(ELASTIC)]
        words += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
        words += ["--runs", str(folder / "runs"), "--ckpt_path", "last"]
        words = [*(["ip", "netns", "exec", self.name] if self.name else []), *words]
        environment = _small_run.variables(
            GLOO_SOCKET_IFNAME=self.name or "lo",
            INDICLIP_PAUSE="0.2",
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",  # see the config
        )
        with (folder / f"{self.name or 'output'}.txt").open("ab") as output:
            self.process = subprocess.Popen(
                words, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def processes(self) -> list[int]:
        """Ids of all that runs on it and was started here, torchrun first."""
        if self.name:
            shown = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
            return sorted(map(int, shown.stdout.split()))
        return [self.process.pid, *children(self.process.pid)] if self.process else []

    def kill(self) -> None:
        """As when the power fails, but that the other side hears of it."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if self.process:
            self.process.wait()


def children(process: int) -> list[int]:
    """Ids of the processes that a process has started."""
    with contextlib.suppress(FileNotFoundError):
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []


@contextlib.contextmanager
def two_nodes() -> Iterator[list[Node]]:
    """Namespaces that are joined; they and all that runs in them are gone in the end."""
    nodes = [Node(f"try{os.getpid()}-{side}", f"10.77.0.{number}") for number, side in enumerate("ab", 1)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for node in nodes:
            ip("netns", "add", node.name)
        first, second = (node.name for node in nodes)
        ip("link", "add", first, "netns", first, "type", "veth", "peer", "name", second, "netns", second)
        for node in nodes:
            ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", node.name)
            ip("-n", node.name, "link", "set", node.name, "up")
            ip("-n", node.name, "link", "set", "lo", "up")
        yield nodes
    finally:
        for node in nodes:
            node.kill()
            subprocess.run(["ip", "netns", "delete", node.name], check=False, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def this_machine() -> Iterator[Node]:
    """The machine itself; what was started on it is gone in the end."""
    node = Node("", "127.0.0.1")
    try:
        yield node
    finally:
        node.kill()


def wait_for_step(folder: Path, start: int, ranks: int, node: Node) -> None:
    """Wait until that start, on so many ranks, has done seven steps of its own: one at least is after a checkpoint."""

    def there() -> bool:
        assert node.process is not None
        if node.process.poll() is not None:
            raise RuntimeError(f"torchrun ended with {node.process.returncode}")
        done = _small_run.starts(folder)
        return len(done) >= start and done[-1][0] == ranks and done[-1][2] - done[-1][1] >= 6

    wait_until(there, f"seventh step of start {start} on {ranks} ranks")


def lose_a_node(folder: Path) -> int:
    """Train on two nodes, one of which is killed and comes back. Returns the status of the first."""
    with two_nodes() as (first, second):
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first.address}:{PORT}"]

        def start(node: Node) -> None:
            is_host = ["--rdzv-conf", f"is_host={node is first}"]  # else torchrun goes by the name of the machine
            own = ["--nnodes", "1:2", "--nproc-per-node", "1", "--local-addr", node.address]
            node.start(folder, [*meet, *is_host, *own])

        start(first)
        start(second)
        wait_for_step(folder, 1, 2, first)
        print(f"killing the second node: processes {second.processes()}", flush=True)
        second.kill()
        wait_for_step(folder, 2, 1, first)
        print("the second node comes back", flush=True)
        start(second)
        wait_for_step(folder, 3, 2, first)
        assert first.process is not None
        return first.process.wait(180)


def lose_a_process(folder: Path) -> int:
    """Train in two processes of one torchrun, one of which is killed. Returns torchrun's status."""
    with this_machine() as node:
        node.start(folder, ["--standalone", "--nproc-per-node", "2"])
        wait_for_step(folder, 1, 2, node)
        assert node.process is not None
        victim = children(node.process.pid)[-1]
        print(f"killing process {victim}", flush=True)
        os.kill(victim, signal.SIGKILL)
        wait_for_step(folder, 2, 2, node)
        return node.process.wait(180)


def main() -> int:
    """Print what each start did and what was compared. Returns 1 where the run did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one-node", action="store_true", help="two processes without namespaces")
    parser.add_argument("--folder", type=Path, help="where all of it lies and stays (default: a temporary folder)")
    arguments = parser.parse_args()
    if not arguments.one_node and (os.geteuid() or shutil.which("ip") is None):
        print("try_two_nodes: namespaces need root and ip (iproute2); or --one-node", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that all is cleaned up
    place = Path(tempfile.mkdtemp(prefix="elastic-", dir=arguments.folder)).resolve()
    try:
        other = _small_run.reference(place / "undisturbed")
        folder = _small_run.prepared(place / "elastic")
        try:
            status = (lose_a_process if arguments.one_node else lose_a_node)(folder)
        except (RuntimeError, TimeoutError, subprocess.TimeoutExpired):
            for output in folder.glob("*.txt"):
                print(f"--- {output.name}\n{output.read_text()[-5000:]}")
            raise
        for number, (ranks, begin, end) in enumerate(_small_run.starts(folder), 1):
            print(f"start {number}: steps {begin} to {end} on {ranks} rank{'s' * (ranks > 1)}")
        assert status == 0, f"torchrun ended with {status}"
        difference = _small_run.compare(folder, other)
        same = f"{STEPS} steps with the samples of an undisturbed process"
        print(f"{same}; largest difference of a weight {difference:.1e}")
        return int(difference > 1e-5)
    finally:
        if not arguments.folder:
            shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
