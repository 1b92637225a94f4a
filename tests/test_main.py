"""`python -m indiclip`, and output that is not read to its end (`| head -1`, `| true`): no traceback, status 0."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_shards import png, write_tar

import indiclip
import indiclip.cli

ROOT = Path(__file__).parent.parent


def run(words, **options):
    command = [sys.executable, "-m", "indiclip", *words]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False, **options)


def test_the_package_runs_as_a_module():
    done = run(["--version"], stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout.strip()) == (0, f"indiclip {indiclip.__version__}")


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_the_example_of_what_reads_a_run_names_the_run(command, capsys):
    assert indiclip.cli.main([command, "--help"]) == 0
    example = f"example: indiclip {command} --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt"
    assert example + " --pictures 20" * (command == "predict") in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("words", ["--help", "shards --help"])
def test_output_that_is_closed_is_no_error(words):
    command = f"{sys.executable} -m indiclip {words} >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "words",
    [
        "--help", "--version", "fit --help", "check --help", "shards --help", "shards pack --help",
        "shards stats SHARD", "shards check SHARD", "shards index SHARD --json",
        "tokenizer --help", "tokenizer report bytes --text TEXT", "bench --help", "bench cards",
    ],
)  # fmt: skip
@pytest.mark.parametrize("unbuffered", ["1", pytest.param("", marks=pytest.mark.slow)])
def test_a_reader_that_has_gone_is_no_error(words, unbuffered, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    path = write_tar(tmp_path / "a.tar", {"0.png": png(), "0.txt": "x"})
    (tmp_path / "t.txt").write_text("a diya\n")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        words = [{"SHARD": path, "TEXT": str(tmp_path / "t.txt")}.get(word, word) for word in words.split()]
        done = run(words, stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_head_sees_the_first_line_only(tmp_path):
    command = f"set -o pipefail; {sys.executable} -m indiclip shards stats --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: indiclip shards stats")


def test_a_process_that_native_code_aborts_says_where_it_was(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONFAULTHANDLER", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code = "import os; from indiclip import cli; cli._run = lambda words: os.abort(); cli.main([])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGABRT
    assert 'cli.py", line' in done.stderr.partition("Fatal Python error: Aborted")[2]
