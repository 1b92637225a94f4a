"""COCO val2017 photos with boxes, masks, keypoints and captions in <out>/coco: `images/` and `instances.json`.

Downloads the annotations (252 MB) and, one by one, the photos of the first --limit images. Annotations: CC BY 4.0;
photos: each its own licence (field `license`).

    python tools/prepare_coco.py --limit 200
    python tools/prepare_coco.py --source /data/coco   # a folder with annotations/*.json and val2017/*.jpg
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _download import as_url, download, fetch, members, parser, run, write
from rich.progress import track

BASE = "http://images.cocodataset.org"
ARCHIVE = "annotations/annotations_trainval2017.zip"
FILES = ("instances_val2017", "person_keypoints_val2017", "captions_val2017")


def read_annotations(source: str | None, out: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Instances, keypoints and captions, from the public archive or beneath a local folder or URL."""
    base = as_url(source or BASE)
    folder = Path(source).expanduser() / "annotations" if source and "://" not in source else None
    packed = folder if folder and folder.is_dir() else download(f"{base}/{ARCHIVE}", out)
    found = {Path(name).stem: json.loads(data) for name, data in members(packed, rf"({'|'.join(FILES)})\.json$")}
    if missing := set(FILES) - set(found):
        raise FileNotFoundError(f"{packed}: no {sorted(missing)[0]}.json inside")
    return found[FILES[0]], found[FILES[1]], found[FILES[2]]


def select(
    instances: dict[str, Any], keypoints: dict[str, Any], captions: dict[str, Any], limit: int
) -> dict[str, Any]:
    """One file of the first `limit` images by id: keypoints join their annotation, captions their image."""
    images = sorted(instances["images"], key=lambda image: image["id"])[:limit]
    kept = {image["id"] for image in images}
    of_image: dict[int, list[str]] = {image_id: [] for image_id in kept}
    for entry in captions["annotations"]:
        if entry["image_id"] in kept and entry["caption"].strip():
            of_image[entry["image_id"]].append(entry["caption"].strip())
    points = {
        entry["id"]: {name: entry[name] for name in ("keypoints", "num_keypoints")}
        for entry in keypoints["annotations"]
    }
    return {
        "info": instances["info"],
        "licenses": instances["licenses"],
        "categories": instances["categories"],
        "images": [image | {"captions": of_image[image["id"]], "split": "val2017"} for image in images],
        "annotations": [
            entry | points.get(entry["id"], {}) for entry in instances["annotations"] if entry["image_id"] in kept
        ],
    }


def main(argv: list[str] | None = None) -> None:
    """See the module's docstring."""
    options = parser(__doc__ or "", "a folder or URL with the layout of images.cocodataset.org")
    options.add_argument("--limit", type=int, default=200, help="number of images (of 5,000)")
    arguments = options.parse_args(argv)
    folder, base = arguments.out / "coco", as_url(arguments.source or BASE)
    content = select(*read_annotations(arguments.source, arguments.out), arguments.limit)
    for image in track(content["images"], "photos", transient=True):
        fetch(f"{base}/val2017/{Path(image['file_name']).name}", folder / "images" / Path(image["file_name"]).name)
    write(folder / "instances.json", content)
    print(f"{folder}: {len(content['images'])} images, {len(content['annotations'])} boxes")


if __name__ == "__main__":
    run(main)
