"""A small experiment for scripts that start, kill and resume runs: what its steps did, and how it ended.

It computes the same on any number of ranks but for rounding: the loss is over the batch of all of them, and there is no
dropout, no batch norm and no AdamW, which makes a whole step of a gradient that is nothing but rounding.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_kill
import lightning as L
import yaml

from indiclip.pretrained.weights import read_tensors

STEPS, EVERY, BATCH = bench_kill.STEPS, bench_kill.EVERY, 8


class Diary(L.Callback):
    """Writes the ids of each rank's samples, and makes steps last as long as INDICLIP_PAUSE says (seconds).

    Args:
        folder: Where to.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.start = Path(folder), 0.0

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.start = trainer.strategy.broadcast(time.time())

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        time.sleep(float(os.environ.get("INDICLIP_PAUSE", "0")))
        keys = [key for part in batch.values() for key in part["keys"]]
        row = {"step": trainer.global_step, "start": self.start, "world": trainer.world_size, "keys": keys}
        with (self.folder / f"keys-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def prepared(folder: Path, **trainer: Any) -> Path:
    """A new folder with the experiment, whose trainer has these settings too."""
    folder.mkdir(parents=True)
    tree = bench_kill.experiment(folder, 1, 1)
    tree["model"]["encoder"]["batch_norm"] = False
    tree["model"]["encoder"]["text"]["architecture"]["hidden_dropout_prob"] = 0.0
    tree["model"]["encoder"]["text"]["architecture"]["attention_probs_dropout_prob"] = 0.0
    tree["model"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
    tree["data"]["train"][0]["batch_size"] = BATCH
    tree["trainer"]["callbacks"][0]["class_path"] = "_small_run.Diary"
    del tree["trainer"]["devices"]
    tree["trainer"] |= trainer
    (folder / "experiment.yaml").write_text(yaml.safe_dump(tree))
    return folder


def variables(**more: str) -> dict[str, str]:
    """For a new Python that has the tools and our modules at hand."""
    tools = Path(__file__).resolve().parent
    paths = [str(tools), str(tools.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"} | more


def reference(folder: Path) -> Path:
    """A run of one process that nobody disturbs, in a new folder."""
    prepared(folder, devices=1)
    words = ["fit", "--config", str(folder / "experiment.yaml"), "--runs", str(folder / "runs")]
    subprocess.run([sys.executable, "-m", "indiclip", *words], env=variables(), check=True, stdout=subprocess.DEVNULL)
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    """What all ranks wrote. A killed process may have left half a line."""
    found = []
    for file in sorted(folder.glob("keys-*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def starts(folder: Path) -> list[tuple[int, int, int]]:
    """(ranks, first step, last step) of each start, in order; steps are counted from 1."""
    of_start: dict[float, list[dict[str, Any]]] = {}
    for row in rows(folder):
        of_start.setdefault(row["start"], []).append(row)
    return [
        (of[0]["world"], 1 + min(row["step"] for row in of), 1 + max(row["step"] for row in of))
        for _, of in sorted(of_start.items())
    ]


def samples(folder: Path) -> dict[int, list[str]]:
    """Step -> ids of the whole batch, in order of the ids, of the last time that it was done."""
    last: dict[int, float] = {}
    found = rows(folder)
    for row in found:
        last[row["step"]] = max(row["start"], last.get(row["step"], 0.0))
    batches: dict[int, list[str]] = {step: [] for step in last}
    for row in found:
        if row["start"] == last[row["step"]]:
            batches[row["step"]] += row["keys"]
    return {step: sorted(keys) for step, keys in sorted(batches.items())}


def compare(folder: Path, other: Path) -> float:
    """The largest difference of a weight at the end of two runs.

    Raises:
        AssertionError: They did not take the same samples in each step, or another number of steps.
    """
    assert samples(folder) == samples(other), "the runs took other samples"
    first, second = (read_tensors(at / "runs" / "experiment" / "checkpoints" / "last.ckpt") for at in (folder, other))
    assert first["global_step"] == second["global_step"] == STEPS, f"the run ended at step {first['global_step']}"
    ours, theirs = first["state_dict"], second["state_dict"]
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in theirs)


def wait_until(true: Callable[[], Any], what: str, seconds: float = 180.0) -> None:
    """Look ten times a second whether something is so. Raises TimeoutError where it is not after so many seconds."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"after {seconds:g} s there was still no {what}")
        time.sleep(0.1)
