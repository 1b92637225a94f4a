"""How often training images that were changed are found again, and how often other images are taken for them.

    INDICLIP_DATA=... python tools/bench_contamination.py

Real photos: COCO's, dishes and clothes of India, and CIFAR-10's test images (32 px). Each is changed as data sets
change images, hashed as a training image is, and looked for as a benchmark image is. A miss is a changed image whose
original is not found; pairs of different images are all those of a set, and what is found of them in any view counts
as false (true duplicates within a set as well).

Columns are ways to look: dHash and pHash alone, as the image is; both; both in all views, as the benchmark looks.
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from indiclip.evals.protocols.contamination import MAX_DISTANCES, UNHASHABLE, VIEWS, image_hashes
from indiclip.evals.reports.pictures import thumbnail
from indiclip.images import EncodedImage
from indiclip.webdataset.shards import Shards

SIDE = 64  # as `indiclip.evals.overlap` hashes
DISTANCES = (2, 4, 6, 8, 10)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def cropped(image: Image.Image, share: float, place: float = 0.5) -> Image.Image:
    """Without a share of both sides, `place` of which is taken from the left and the top."""
    width, height = image.size
    left, top = round(width * share * place), round(height * share * place)
    return image.crop((left, top, left + round(width * (1 - share)), top + round(height * (1 - share))))


def brighter(image: Image.Image, factor: float) -> Image.Image:
    return image.point(lambda value: min(round(value * factor), 255))


def bordered(image: Image.Image, share: float) -> Image.Image:
    return ImageOps.expand(image, max(round(share * max(image.size)), 1), "white")


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half the size": lambda x: x.resize((max(x.width // 2, 1), max(x.height // 2, 1)), Image.Resampling.BILINEAR),
    "224 x 224": lambda x: x.resize((224, 224), Image.Resampling.BICUBIC),
    "JPEG 30": lambda x: jpeg(x, 30),
    "brighter by 0.3": lambda x: brighter(x, 1.3),
    "darker by 0.3": lambda x: brighter(x, 0.7),
    "mirrored": ImageOps.mirror,
    "crop of 5%": lambda x: cropped(x, 0.05),
    "crop of 10%": lambda x: cropped(x, 0.1),
    "crop of 10%, mirrored, JPEG 30": lambda x: jpeg(ImageOps.mirror(cropped(x, 0.1)), 30),
    "crop of 5% at two sides": lambda x: cropped(x, 0.05, 0.0),
    "crop of 10% at two sides": lambda x: cropped(x, 0.1, 0.0),
    "white border of 5%": lambda x: bordered(x, 0.05),
}


def photos(data: Path, cifar: int) -> Iterator[tuple[str, list[Image.Image]]]:
    """Name of a set -> its images."""
    shards = Shards(str(data / "cifar10" / "test-*.tar.gz"))
    images = [np.asarray(shards[index]["image"].decode()) for index in range(min(cifar, len(shards)))]
    yield "CIFAR-10", list(map(Image.fromarray, images))
    folders = {
        "COCO": [data / "coco" / "images"],
        "India": [data / "india" / name for name in ("edibles_food", "edibles_fruit_veg", "clothes_saree")],
    }
    for name, places in folders.items():
        files = sorted(file for place in places for file in place.rglob("*.jpg"))
        yield name, [Image.fromarray(EncodedImage(file.read_bytes(), file.name).decode()) for file in files]


def hashes(image: Image.Image, views: tuple[tuple[float, bool], ...]) -> list[tuple[int, int]]:
    pixels = thumbnail(np.asarray(image), SIDE)
    return [image_hashes(pixels, *view) for view in views]


def distances(bench_NV2: np.ndarray, training_N2: np.ndarray) -> np.ndarray:
    """Least over the views, uint8 (N, 2); 64 where one of both has no hash."""
    differing = np.bitwise_count(bench_NV2 ^ training_N2[:, None])
    nothing = (bench_NV2 == UNHASHABLE) | (training_N2[:, None] == UNHASHABLE)
    return np.asarray(np.where(nothing, 64, differing).min(1))


def of_different(bench_NV2: np.ndarray, training_N2: np.ndarray) -> np.ndarray:
    """Distances of all ordered pairs of different images, uint8 (N * (N - 1), 2)."""
    rows = []
    for index, of_one in enumerate(training_N2):
        others_NV2 = np.delete(bench_NV2, index, axis=0)
        rows.append(distances(others_NV2, np.broadcast_to(of_one, (len(others_NV2), 2))))
    return np.concatenate(rows)


def ways(one_N2: np.ndarray, all_N2: np.ndarray) -> list[np.ndarray]:
    """What each column finds, bool (N,), of distances as the image is and in all views."""
    near = np.array(MAX_DISTANCES)
    return [one_N2[:, 0] <= near[0], one_N2[:, 1] <= near[1], (one_N2 <= near).any(1), (all_N2 <= near).any(1)]


def main() -> None:
    """See the module's docstring."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=Path(os.environ.get("INDICLIP_DATA", "data")))
    options.add_argument("--cifar", type=int, default=2000, help="images of CIFAR-10 (default: 2000)")
    arguments = options.parse_args()
    print("| images | change | dHash | pHash | either | either, all views |\n" + "|---" * 6 + "|")
    falses = []
    for name, images in photos(arguments.data, arguments.cifar):
        bench = np.array([hashes(image, VIEWS) for image in images], np.uint64)
        for change, of in CHANGES.items():
            training = np.array([hashes(of(image), VIEWS[:1])[0] for image in images], np.uint64)
            missed = [
                f"{1 - found.mean():.3f}"
                for found in ways(distances(bench[:, :1], training), distances(bench, training))
            ]
            print("| " + " | ".join([f"{name} ({len(images):,})", change, *missed]) + " |", flush=True)
        as_is, in_views = (of_different(bench[:, :views], bench[:, 0]) for views in (1, len(VIEWS)))
        for most in DISTANCES:
            columns = [as_is[:, 0] <= most, as_is[:, 1] <= most, (as_is <= most).any(1), (in_views <= most).any(1)]
            counts = [f"{column.sum():,}" for column in columns]
            falses.append([f"{name}, {len(as_is):,} ordered pairs", f"at most {most} bits", *counts])
    print("\n| images | found at | dHash | pHash | either | either, all views |\n" + "|---" * 6 + "|")
    for row in falses:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
