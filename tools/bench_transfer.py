"""What an encoder is worth in a detector: AP after fine-tuning torchvision's FCOS, from three kinds of weights.

    python tools/bench_transfer.py downstream --folder runs/transfer             # goes on where it was stopped
    python tools/bench_transfer.py table --folder runs/transfer                  # of what is done so far

The arms are (a) `four_tasks`, a run of conf/quickstart.yaml's tasks; (b) `contrastive`, the same with image-text alone
and as many more steps as the CPU-seconds of (a) pay for; (c) `random` weights. Pretraining draws 11 of mela's 17 kinds;
the scenes of the fine-tuning show the other six, which are files in COCO's format: 64, 256 or 1,024 labelled ones to
learn from and 512 held-out ones. Then the photos of `$INDICLIP_DATA/coco`, in five folds, whose boxes
are all of one class.

A seed draws the pretraining's weights and samples, the labelled subset and the detector's weights. Everything is done
by `indiclip fit`, with one thread, and goes on after a kill; results.jsonl has a row per fine-tuning. All arms are
fine-tuned with the same options, at the learning rate that has the best mean AP over the arms (`--rates`): of the first
seed's pretraining and 256 images of a seed that the table does not have, on the table's held-out scenes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning as L
import numpy as np
import yaml
from omegaconf import OmegaConf
from PIL import Image

from indiclip import json_lines
from indiclip.training.fault_tolerance.ranks import folder_of

ROOT = Path(__file__).parent.parent
HELD_OUT = ["kite", "dhol", "umbrella", "elephant", "lotus", "lantern"]
STEPS = {"four_tasks": 450, "contrastive": 740}  # a step of image-text alone takes 0.61 of one of four tasks
ARMS = (*STEPS, "random")
SIZES = (64, 256, 1024)
NUM_HELD_OUT, SIDE, FOLDS = 512, 96, 5
RATES_SEED = 100  # of the scenes on which the learning rate is chosen
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}  # Student's t, 95%, by degrees of freedom


class CPUClock(L.Callback):
    """Appends the CPU-seconds of training to `cpu_seconds.jsonl` in the run's folder, a line for each stretch of steps.

    Imports, validation and reports are not in them. Where a run was killed and went on, the lines of both add up; steps
    that were done twice count twice.

    Args:
        every_n_steps: Steps between two lines.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every = every_n_steps
        self._since, self._done, self._validating = 0.0, 0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since, self._done = time.process_time(), trainer.global_step  # after the validation before training

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step % self.every and step != trainer.max_steps:
            return
        row = {"step": step, "steps": step - self._done, "cpu_seconds": round(time.process_time() - self._since, 3)}
        json_lines.append(folder_of(trainer) / "cpu_seconds.jsonl", [row])
        self._since, self._done = time.process_time(), step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validating = time.process_time()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since += time.process_time() - self._validating


def cpu_seconds(run: Path) -> float:
    """Of a run's training, over all its processes."""
    return sum(row["cpu_seconds"] for row in json_lines.read(run / "cpu_seconds.jsonl"))


def fit(config: dict[str, Any], folder: Path, name: str, checkpoint_every: int) -> dict[str, Any]:
    """`indiclip fit`, going on from where it was; the run's metrics. A run that is done is not done again."""
    done = folder / name / "metrics.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        every = {"every_n_train_steps": checkpoint_every}
        checkpoints = "indiclip.training.fault_tolerance.checkpoints.Checkpoints"
        config["trainer"] |= {
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "bench_transfer.CPUClock"},
                {"class_path": checkpoints, "init_args": every},
            ],
        }
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        paths = [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "indiclip.cli", "fit", "--config", str(file), "--runs", str(folder)]
        with (folder / f"{name}.log").open("ab") as log:
            status = subprocess.run(
                [*command, "--name", name, "--ckpt_path", "last"], cwd=ROOT, env=environment, stdout=log, stderr=log
            ).returncode
        if status or not done.exists():
            raise SystemExit(f"{folder / name}: the fit ended with {status}, see {name}.log")
    metrics: dict[str, Any] = json.loads(done.read_text())
    return metrics


def pretraining(arm: str, seed: int) -> dict[str, Any]:
    """The experiment of an arm: conf/quickstart.yaml without the held-out kinds."""
    from indiclip.generated.mela_words import CLASSES

    config: dict[str, Any] = yaml.safe_load((ROOT / "conf" / "quickstart.yaml").read_text())
    if arm == "contrastive":
        config["model"]["heads"] = config["model"]["heads"][:1]
    for part in ("train", "val"):
        sources = config["data"][part]
        config["data"][part] = [one for one in sources if arm != "contrastive" or one["task"] == "contrastive"]
        for source in sources:
            source["dataset"]["init_args"]["kinds"] = [kind for kind in CLASSES if kind not in HELD_OUT]
    config["data"]["steps_per_epoch"] = config["trainer"]["max_steps"] = STEPS[arm]
    return config | {"seed_everything": seed}


def write_scenes(folder: Path) -> None:
    """Scenes of the held-out kinds: images, and `train.json` and `val.json` in COCO's format."""
    from indiclip.generated.mela import Mela

    if (folder / "val.json").exists():
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    categories = [{"id": number, "name": kind} for number, kind in enumerate(HELD_OUT, 1)]
    for part, count, seed in (("train", max(SIZES), 51), ("val", NUM_HELD_OUT, 1051)):
        fair = Mela(num_scenes=count, size=SIDE, layout="mixed", people=0, kinds=HELD_OUT, seed=seed)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            sample = fair[index]
            images.append({"id": index, "file_name": f"{part}{index:05}.png", "width": SIDE, "height": SIDE})
            Image.fromarray(np.asarray(sample["image"])).save(folder / "images" / images[-1]["file_name"])
            for (x1, y1, x2, y2), label in zip(sample["boxes_xyxy"].tolist(), sample["classes"], strict=True):
                box = [x1, y1, x2 - x1, y2 - y1]
                kind = HELD_OUT.index(fair.classes[int(label)].replace(" ", "_")) + 1
                row = {"id": len(annotations) + 1, "image_id": index, "category_id": kind, "bbox": box, "iscrowd": 0}
                annotations.append(row | {"area": box[2] * box[3]})
        content = {"images": images, "annotations": annotations, "categories": categories}
        json_lines.write_whole(folder / f"{part}.json", json.dumps(content).encode())


def labelled(scenes: Path, size: int, seed: int) -> Path:
    """A random part of train.json."""
    file = scenes / f"train-{size}-{seed}.json"
    if not file.exists():
        content = json.loads((scenes / "train.json").read_text())
        chosen = {int(i) for i in np.random.default_rng(seed).permutation(max(SIZES))[:size]}
        content["images"] = [image for image in content["images"] if image["id"] in chosen]
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] in chosen]
        json_lines.write_whole(file, json.dumps(content).encode())
    return file


def finetuning(weights: Path, arm: str, seed: int, lr: float, changes: dict[str, Any]) -> dict[str, Any]:
    """conf/downstream/fcos.yaml from a run's weights, or with random ones of the same architecture."""
    from indiclip.pretrained.read import read_weights

    config: dict[str, Any] = yaml.safe_load((ROOT / "conf" / "downstream" / "fcos.yaml").read_text())
    encoder = {"init_from": [{"weights": str(weights), "parts": ["image", "text", "projections"]}]}
    plain = read_weights(str(weights)).config
    if num_blocks := changes.get("num_blocks"):  # the last ones are left away
        plain["backbone"]["init_args"]["depth"] = num_blocks
        encoder["backbone"] = plain["backbone"]
        encoder["init_from"][0]["allow"] = ["backbone.vit.blocks.*"]
    config["model"]["encoder"] = encoder if arm != "random" else plain
    config["model"] |= {"lr": lr} | changes.get("model", {})
    config["model"]["heads"][0]["init_args"] |= changes["head"]
    for part in ("train", "val"):
        config["data"][part][0] |= changes[part]
    steps = config["trainer"]["max_steps"] = changes.get("steps", config["trainer"]["max_steps"])
    config["data"]["steps_per_epoch"] = steps // 3
    return config | {"seed_everything": seed}


def on_scenes(folder: Path, size: int, seed: int) -> dict[str, Any]:
    """Which files and sizes a fine-tuning on generated scenes has."""
    scenes = folder / "scenes"
    files = {"train": labelled(scenes, size, seed), "val": scenes / "val.json"}
    changes: dict[str, Any] = {"head": {"num_classes": len(HELD_OUT)}}
    for part, file in files.items():
        arguments = {"images": str(scenes / "images"), "annotations": str(file)}
        dataset = {"class_path": "indiclip.datasets.coco.CocoDetection", "init_args": arguments}
        changes[part] = {"dataset": dataset, "max_tokens": (SIDE // 8) ** 2}
    return changes


def on_photos(folder: Path, data_root: Path, fold: int) -> dict[str, Any]:
    """The same for a fold of the photos, with all 80 classes as one: 154 photos do not tell them apart."""
    photos = data_root / "coco"
    file = folder / "photos.json"
    if not file.exists():
        content = json.loads((photos / "instances.json").read_text())
        rows = [row | {"category_id": 1} for row in content["annotations"]]
        content |= {"annotations": rows, "categories": [{"id": 1, "name": "thing"}]}
        json_lines.write_whole(file, json.dumps(content).encode())
    files = {"images": str(photos / "images"), "annotations": str(file)}
    boxes = {"class_path": "indiclip.datasets.coco.CocoDetection", "init_args": files}
    # torchvision keeps boxes of a score from 0.2 on, which so short a training on photos does not reach.
    head = {"num_classes": 1, "scales": [2.0, 1.0, 0.5], "options": {"score_thresh": 0.01}}
    changes: dict[str, Any] = {"head": head, "steps": 200}
    for part in ("train", "val"):
        arguments = {"dataset": boxes, "part": part, "fold": fold, "fraction": 1 / FOLDS}
        dataset = {"class_path": "indiclip.datasets.split.Split", "init_args": arguments}
        changes[part] = {"dataset": dataset, "max_tokens": 256, "batch_size": 8}
    return changes


class Bench:
    """A folder of runs and results.

    Args:
        folder: Of everything.
        data_root: Of the photos.
    """

    def __init__(self, folder: Path, data_root: Path) -> None:
        self.folder, self.data_root = folder.resolve(), data_root.resolve()
        self.file = self.folder / "results.jsonl"

    def rows(self) -> list[dict[str, Any]]:
        """All fine-tunings that are done."""
        return json_lines.read(self.file)

    def pretrained(self, arm: str, seed: int) -> Path:
        """The run of an arm, trained where it is not there yet."""
        name = f"{'four_tasks' if arm == 'random' else arm}-{seed}"
        fit(pretraining(name.rpartition("-")[0], seed), self.folder / "pretrain", name, 50)
        return self.folder / "pretrain" / name

    def finetune(self, data: str, arm: str, size: int, seed: int, lr: float, variant: str = "") -> dict[str, Any]:
        """One fine-tuning; the row in results.jsonl."""
        key = {"data": data, "arm": arm, "size": size, "seed": seed, "lr": lr, "variant": variant}
        for row in self.rows():
            if key.items() <= row.items():
                return row
        weights = self.pretrained(arm, 0 if data == "photos" else seed % RATES_SEED)
        changes = (
            on_photos(self.folder, self.data_root, seed) if data == "photos" else on_scenes(self.folder, size, seed)
        )
        changes = OmegaConf.to_container(OmegaConf.merge(changes, VARIANTS[variant]))
        name = "-".join(str(value) for value in key.values() if value != "")
        metrics = fit(finetuning(weights, arm, seed, lr, changes), self.folder / "finetune", name, 100)
        scores = {name: metrics["metrics"].get(f"val/torchvision_detector/{name}") for name in ("ap", "ap50", "ap75")}
        run = self.folder / "finetune" / name
        row = key | scores | {"steps": metrics["step"], "cpu_seconds": round(cpu_seconds(run), 1)}
        row["pretraining_cpu_seconds"] = 0 if arm == "random" else round(cpu_seconds(weights), 1)
        json_lines.append(self.file, [row])
        print(json.dumps(row), flush=True)
        return row

    def choose_rate(self, rates: list[float]) -> float:
        """The one of the best mean AP over the arms."""
        if len(rates) == 1:
            return rates[0]
        tried = {lr: [self.finetune("scenes", arm, 256, RATES_SEED, lr)["ap"] for arm in ARMS] for lr in rates}
        return max(tried, key=lambda lr: mean(tried[lr]))


# What is changed to find the reason of a result.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "frozen": {"model": {"lr_scale": {"encoder.backbone": 0.0}}},
    "no_decay": {"model": {"layer_decay": 1.0}},
    "decay_0.6": {"model": {"layer_decay": 0.6}},
    "three_blocks": {"num_blocks": 3},
    "two_blocks": {"num_blocks": 2},
    "steps_800": {"steps": 800},
    "tokens_576": {part: {"max_tokens": 576} for part in ("train", "val")},
}


def interval(values: list[float]) -> str:
    """Mean and the half-width of its 95% interval by Student's t."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else ""
    return f"{mean(values):.3f} ± {T_95.get(len(values) - 1, 2.57) * stdev(values) / len(values) ** 0.5:.3f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each data set, size and variant; an arm a column, and (a) less the others by seed."""
    lines = ["| data | labelled | lr | " + " | ".join(ARMS) + " | a - b | a - c | runs |", "|---" * 8 + "|"]
    cells: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    for row in rows:
        kind = "rates" if row["data"] == "scenes" and row["seed"] == RATES_SEED else row["data"]
        key = (f"{kind} {row['variant']}".strip(), row["size"], row["lr"])
        cells.setdefault(key, {}).setdefault(row["arm"], {})[row["seed"]] = row["ap"]
    for key, arms in sorted(cells.items(), key=str):
        own = [interval(list(arms.get(arm, {}).values())) for arm in ARMS]
        first = arms.get(ARMS[0], {})
        apart = [
            interval([first[seed] - ap for seed, ap in arms.get(arm, {}).items() if seed in first]) for arm in ARMS[1:]
        ]
        runs = "/".join(str(len(arms.get(arm, {}))) for arm in ARMS)
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join([*own, *apart])} | {runs} |")
    return "\n".join(lines)


def main() -> None:
    """Do what is left to do, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["downstream", "table"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("INDICLIP_DATA", "data")))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--folds", type=int, nargs="*", default=list(range(FOLDS)))
    parser.add_argument("--variant", default="", choices=VARIANTS)
    arguments = parser.parse_args()
    bench = Bench(arguments.folder, arguments.data)
    if arguments.what == "downstream":
        write_scenes(bench.folder / "scenes")
        lr = bench.choose_rate(arguments.rates)
        for seed in arguments.seeds:
            for size in arguments.sizes:
                for arm in arguments.arms:
                    bench.finetune("scenes", arm, size, seed, lr, arguments.variant)
        for fold in arguments.folds:
            for arm in arguments.arms:
                bench.finetune("photos", arm, 0, fold, lr, arguments.variant)
    print(table(bench.rows()))


if __name__ == "__main__":
    main()
