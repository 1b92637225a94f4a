"""Signals: the step is finished, all ranks save, and the run leaves with the scheduler's code; it resumes exactly."""

import json
import os
import signal
import stat

import pytest
import torch
from experiments import config, fit
from processes import as_they_end, forked, two_ranks, wait_until

from indiclip.training.fault_tolerance.preemption import requeue
from indiclip.training.record import read_history


def experiment(folder, number=None, step=0, steps=6, **signal_options):
    """A run that keeps a diary, and gets a signal where `number` is given."""
    tree = config(trainer__max_steps=steps)
    callbacks = [{"class_path": "trouble.Diary", "init_args": {"folder": str(folder / "diary")}}]
    if number:
        arguments = {"number": int(number), "step": step, **signal_options}
        callbacks.append({"class_path": "trouble.Signal", "init_args": arguments})
    tree["trainer"]["callbacks"] = callbacks
    tree["data"]["steps_per_epoch"] = 3
    return tree


def diary(folder, rank=0):
    """Step -> ids, of what was done last."""
    rows = [json.loads(line) for line in (folder / "diary" / f"keys-{rank}.jsonl").read_text().splitlines()]
    return {row["step"]: row["keys"] for row in rows}, [row["step"] for row in rows]


def weights(folder, rank=0):
    return torch.load(folder / "diary" / f"weights-{rank}.pt", weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert fit(folder, experiment(folder)) == 0
    return folder


@pytest.mark.parametrize(
    ("number", "status", "moment", "step"),
    [
        (signal.SIGTERM, 143, 2, 2),
        (signal.SIGTERM, 143, 0, 3),
        (signal.SIGTERM, 143, -1, 1),
        (signal.SIGUSR1, 138, 2, 2),
        (signal.SIGINT, 130, 0, 3),  # Lightning has its own way with Ctrl-C
        (signal.SIGINT, 130, -1, 1),
    ],
)
def test_a_signal_saves_and_the_resumed_run_ends_with_the_same_weights(
    tmp_path, capfd, monkeypatch, uninterrupted, number, status, moment, step
):
    """After the second of six steps; in the validation that follows the third (0); before the first (-1)."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    before = signal.getsignal(number)
    assert fit(tmp_path, experiment(tmp_path, number, moment)) == status
    assert signal.getsignal(number) == before
    error = capfd.readouterr().err
    assert f"{number.name}: finishing the step, then saving" in error
    saved = tmp_path / "runs" / "experiment" / "checkpoints" / f"{step}.ckpt"
    assert f"indiclip: {number.name}: saved {saved}, step {step}" in error
    assert saved.is_file()
    assert fit(tmp_path, experiment(tmp_path), "--ckpt_path", "last") == 0
    assert f"going on from {saved}: step {step}" in capfd.readouterr().out
    keys, order = diary(tmp_path)
    assert (keys, order) == diary(uninterrupted)
    assert order == list(range(6))
    expected = weights(uninterrupted)
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path).items())
    history, whole = (read_history(folder / "runs" / "experiment") for folder in (tmp_path, uninterrupted))
    assert [row.keys() for row in history] == [row.keys() for row in whole]
    assert [row["step"] for row in history] == [row["step"] for row in whole]


@pytest.mark.parametrize("step", [3, 6, 0])
def test_a_signal_in_the_last_step_of_an_epoch_or_of_the_run_costs_no_validation(tmp_path, uninterrupted, step):
    """Nor does one amid a validation (0): the held-out scores are those of the uninterrupted run."""
    assert fit(tmp_path, experiment(tmp_path, signal.SIGTERM, step)) == 143
    folder, whole = (place / "runs" / "experiment" for place in (tmp_path, uninterrupted))
    assert (folder / "checkpoints" / f"{step or 3}.ckpt").is_file()
    assert not (folder / "metrics.json").exists()
    for _ in range(2):  # a finished run has nothing left to do
        assert fit(tmp_path, experiment(tmp_path), "--ckpt_path", "last") == 0
        assert scores(folder) == scores(whole)
        assert held_out(json.loads((folder / "metrics.json").read_text())["metrics"]) == scores(whole)[6]
        assert (folder / "report.html").is_file()


def test_a_validation_done_again_is_recorded_once(tmp_path):
    """The checkpoint of the third step was taken before the validation that followed it."""
    for steps in (3, 6):
        tree = experiment(tmp_path, steps=steps)
        checkpoints = "indiclip.training.fault_tolerance.checkpoints.Checkpoints"
        tree["trainer"]["callbacks"].append({"class_path": checkpoints, "init_args": {"every_n_train_steps": 3}})
        assert fit(tmp_path, tree, "--ckpt_path", "last") == 0
    assert list(scores(tmp_path / "runs" / "experiment")) == [3, 6]


def test_a_second_signal_in_a_validation_done_again_loses_no_later_one(tmp_path):
    for moment in (4, 0, None):  # in the step before a validation, in that validation
        tree = experiment(tmp_path, moment is not None and signal.SIGTERM, moment, steps=12)
        tree["trainer"]["check_val_every_n_epoch"] = 2
        tree["data"]["steps_per_epoch"] = 2
        assert fit(tmp_path, tree, "--ckpt_path", "last") == (0 if moment is None else 143)
    assert list(scores(tmp_path / "runs" / "experiment")) == [4, 8, 12]


def test_a_run_that_went_further_keeps_its_record(tmp_path):
    """Its third step's checkpoint has nothing left to train up to the third step; nor is a row there twice."""
    tree = experiment(tmp_path)
    tree["trainer"]["callbacks"] += [
        {"class_path": "indiclip.training.fault_tolerance.checkpoints.Checkpoints", "init_args": {"save_top_k": -1}},
        {"class_path": "indiclip.training.callbacks.TaskGradients", "init_args": {"every_n_steps": 1}},
    ]
    assert fit(tmp_path, tree) == 0
    folder = tmp_path / "runs" / "experiment"
    history, metrics = read_history(folder), (folder / "metrics.json").read_text()
    third = ("--ckpt_path", str(folder / "checkpoints" / "3.ckpt"))
    assert fit(tmp_path, tree, "--trainer.max_steps", "3", *third) == 0
    assert (read_history(folder), (folder / "metrics.json").read_text()) == (history, metrics)
    assert fit(tmp_path, tree, *third) == 0
    assert sorted((row["step"], *row.keys()) for row in read_history(folder)) == sorted(
        (row["step"], *row.keys()) for row in history
    )


def test_a_run_that_was_killed_while_it_wrote_its_report_writes_it_at_the_next_start(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("indiclip.training.record.write_report", full)
        assert fit(tmp_path, experiment(tmp_path)) == 1
    assert fit(tmp_path, experiment(tmp_path), "--ckpt_path", "last") == 0
    folder = tmp_path / "runs" / "experiment"
    assert (folder / "report.html").is_file()
    assert json.loads((folder / "metrics.json").read_text())["step"] == 6


def held_out(values):
    return {name: value for name, value in values.items() if name.startswith("val/")}


def scores(folder):
    """Step -> held-out metrics."""
    rows = [(row["step"], held_out(row)) for row in read_history(folder)]
    found = [row for row in rows if row[1]]
    assert len(found) == len(dict(found))
    return dict(found)


@pytest.mark.parametrize(("moment", "step"), [(2, 2), (-1, 1)])
def test_one_rank_of_two_gets_the_signal_and_both_leave(tmp_path, moment, step):
    tree = experiment(tmp_path, signal.SIGTERM, moment, steps=50, rank=1)
    done, folder = two_ranks(tmp_path, tree)
    assert done.statuses == [143, 0], done.stderr[-3000:]  # see AgreedStop
    assert diary(tmp_path, 0)[1] == diary(tmp_path, 1)[1] == list(range(step))
    lines = [line for line in done.stderr.splitlines() if line.startswith("indiclip: ")]
    goes_on = "the same command with --ckpt_path last goes on from it"
    assert lines == [f"indiclip: SIGTERM: saved {folder / 'checkpoints' / f'{step}.ckpt'}, step {step}; {goes_on}"]
    assert "Traceback" not in done.stderr


def test_a_second_ctrl_c_leaves_a_step_that_never_ends(tmp_path):
    tree = experiment(tmp_path)
    tree["trainer"]["callbacks"].append({"class_path": "trouble.Stuck", "init_args": {"step": 2}})
    error = tmp_path / "err"

    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it
        return fit(tmp_path, tree)

    with forked(work, tmp_path) as process:
        wait_until(lambda: error.is_file() and "stuck\n" in error.read_text())
        os.kill(process, signal.SIGINT)
        wait_until(lambda: "SIGINT: finishing the step" in error.read_text())
        assert os.waitpid(process, os.WNOHANG) == (0, 0)
        os.kill(process, signal.SIGINT)
        assert dict(as_they_end([process])) == {process: 130}
    folder = tmp_path / "runs" / "experiment"
    assert not (folder / "checkpoints").exists()
    left = f"indiclip: Ctrl-C: left at once (while training {folder}, after step 1; last checkpoint: none)\n"
    assert error.read_text().endswith(left)


def fake_scontrol(folder, monkeypatch, status=0):
    script = folder / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\necho no such job >&2\nexit {status}\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")


def test_slurms_signal_puts_the_job_into_the_queue_again(tmp_path, monkeypatch, capfd):
    fake_scontrol(tmp_path, monkeypatch)
    assert fit(tmp_path, experiment(tmp_path, signal.SIGUSR1, 2)) == 138
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert "step 2; job 77 is queued again (1 of 20)" in capfd.readouterr().err


def test_a_run_is_queued_again_only_so_often_and_only_while_it_gets_on(tmp_path, monkeypatch):
    fake_scontrol(tmp_path, monkeypatch)
    assert requeue(tmp_path, 5, 4) == "job 77 is queued again (1 of 4)"
    assert requeue(tmp_path, 5, 4) == "job 77 is queued again (2 of 4)"
    assert requeue(tmp_path, 5, 4) == "not queued again: the last 3 starts all ended at step 5"
    assert requeue(tmp_path, 9, 4) == "job 77 is queued again (3 of 4)"
    assert requeue(tmp_path, 12, 4) == "job 77 is queued again (4 of 4)"
    assert requeue(tmp_path, 15, 4) == "not queued again: it was 4 times, the most allowed (max_requeues)"
    assert (tmp_path / "asked").read_text() == "requeue 77\n" * 4


def test_array_jobs_failing_and_missing_scontrol(tmp_path, monkeypatch):
    fake_scontrol(tmp_path, monkeypatch, status=1)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert requeue(tmp_path, 1, 9) == "not queued again: scontrol requeue 70_3: no such job\n"
    monkeypatch.setenv("PATH", "/nowhere")
    assert "not queued again: scontrol requeue 70_3: [Errno 2] No such file" in requeue(tmp_path, 2, 9)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3; rm -rf x")
    assert requeue(tmp_path, 3, 9) == "not queued again: the job is called '70_3; rm -rf x'"
