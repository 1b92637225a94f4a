"""Blood cells to count (BCCD, MIT licence) in <out>/counting: `images/` and `counting.json`.

Downloads the archive of github.com/Shenggan/BCCD_Dataset (8 MB): 364 microscope photos with a box around every cell.
The red cells are counted, a point in the middle of each box; the others' numbers are kept as `other_counts`.

    python tools/prepare_counting.py
    python tools/prepare_counting.py --source BCCD_Dataset-master.zip   # without a network
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import PurePosixPath
from typing import Any

from _download import archive, members, parser, run, write

URL = "https://github.com/Shenggan/BCCD_Dataset/archive/refs/heads/master.zip"
COUNTED, CLASS_NAME = "RBC", "red blood cell"


def entry(xml: bytes, file_name: str) -> dict[str, Any]:
    """A Pascal VOC annotation (boxes as corners) in the layout of counting.json (boxes as x, y, width, height)."""
    root = ElementTree.fromstring(xml)
    width, height = (int(root.findtext(f"size/{name}", "0")) for name in ("width", "height"))
    boxes, others = [], Counter[str]()
    for found in root.iter("object"):
        if (name := found.findtext("name", "")) != COUNTED:
            others[name] += 1
            continue
        corners = [float(found.findtext(f"bndbox/{side}", "nan")) for side in ("xmin", "ymin", "xmax", "ymax")]
        x1, y1, x2, y2 = (min(max(side, 0), edge) for side, edge in zip(corners, (width, height) * 2, strict=True))
        if x2 > x1 and y2 > y1:  # a few of the boxes have no extent
            boxes.append([x1, y1, x2 - x1, y2 - y1])
    return {
        "file_name": file_name,
        "width": width,
        "height": height,
        "class_name": CLASS_NAME,
        "count": len(boxes),
        "points": [[x + w / 2, y + h / 2] for x, y, w, h in boxes],
        "source": "Shenggan/BCCD_Dataset",
        "license": "MIT",
        "boxes": boxes,
        "other_counts": dict(others),
    }


def main(argv: list[str] | None = None) -> None:
    """See the module's docstring."""
    options = parser(__doc__ or "", "a local copy (archive or folder) or another URL of the repository's archive")
    options.add_argument("--min-count", type=int, default=3, help="leave out photos with fewer cells")
    arguments = options.parse_args(argv)
    source, folder = archive(arguments.source, URL, arguments.out), arguments.out / "counting"
    images = {PurePosixPath(name).stem: data for name, data in members(source, r"JPEGImages/[^/]+\.jpg$")}
    entries = []
    for name, xml in members(source, r"Annotations/[^/]+\.xml$"):
        stem = PurePosixPath(name).stem
        made = entry(xml, f"bccd_{stem.rsplit('_', 1)[-1]}.jpg")
        if stem in images and made["count"] >= arguments.min_count:
            write(folder / "images" / made["file_name"], images[stem])
            entries.append(made)
    if not entries:
        raise FileNotFoundError(f"{source}: no JPEGImages/*.jpg with Annotations/*.xml inside")
    write(folder / "counting.json", entries)
    print(f"{folder}: {len(entries)} images, {sum(made['count'] for made in entries):,} cells")


if __name__ == "__main__":
    run(main)
