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
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torchvision.models import detection

import indiclip
from indiclip import json_lines
from indiclip.datasets.coco import CocoDetection
from indiclip.detection_metric import DetectionMetric
from indiclip.encoder import Encoder
from indiclip.export.torchvision import as_torchvision, write_detector
from indiclip.export.torchvision_backbone import build_detector
from indiclip.preprocessing import read_upright
from indiclip.pretrained.runs import AVERAGES
from indiclip.pretrained.weights import read_tensors
from indiclip.training.cli import run

ROOT = Path(__file__).parent.parent
HEAD = "torchvision_detector"


def page_for(arguments: argparse.Namespace) -> dict[str, Any]:
    """The page with the model and the files in their places."""
    page: dict[str, Any] = yaml.safe_load(arguments.config.read_text())
    page["model"]["encoder"] = (
        yaml.safe_load((ROOT / "conf" / "quickstart.yaml").read_text())["model"]["encoder"]
        if arguments.model == "random"
        else {"init_from": [{"weights": arguments.model, "parts": ["image", "text", "projections"]}]}
    )
    files = {"train": (arguments.train, arguments.images), "val": (arguments.val, arguments.val_images)}
    for part, (file, images) in files.items():
        own = {"annotations": str(file), "images": str(images or arguments.images)}
        page["data"][part][0]["dataset"]["init_args"] |= own
        own_sizes = {"max_tokens": arguments.max_tokens, "batch_size": arguments.batch_size}
        page["data"][part][0] |= {key: value for key, value in own_sizes.items() if value}
    head = page["model"]["heads"][0]["init_args"]
    if "num_classes" not in head:
        raise ValueError(f"{arguments.config}: its first head has no num_classes; expected a page of conf/downstream")
    head["num_classes"] = len(CocoDetection(str(arguments.images), str(arguments.train)).classes)
    return page


def newest_run(runs: Path, name: str) -> Path:
    """The folder of the run that ended last among those of a name: `name`, `name-2`, ..."""
    own = [folder for folder in runs.iterdir() if re.fullmatch(rf"{re.escape(name)}(-\d+)?", folder.name)]
    ended = [folder for folder in own if (folder / "metrics.json").exists()]
    return max(ended, key=lambda folder: (folder / "metrics.json").stat().st_mtime)


def detector_of(folder: Path, encoder: Encoder, sizes_hw: np.ndarray) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The detector that a run trained, and how it is built.

    Args:
        folder: The run's. Its averaged weights are taken where it has some, as `indiclip.load` does.
        encoder: Which it trained, without adapters.
        sizes_hw: Of the images that it will get, as they are resized here: torchvision resizes to the median.
    """
    config = yaml.safe_load((folder / "config.yaml").read_text())
    head = config["model"]["heads"][0]["init_args"]
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
    prefix = f"heads.{HEAD}."
    trained = {name.removeprefix(prefix): weight for name, weight in found.items() if name.startswith(prefix)}
    weights = {f"backbone.{name}": weight for name, weight in backbone.state_dict().items()}
    for name, weight in trained.items():
        weights[f"backbone.{name}" if name.startswith("pyramid.") else name.removeprefix("detector.")] = weight
    detector.load_state_dict(weights)
    return detector.eval(), spec | {"options": options}


@torch.no_grad()
def score(detector: torch.nn.Module, dataset: CocoDetection, first_label: int) -> dict[str, float]:
    """COCO's numbers of a torchvision detector on a data set."""
    metric = DetectionMetric()
    for index in range(len(dataset)):
        sample: Any = dataset[index]
        found = detector([read_upright(sample["image"]).float() / 255])[0]
        prediction = {"boxes_xyxy": found["boxes"], "scores": found["scores"], "labels": found["labels"] - first_label}
        truth = [torch.from_numpy(np.asarray(sample[name])) for name in ("boxes_xyxy", "classes", "crowd")]
        metric.update(prediction, truth, (1.0, 1.0))
    return {name: round(float(value), 4) for name, value in metric.compute().items()}


def main(argv: list[str] | None = None) -> int:
    """Fit, write, score. Returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["fit"]:  # one of the other processes, which Lightning starts with the words of `fit`
        return run(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "conf" / "downstream" / "fcos.yaml")
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
    for file in (arguments.config, arguments.train, arguments.val, arguments.images):
        if not file.exists():
            parser.error(f"{file}: no such file or folder")
    name = arguments.name or arguments.config.stem
    arguments.runs.mkdir(parents=True, exist_ok=True)
    page = arguments.runs / f"{name}.yaml"
    try:
        page.write_text(yaml.safe_dump(page_for(arguments), sort_keys=False))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    status = run(["fit", "--config", str(page), "--runs", str(arguments.runs), "--name", name, *options])
    if status:
        return status

    folder = newest_run(arguments.runs, name)
    encoder = indiclip.load(folder).merged()
    own = encoder.backbone
    held_out = CocoDetection(str(arguments.val_images or arguments.images), str(arguments.val))
    max_tokens = yaml.safe_load((folder / "config.yaml").read_text())["data"]["val"][0]["max_tokens"]
    sizes_hw = [own.preprocessing.fit_hw(int(h), int(w), max_tokens) for h, w in held_out.sizes_hw]
    detector, spec = detector_of(folder, encoder, np.array(sizes_hw))
    shutil.rmtree(folder / "torchvision", ignore_errors=True)  # of fewer steps, where the run went on
    write_detector(encoder, detector, spec | {"classes": list(held_out.classes)}, folder / "torchvision")
    ap = score(detector, held_out, int(spec["kind"] != "FCOS"))
    in_run = json.loads((folder / "metrics.json").read_text())["metrics"]
    parity = {"torchvision": ap, "run": {key: in_run.get(f"val/{HEAD}/{key}") for key in ap}}
    json_lines.write_whole(folder / "torchvision" / "parity.json", (json.dumps(parity, indent=2) + "\n").encode())
    aps = [parity[where].get("ap") or 0.0 for where in ("torchvision", "run")]
    print(f"detector {folder / 'torchvision'}: AP {aps[0]:.4f} as torchvision runs it, {aps[1]:.4f} in the run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
