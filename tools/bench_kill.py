"""Runs killed with SIGKILL at random moments, many of them while they save, and resumed: what is lost?

    python tools/bench_kill.py [--runs 20] [--kills 2] [--seed 0] [--folder FOLDER]

A small model with dropout trains for 60 steps through the real command, with loader processes and a checkpoint every
five steps; `TMPDIR` lies on another file system than the run. Each run is killed, with all its processes, and goes on
with `--ckpt_path last` and another number of loader processes until it ends. Then the ids of the samples of every step
and the last weights are compared with those of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from indiclip.survival.manifest import what_is_wrong

STEPS, EVERY = 60, 5


class Diary(L.Callback):
    """Writes the ids of each step's samples, and the weights at the end.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        row = {"step": trainer.global_step, "keys": {task: part["keys"] for task, part in batch.items()}}
        with (self.folder / "keys.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        torch.save(module.state_dict(), self.folder / "weights.pt")


def experiment(folder: Path) -> dict[str, Any]:
    """Two tasks' worth of a config: small, with dropout, without validation."""
    text = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 64, "hidden_dropout_prob": 0.2}
    backbone = {"width": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "max_tokens": 64}
    mela = {"class_path": "indiclip.data.mela.Mela", "init_args": {"num_scenes": 100, "size": 32, "layout": "single"}}
    jitter = {"class_path": "torchvision.transforms.v2.ColorJitter", "init_args": {"brightness": 0.5}}
    source = {"task": "contrastive", "dataset": mela, "batch_size": 8, "max_tokens": 16, "augment": [jitter]}
    checkpoints = {"class_path": "indiclip.survival.checkpoints.Checkpoints"}
    encoder = {
        "backbone": {"class_path": "indiclip.backbone.NaFlexViT", "init_args": backbone},
        "text": {"tokenizer": {"class_path": "indiclip.text.ByteTokenizer"}, "architecture": text},
        "embed_dim": 32,
        "lengths": [16],
        "batch_norm": True,
    }
    return {
        "model": {"encoder": encoder, "heads": [{"class_path": "heads.contrastive.Contrastive"}], "warmup_steps": 5},
        "data": {"train": [source], "steps_per_epoch": 25},
        "trainer": {
            "max_steps": STEPS,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "bench_kill.Diary", "init_args": {"folder": str(folder)}},
                checkpoints | {"init_args": {"every_n_train_steps": EVERY}},
            ],
        },
    }


def start(folder: Path, scratch: Path, workers: int) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own."""
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment(folder)))
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TMPDIR": str(scratch), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "indiclip.cli", "fit", "--config", str(file), "--runs", str(folder / "runs")]
    command += ["--ckpt_path", "last", "--data.num_workers", str(workers)]
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(command, env=environment, start_new_session=True, stdout=output, stderr=output)


def kill(run: subprocess.Popen[bytes], folder: Path, while_saving: bool, draw: random.Random) -> str:
    """Kill a run at a random moment after its first step, or at a random save. Returns what it was doing."""
    checkpoints = folder / "runs" / "experiment" / "checkpoints"
    diary = folder / "keys.jsonl"
    before = diary.stat().st_size if diary.exists() else 0
    while run.poll() is None and (not diary.exists() or diary.stat().st_size == before):
        time.sleep(0.002)
    if while_saving:
        saves, at, there = 0, draw.randint(1, 4), False
        while run.poll() is None:
            part = (
                any(file.name.endswith(".part") for file in os.scandir(checkpoints)) if checkpoints.exists() else False
            )
            saves += part and not there
            there = part
            if saves == at and part:
                break
        time.sleep(draw.uniform(0, 0.005))
    else:
        time.sleep(draw.uniform(0, 2.0))
    if run.poll() is not None:
        return "ended before"
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    left = checkpoints.exists() and any(file.name.endswith(".part") for file in os.scandir(checkpoints))
    return "saving" if left else "training"


def read_diary(folder: Path) -> dict[int, Any]:
    """Step -> ids, of the last time that the step was done. A killed process may have left half a line."""
    rows = {}
    for line in (folder / "keys.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["step"]] = row["keys"]
    return rows


def one_run(folder: Path, scratch: Path, kills: int, draw: random.Random) -> dict[str, Any]:
    """Start, kill, go on. Returns what was seen."""
    moments, examined, torn = [], 0, 0
    for _ in range(kills):
        moments.append(kill(start(folder, scratch, draw.randint(0, 2)), folder, draw.random() < 0.6, draw))
        for file in (folder / "runs").glob("*/checkpoints/*.ckpt"):
            if not file.is_symlink():
                examined, torn = examined + 1, torn + (what_is_wrong(file) is not None or not readable(file))
    status = start(folder, scratch, draw.randint(0, 2)).wait()
    return {"moments": moments, "examined": examined, "torn": torn, "status": status}


def readable(file: Path) -> bool:
    """Whether a checkpoint can be read to its last byte: by the archive's own checksums, whatever our list says."""
    try:
        return zipfile.ZipFile(file).testzip() is None and "state_dict" in torch.load(file, weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, OSError):
        return False


def compare(folder: Path, reference: Path) -> tuple[int, int, bool]:
    """(samples lost, samples repeated, weights equal) beside the run that nobody killed."""
    mine, theirs = (
        Counter(f"{step} {key}" for step, tasks in read_diary(place).items() for keys in tasks.values() for key in keys)
        for place in (folder, reference)
    )
    weights = [torch.load(place / "weights.pt", weights_only=True) for place in (folder, reference)]
    return (
        (theirs - mine).total(),
        (mine - theirs).total(),
        all(torch.equal(value, weights[1][name]) for name, value in weights[0].items()),
    )


def main() -> int:
    """Print a line per run and the sums. Returns 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=2, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs lie (default: a temporary folder)")
    arguments = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="kill-", dir=arguments.folder))
    scratch = Path(tempfile.mkdtemp(prefix="kill-", dir="/dev/shm"))
    other = "another file system" if scratch.stat().st_dev != place.stat().st_dev else "THE SAME file system"
    reference = place / "reference"
    reference.mkdir()
    if start(reference, scratch, 2).wait():
        print((reference / "output.txt").read_text()[-2000:])
        return 1
    sums = {"kills": 0, "saving": 0, "lost": 0, "repeated": 0, "examined": 0, "torn": 0, "unequal": 0}
    for number in range(arguments.runs):
        folder = place / f"run{number}"
        folder.mkdir()
        seen = one_run(folder, scratch, arguments.kills, random.Random(f"{arguments.seed} {number}"))
        if seen["status"]:
            print((folder / "output.txt").read_text()[-2000:])
            return 1
        lost, repeated, equal = compare(folder, reference)
        sums["kills"] += sum(moment != "ended before" for moment in seen["moments"])
        sums["saving"] += seen["moments"].count("saving")
        for name, value in (("lost", lost), ("repeated", repeated), ("unequal", not equal)):
            sums[name] += value
        for name in ("examined", "torn"):
            sums[name] += seen[name]
        print(
            f"run {number:2}: killed while {', '.join(seen['moments'])}; weights {'equal' if equal else 'DIFFER'}",
            flush=True,
        )
    print(
        f"{arguments.runs} runs of {STEPS} steps, TMPDIR on {other}: {sums['kills']} kills, {sums['saving']} of them "
        f"while saving; samples lost {sums['lost']}, repeated {sums['repeated']}; checkpoints torn {sums['torn']} of "
        f"{sums['examined']}; runs with other weights {sums['unequal']}"
    )
    shutil.rmtree(scratch)
    if not arguments.folder:
        shutil.rmtree(place)
    return int(any(sums[name] for name in ("lost", "repeated", "torn", "unequal")))


if __name__ == "__main__":
    sys.exit(main())
