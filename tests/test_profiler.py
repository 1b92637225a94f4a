"""The profile of a step: hand-made traces against sums by hand, and a run with hand-made sleeps against the clock."""

import gc
import json
import sys
import time

import pytest
from experiments import config, fit
from processes import two_ranks
from test_watchdog import Then
from test_watchdog import fit as fit_module

from indiclip import Profiler
from indiclip.generated.mela import Mela
from indiclip.training.fault_tolerance.watchdog import Watchdog
from indiclip.training.trace import part_times


def event(category, name, begin, end, thread=1, **args):
    named = {key.replace("_", " "): value for key, value in args.items()}
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": end - begin, "tid": thread, "args": named}


def annotated(name, begin, end, thread=1):
    return event("user_annotation", name, begin, end, thread)


HOST = [
    annotated("ProfilerStep#7", 0, 1000),
    annotated("data", 10, 110),
    annotated("Optimizer.step#AdamW.step", 150, 950),
    annotated("loss", 160, 400),
    annotated("image tower", 170, 270),
    event("cpu_op", "aten::mm", 180, 260, Sequence_number=5, Fwd_thread_id=0, External_id=1),
    annotated("boxes", 280, 380),
    annotated("text tower", 300, 340),  # which the head calls
    event("cpu_op", "aten::mm", 310, 330, Sequence_number=6, Fwd_thread_id=0, External_id=2),
    event("cpu_op", "aten::mm", 350, 370, Sequence_number=7, Fwd_thread_id=0, External_id=3),
    annotated("backward", 400, 800),
]


def backward(name, begin, end, thread, number, external):
    """A node of the backward pass, and the operator that it calls."""
    node = f"autograd::engine::evaluate_function: {name}"
    inner = event("cpu_op", "aten::mm", begin + 1, end, thread, External_id=external + 1)
    if number is None:
        return [event("cpu_op", node, begin, end, thread, External_id=external), inner]
    args = {"Sequence_number": number, "Fwd_thread_id": 1, "External_id": external}
    return [event("cpu_op", node, begin, end, thread, **args), inner]


def seconds(times):
    return {part: round(1e6 * value, 6) for part, value in times.seconds.items()}


def test_a_step_of_the_processor_by_hand():
    """Nodes of the graph find their part; communication is what no operator hides; nothing counts twice."""
    trace = [
        *HOST,
        *backward("MmBackward0", 410, 450, 1, 7, 10),  # of the head
        *backward("MmBackward0", 450, 500, 1, 6, 20),  # of the text tower
        *backward("torch::autograd::AccumulateGrad", 500, 510, 1, None, 30),  # of its weights
        annotated("gloo:all_reduce", 480, 700, thread=9),
        event("cpu_op", "_c10d_functional::wait_tensor", 620, 690),
        *backward("MmBackward0", 520, 600, 1, 5, 40),  # of the image tower
        event("cpu_op", "aten::_fused_adamw_", 820, 900),
        {"ph": "i", "name": "no range", "ts": 0},
    ]
    times = part_times(trace, ["image tower", "text tower", "boxes"])
    assert seconds(times) == {
        "data": 100,
        "image tower": 100 + 80,
        "text tower": 40 + 50 + 10,
        "boxes": (100 - 40) + 40,
        "loss": 240 - 100 - 100,
        "communication": 10 + 100,  # 510 to 520 and 600 to 700
        "optimizer": (160 - 150) + (950 - 800),
        "other": (10 + 40) + (10 + 100) + 50,
    }
    assert sum(seconds(times).values()) == 1000
    assert dict(times.calls) == {
        "data": 1, "optimizer": 1, "loss": 0, "image tower": 1, "boxes": 1, "text tower": 1, "communication": 1
    }  # fmt: skip
    assert not times.on_device


def test_a_validation_between_steps_is_no_part_of_them_by_hand():
    validation = [annotated("validation", 955, 995), annotated("data", 957, 958), annotated("image tower", 960, 990)]
    parts = ["image tower", "text tower", "boxes"]
    with_it, without = part_times([*HOST, *validation], parts), part_times(HOST, parts)
    assert seconds(with_it) == seconds(without) | {"other": seconds(without)["other"] - 40}
    assert sum(seconds(with_it).values()) == pytest.approx(1e6 * with_it.step) == 960
    assert with_it.calls == without.calls


def test_a_step_of_a_gpu_by_hand():
    """Times are those of kernels, later than the host's; of a GPU without work the step waits for data or the host."""
    trace = [
        *HOST,
        *backward("MmBackward0", 410, 420, 2, 7, 10),  # in a thread of its own
        *backward("MmBackward0", 430, 440, 2, 5, 20),
        event("kernel", "gemm", 200, 400, 100, External_id=1),  # image tower
        event("kernel", "gemm", 400, 500, 100, External_id=2),  # text tower
        event("kernel", "gemm", 500, 520, 100, External_id=3),  # boxes
        event("kernel", "gemm", 520, 600, 100, External_id=11),  # boxes, backward
        event("kernel", "ncclDevKernel_AllReduce", 580, 650, 101, External_id=99),
        event("kernel", "gemm", 600, 630, 100, External_id=21),  # image tower, backward
        event("kernel", "reduce", 640, 660, 100, External_id=12345),  # of what the trace does not have
    ]
    times = part_times(trace, ["image tower", "text tower", "boxes"])
    assert seconds(times) == {
        "data": 100,
        "image tower": 200 + 30,
        "text tower": 100,
        "boxes": 20 + 80,
        "communication": 10,
        "other": 20,
        "waiting for the host": 10 + 90 + 340,
    }
    assert times.on_device


def profiled(**options):
    return {"class_path": "indiclip.Profiler", "init_args": options}


def test_parts_of_a_run_against_hand_made_sleeps(tmp_path, capsys):
    """A sample takes 10 ms to read and the loss 50 ms more: four samples, so 40 ms of data and 50 of the head."""
    clock = tmp_path / "clock"
    tree = config(trainer__max_steps=6, trainer__profiler=profiled(skip=2, steps=3), trainer__limit_val_batches=0)
    tree["model"]["heads"] = [{"class_path": "trouble.SlowLoss", "init_args": {"seconds": 0.05, "file": str(clock)}}]
    tree["data"]["train"][0]["dataset"] = {"class_path": "trouble.SlowMela", "init_args": {"seconds": 0.01}}
    tree["data"] |= {"steps_per_epoch": 6}
    assert fit(tmp_path, tree) == 0
    folder = tmp_path / "runs" / "experiment"
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    names = {e["name"] for e in events}
    assert {"data", "image tower", "text tower", "trouble", "trouble loss", "loss", "backward"} <= names
    times = part_times(events, ["image tower", "text tower", "trouble", "pools, projections"])
    assert times.steps == 3
    assert times.seconds["data"] >= 0.04
    assert times.seconds["trouble"] >= 0.05
    assert sum(times.seconds.values()) == pytest.approx(times.step)  # parts share it out
    assert {part: times.calls[part] / 3 for part in ("image tower", "text tower", "trouble", "optimizer")} == {
        "image tower": 1, "text tower": 1, "trouble": 1, "optimizer": 1
    }  # fmt: skip
    begins = [float(line) for line in clock.read_text().split()]  # of each loss
    assert begins[4] - begins[2] <= 3 * times.step <= begins[5] - begins[1]  # the steps begin a little before
    printed = capsys.readouterr().out
    assert (folder / "profile.txt").read_text() in printed
    for part in ("data", "image tower", "text tower", "trouble", "loss", "optimizer", "communication"):
        assert f"│ {part} " in printed


def test_a_profile_by_a_word_of_the_command(tmp_path, capsys):
    """Of a run that is too short for it, which says so; and the model is left as it was."""
    tree = config()
    assert fit(tmp_path, tree, "--trainer.profiler", "indiclip.Profiler") == 0
    assert "trainer.profiler: the run had 2 steps, and skip is 10: none was profiled" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "experiment" / "trace.json").exists()
    flags = ("--trainer.profiler", "indiclip.Profiler", "--trainer.profiler.skip", "0")
    assert fit(tmp_path, tree, *flags) == 2
    assert "trainer.profiler.skip" in capsys.readouterr().err


def test_each_run_is_profiled_without_its_validations(tmp_path):
    """Two with the same object; of the validations, of 0.3 s each, one lies between the three steps."""
    profiler, scenes = Profiler(str(tmp_path), skip=1, steps=3), Mela(4, 32, "single")
    slow = Then("on_validation_batch_start", lambda *_: time.sleep(0.3))
    for _ in range(2):
        options = {"val": [scenes], "val_check_interval": 2, "profiler": profiler}
        fit_module(tmp_path, scenes, slow, watchdog=Watchdog(), **options)
        assert "image tower" in profiler.summary()
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        (tmp_path / "trace.json").unlink()
        (validation,) = [e["dur"] for e in events if e["name"] == "validation" and e["cat"] == "user_annotation"]
        assert validation >= 3e5
        steps = [e["dur"] for e in events if e["name"].startswith("ProfilerStep#") and e["cat"] == "user_annotation"]
        times = part_times(events, ["image tower", "text tower", "contrastive", "pools, projections"])
        assert 3e6 * times.step == pytest.approx(sum(steps) - validation)
        assert sum(times.seconds.values()) == pytest.approx(times.step)
        assert times.calls["image tower"] == times.calls["optimizer"] == 3


def test_one_that_is_refused_leaves_without_another_word(monkeypatch):
    """Lightning tears a profiler down when it is collected."""
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    with pytest.raises(ValueError, match=r"trainer\.profiler\.skip"):
        Profiler(skip=0)
    gc.collect()
    assert not said


def test_ranks_communicate_in_a_profile(tmp_path):
    tree = config(trainer__max_steps=5, trainer__profiler=profiled(skip=1, steps=2), trainer__limit_val_batches=0)
    tree["data"] |= {"steps_per_epoch": 5}
    done, folder = two_ranks(tmp_path, tree)
    assert done.returncode == 0, done.stderr[-3000:]
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    times = part_times(events, ["image tower", "text tower", "contrastive", "pools, projections"])
    assert times.calls["communication"] >= 2 * 2  # gradients and embeddings
    assert 0 < times.seconds["communication"] < times.step
    assert sum(times.seconds.values()) <= 1.000001 * times.step
