"""Zero-shot CIFAR-10 accuracy against CPU-seconds of training, several seeds.

    INDICLIP_DATA=... python tools/bench_cifar10.py --seeds 0 1 2

One process and one thread per run, the loader inside it, so that process time is all the CPU time there is; what
validation costs is left out. Prints the curve of each seed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
import yaml

ROOT = Path(__file__).resolve().parent.parent
OVERLAY = """
seed_everything: {seed}
data: {{num_workers: 0, steps_per_epoch: {every}}}
trainer:
  max_steps: {steps}
  callbacks+:
    - {{class_path: bench_cifar10.CpuClock, init_args: {{file: {file}}}}}
"""


class CpuClock(L.Callback):
    """Appends {cpu_seconds, step, zero_shot} at each validation; the clock stands still meanwhile.

    Args:
        file: JSON lines.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds, self.since = 0.0, time.process_time()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds += time.process_time() - self.since

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.since = time.process_time()
        row = {"cpu_seconds": round(self.seconds, 1), "step": trainer.global_step}
        row |= {"zero_shot": round(float(trainer.callback_metrics["val/contrastive/zero_shot"]), 4)}
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def train(seed: int, steps: int, every: int, config: Path, extra: list[str]) -> list[dict[str, float]]:
    """One run; its curve."""
    with tempfile.TemporaryDirectory() as folder:
        curve = Path(folder) / "curve.jsonl"
        overlay = Path(folder) / "overlay.yaml"
        overlay.write_text(OVERLAY.format(seed=seed, every=every, steps=steps, file=curve))
        command = [sys.executable, "-m", "indiclip.cli", "fit", "--config", str(config), "--config", str(overlay)]
        command += ["--runs", folder, "--trainer.enable_checkpointing", "false", *extra]
        paths = os.pathsep.join([str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return [json.loads(line) for line in curve.read_text().splitlines()]


def main() -> None:
    """Print the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of a run (default: the config's)")
    parser.add_argument("--every", type=int, help="steps between validations (default: a quarter of them)")
    parser.add_argument("--config", type=Path, default=ROOT / "conf" / "cifar10.yaml")
    arguments, extra = parser.parse_known_args()
    steps = arguments.steps or yaml.safe_load(arguments.config.read_text())["trainer"]["max_steps"]
    every = arguments.every or max(1, steps // 4)
    for seed in arguments.seeds:
        print(f"seed {seed}   CPU-seconds: zero-shot accuracy", flush=True)
        for row in train(seed, steps, every, arguments.config, extra):
            print(f"  {row['cpu_seconds']:7.1f}  {row['zero_shot']:.2%}  (step {row['step']})", flush=True)


if __name__ == "__main__":
    main()
