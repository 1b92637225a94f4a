"""Small data as the pages of conf/ for clusters read it, of generated scenes, by the commands they name."""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from indiclip.cli import main
from indiclip.generated.mela import Mela
from indiclip.generated.mela_words import LANGUAGES, PERSON

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import train_tokenizer  # noqa: E402

PARTS = 14  # coarse parts of a body in a DensePose annotation


def pack(source, images, out, *words):
    """Its shards for training, and again for validation."""
    for name in ("train", "val"):
        command = ["shards", "pack", str(source), "--images", str(images), "--out", str(out), "--name", name]
        assert main([*command, "--workers", "0", *words]) == 0


def india(folder, scenes=12):
    """What conf/india_b16.yaml and conf/india_l14.yaml read: captions in thirteen languages, boxes, bodies, points."""
    images = folder / "images"
    images.mkdir(parents=True)
    captioned(folder, images, scenes)
    boxes, captions, bodies, counted = [], [], [], []
    fair = Mela(scenes, 96, "mixed", people=1.0, languages=["en"], densepose_points=20, seed=4)
    for number, sample in enumerate(map(fair.__getitem__, range(scenes))):
        name = f"fair-{number}.png"
        Image.fromarray(sample["image"]).save(images / name)
        wh = (sample["boxes_xyxy"][:, 2:] - sample["boxes_xyxy"][:, :2]).tolist()
        of_image = [
            {"image_id": number, "category_id": int(kind) + 1, "bbox": [*box[:2], *size], "iscrowd": 0}
            for box, size, kind in zip(sample["boxes_xyxy"].tolist(), wh, sample["classes"], strict=True)
        ]
        boxes += of_image
        captions += [{"image_id": number, "caption": text} for text in sample["captions"]["en"]]
        people = [one for one in of_image if one["category_id"] == PERSON + 1]
        bodies += [one | {"category_id": 1} | body(sample, row, one["bbox"]) for row, one in enumerate(people)]
        points = sample["points_xy"].tolist()
        counted.append({"file_name": name, "class_name": sample["count_class"], "count": len(points), "points": points})
    rows = [{"id": i, "file_name": f"fair-{i}.png", "width": 96, "height": 96} for i in range(scenes)]
    names = [*fair.classes, *(f"thing {i}" for i in range(80 - len(fair.classes)))]
    write_coco(folder / "instances.json", rows, boxes, names)
    write_coco(folder / "bodies.json", rows, bodies, ["person"])
    (folder / "captions.json").write_text(json.dumps({"annotations": captions}))
    pack(folder / "instances.json", images, folder / "boxes", "--captions", str(folder / "captions.json"))
    pack(folder / "bodies.json", images, folder / "densepose")
    (folder / "counting").mkdir()
    images.rename(folder / "counting" / "images")
    for name in ("train", "val"):
        (folder / "counting" / f"{name}.json").write_text(json.dumps(counted))
    return folder


def captioned(folder, images, scenes):
    """Shards with a caption in each language, and the tokenizer of their table."""
    fair = Mela(scenes, 64, "single", languages=LANGUAGES, seed=3)
    lines = ["\t".join(["file", *LANGUAGES])]
    for number, sample in enumerate(map(fair.__getitem__, range(scenes))):
        Image.fromarray(sample["image"]).save(images / f"one-{number}.png")
        lines.append("\t".join([f"one-{number}.png", *(sample["captions"][code][0] for code in LANGUAGES)]))
    (folder / "captions.tsv").write_text("\n".join(lines), "utf-8")
    pack(folder / "captions.tsv", images, folder / "captions")
    words = ["--text", str(folder / "captions.tsv"), "--vocab-size", "400"]
    train_tokenizer.main([*words, "--out", str(folder / "tokenizer.json")])


def body(sample, row, bbox):
    """The DensePose part of a person's annotation: relative to the box, stretched to 256 x 256."""
    x, y, width, height = bbox
    crop = sample["dp_masks"][row][round(y) : round(y + height), round(x) : round(x + width)]
    mask = rle.encode(np.asfortranarray(np.array(Image.fromarray(crop).resize((256, 256), Image.Resampling.NEAREST))))
    own = sample["dp_person"] == row
    places = (sample["dp_points_xy"][own] - [x, y]) / [width, height] * 255
    columns = dict(zip(("dp_x", "dp_y", "dp_U", "dp_V"), (*places.T, *sample["dp_uv"][own].T), strict=True))
    masks = [{"size": mask["size"], "counts": mask["counts"].decode()}, *[[]] * (PARTS - 1)]
    points = {name: values.tolist() for name, values in columns.items()}
    return points | {"dp_I": sample["dp_part"][own].tolist(), "dp_masks": masks}


def write_coco(file, images, annotations, names):
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    numbered = [one | {"id": number} for number, one in enumerate(annotations, 1)]
    file.write_text(json.dumps({"images": images, "annotations": numbered, "categories": categories}))
