"""Loader processes: what they note, signals to the group, how they end, and what is said of one that was killed."""

import multiprocessing
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from threading import Timer

import pytest
from experiments import config, fit
from processes import alive, environment, in_processes, two_ranks, wait_until
from torch.utils.data import Dataset
from trouble_reading import Troubles, loader

from indiclip.loading.workers import StepLoader, Workers, explain, kill_workers, living_workers, own_reading, reading

_IMPORTS = """
import multiprocessing, os, signal, subprocess, sys
from indiclip.loading.workers import living_workers, explain
from trouble_reading import Troubles, loader
"""


def run_python(code, *arguments):
    """A new process, leader of its own group, with the tests' and our modules at hand."""
    command = [sys.executable, "-c", f"{_IMPORTS}\n{code}", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, env=environment(), start_new_session=True)


def test_what_is_read_is_noted_for_as_long_as_it_is_read():
    class Keys:
        def key(self, index):
            return "शार्ड/" + "x" * 300 if index else "shard-0/a"

    with reading("contrastive", Keys(), 0):
        assert own_reading().name == "contrastive sample shard-0/a"
    with reading("contrastive", Keys(), 1):
        cut = own_reading().name  # by bytes, of which a Devanagari letter has three
        assert cut.startswith("contrastive sample शार्ड/xxx")
        assert len(cut.encode()) == 248
    assert own_reading() == ("", 0.0)


SIGNALLED = """
multiprocessing.set_start_method(sys.argv[1])
got = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: got.append(number))
seen = []
for _ in range(int(sys.argv[2])):
    with subprocess.Popen(["sh", "-c", "trap '' TERM; while kill -s TERM 0; do sleep 0.005; done"]) as storm:
        steps = iter(loader(Troubles("fine")))  # the workers start amid signals
        seen.append(next(steps))
        storm.kill()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.killpg(0, number)
    seen.extend(steps)
print(sorted(set(got)), len(seen), len(set(seen)))
"""


@pytest.mark.parametrize(("method", "times"), [("fork", 5), pytest.param("spawn", 1, marks=pytest.mark.slow)])
def test_signals_to_the_process_group_leave_the_workers_at_work(method, times):
    """What Ctrl-C and SLURM do, while the workers start and while they read."""
    with run_python(SIGNALLED, method, str(times)) as process:
        out, error = process.communicate(timeout=120)
    assert out.split() == ["[2,", "10,", "15]", str(24 * times), "24"], error


STUCK = """
steps = iter(loader(Troubles("stuck")))
next(steps), next(steps)
while living_workers()[0].reading(1).name != "c sample mela-0-5":
    pass
print(*[process.pid for process in living_workers()[0].processes], flush=True)
"""


def test_no_worker_outlives_a_killed_main_process():
    """Neither the one that is stuck in C code nor the idle ones."""
    with run_python(STUCK + "list(steps)") as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        assert all(alive(pid) for pid in pids)
        process.kill()
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_python_ends_though_a_worker_is_stuck():
    """multiprocessing ends its processes by SIGTERM, which ours ignore, and waits for them."""
    with run_python(STUCK) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert not any(alive(pid) for pid in pids)


def test_workers_that_are_stuck_can_be_ended_at_once_and_answer_before():
    steps = iter(loader(Troubles("stuck")))
    next(steps)
    group = living_workers()[0]
    next(steps)
    wait_until(lambda: group.reading(1).name == "c sample mela-0-5")
    idle, stuck = group.stacks()
    assert "in bring" not in idle
    assert re.search(r'trouble_reading.py", line \d+ in bring\n.* in __getitem__\n', stuck)  # though it holds the GIL
    kill_workers()  # and torch takes no notice
    assert not any(process.is_alive() for process in group.processes)


def test_a_killed_worker_is_an_error_only_where_it_is_waited_for():
    """torch's own handler raises it in the lines between, and in one of three hundred tries inside of a lock."""
    steps = iter(loader(Troubles("fine")))
    next(steps)
    killed = living_workers()[0].processes[1]
    killed.kill()
    wait_until(lambda: not killed.is_alive())
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(steps)


@pytest.mark.parametrize("method", ["fork", "spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_a_killed_worker_is_named_with_what_it_read(method):
    code = f"""
multiprocessing.set_start_method("{method}")
try:
    list(loader(Troubles("killed")))
except RuntimeError as error:
    print(explain(error))
"""
    with run_python(code) as process:
        out, _ = process.communicate(timeout=120)
    assert re.fullmatch(
        r"train worker 1 \(pid \d+\) was killed by SIGKILL, most likely the machine ran out of memory \(.*\); it was "
        r"reading c sample mela-0-5\n",
        out,
    )


def test_a_datasets_error_in_a_worker_is_one_line():
    with pytest.raises(KeyError) as caught:
        list(loader(Troubles("error")))
    assert explain(caught.value) == (
        "worker 1: KeyError: 'captoin' (while reading c sample mela-0-5) (INDICLIP_TRACEBACK=1 shows where)"
    )
    assert explain(KeyError("captoin")) is None


def test_an_iterator_that_awaits_collection_is_left_alone_by_forked_workers():
    """torch's would end the main process's workers from within one of theirs, and print errors."""
    code = """
import gc
old = iter(loader(Troubles("fine")))
old.itself = old
del old
for _ in range(3):
    steps = iter(loader(Troubles("collect")))
    print(len(list(steps)))
"""
    with run_python(code) as process:
        assert process.communicate(timeout=60) == ("24\n" * 3, "")


def test_errors_of_any_shape_survive_the_way_from_the_worker():
    class Shapes(Dataset):
        def __init__(self, error):
            self.error = error

        def key(self, index):
            return f"s{index}"

        def __getitem__(self, index):
            with reading("c", self, index):
                raise self.error

    for error, line in (
        (ValueError("two\nlines"), "ValueError: two lines"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "UnicodeDecodeError: 'utf-8' codec can't decode.* bad"),
        (MemoryError(), "MemoryError"),
    ):
        steps = StepLoader(Shapes(error), batch_size=None, sampler=[3], num_workers=1, worker_init_fn=Workers("x", 1))
        with pytest.raises(Exception) as caught:  # noqa: PT011
            next(iter(steps))
        assert re.fullmatch(rf"worker 0: {line} \(while reading c sample s3\) .*", explain(caught.value))


def trouble(kind, **changes):
    settings = {"data__num_workers": 2, "trainer__max_steps": 50, "data__steps_per_epoch": 50}
    tree = config(**settings | changes)
    tree["data"]["train"][0]["dataset"] = {"class_path": "trouble_reading.Troubles", "init_args": {"kind": kind}}
    return tree


def test_a_killed_worker_ends_the_run_with_one_line(tmp_path, capsys):
    tree = trouble("killed")
    checkpoints = {"every_n_train_steps": 1, "save_last": True}
    tree["trainer"]["callbacks"] = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints}
    ]
    assert fit(tmp_path, tree) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("indiclip: ")]
    assert len(lines) == 1
    assert re.search(
        r"train worker \d \(pid \d+\) was killed by SIGKILL, .* reading contrastive sample mela-0-5 \(while training "
        r".*experiment, after step \d+; last checkpoint: (none|.*/checkpoints/(\d+|last).ckpt, from which "
        r"--ckpt_path last goes on)\)",
        lines[0],
    )


def test_a_worker_that_is_killed_while_it_hands_over_a_batch_is_named(monkeypatch):
    """Then the connection breaks first."""

    def reset(iterator, *_, **__):
        Timer(0.3, iterator._workers[0].kill).start()
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data", reset)
    steps = StepLoader([0, 1], batch_size=None, num_workers=1, worker_init_fn=Workers("x", 1))
    with pytest.raises(RuntimeError) as caught:
        next(iter(steps))
    assert re.match(r"x worker 0 \(pid \d+\) was killed by SIGKILL", explain(caught.value))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_datasets_error_ends_the_run_with_one_line(num_workers, tmp_path, capsys, monkeypatch):
    tree = trouble("error", data__num_workers=num_workers)
    assert fit(tmp_path, tree) == 1
    error = capsys.readouterr().err
    assert re.search(r"^indiclip: (worker \d: )?KeyError: 'captoin' \(", error, re.MULTILINE)
    assert "(while reading contrastive sample mela-0-5)" in error
    assert "(INDICLIP_TRACEBACK=1 shows where)" in error
    monkeypatch.setenv("INDICLIP_TRACEBACK", "1")
    with pytest.raises(KeyError) as caught:
        fit(tmp_path, tree)
    assert "in bring" in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("length", [75, 76])
def test_a_temporary_folder_whose_path_is_too_long_for_sockets_is_refused(length, tmp_path, capsys, monkeypatch):
    """It would hang in the first step: torch hands over tensors through such sockets."""
    with tempfile.TemporaryDirectory() as short:
        folder = Path(short, "x" * (length - len(short) - 1))
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)
        assert fit(tmp_path, config(data__num_workers=1)) == (2 if length > 75 else 0)
    assert (f"TMPDIR: {folder}: expected at most 75 bytes" in capsys.readouterr().err) == (length > 75)


@pytest.mark.slow
def test_a_killed_worker_of_one_rank_ends_both(tmp_path):
    """And one says why, though Lightning's thread that watches the second rank would end the run without a word.

    And `two_ranks` looks that no worker outlives them.
    """
    done, _ = two_ranks(tmp_path, trouble("killed"), started_by="lightning")
    assert done.returncode == 1, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("indiclip: "))
    assert "was killed by SIGKILL" in line
    assert ", rank 1, " in line  # so the other has the store, and knows that the reason has been said
    assert "Traceback" not in done.stderr


def test_a_forked_process_has_no_part_in_the_workers_of_its_parent(tmp_path):
    """multiprocessing lets only the parent ask whether they are alive, as is done when Python exits."""
    steps = iter(loader(Troubles("fine")))
    next(steps)
    assert living_workers()

    def work():
        kill_workers()
        return len(living_workers())

    done = in_processes([work], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list(steps)) == 23
