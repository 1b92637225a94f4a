"""Counting on real photos, cross-validated: the counting head of a config alone, or the whole config, on every fold.

    INDICLIP_DATA=... python tools/bench_counting.py --seeds 0 1 2            # counting alone, 5 folds each
    INDICLIP_DATA=... python tools/bench_counting.py --whole --folds 0        # all heads of the config, one fold

Every photo is held out in one fold of each seed. Prints the errors of each run beside those of three constant answers,
and their mean. A run that has ended is not made again, so a bench that was stopped goes on when it is started again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from bench_tasks import fit, keep_heads
from omegaconf import OmegaConf

METRICS = ("mae", "mae_of_mean", "mae_ratio", "mae_ratio_median", "mae_ratio_class_median")


def hold_out(config: Any, fold: int) -> Any:
    """The config with another part of the counting photos held out."""
    for part in ("train", "val"):
        for source in config.data[part]:
            if source.task == "counting":
                source.dataset.init_args.fold = fold
    return config


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("conf/real_small.yaml"))
    parser.add_argument("--whole", action="store_true", help="train all heads of the config, not counting alone")
    parser.add_argument("--folds", type=int, nargs="+", default=range(5))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_counting"))
    arguments, extra = parser.parse_known_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, float]] = []
    print(f"seed fold seconds {' '.join(METRICS)}")
    for seed in arguments.seeds:
        for fold in arguments.folds:
            name = f"{'whole' if arguments.whole else 'counting'}_{seed}_{fold}"
            done = arguments.runs / name / "metrics.json"
            if not done.exists():
                config = hold_out(OmegaConf.load(arguments.config), fold)
                shutil.rmtree(done.parent, ignore_errors=True)  # of a run that was stopped
                page = arguments.runs / f"{name}.yaml"
                OmegaConf.save(config if arguments.whole else keep_heads(config, ["counting"]), page)
                fit(page, arguments.runs, name, ["--seed_everything", str(seed), *extra])
            run = json.loads(done.read_text())
            results.append({metric: run["metrics"][f"val/counting/{metric}"] for metric in METRICS})
            numbers = " ".join(f"{number:.3f}" for number in results[-1].values())
            print(f"{seed:4} {fold:4} {run['seconds']:7.0f} {numbers}", flush=True)
    means = " ".join(f"{statistics.mean(row[metric] for row in results):.3f}" for metric in METRICS)
    print(f"mean of {len(results)}: {means}")


if __name__ == "__main__":
    main()
