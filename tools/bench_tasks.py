"""What training the tasks together costs and gives: a config beside the same config with some heads switched off.

    python tools/bench_tasks.py --config conf/quickstart.yaml --only contrastive --seeds 0 1 2

Runs `indiclip fit` with all heads and with those of `--only` (and the sources they read), once per seed, and prints
the seconds of the fit and the held-out metrics as a table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

METRICS = (
    "contrastive/zero_shot", "contrastive/zero_shot_64", "detection/ap50", "detection/ap", "densepose/part_accuracy",
    "densepose/uv_gps", "densepose/uv_error", "counting/mae", "counting/mae_ratio",
)  # fmt: skip


def keep_heads(config: Any, names: list[str]) -> Any:
    """The config with the named heads alone, and the sources they read. Names are classes in lower case."""

    def name(head: Any) -> str:
        return str(head.class_path).rsplit(".", 1)[-1].lower()

    heads = [head for head in config.model.heads if name(head) in names]
    tasks = {OmegaConf.select(head, "init_args.task") or name(head) for head in heads}
    config.model.heads = heads
    for part in ("train", "val"):
        config.data[part] = [source for source in config.data[part] if source.task in tasks]
    return config


def fit(config: Path, runs: Path, name: str, extra: list[str]) -> dict[str, Any]:
    """Train in `runs/name`; the run's metrics.json."""
    if (runs / name).exists():
        raise SystemExit(f"{runs / name} is there already; give another --runs")
    command = [sys.executable, "-m", "indiclip.cli", "fit", "--config", str(config), "--runs", str(runs)]
    subprocess.run([*command, "--name", name, *extra], check=True, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads((runs / name / "metrics.json").read_text())
    return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], help="heads of the second run; none: no second run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_tasks"))
    arguments, extra = parser.parse_known_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    variants = {"all": arguments.config}
    if arguments.only:
        variants["only"] = arguments.runs / f"{arguments.config.stem}_{'_'.join(arguments.only)}.yaml"
        OmegaConf.save(keep_heads(OmegaConf.load(arguments.config), arguments.only), variants["only"])
    for label, config in variants.items():
        for seed in arguments.seeds:
            flags = ["--seed_everything", str(seed), *extra]
            result = fit(config, arguments.runs, f"{config.stem}_{seed}", flags)
            scores = {name: result["metrics"].get(f"val/{name}") for name in METRICS}
            row = ", ".join(f"{name} {score:.3f}" for name, score in scores.items() if score is not None)
            heads = "all heads" if label == "all" else "+".join(arguments.only)
            print(f"{arguments.config.stem} {heads}, seed {seed}: {result['seconds']:.0f} s; {row}", flush=True)


if __name__ == "__main__":
    main()
