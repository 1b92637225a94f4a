"""CIFAR-10 (Krizhevsky 2009) as WebDataset shards in <out>/cifar10: 50,000 train and 10,000 test images of 32x32.

Downloads the binary version (170 MB; the Python version is a pickle) and writes `{train,test}-NNNN.tar.gz` with members
`NNNNNN.{jpg,cls,txt}`, and classes.txt. About two minutes.

    python tools/prepare_cifar10.py                                   # into $INDICLIP_DATA, else data/
    python tools/prepare_cifar10.py --source cifar-10-binary.tar.gz   # without a network
"""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from _download import archive, members, parser, run, write
from PIL import Image

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # as on https://www.cs.toronto.edu/~kriz/cifar.html
SHARD = 5000  # images
_RECORD = 1 + 3 * 32 * 32  # label, then the red, green and blue planes


def records(source: Path) -> Iterator[tuple[str, int, np.ndarray]]:
    """(part, label, image) of every image, in the dataset's order."""
    batches = sorted(members(source, r"(data_batch_\d|test_batch)\.bin$"))
    if not batches:
        raise FileNotFoundError(f"{source}: no data_batch_N.bin or test_batch.bin inside")
    for name, data in batches:
        if len(data) % _RECORD:
            raise ValueError(f"{source}: {name} has {len(data)} bytes; expected a multiple of {_RECORD}")
        for record in np.frombuffer(data, np.uint8).reshape(-1, _RECORD):
            image = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
            yield ("test" if "test_batch" in name else "train"), int(record[0]), image


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member without owner and time, so that the same data makes the same file."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def shard(samples: list[tuple[int, int, np.ndarray]], classes: list[str]) -> bytes:
    """A gzipped tar of (number, label, image)."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for number, label, image in samples:
            jpeg, name = io.BytesIO(), classes[label]
            Image.fromarray(image).save(jpeg, "JPEG", quality=95)
            add(tar, f"{number:06d}.jpg", jpeg.getvalue())
            add(tar, f"{number:06d}.cls", str(label).encode())
            add(tar, f"{number:06d}.txt", f"a photo of a{'n' if name[0] in 'aeiou' else ''} {name}".encode())
    return packed.getvalue()


def main(argv: list[str] | None = None) -> None:
    """See the module's docstring."""
    arguments = parser(__doc__ or "", "a local copy or another URL of the binary version's archive").parse_args(argv)
    source, folder = archive(arguments.source, URL, arguments.out, MD5), arguments.out / "cifar10"
    names = [data for _, data in members(source, r"batches\.meta\.txt$")]
    if not names:
        raise FileNotFoundError(f"{source}: no batches.meta.txt inside")
    classes = names[0].decode().split()
    parts: dict[str, list[tuple[int, int, np.ndarray]]] = {"train": [], "test": []}
    for part, label, image in records(source):
        parts[part].append((len(parts[part]), label, image))
    for part, samples in parts.items():
        for number, start in enumerate(range(0, len(samples), SHARD)):
            write(folder / f"{part}-{number:04d}.tar.gz", shard(samples[start : start + SHARD], classes))
        print(f"{folder}: {len(samples):,} {part} images")
    write(folder / "classes.txt", "\n".join(classes) + "\n")


if __name__ == "__main__":
    run(main)
