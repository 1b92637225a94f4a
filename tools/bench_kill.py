"""Runs killed with SIGKILL at random moments, many of them while they save, and resumed: what is lost?

    python tools/bench_kill.py [--runs 20] [--kills 2] [--seed 0] [--ranks 1] [--folder FOLDER]

A small model with dropout trains for 60 steps through the real command, with loader processes; every second run with a
checkpoint every five steps, the others by epochs with two micro-batches a step and a checkpoint after each. `TMPDIR`
lies on another file system than the run. Each run is killed, with all its processes, and goes on with
`--ckpt_path last` and another number of loader processes until it ends. Then the ids of the samples of every batch, the
held-out scores and the last weights are compared with those of a run that nobody killed.

With several `--ranks` the weights are shared out over them, and a checkpoint is a folder that all of them write while
they train on; then every run has a checkpoint every five steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
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

from indiclip.pretrained.sharded import read_sharded
from indiclip.pretrained.weights import read_tensors
from indiclip.training.fault_tolerance.manifest import what_is_wrong
from indiclip.training.record import read_history

STEPS, EVERY = 60, 5
SHARDED = {"class_path": "indiclip.training.sharding.ShardedStrategy", "init_args": {"data_parallel_size": 1}}


class Diary(L.Callback):
    """Writes the ids of each batch's samples.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        number = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        if trainer.global_rank:
            return
        row = {"batch": number, "keys": {task: part["keys"] for task, part in batch.items()}}
        with (self.folder / "keys.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def experiment(folder: Path, micro_batches: int, ranks: int) -> dict[str, Any]:
    """A small model with dropout."""
    text = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 64, "hidden_dropout_prob": 0.2}
    backbone = {"width": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "max_tokens": 64}
    mela = {
        "class_path": "indiclip.generated.mela.Mela",
        "init_args": {"num_scenes": 100, "size": 32, "layout": "single"},
    }
    jitter = {"class_path": "torchvision.transforms.v2.ColorJitter", "init_args": {"brightness": 0.5}}
    source = {"task": "contrastive", "dataset": mela, "batch_size": 8, "max_tokens": 16, "augment": [jitter]}
    held_out = source | {"dataset": mela | {"init_args": mela["init_args"] | {"num_scenes": 16, "seed": 1}}}
    held_out = {name: value for name, value in held_out.items() if name != "augment"}
    callbacks: list[dict[str, Any]] = [{"class_path": "bench_kill.Diary", "init_args": {"folder": str(folder)}}]
    if micro_batches == 1:
        every = {"every_n_train_steps": EVERY}
        callbacks.append(
            {"class_path": "indiclip.training.fault_tolerance.checkpoints.Checkpoints", "init_args": every}
        )
    encoder = {
        "backbone": {"class_path": "indiclip.backbone.NaFlexViT", "init_args": backbone},
        "text": {"tokenizer": {"class_path": "indiclip.tokenizers.ByteTokenizer"}, "architecture": text},
        "embed_dim": 32,
        "lengths": [16],
        "batch_norm": True,
    }
    return {
        "model": {
            "encoder": encoder,
            "heads": [{"class_path": "heads.contrastive.Contrastive"}],
            "warmup_steps": 5,
            "micro_batches": micro_batches,
        },
        "data": {"train": [source], "val": [held_out], "steps_per_epoch": 25 if micro_batches == 1 else 9},
        "trainer": {
            **({"max_steps": STEPS} if micro_batches == 1 else {"max_epochs": 7}),
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "callbacks": callbacks,
            **({"devices": ranks, "strategy": SHARDED} if ranks > 1 else {"devices": 1}),
        },
    }


def start(folder: Path, scratch: Path, workers: int) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own."""
    file = folder / "experiment.yaml"
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TMPDIR": str(scratch), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"}
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
        saves, at, there = 0, draw.randint(2, 5), False  # the first would leave nothing to look at
        while run.poll() is None:
            part = being_saved(checkpoints)
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
    return "saving" if being_saved(checkpoints) else "training"


def being_saved(checkpoints: Path) -> bool:
    """Whether a checkpoint lies beside its place."""
    return any(re.fullmatch(r"\.\d+\.ckpt\.part", part.name) for part in checkpoints.glob(".*.part"))


def read_diary(folder: Path) -> dict[int, Any]:
    """Number of the batch -> ids, of the last time that it was done. A killed process may have left half a line."""
    rows = {}
    for line in (folder / "keys.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["batch"]] = row["keys"]
    return rows


def prepared(folder: Path, micro_batches: int, ranks: int) -> Path:
    """A folder with an experiment."""
    folder.mkdir()
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment(folder, micro_batches, ranks)))
    return folder


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
        if file.is_dir():
            return "optimizer_states" in read_sharded(file)
        return zipfile.ZipFile(file).testzip() is None and "state_dict" in torch.load(file, weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, OSError, ValueError):
        return False


def held_out_scores(folder: Path) -> list[Any]:
    """(step, scores) of every validation, in order."""
    rows = read_history(folder / "runs" / "experiment")
    found = [(row["step"], {name: row[name] for name in row if name.startswith("val/")}) for row in rows]
    return [one for one in found if one[1]]


def compare(folder: Path, reference: Path) -> tuple[int, int, bool, bool]:
    """(samples lost, samples repeated, scores equal, weights equal) beside the run that nobody killed."""
    mine, theirs = (
        Counter(f"{batch} {key}" for batch, tasks in read_diary(p).items() for keys in tasks.values() for key in keys)
        for p in (folder, reference)
    )
    last = [place / "runs" / "experiment" / "checkpoints" / "last.ckpt" for place in (folder, reference)]
    weights = [read_tensors(file)["state_dict"] for file in last]
    return (
        (theirs - mine).total(),
        (mine - theirs).total(),
        held_out_scores(folder) == held_out_scores(reference),
        all(torch.equal(value, weights[1][name]) for name, value in weights[0].items()),
    )


def main() -> int:
    """Print a line per run and the sums. Returns 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=2, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1, help="processes; several share out the weights")
    parser.add_argument("--folder", type=Path, help="where the runs lie (default: a temporary folder)")
    arguments = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="kill-", dir=arguments.folder))
    scratch = Path(tempfile.mkdtemp(prefix="kill-", dir="/dev/shm"))
    other = "another file system" if scratch.stat().st_dev != place.stat().st_dev else "THE SAME file system"
    kinds, ranks = ([1, 2] if arguments.ranks == 1 else [1]), arguments.ranks
    references = [prepared(place / f"reference{micro_batches}", micro_batches, ranks) for micro_batches in kinds]
    for reference in references:
        if start(reference, scratch, 2).wait():
            print((reference / "output.txt").read_text()[-2000:])
            return 1
    names = ("kills", "saving", "lost", "repeated", "examined", "torn", "other scores", "other weights")
    sums = dict.fromkeys(names, 0)
    for number in range(arguments.runs):
        kind = number % len(kinds)
        folder = prepared(place / f"run{number}", kinds[kind], ranks)
        seen = one_run(folder, scratch, arguments.kills, random.Random(f"{arguments.seed} {number}"))
        if seen["status"]:
            print((folder / "output.txt").read_text()[-2000:])
            return 1
        lost, repeated, same_scores, equal = compare(folder, references[kind])
        sums["kills"] += sum(moment != "ended before" for moment in seen["moments"])
        sums["saving"] += seen["moments"].count("saving")
        sums["lost"], sums["repeated"] = sums["lost"] + lost, sums["repeated"] + repeated
        sums["other scores"] += not same_scores
        sums["other weights"] += not equal
        for name in ("examined", "torn"):
            sums[name] += seen[name]
        print(
            f"run {number:2}: killed while {', '.join(seen['moments'])}; weights {'equal' if equal else 'DIFFER'}, "
            f"held-out scores {'equal' if same_scores else 'DIFFER'}",
            flush=True,
        )
    print(
        f"{arguments.runs} runs of {STEPS} steps on {ranks} rank(s), TMPDIR on {other}: {sums['kills']} kills, "
        f"{sums['saving']} of them "
        f"while saving; samples lost {sums['lost']}, repeated {sums['repeated']}; checkpoints torn {sums['torn']} of "
        f"{sums['examined']}; runs with other weights {sums['other weights']}, other held-out scores "
        f"{sums['other scores']}"
    )
    shutil.rmtree(scratch)
    if not arguments.folder:
        shutil.rmtree(place)
    return int(any(sums[name] for name in ("lost", "repeated", "torn", "other scores", "other weights")))


if __name__ == "__main__":
    sys.exit(main())
