"""What a run shows while it trains, on terminals of several widths and in a log."""

import io
import os
import re
import signal
from types import SimpleNamespace

import pytest
from experiments import config, fit
from processes import as_they_end
from rich.console import Console
from terminal import CTRL_C, on_terminal

from indiclip.commands import parallel
from indiclip.training.record import read_history
from indiclip.training.run_bar import RunBar

CHECKPOINTS = "indiclip.training.fault_tolerance.checkpoints.Checkpoints"
NUMBERS = ("contrastive 13.402", "captioning 4.506", "detection 1.857", "segmentation 0.712", "1,312 samples/s")
NUMBERS += ("45.1 ktok/s", "MFU 31%", "waiting 17%", "memory 61.0 GB")


def on_terminal_of(columns, folder, tree):
    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it
        return fit(folder, tree)

    return on_terminal(work, columns, folder)


def part(class_path, **options):
    return {"class_path": class_path, "init_args": options}


def without_spaces(lines):
    """A terminal's line does not say whether a space followed it."""
    return "".join(lines).replace(" ", "")


@pytest.mark.parametrize("columns", [50, 80, 100, 180])
def test_no_value_is_broken_and_none_is_missing(columns):
    console = Console(width=columns, file=io.StringIO(), force_terminal=True, color_system=None)
    bar = RunBar(console, 0.5)
    bar.add_task("train", total=2000, completed=99)
    bar.add_task("validate", total=40, completed=12)
    bar.numbers = "  ".join(value.replace(" ", "\N{NO-BREAK SPACE}") for value in NUMBERS)
    console.print(bar.get_renderable())
    train, validate, *numbers = console.file.getvalue().replace("\N{NO-BREAK SPACE}", " ").splitlines()
    assert re.fullmatch(r"train    [━╸╺ ]+   99/2000 0:00:00, -:--:-- left", train)
    assert re.fullmatch(r"validate [━╸╺ ]+     12/40 0:00:00, -:--:-- left", validate)
    assert tuple(value for line in numbers for value in line.split("  ")) == NUMBERS
    assert {len(train), len(validate)} == {columns}
    assert all(len(line) <= columns - len("^C") for line in numbers)  # which the terminal writes behind the last one
    assert len(numbers) == {50: 4, 80: 2, 100: 2, 180: 1}[columns]


def test_the_losses_are_those_of_the_history(tmp_path, capfd):
    """One of the head's own terms, weighted by 3 in the total; and the sum of the terms of another, which begins later:
    between the step whose losses are shown and the one in which they are."""
    tree = config(trainer__max_steps=5, data__steps_per_epoch=5)
    tree["model"]["heads"] = [
        part("heads.contrastive.Contrastive", weight=3.0),
        part("heads.detection.Detection", task="contrastive", start=1, num_classes=17, out_channels=16, num_convs=1),
    ]
    tree["trainer"]["callbacks"] = [part("indiclip.training.callbacks.TaskProgress", plain_seconds=0.0)]
    assert fit(tmp_path, tree) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith(("train ", "validate "))]
    rows = {row["step"]: row for row in read_history(tmp_path / "runs" / "experiment") if "train/loss" in row}
    shown = [line for line in lines if line.startswith("train ")]
    assert len(shown) >= 2
    for line in shown:
        step = int(re.match(r"train (\d)/5  ", line)[1]) - 1  # the numbers are of the step before
        detection = sum(value for name, value in rows[step].items() if name.startswith("train/detection/"))
        found = re.search(r"contrastive ([\d.]+)  (?:detection ([\d.]+)  )?", line)
        assert float(found[1]) == pytest.approx(rows[step]["train/contrastive/loss"], abs=6e-4)
        assert (found[2] is None) == (step == 1)
        assert float(found[2] or 0) == pytest.approx(detection, abs=6e-4)
    assert [line.partition("  ")[0] for line in lines[-3:]] == ["validate 1/3", "validate 2/3", "validate 3/3"]


def test_ctrl_c_in_a_validation_is_answered_above_the_bar(tmp_path):
    tree = config(trainer__max_steps=50, data__steps_per_epoch=2)
    tree["data"]["val"][0] |= {"dataset": part("trouble.SlowMela", seconds=0.5), "batch_size": 1}
    with on_terminal_of(100, tmp_path, tree) as (process, terminal):
        terminal.wait_for("validate ")
        terminal.press(CTRL_C)
        lines = terminal.rest()
        assert dict(as_they_end([process])) == {process: 130}
    told = lines.index("SIGINT: finishing the step, then saving (Ctrl-C: leave at once)")
    train, validate, _, *end = lines[told + 1 :]
    assert re.fullmatch(r"train    [━╸╺ ]+  2/50 \d:\d\d:\d\d, (-:--:--|\d:\d\d:\d\d) left", train)
    assert re.fullmatch(r"validate [━╸╺ ]+ +\d+/12 \d:\d\d:\d\d, (-:--:--|\d:\d\d:\d\d) left", validate)
    assert "contrastive" not in "".join(end)
    saved = tmp_path / "runs" / "experiment" / "checkpoints" / "2.ckpt"
    words = f"indiclip: SIGINT: saved {saved}, step 2; the same command with --ckpt_path last goes on from it"
    assert without_spaces(end) == without_spaces([words])
    assert sum(line.startswith(("train ", "validate ")) for line in lines) == 2  # no stale copy


def test_a_step_that_hangs_answers_ctrl_c_and_the_second_one_says_what_is_left(tmp_path):
    tree = config(trainer__max_steps=5, data__steps_per_epoch=5)
    tree["trainer"]["callbacks"] = [
        part("trouble.Stuck", step=3),
        part(CHECKPOINTS, every_n_train_steps=2),
    ]
    with on_terminal_of(80, tmp_path, tree) as (process, terminal):
        terminal.wait_for("stuck")
        terminal.press(CTRL_C)
        terminal.wait_for("SIGINT: finishing the step, then saving")
        assert os.waitpid(process, os.WNOHANG) == (0, 0)
        terminal.press(CTRL_C)
        lines = terminal.rest()
        assert dict(as_they_end([process])) == {process: 130}
    assert "SIGINT: finishing the step, then saving (Ctrl-C: leave at once)" in lines
    folder = tmp_path / "runs" / "experiment"
    where = f"{folder}, after step 2; last checkpoint: {folder / 'checkpoints' / '2.ckpt'}"
    words = f"indiclip: Ctrl-C: left at once (while training {where}, from which --ckpt_path last goes on)"
    assert without_spaces(lines).endswith(without_spaces([words]))


def test_where_there_is_no_terminal_a_line_says_now_and_then_how_far_it_is(monkeypatch, capsys):
    clock = iter(range(0, 1000, 10))  # ten seconds between any two looks at it
    monkeypatch.setattr(parallel, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with parallel.progress_bar(1200, "images") as advance:
        for _ in range(8):
            advance(150)
    assert capsys.readouterr() == ("", "images 450 of 1,200\nimages 900 of 1,200\n")
