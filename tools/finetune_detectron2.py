"""From a run to a detector of detectron2 (ViTDet), on boxes or masks in COCO's format.

    python tools/finetune_detectron2.py --model runs/quickstart --train train.json --images photos --val held_out.json

The encoder goes to `RUN/vitdet` as by `indiclip export --to vitdet`; `--model` may also be such a folder. ViTDet's Mask
R-CNN (or `--detector cascade_mask_rcnn`) is trained on it with layer-wise decay; without masks where the annotations
have only boxes. AP over time is in `RUN/report.html`. The same line goes on after a kill or Ctrl-C, with more
`--max_steps` too; another model, detector or data set needs another `--name`. Settings of the LazyConfig in
`RUN/vitdet` may follow: `optimizer.lr=3e-4`, `dataloader.train.num_workers=0`.

The detector is `RUN/model_final.pth`, which `RUN/config.yaml` builds where the code in `RUN/vitdet` (or in `--model`,
where that is such a folder) is on the path; IndiCLIP is not needed:

    sys.path.append("RUN/vitdet")  # or PYTHONPATH=RUN/vitdet
    model = instantiate(LazyConfig.load("RUN/config.yaml").model).eval()
    DetectionCheckpointer(model).load("RUN/model_final.pth")

One process trains. On several GPUs detectron2's own `tools/lazyconfig_train_net.py` does, by the same configuration.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import signal
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from indiclip import json_lines
from indiclip.datasets.coco import CocoDetection
from indiclip.export.exporter import export
from indiclip.export.source import open_source
from indiclip.head import same_classes
from indiclip.masking import mask
from indiclip.names import did_you_mean
from indiclip.tasks.detection_metric import DETECTION_MEASURES
from indiclip.training.report.report import write_report
from indiclip.training.run_folder import lock, unlock

if TYPE_CHECKING:
    from _vitdet_training import Training

DETECTORS = ("mask_rcnn", "cascade_mask_rcnn")
BEGUN = "begun_with.json"  # in the run's folder


def config_for(arguments: argparse.Namespace, vitdet: Path) -> Any:
    """The folder's LazyConfig with the files, their classes and the sizes in their places.

    Raises:
        ValueError: A setting is none of it, or cannot be read.
    """
    from detectron2.config import LazyConfig

    config = LazyConfig.load(str(vitdet / f"{arguments.detector}.py"))
    config.dataloader.train.dataset.names = register(arguments.train, arguments.images)
    config.dataloader.test.dataset.names = register(arguments.val, arguments.val_images or arguments.images)
    config.model.roi_heads.num_classes = len(json.loads(arguments.train.read_text())["categories"])
    mapper = config.dataloader.train.mapper
    if lacking := without_masks(arguments):
        print(f"boxes alone, no masks: not every object of {' and '.join(lacking)} has one")
        heads = config.model.roi_heads
        heads.mask_in_features = heads.mask_pooler = heads.mask_head = None
        mapper.use_instance_mask = mapper.recompute_boxes = False
    elif any(isinstance(row["segmentation"], dict) for row in objects(arguments.train)):
        mapper.instance_mask_format = "bitmask"  # polygons, the default, cannot be made of run lengths
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
    return with_options(config, arguments.options)


def with_options(config: Any, options: list[str]) -> Any:
    """Raises ValueError for one that the config does not have, which detectron2 would add to it."""
    from detectron2.config import LazyConfig
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for option in options:
        key, equals, _ = option.partition("=")
        parent, _, last = key.rpartition(".")
        own = OmegaConf.select(config, parent) if parent else config
        adds = key.startswith("+") and last not in ("", "+")
        if not equals or not (adds or (OmegaConf.is_dict(own) and last in own)):
            near = did_you_mean(last, map(str, own)) if OmegaConf.is_dict(own) else ""
            raise ValueError(f"{option}: found no such KEY=VALUE of the LazyConfig{near} (+KEY=VALUE adds one)")
        try:
            config = LazyConfig.apply_overrides(config, [option])
        except (HydraException, OmegaConfBaseException, KeyError) as error:
            raise ValueError(f"{option}: {error}") from error
    return config


def check_data(arguments: argparse.Namespace) -> None:
    """Raise ValueError or OSError for what detectron2 would say in mid-training, or not at all: images that are
    missing, boxes out of their image, held-out classes that are not those of training, nothing to learn or score."""
    files = {"--train": (arguments.train, None), "--val": (arguments.val, arguments.val_images)}
    datasets = {
        option: CocoDetection(str(images or arguments.images), str(file)) for option, (file, images) in files.items()
    }
    same_classes("detection", datasets)
    for option, (file, _) in files.items():
        if not (found := len(objects(file))):
            raise ValueError(f"{option}: {file} has no objects (crowds are not counted)")
        print(
            f"{option}: {len(datasets[option]):,} images, {found:,} objects of {len(datasets[option].classes)} classes"
        )
    if not without_masks(arguments) and find_spec("shapely") is None:
        raise ImportError(f"{arguments.train}: has masks, which detectron2 crops by shapely; pip install shapely")


def begun_with(arguments: argparse.Namespace) -> dict[str, Any]:
    """The words of a run that must stay: its model, its data and whatever gives its weights their shapes."""
    model = Path(arguments.model)
    words: dict[str, Any] = {"--model": str(model.resolve()) if model.exists() else arguments.model}
    words |= {"--detector": arguments.detector, "--image_size": arguments.image_size}
    files = {"--train": arguments.train, "--images": arguments.images, "--val": arguments.val}
    files["--val_images"] = arguments.val_images or arguments.images
    words |= {option: str(path.resolve()) for option, path in files.items()}
    settings = dict(option.removeprefix("+").split("=", 1) for option in arguments.options if "=" in option)
    return words | {key: value for key, value in settings.items() if key.split(".")[0] == "model"}


def check_begun(run: Path, words: dict[str, Any]) -> None:
    """Raise ValueError where the run is of other words, or of another program."""
    file = run / BEGUN
    if not file.is_file():
        if (run / "checkpoints").is_dir():
            raise ValueError(f"{run}: is a run of `indiclip fit`; --name NAME begins another")
        return
    begun = json.loads(file.read_text())
    apart = [
        f"{key} {begun[key]}, not {words.get(key)}" if begun.get(key) is not None else f"no {key}, not {words[key]}"
        for key in begun | words
        if begun.get(key) != words.get(key)
    ]
    if apart:
        raise ValueError(f"{run}: was begun with {'; '.join(apart)}; --name NAME begins another")


def vitdet_of(arguments: argparse.Namespace, run: Path) -> Path:
    """The folder of ViTDet's configurations: the model itself, or the run's, which is written the first time."""
    if (Path(arguments.model) / f"{arguments.detector}.py").is_file():
        return Path(arguments.model)
    if not (run / BEGUN).is_file():
        shutil.rmtree(run / "vitdet", ignore_errors=True)  # of a start that came no further, perhaps of another model
        export(open_source(arguments.model, "auto", None), "vitdet", run / "vitdet")
    return run / "vitdet"


def without_masks(arguments: argparse.Namespace) -> list[str]:
    """The files of which not every object has a mask."""
    files = dict.fromkeys((arguments.train, arguments.val))
    return [str(file) for file in files if not all(row.get("segmentation") for row in objects(file))]


def objects(file: Path) -> list[dict[str, Any]]:
    """The annotations that are learned and scored: all but crowds."""
    return [row for row in json.loads(file.read_text())["annotations"] if not row.get("iscrowd")]


def register(file: Path, images: Path) -> str:
    """A data set under the name of its file."""
    from detectron2.data import DatasetCatalog
    from detectron2.data.datasets import register_coco_instances

    name = f"coco:{file.resolve()}"  # by this word detectron2 takes category ids with gaps without a warning
    if name not in DatasetCatalog.list():
        register_coco_instances(name, {}, str(file), str(images))
    return name


def report(run: Path) -> dict[str, Any]:
    """Write `metrics.json` and `report.html` as `indiclip fit` does."""
    history = json_lines.read(run / "history.jsonl")
    metrics = {name: row[name] for row in history for name in row if name.startswith("val/")}
    record: dict[str, Any] = {"step": history[-1]["step"], "seconds": history[-1]["seconds"], "metrics": metrics}
    heads = {name: ("Detection", DETECTION_MEASURES) for name in DETECTORS if f"val/{name}/ap" in metrics}
    write_report(run, run.name, record | {"history": history, "quarantined": [], "data": {}, "heads": heads}, {})
    json_lines.write_whole(run / "metrics.json", (json.dumps(record, indent=2) + "\n").encode())
    return record


class Parser(argparse.ArgumentParser):
    """One line for a mistake; argparse's own begins with the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {mask(' '.join(message.split()))}\n")


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a whole number from 1")
    return int(text)


def parse(argv: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run, or whatever else `indiclip export` takes, or its folder")
    parser.add_argument("--detector", default="mask_rcnn", choices=DETECTORS)
    parser.add_argument("--train", type=Path, required=True, help="annotations to learn from")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True, help="held-out annotations")
    parser.add_argument("--val_images", type=Path, help="where they lie elsewhere")
    parser.add_argument("--image_size", type=count, help="pixels of a side (default: 64 patches)")
    parser.add_argument("--batch_size", type=count, default=16, help="images per step")
    parser.add_argument("--max_steps", type=count, default=10_000)
    parser.add_argument("--every", type=count, default=1_000, help="steps between evaluations, and between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--name", default="vitdet")
    parser.add_argument("options", nargs="*", help="KEY=VALUE of the LazyConfig")
    return parser, parser.parse_intermixed_args(argv)  # settings may stand anywhere


def prepare(arguments: argparse.Namespace, run: Path) -> tuple[Path, Any]:
    """Check everything, and begin the run. Returns the folder of the configurations and the LazyConfig.

    Raises:
        ImportError, OSError, ValueError: One line says what is wrong.
    """
    words = begun_with(arguments)
    check_begun(run, words)
    check_data(arguments)
    vitdet = vitdet_of(arguments, run)
    config = config_for(arguments, vitdet)
    run.mkdir(parents=True, exist_ok=True)
    lock(run)
    json_lines.write_whole(run / BEGUN, (json.dumps(words, indent=2) + "\n").encode())
    return vitdet, config


def begin(arguments: argparse.Namespace, run: Path, config: Any) -> Training:
    """The training, with detectron2's messages about it on the terminal and in `RUN/log.txt`."""
    from _vitdet_training import Training
    from detectron2.config import LazyConfig
    from detectron2.utils.env import seed_all_rng
    from detectron2.utils.logger import setup_logger

    setup_logger(str(run))
    logging.getLogger("detectron2.data").setLevel(logging.WARNING)  # tables of all classes at every evaluation
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
    seed_all_rng(arguments.seed)
    LazyConfig.save(config, str(run / "config.yaml"))
    return Training(config, run, arguments.detector)


def stopped(training: Training | None) -> str:
    """What is left after Ctrl-C."""
    if training is None:
        return "stopped before training; the same line does it again"
    saved = training.checkpointer
    if not saved.step:
        return f"stopped at step {training.step}, before the first checkpoint; the same line begins again"
    return (
        f"stopped at step {training.step}; the same line goes on from {saved.get_checkpoint_file()}, step {saved.step}"
    )


def main(argv: list[str] | None = None) -> int:
    """Export, train, report. Returns the exit status."""
    parser, arguments = parse(argv)
    if find_spec("detectron2") is None:
        parser.error("needs detectron2, which is built from its source: README.md says how")
    for noise in ("", "torch.meshgrid"):  # of detectron2's imports and of its ViT
        warnings.filterwarnings("ignore", noise, UserWarning if noise else FutureWarning)
    run = arguments.runs / arguments.name
    training = None
    try:
        vitdet, config = prepare(arguments, run)
        training = begin(arguments, run, config)
        training.run()
        record = report(run)
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: {stopped(training)}", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    finally:
        unlock()
    ap = record["metrics"].get(f"val/{arguments.detector}/ap") or 0.0
    print(f"detector {run / 'model_final.pth'}: AP {ap:.4f}; report {run / 'report.html'}")
    print(f"{run / 'config.yaml'} builds it with PYTHONPATH={vitdet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
