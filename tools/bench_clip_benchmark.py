"""The benchmark's numbers beside clip-benchmark's: the same folders, the same OpenCLIP model, both commands.

    python tools/bench_clip_benchmark.py --data $INDICLIP_DATA --peer OTHER_VENV/bin/python [--run runs/portable]

OTHER_VENV has clip-benchmark 1.6.2 and its dependencies (numpy < 2.4). The folders are `indiclip bench import`'s of the
CIFAR-10 test images and of the captioned COCO photos. The model is random, from a seed, and given to both as a file:
that its numbers are low makes no difference to whether they are equal. With `--run`, clip-benchmark scores the run's
export to OpenCLIP and `indiclip bench` the run itself, in the view that the export has: squares of its own grid.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

METRICS = {
    "cifar10": {"acc1": "acc1", "acc5": "acc5", "mean_per_class_recall": "mean_per_class_recall"},
    "coco_retrieval": {
        "image_to_text_r5": "text_retrieval_recall@5",
        "text_to_image_r5": "image_retrieval_recall@5",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and coco/")
    parser.add_argument("--peer", required=True, help="Python that has clip-benchmark")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="ViT-S-32-alt", help="OpenCLIP architecture (default: ViT-S-32-alt)")
    which.add_argument("--run", help="a run to export, instead of a random model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if args.run:
            ours_model, theirs_model = export_run(args.run, folder)
        else:
            weights = make_weights(args.model, args.seed, folder)
            ours_model = ["--model", f"open_clip:{args.model}:{weights}"]
            theirs_model = ["--model", args.model, "--pretrained", str(weights)]
        rows = []
        for card, metrics in METRICS.items():
            data = import_folder(card, args.data, folder)
            theirs = run_peer(args.peer, theirs_model, card, data, folder)
            ours = run_ours(ours_model, card, folder)
            rows += [(card, ours_name, ours[ours_name], theirs[name]) for ours_name, name in metrics.items()]
    print(f"{'card':<16}{'metric':<24}{'indiclip':>10}{'clip-benchmark':>16}{'difference':>12}")
    for card, name, ours_value, theirs_value in rows:
        difference = abs(ours_value - theirs_value)
        print(f"{card:<16}{name:<24}{ours_value:>10.5f}{theirs_value:>16.5f}{difference:>12.1e}")


def make_weights(model: str, seed: int, folder: Path) -> Path:
    """A random model as a file that both read."""
    import open_clip

    torch.manual_seed(seed)
    file = folder / "weights.pt"
    torch.save(open_clip.create_model(model).state_dict(), file)
    return file


def export_run(run: str, folder: Path) -> tuple[list[str], list[str]]:
    """The options of both commands for a run and its export."""
    import indiclip
    from indiclip.export.parity import own_grid

    out = folder / "export"
    command = [sys.executable, "-m", "indiclip.cli", "export", run, "--to", "open_clip", str(out)]
    subprocess.run(command, check=True)
    rows, columns = own_grid(indiclip.load(run))
    ours = ["--model", run, "--views", f"{rows * columns}-square"]
    return ours, ["--model", f"local-dir:{out}", "--pretrained", ""]


def import_folder(card: str, data: Path, folder: Path) -> Path:
    """clip-benchmark's folder of a card."""
    out = folder / "images" / card
    if card == "cifar10":
        source = folder / "cifar10_test"
        source.mkdir()
        for file in (*sorted((data / "cifar10").glob("test-*")), data / "cifar10" / "classes.txt"):
            (source / file.name).symlink_to(file.resolve())
    else:
        source = coco_captions(data / "coco", folder)
    command = [sys.executable, "-m", "indiclip.cli", "bench", "import", str(source), "--card", card, "--out", str(out)]
    subprocess.run(command, check=True)
    return out


def coco_captions(coco: Path, folder: Path) -> Path:
    """The captioned photos in COCO's own format, which keeps captions in a file beside that of the boxes."""
    instances = json.loads((coco / "instances.json").read_text())
    images = [image for image in instances["images"] if image.get("captions")]
    captions = [
        {"id": i * 100 + j, "image_id": image["id"], "caption": caption}
        for i, image in enumerate(images)
        for j, caption in enumerate(image["captions"])
    ]
    out = folder / "coco"
    out.mkdir()
    (out / "images").symlink_to((coco / "images").resolve())
    kept = [{"id": image["id"], "file_name": image["file_name"]} for image in images]
    (out / "captions_val.json").write_text(json.dumps({"images": kept, "annotations": captions}))
    return out


def run_peer(python: str, model: list[str], card: str, data: Path, folder: Path) -> dict[str, float]:
    """clip-benchmark's numbers, in float32."""
    out = folder / f"peer-{card}.json"
    task = "zeroshot_retrieval" if card == "coco_retrieval" else "zeroshot_classification"
    command = [python, "-m", "clip_benchmark.cli", "eval", "--dataset", f"wds/{card}", "--dataset_root", str(data)]
    command += [*model, "--task", task, "--no_amp", "--num_workers", "1", "--recall_k", "5", "--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not out.is_file():
        raise SystemExit(f"clip-benchmark failed:\n{done.stderr[-2000:]}")
    metrics: dict[str, float] = json.loads(out.read_text())["metrics"]
    return metrics


def run_ours(model: list[str], card: str, folder: Path) -> dict[str, float]:
    """Metric -> value of our English scores, of the full length."""
    out = folder / f"ours-{card}"
    command = [sys.executable, "-m", "indiclip.cli", "bench", *model]
    command += ["--images", str(folder / "images"), "--cards", card, "--languages", "en", "--out", str(out)]
    subprocess.run([*command, "--no_probes", "--device", "cpu"], check=True, stdout=subprocess.DEVNULL)
    scores = json.loads((out / "metrics.json").read_text())["scores"]
    full = max(row["length"] for row in scores)
    rows = [row for row in scores if row["protocol"] in ("zero_shot", "retrieval") and row["length"] == full]
    return {row["metric"]: row["value"] for row in rows}


if __name__ == "__main__":
    main()
