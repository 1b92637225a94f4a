"""From a run to a detector of torchvision, on boxes in COCO's format.

    python tools/finetune_torchvision.py --model runs/quickstart --train train.json --images photos --val held_out.json

It is `indiclip fit` on a page of conf/downstream with the encoder, the files and their number of classes filled in: AP
over time is in the run's report.html, `--name NAME --ckpt_path last` goes on after a kill, and every other option of
`fit` may follow (`--seed_everything 1`, `--trainer.max_steps 1000`, `--model.layer_decay 0.7`, `--trainer.max_time
00:00:05:00`). Then the detector is written to `RUN/torchvision`, which opens without IndiCLIP:

    from torchvision_backbone import load_detector       # the file lies in that folder
    detector = load_detector("RUN/torchvision")
    detector([image])                                    # float (3, height, width) in 0..1

and scored as torchvision runs it: with its own resizing, beside the run's own AP (`parity.json`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torchvision.models import detection

import indiclip
from indiclip.config_files import SHIPPED, find_config, read_config
from indiclip.datasets.coco import CocoDetection
from indiclip.datasets.coco_file import read_coco
from indiclip.datasets.tables import existing
from indiclip.encoder import Encoder
from indiclip.export.new_folder import new_folder
from indiclip.export.torchvision import as_torchvision, write_detector
from indiclip.export.torchvision_backbone import build_detector
from indiclip.masking import mask
from indiclip.preprocessing import read_upright
from indiclip.pretrained.read import read_weights
from indiclip.pretrained.runs import AVERAGES
from indiclip.pretrained.weights import read_tensors
from indiclip.tasks.detection_metric import DetectionMetric
from indiclip.training.cli import run
from indiclip.training.config_errors import one_line

HEAD = "heads.torchvision_detector.TorchvisionDetector"
PARTS = ("image", "text", "projections")  # the loss of a detector has no temperature


def page_for(arguments: argparse.Namespace) -> dict[str, Any]:
    """The page with the model and the files in their places.

    Raises:
        FileNotFoundError, ValueError: A file is missing or not what it should be, or the model cannot be read.
    """
    file = find_config(arguments.config[0])
    page: dict[str, Any] = read_config(file)
    head = detector_head(page, file)
    head["num_classes"] = len(read_coco(existing(str(arguments.train)), arguments.images).classes)
    page["model"]["encoder"] = encoder_for(arguments.model)
    files = {"train": (arguments.train, arguments.images), "val": (arguments.val, arguments.val_images)}
    for part, (labels, images) in files.items():
        source = page["data"][part][0]
        source["dataset"]["init_args"] |= {"annotations": str(labels), "images": str(images or arguments.images)}
        own_sizes = {"max_tokens": arguments.max_tokens, "batch_size": arguments.batch_size}
        source |= {key: value for key, value in own_sizes.items() if value}
    return page


def detector_head(config: Any, file: Path) -> dict[str, Any]:
    """The arguments of a config's detector.

    Raises:
        ValueError: It has none, or several, or other data than a page of conf/downstream.
    """
    try:
        (head,) = (head["init_args"] for head in config["model"]["heads"] if head["class_path"] == HEAD)
        for part in ("train", "val"):
            assert isinstance(config["data"][part][0]["dataset"]["init_args"], dict)
    except (AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
        expected = f"a page as conf/downstream/fcos.yaml: one head {HEAD}, and a source in data.train and data.val"
        raise ValueError(f"--config {file}: expected {expected}") from error
    return head


def encoder_for(model: str) -> dict[str, Any]:
    """What `model.encoder` says. An image model gets a small text tower and a pool, which no detector uses."""
    quickstart = read_config(SHIPPED / "quickstart.yaml")["model"]["encoder"]
    if model == "random":
        return quickstart
    has = read_weights(model).parts
    weights: dict[str, Any] = {"weights": model, "parts": [part for part in PARTS if part in has]}
    if "text" in has:
        return {"init_from": [weights]}
    return {"init_from": [weights | {"allow": ["image_pool*"]}], "text": quickstart["text"]}


def detector_of(folder: Path, encoder: Encoder, sizes_hw: np.ndarray) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The detector that a run trained, and how it is built.

    Args:
        folder: The run's. Its averaged weights are taken where it has some, as `indiclip.load` does.
        encoder: Which it trained, without adapters.
        sizes_hw: Of the images that it will get, as they are resized here: torchvision resizes to the median.
    """
    config = yaml.safe_load((folder / "config.yaml").read_text())
    head = detector_head(config, folder / "config.yaml")
    options = dict(head.get("options") or {})
    options.setdefault("min_size", int(np.median(sizes_hw.min(1))))
    options.setdefault("max_size", int(sizes_hw.max()))
    kind, scales = head["detector"], head.get("scales")
    num_classes = head["num_classes"] + (kind != "FCOS")  # the R-CNNs count the background
    spec = {"kind": kind, "num_classes": num_classes, "out_channels": head["out_channels"], "scales": scales}
    backbone = as_torchvision(encoder, head["out_channels"], scales)
    detector = build_detector(getattr(detection, kind), backbone, num_classes, **options)
    checkpoint = read_tensors(folder / "checkpoints" / "last.ckpt")
    found = checkpoint["state_dict"] | checkpoint.get(AVERAGES, {}).get("state_dict", {})
    prefix = f"heads.{name_of(head)}."
    trained = {name.removeprefix(prefix): weight for name, weight in found.items() if name.startswith(prefix)}
    weights = {f"backbone.{name}": weight for name, weight in backbone.state_dict().items()}
    for name, weight in trained.items():
        weights[f"backbone.{name}" if name.startswith("pyramid.") else name.removeprefix("detector.")] = weight
    detector.load_state_dict(weights)
    return detector.eval(), spec | {"options": options}


def name_of(head: dict[str, Any]) -> str:
    """By which its weights and metrics are called."""
    return str(head.get("name") or HEAD.split(".")[1])


@torch.no_grad()
def score(detector: torch.nn.Module, dataset: CocoDetection, first_label: int) -> dict[str, float]:
    """COCO's numbers of a torchvision detector on a data set."""
    metric = DetectionMetric()
    for index in range(len(dataset)):
        sample: Any = dataset[index]
        found = detector([read_upright(sample["image"]).float() / 255])[0]
        prediction = {"boxes_xyxy": found["boxes"], "scores": found["scores"], "labels": found["labels"] - first_label}
        names = ("boxes_xyxy", "classes", "crowd", "area")
        *truth, area = (torch.from_numpy(np.asarray(sample[name])) for name in names)
        metric.update(prediction, truth, (1.0, 1.0), area)
    return {name: round(float(value), 4) for name, value in metric.compute().items()}


def main(argv: list[str] | None = None) -> int:
    """Fit, write, score. Returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["fit"]:  # one of the other processes, which Lightning starts with the words of `fit`
        return run(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config",
        action="append",
        help="a page as those of conf/downstream (default: downstream/fcos); others are stacked on it",
    )
    parser.add_argument(
        "--model", required=True, help="whatever init_from reads: a run, a folder, a timm name; or random"
    )
    parser.add_argument("--train", type=Path, required=True, help="annotations to learn from")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True, help="held-out annotations")
    parser.add_argument("--val_images", type=Path, help="where they lie elsewhere")
    parser.add_argument("--max_tokens", type=int, help="patches per image (default: the page's)")
    parser.add_argument("--batch_size", type=int, help="images per step (default: the page's)")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--name", default="")
    arguments, options = parser.parse_known_args(words)
    arguments.config = arguments.config or ["downstream/fcos"]
    name = arguments.name or Path(arguments.config[0]).stem
    try:
        page = page_for(arguments)
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {mask(one_line(error))}\n")
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / f"{name}.yaml"
        file.write_text(yaml.safe_dump(page, sort_keys=False))
        stacked = [word for other in arguments.config[1:] for word in ("--config", other)]
        fit = ["fit", "--config", str(file), *stacked, "--runs", str(arguments.runs), "--name", name, *options]
        return run(fit, lambda folder: write(folder, arguments))


def write(folder: Path, arguments: argparse.Namespace) -> None:
    """The detector of a run that has ended, and its score."""
    encoder = indiclip.load(folder).merged()
    held_out = CocoDetection(str(arguments.val_images or arguments.images), str(arguments.val))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    max_tokens = config["data"]["val"][0]["max_tokens"]
    fit_hw = encoder.backbone.preprocessing.fit_hw
    sizes_hw = [fit_hw(int(h), int(w), max_tokens) for h, w in held_out.sizes_hw]
    detector, spec = detector_of(folder, encoder, np.array(sizes_hw))
    with new_folder(folder / "torchvision", replaces=True) as part:  # of fewer steps, where the run went on
        write_detector(encoder, detector, spec | {"classes": list(held_out.classes)}, part)
        ap = score(detector, held_out, int(spec["kind"] != "FCOS"))
        in_run = json.loads((folder / "metrics.json").read_text())["metrics"]
        head = name_of(detector_head(config, folder / "config.yaml"))
        parity = {"torchvision": ap, "run": {key: in_run.get(f"val/{head}/{key}") for key in ap}}
        (part / "parity.json").write_text(json.dumps(parity, indent=2) + "\n")
    for left in folder.glob(".torchvision-*"):  # of a process that was killed here; the run is locked
        shutil.rmtree(left, ignore_errors=True)
    aps = [parity[where].get("ap") or 0.0 for where in ("torchvision", "run")]
    print(f"detector {folder / 'torchvision'}: AP {aps[0]:.4f} as torchvision runs it, {aps[1]:.4f} in the run")


if __name__ == "__main__":
    sys.exit(main())
