"""tools/slurm/train.sbatch on a real SLURM of this machine alone: a job that is signalled and requeued still ends well.

    apt-get install slurm-wlm munge
    python tools/try_slurm.py [--folder FOLDER]          # as root, in two to three minutes

A SLURM of its own (munged, slurmctld, and a slurmd for each of two nodes that are both this machine) runs from a
temporary folder on the loopback interface; there is no cgroup and no GPU, and what is called a GPU is only counted. The
job trains a small model with a process on each node, and has to start three times:

1. It gets SIGUSR1, as before its time is over: it saves and puts itself into the queue again.
2. `scontrol requeue`, as a preemption does: SLURM ends it with SIGTERM, and it saves.
3. It goes on to its end.

Then the samples of every step and the weights are compared with those of a process that nobody disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import _small_run
from _small_run import STEPS, wait_until

SBATCH = Path(__file__).resolve().parent / "slurm" / "train.sbatch"
NODES = 2
SLURM_CONF = """
ClusterName=try
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket,cred_expire=5
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SchedulerParameters=sched_interval=2
KillWait=60
MailProg=/bin/true
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
"""


def write_configuration(place: Path) -> None:
    """What the daemons read."""
    host = socket.gethostname().partition(".")[0]
    ports = free_ports(NODES + 1)
    lines = [SLURM_CONF.format(host=host, place=place, port=ports[0])]
    for number, port in enumerate(ports[1:], 1):
        lines.append(f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 Gres=gpu:1")
    lines.append(f"PartitionName=all Nodes=n[1-{NODES}] Default=YES State=UP")
    (place / "slurm.conf").write_text("\n".join(lines) + "\n")
    (place / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    (place / "munge.key").write_bytes(os.urandom(128))
    (place / "munge.key").chmod(0o600)
    (place / "state").mkdir()


def free_ports(count: int) -> list[int]:
    """Numbers of ports that nobody listens at."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def daemons(place: Path, environment: dict[str, str]) -> Iterator[None]:
    """Run munged, slurmctld and the slurmds, and end them by their ids."""
    munged = ["munged", "--foreground", "--force", f"--key-file={place}/munge.key", f"--socket={place}/munge.socket"]
    munged += [f"--pid-file={place}/munged.pid", f"--log-file={place}/munged.log", f"--seed-file={place}/munged.seed"]
    commands = {"munged": munged, "slurmctld": ["slurmctld", "-D", "-i"]}
    commands |= {f"n{number}": ["slurmd", "-D", "-N", f"n{number}"] for number in range(1, NODES + 1)}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name, words in commands.items():
            with (place / f"{name}.txt").open("wb") as output:
                started.append(subprocess.Popen(words, env=environment, stdout=output, stderr=output))
            if name == "munged":
                wait_until((place / "munge.socket").exists, "socket of munged", 20)
        yield
    finally:
        for daemon in reversed(started):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()


class Slurm:
    """The commands of SLURM.

    Args:
        environment: With SLURM_CONF.
        folder: Where jobs are submitted.
    """

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.environment, self.folder = environment, folder

    def __call__(self, *words: str) -> str:
        """What a command prints. Raises CalledProcessError."""
        done = subprocess.run(words, env=self.environment, cwd=self.folder, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        shown = self("scontrol", "show", "job", "--oneliner", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def is_up(self) -> bool:
        """Whether all nodes wait for jobs."""
        with contextlib.suppress(subprocess.CalledProcessError):
            return self("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle"] * NODES
        return False


def try_job(slurm: Slurm, folder: Path) -> Path:
    """Submit, signal, requeue. Returns the job's log."""
    words = ["sbatch", "--parsable", f"--nodes={NODES}", "--ntasks-per-node=1", "--gpus-per-node=1"]
    words += ["--cpus-per-task=1", "--time=20", "--job-name=try", str(SBATCH)]
    words += ["--config", str(folder / "experiment.yaml"), "--runs", str(folder / "runs")]
    job = slurm(*words)
    log = folder / f"try-{job}.log"

    def trains_in(start: int) -> bool:
        """Whether that start has done three steps of its own."""
        done = _small_run.starts(folder)
        ended = slurm.job(job)["JobState"] in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "COMPLETED")
        if ended:
            raise RuntimeError(f"the job is {slurm.job(job)['JobState']}")
        return len(done) == start and done[-1][2] - done[-1][1] >= 3

    try:
        wait_until(lambda: trains_in(1), "third step of the first start")
        slurm("scancel", "--signal=USR1", job)  # to all tasks, as --signal=USR1@180 does
        wait_until(lambda: trains_in(2), "third step of the second start")
        slurm("scontrol", "requeue", job)
        wait_until(lambda: trains_in(3), "third step of the third start")
        wait_until(lambda: slurm.job(job)["JobState"] not in ("RUNNING", "COMPLETING"), "end of the job")
        found = slurm.job(job)
        assert found["JobState"] == "COMPLETED", found["JobState"]
        assert found["Restarts"] == "2", found["Restarts"]
    finally:
        if log.exists():
            print(log.read_text())
        with contextlib.suppress(subprocess.CalledProcessError):
            slurm("scancel", "--signal=KILL", "--full", job)
    return log


def main() -> int:
    """Print the job's log and what was compared. Returns 1 where it did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where all of it lies and stays (default: a temporary folder)")
    arguments = parser.parse_args()
    missing = [word for word in ("munged", "slurmctld", "slurmd", "srun", "sbatch") if shutil.which(word) is None]
    if missing:
        print(f"try_slurm: {', '.join(missing)} not found; apt-get install slurm-wlm munge", file=sys.stderr)
        return 2
    if os.geteuid():
        print("try_slurm: slurmd starts jobs as their users; expected root", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the daemons are ended
    place = Path(tempfile.mkdtemp(prefix="slurm-", dir=arguments.folder)).resolve()
    place.chmod(0o755)  # munged trusts no folder that others may write to
    try:
        write_configuration(place)
        command = place / "bin" / "indiclip"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m indiclip "$@"\n')
        command.chmod(0o755)
        environment = _small_run.variables(
            SLURM_CONF=str(place / "slurm.conf"),
            PATH=f"{command.parent}:{os.environ['PATH']}",
            MASTER_ADDR="127.0.0.1",  # n1 and n2 are no names of hosts
            GLOO_SOCKET_IFNAME="lo",
            INDICLIP_PAUSE="0.25",
        )
        other = _small_run.reference(place / "undisturbed")
        folder = _small_run.prepared(place / "job", accelerator="cpu", strategy="ddp")
        slurm = Slurm(environment, folder)
        with daemons(place, environment):
            wait_until(slurm.is_up, "idle node", 60)
            nodes = slurm("sinfo", "--noheader", "--format=%D nodes (%N)")
            print(slurm("sinfo", "--version"), "with", nodes, flush=True)
            log = try_job(slurm, folder)
        return report(folder, other, log.read_text())
    finally:
        if not arguments.folder:
            shutil.rmtree(place, ignore_errors=True)


def report(folder: Path, other: Path, log: str) -> int:
    """Compare the job with the run that nobody disturbed, and print it. Returns 1 where they differ."""
    for number, (ranks, first, last) in enumerate(_small_run.starts(folder), 1):
        print(f"start {number}: steps {first} to {last} on {ranks} ranks")
    assert "is queued again (1 of 20)" in log, "SIGUSR1 did not queue the job again"
    difference = _small_run.compare(folder, other)
    same = f"{STEPS} steps with the samples of an undisturbed process"
    print(f"{same}; largest difference of a weight {difference:.1e}")
    return int(difference > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
