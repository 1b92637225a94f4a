"""From a run to a detector of detectron2 (ViTDet), on boxes or masks in COCO's format.

    python tools/finetune_detectron2.py --model runs/quickstart --train train.json --images photos --val held_out.json

The encoder goes to `RUN/vitdet` as by `indiclip export --to vitdet`; `--model` may also be such a folder. ViTDet's Mask
R-CNN (or `--detector cascade_mask_rcnn`) is trained on it with layer-wise decay; without masks where the annotations
have only boxes. AP over time is in `RUN/report.html`; the detector is `RUN/model_final.pth`, which `RUN/config.yaml`
builds. The same line goes on after a kill. Settings of the LazyConfig in `RUN/vitdet` may follow: `optimizer.lr=3e-4`,
`dataloader.train.num_workers=0`.

One process trains. On several GPUs detectron2's own `tools/lazyconfig_train_net.py` does, by the same configuration.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from indiclip import json_lines
from indiclip.datasets.coco import CocoDetection
from indiclip.evals.pages.report import write_report
from indiclip.export.exporter import export
from indiclip.export.source import open_source

DETECTORS = ("mask_rcnn", "cascade_mask_rcnn")
NAMES = {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "APs": "ap_small", "APm": "ap_medium", "APl": "ap_large"}


def config_for(arguments: argparse.Namespace, vitdet: Path, options: list[str]) -> Any:
    """The folder's LazyConfig with the files, their classes and the sizes in their places."""
    from detectron2.config import LazyConfig

    config = LazyConfig.load(str(vitdet / f"{arguments.detector}.py"))
    learned, held_out = (register(*files) for files in files_of(arguments))
    config.dataloader.train.dataset.names, config.dataloader.test.dataset.names = learned, held_out
    config.model.roi_heads.num_classes = len(CocoDetection(str(arguments.images), str(arguments.train)).classes)
    if not has_masks(arguments.train):
        heads, mapper = config.model.roi_heads, config.dataloader.train.mapper
        heads.mask_in_features = heads.mask_pooler = heads.mask_head = None
        mapper.use_instance_mask = mapper.recompute_boxes = False
    if size := arguments.image_size:
        config.model.backbone.square_pad = size
        _, resize, crop = config.dataloader.train.mapper.augmentations
        resize.target_height = resize.target_width = size
        crop.crop_size = (size, size)
        test = config.dataloader.test.mapper.augmentations[0]
        test.short_edge_length = test.max_size = size
    config.dataloader.train.total_batch_size = arguments.batch_size
    config.train.max_iter, config.train.eval_period = arguments.max_steps, arguments.every
    config.train.checkpointer.period, config.train.checkpointer.max_to_keep = arguments.every, 1
    config.train.device = "cuda" if torch.cuda.is_available() else "cpu"
    config.train.amp.enabled = torch.cuda.is_available()
    config.train.log_period = 1 if arguments.max_steps < 100 else config.train.log_period
    return LazyConfig.apply_overrides(config, options)


def files_of(arguments: argparse.Namespace) -> list[tuple[Path, Path]]:
    """Annotations and folder of images, of training and of what is held out."""
    held_out = arguments.val_images or arguments.images
    return [(arguments.train, arguments.images), (arguments.val, held_out)]


def has_masks(file: Path) -> bool:
    """Whether all objects have one."""
    return all(row.get("segmentation") for row in json.loads(file.read_text())["annotations"])


def register(file: Path, images: Path) -> str:
    """A data set under the name of its file."""
    from detectron2.data import DatasetCatalog
    from detectron2.data.datasets import register_coco_instances

    name = str(file.resolve())
    if name not in DatasetCatalog.list():
        register_coco_instances(name, {}, str(file), str(images))
    return name


def train(config: Any, run: Path, detector: str) -> None:
    """Train on from the newest checkpoint of the run, or from the start, and write the report."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import instantiate
    from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, hooks
    from detectron2.evaluation import inference_on_dataset

    model = instantiate(config.model).to(config.train.device)
    config.optimizer.params.model = model
    kind = AMPTrainer if config.train.amp.enabled else SimpleTrainer
    trainer = kind(model, instantiate(config.dataloader.train), instantiate(config.optimizer))
    checkpointer = DetectionCheckpointer(model, str(run), trainer=trainer)
    loaded = checkpointer.resume_or_load(config.train.init_checkpoint, resume=True)
    start = loaded.get("iteration", -1) + 1 if checkpointer.has_checkpoint() else 0
    history = run / "history.jsonl"
    rows = [row for row in json_lines.read(history) if row["step"] <= start]
    json_lines.rewrite(history, rows)
    began = time.monotonic() - max((row["seconds"] for row in rows), default=0.0)

    def add(values: dict[str, float]) -> None:
        step = min(trainer.iter + 1, config.train.max_iter)
        json_lines.append(history, [{"step": step, "seconds": round(time.monotonic() - began, 1)} | finite(values)])

    class Losses(HookBase):
        def after_step(self) -> None:
            if (self.trainer.iter + 1) % config.train.log_period == 0:
                latest = self.trainer.storage.latest()
                add({f"train/{detector}/{name}": value for name, (value, _) in latest.items() if "loss" in name})

    def evaluate() -> None:
        found = inference_on_dataset(
            model, instantiate(config.dataloader.test), instantiate(config.dataloader.evaluator)
        )
        add({f"val/{detector}/{name}": value for name, value in scores(found).items()})

    trainer.register_hooks(
        [
            hooks.LRScheduler(scheduler=instantiate(config.lr_multiplier)),
            Losses(),
            hooks.EvalHook(config.train.eval_period, evaluate),
            hooks.PeriodicCheckpointer(checkpointer, **config.train.checkpointer, max_iter=config.train.max_iter),
        ]
    )
    scored = [row["step"] for row in rows if f"val/{detector}/ap" in row]
    if max([-1, *scored]) < config.train.max_iter:
        trainer.train(start, config.train.max_iter)


def scores(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """detectron2's percentages by the names and in the units of IndiCLIP's detectors; those of masks begin with it."""
    return {
        f"{prefix}{ours}": found[task][theirs] / 100
        for task, prefix in {"bbox": "", "segm": "mask_"}.items()
        for theirs, ours in NAMES.items()
        if theirs in found.get(task, {})
    }


def finite(values: dict[str, float]) -> dict[str, float | None]:
    """None is what JSON has no number for: detectron2 says NaN where there is no such object."""
    return {name: round(value, 6) if math.isfinite(value) else None for name, value in values.items()}


def report(run: Path, detector: str) -> dict[str, Any]:
    """Write `metrics.json` and `report.html` as `indiclip fit` does."""
    history = json_lines.read(run / "history.jsonl")
    metrics = {name: row[name] for row in history for name in row if name.startswith("val/")}
    record: dict[str, Any] = {"step": history[-1]["step"], "seconds": history[-1]["seconds"], "metrics": metrics}
    write_report(run, run.name, record | {"history": history, "quarantined": [], "data": {}}, {})
    json_lines.write_whole(run / "metrics.json", (json.dumps(record, indent=2) + "\n").encode())
    return record


def main(argv: list[str] | None = None) -> int:
    """Export, train, report. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run, or whatever else `indiclip export` takes, or its folder")
    parser.add_argument("--detector", default="mask_rcnn", choices=DETECTORS)
    parser.add_argument("--train", type=Path, required=True, help="annotations to learn from")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True, help="held-out annotations")
    parser.add_argument("--val_images", type=Path, help="where they lie elsewhere")
    parser.add_argument("--image_size", type=int, help="pixels of a side (default: 64 patches)")
    parser.add_argument("--batch_size", type=int, default=16, help="images per step")
    parser.add_argument("--max_steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=1_000, help="steps between evaluations, and between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--name", default="vitdet")
    parser.add_argument("options", nargs="*", help="KEY=VALUE of the LazyConfig")
    arguments = parser.parse_args(argv)
    for file in (arguments.train, arguments.val, arguments.images):
        if not file.exists():
            parser.error(f"{file}: no such file or folder")
    if find_spec("detectron2") is None:
        parser.error("needs detectron2, which is built from its source: README.md says how")
    try:
        read = [CocoDetection(str(images), str(file)).classes for file, images in files_of(arguments)]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if read[0] != read[1]:
        parser.error(
            f"{arguments.val}: has the classes {', '.join(read[1])}; {arguments.train} has {', '.join(read[0])}"
        )
    if has_masks(arguments.train) and find_spec("shapely") is None:
        parser.error(f"{arguments.train}: has masks, which detectron2 crops by shapely; pip install shapely")
    from detectron2.config import LazyConfig
    from detectron2.utils.env import seed_all_rng
    from detectron2.utils.logger import setup_logger

    run = arguments.runs / arguments.name
    run.mkdir(parents=True, exist_ok=True)
    vitdet = Path(arguments.model) if (Path(arguments.model) / f"{arguments.detector}.py").is_file() else run / "vitdet"
    if not vitdet.is_dir():
        try:
            export(open_source(arguments.model, "auto", None), "vitdet", vitdet)
        except (ValueError, OSError) as error:
            parser.error(str(error))
    setup_logger(str(run))
    logging.getLogger("fvcore.common.checkpoint").setLevel(logging.ERROR)  # which names all that is to be trained
    seed_all_rng(arguments.seed)
    config = config_for(arguments, vitdet, arguments.options)
    LazyConfig.save(config, str(run / "config.yaml"))
    train(config, run, arguments.detector)
    record = report(run, arguments.detector)
    ap = record["metrics"].get(f"val/{arguments.detector}/ap") or 0.0
    print(f"detector {run / 'model_final.pth'}: AP {ap:.4f}; report {run / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
