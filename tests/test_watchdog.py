"""The watchdog: what it says of a loader or a step that does not end, and when it says nothing."""

import itertools
import re
import time
import types

import lightning as L
import pytest
from helpers import tiny_encoder
from processes import wait_until
from trouble_reading import Troubles

from heads.contrastive import Contrastive
from indiclip.generated.mela import Mela
from indiclip.loading.data_module import MultiTaskData
from indiclip.loading.source import Source
from indiclip.loading.workers import living_workers
from indiclip.module import MultiTask
from indiclip.training.fault_tolerance.watchdog import Watchdog

PATIENCE = 0.4  # seconds; a step of these models takes 0.01


class Then(L.Callback):
    """Calls a function at one moment of a run."""

    def __init__(self, moment, function):
        setattr(self, moment, lambda trainer, module, *rest, **more: function(trainer, module, *rest))


def fit(folder, dataset, *callbacks, num_workers=0, val=(), watchdog=None, **options):
    source = Source("contrastive", dataset, 4, max_tokens=16)
    held_out = [Source("contrastive", data, 4, max_tokens=16) for data in val]
    data = MultiTaskData([source], held_out, num_workers=num_workers, patch_size=8, steps_per_epoch=6)
    watchdog = watchdog or Watchdog(PATIENCE)
    trainer = L.Trainer(
        default_root_dir=folder, accelerator="cpu", max_steps=6, logger=False, enable_model_summary=False,
        enable_progress_bar=False, callbacks=[watchdog, *callbacks], use_distributed_sampler=False,
        num_sanity_val_steps=0, **{"enable_checkpointing": False} | options,
    )  # fmt: skip
    trainer.fit(MultiTask(tiny_encoder(), [Contrastive()], warmup_steps=1), datamodule=data)
    return trainer


def sleep_until(true):
    """Let a run stand still until something is so."""
    wait_until(true)


def reports(text):
    return re.findall(r"indiclip: rank 0: no step has ended for .*", text)


def reports_of_the_sample(text):
    """Those of the step for which mela-0-5 is waited for; a slow machine has others before."""
    found = [report for report in text.split("indiclip: ") if "contrastive sample mela-0-5 for" in report]
    loading = re.findall(r"it has been loading step \d+ for", "".join(found))
    return [report for report in found if loading[-1] in report] if loading else []


class Release(L.Callback):
    """Lets the sample go on which a run waits for, when there have been this many reports in the run's folder."""

    def __init__(self, folder, flag, count):
        from threading import Thread

        def wait():
            file = folder / "watchdog-0.txt"
            wait_until(lambda: file.is_file() and len(reports_of_the_sample(file.read_text())) >= count)
            flag.touch()

        Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_that_stands_still_is_reported_with_what_it_reads(num_workers, tmp_path, capfd):
    """Twice, the second time after twice the time; and that it goes on."""
    flag = tmp_path / "flag"
    fit(tmp_path, Troubles("wait", str(flag)), Release(tmp_path, flag, 2), num_workers=num_workers)
    shown, kept = capfd.readouterr().err, (tmp_path / "watchdog-0.txt").read_text()
    first, second = reports_of_the_sample(shown)[:2]
    seconds = [float(re.search(r"ended for (\d+) s", line)[1]) for line in (first, second)]
    step = int(re.search(r"it has been loading step (\d+) for", first)[1])
    assert seconds[1] >= 2 * PATIENCE - 0.5  # rounded to whole seconds
    assert re.search(rf"rank 0 goes on after \d+ s: loading step {step + 1}", shown)
    reader = r"train worker \d \(pid \d+\) reads" if num_workers else "reading"
    assert re.search(rf"{reader} contrastive sample mela-0-5 for \d+ s", shown)
    if num_workers:
        assert re.search(
            r"reads .* s: bring \(trouble_reading.py:\d+\) < __getitem__ \(trouble_reading.py:\d+\) < read", shown
        )
        assert "1 of 2 train workers wait for work" in shown
    for name in ["MainThread", *["train worker 0", "train worker 1"][:num_workers]]:
        assert kept.count(name) >= 2
    assert re.search(r'trouble_reading.py", line \d+,? in bring', kept)


def test_a_step_that_stands_still_is_reported_with_the_stacks_of_the_rank(tmp_path, capfd):
    def stand(trainer, module, *rest):
        if trainer.global_step == 2:
            file = tmp_path / "watchdog-0.txt"
            sleep_until(lambda: file.is_file() and "it has been running step 3" in file.read_text())

    fit(tmp_path, Mela(24, 32, "single"), Then("on_before_backward", stand))
    shown = capfd.readouterr().err
    assert re.search(r"it has been running step 3 for \d+ s\n  rank 0 itself: wait_until \(processes.py", shown)
    assert "in sleep_until" in (tmp_path / "watchdog-0.txt").read_text()


def test_a_long_validation_that_goes_on_and_a_long_save_are_not_stalls(tmp_path, capfd, monkeypatch):
    """Each step, held-out step, save and load takes six tenths of the patience, by a clock that is put on."""
    hours = itertools.count()
    clock = types.SimpleNamespace(monotonic=lambda: now[0], strftime=time.strftime)
    monkeypatch.setattr("indiclip.training.fault_tolerance.watchdog.time", clock)
    now = [0.0]

    def take(*_):
        now[0] += 0.6 * PATIENCE
        next(hours)
        time.sleep(0.3 * PATIENCE)  # for the thread to look, which it does every tenth

    saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    moments = ("on_validation_batch_start", "on_save_checkpoint", "on_train_batch_start")
    others = [Then(moment, take) for moment in moments]
    held_out = [Mela(20, 32, "single", seed=3)]
    fit(tmp_path, Mela(24, 32, "single"), *others, saving, val=held_out, enable_checkpointing=True)
    assert next(hours) == 5 + 6 + 6
    assert reports(capfd.readouterr().err) == []


def test_a_save_that_fails_is_over(tmp_path):
    def fail(*_):
        raise OSError("full")

    def stand(trainer, *_):
        if trainer.global_step == 2:
            with pytest.raises(OSError, match="full"):
                trainer.save_checkpoint(tmp_path / "x.ckpt")
            file = tmp_path / "watchdog-0.txt"
            sleep_until(lambda: file.is_file() and "it has been running step 3" in file.read_text())

    fit(tmp_path, Mela(24, 32, "single"), Then("on_save_checkpoint", fail), Then("on_before_backward", stand))


def test_c_code_that_keeps_the_watching_thread_out_is_reported_too(tmp_path, capfd):
    import ctypes

    shown = ""

    def hold_the_gil(trainer, *_):
        nonlocal shown
        until = time.monotonic() + 60
        while trainer.global_step == 2 and "in hold_the_gil" not in shown and time.monotonic() < until:
            ctypes.PyDLL(None).usleep(int(4e6 * PATIENCE))  # longer than faulthandler was last told to wait
            shown += capfd.readouterr().err

    fit(tmp_path, Mela(24, 32, "single"), Then("on_train_batch_start", hold_the_gil))
    assert re.search(r"Timeout \(0:00:00.400000\)!\n", shown)
    assert "in hold_the_gil" in shown


def test_nothing_of_it_stays_after_a_run(tmp_path):
    import threading

    watchdog = Watchdog(PATIENCE)
    trainer = fit(tmp_path, Mela(24, 32, "single"), watchdog=watchdog)
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
    assert "save_checkpoint" not in vars(trainer)
    with pytest.raises(KeyError):
        fit(tmp_path, Troubles("error"), num_workers=1, watchdog=watchdog)
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(ValueError, match=r"Watchdog.timeout_seconds: 0; expected more than 0"):
        Watchdog(0)


def test_a_stuck_reader_does_not_hold_up_the_end_of_a_failed_run(tmp_path):
    """torch waits ten seconds for each; here it is gone before Lightning tidies up."""
    before, after = [], []

    def fail(trainer, *_):
        if trainer.global_step == 1:
            before.extend(living_workers())
            wait_until(lambda: any(before[0].reading(i).seconds > 1.5 for i in range(2)))
            raise RuntimeError("elsewhere")

    look = Then("on_exception", lambda *_: after.extend(p.is_alive() for p in before[0].processes))
    with pytest.raises(RuntimeError, match="elsewhere"):
        fit(tmp_path, Troubles("wait"), Then("on_train_batch_start", fail), look, num_workers=2)
    assert sorted(after) == [False, True]  # the other is told to end, as always
