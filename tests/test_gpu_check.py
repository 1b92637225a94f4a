"""tools/gpu_check.py on a CPU: what is written as it goes, where a part's time is over, and what is run again."""

import json
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

import gpu_check  # noqa: E402


def call(monkeypatch, folder, *words):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--tiny", "--out", str(folder), *words])
    return gpu_check.main()


@pytest.mark.parametrize("part", ["b16", "packed", pytest.param("methods", marks=pytest.mark.slow)])
def test_a_part_writes_what_it_measures(part, tmp_path):
    assert gpu_check.run_part(gpu_check.Check("cpu", True, tmp_path), part) == 0
    rows = {row["what"]: row for row in map(json.loads, (tmp_path / f"{part}.jsonl").read_text().splitlines())}
    if part == "b16":
        assert rows["ours"]["samples/s"] > 0
        assert rows["ours"]["x OpenCLIP"] > 0
        assert rows["ours, float8"]["GFLOP"] > 0
    if part == "packed":
        assert rows["packed"]["GFLOP"] < rows["padded"]["GFLOP"]
    if part == "methods":
        assert rows["augreg_light1"]["exit status"] == 0
    assert f"## {part}" in gpu_check.table(tmp_path, "a machine")


def test_a_part_whose_command_fails_has_failed(monkeypatch, tmp_path):
    rows = [{"what": "one", "exit status": 1}, {"what": "another", "exit status": 0}]
    monkeypatch.setattr(gpu_check.Check, "methods", lambda self: iter(rows))
    assert gpu_check.run_part(gpu_check.Check("cpu", True, tmp_path), "methods") == 1
    assert len((tmp_path / "methods.jsonl").read_text().splitlines()) == 2


def test_a_part_ends_with_its_time_and_with_all_it_started(monkeypatch, tmp_path):
    """What it had written stays, and counts."""
    script = tmp_path / "part.py"
    script.write_text(
        "import pathlib, subprocess, sys, time\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        '(out / \'losses.jsonl\').write_text(\'{"what": "first", "ms": 1.5}\\n\')\n'
        "(out / 'child').write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    monkeypatch.setitem(gpu_check.MINUTES, "losses", 0.05)
    ended = gpu_check.start_part(Namespace(out=tmp_path, device="cpu", tiny=True), "losses")
    assert ended == "ended at its limit of 0.05 minutes"
    child = Path("/proc") / (tmp_path / "child").read_text()
    for _ in range(100):
        if not child.exists() or "Z" in (child / "stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("its child is alive")
    assert "| first | 1.5 |" in gpu_check.table(tmp_path, "a machine")


def test_what_has_ended_is_not_run_again(monkeypatch, tmp_path):
    started = []
    ends = {"l14": "failed"}
    monkeypatch.setattr(gpu_check, "start_part", lambda _, part: started.append(part) or ends.pop(part, "done"))
    (tmp_path / "b16.done").write_text('{"ended": "done", "seconds": 1}')
    assert call(monkeypatch, tmp_path) == 1
    assert started == [part for part in gpu_check.MINUTES if part != "b16"]
    assert call(monkeypatch, tmp_path) == 1  # of l14
    assert call(monkeypatch, tmp_path, "--parts", "b16", "l14") == 0
    assert started[-2:] == ["b16", "l14"]
    assert len(started) == len(gpu_check.MINUTES) + 1


def test_all_parts_fit_into_three_quarters_of_an_hour():
    assert sum(gpu_check.MINUTES.values()) <= 45
    assert max(gpu_check.MINUTES.values()) <= 9
    assert all(hasattr(gpu_check.Check, part) for part in gpu_check.MINUTES)
