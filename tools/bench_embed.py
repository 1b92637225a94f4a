"""`indiclip embed` beside decoding and the forward pass alone, and killed again and again.

    python tools/bench_embed.py [--images 100000] [--kills 3] [--dtype fp16] [--out FOLDER]

CIFAR-10's training images (`INDICLIP_DATA`; else noise), mirrored in every second pass, in shards; a tower of about 10
million parameters that sees four patches of each. The command embeds all of them. Every ten seconds it is stopped, and
decoding (read, decode, cut into patches, pad) and the forward pass of some of the images are timed alone. Times are
CPU-seconds, which other work on the machine disturbs least, and seconds. Then the command is killed at random moments,
started again, and its files are compared with those of the first time.
"""

from __future__ import annotations

import argparse
import filecmp
import io
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from pyarrow import parquet

from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.evals.images.items import ShardImages
from indiclip.evals.models.embedder import EncoderEmbedder, load_embedder
from indiclip.text import TextTower
from indiclip.tokenizers import ByteTokenizer
from indiclip.webdataset.shards import Shards

_BATCH, _PART, _PER_SHARD = 64, 8192, 10_000
_STRETCH_SECONDS, _SLICE = 10, 1280  # of the command, and the images between two stretches of it
_TEXT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


class Cost(NamedTuple):
    """What something took."""

    cpu: float  # seconds of all its processes
    wall: float

    def __add__(self, other: tuple[float, ...]) -> Cost:  # type: ignore[override]
        return Cost(self.cpu + other[0], self.wall + other[1])

    def per(self, count: int) -> Cost:
        """In milliseconds of each."""
        return Cost(1000 * self.cpu / count, 1000 * self.wall / count)


def timed(work: Callable[[], object]) -> Cost:
    """What `work` takes."""
    cpu, wall = _cpu_seconds(), time.perf_counter()
    work()
    return Cost(_cpu_seconds() - cpu, time.perf_counter() - wall)


def _cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def photographs() -> Iterator[bytes]:
    """JPEGs of 32x32 pixels without end."""
    root = Path(os.environ.get("INDICLIP_DATA", "data")) / "cifar10"
    files = sorted(root.glob("train-*.tar.gz"))
    if not files:
        print(f"{root}: no images, so noise instead")
    generator = np.random.default_rng(0)
    mirrored = False
    while True:
        for shard in files:
            with tarfile.open(shard) as tar:
                members = (tar.extractfile(member) for member in tar if member.name.endswith(".jpg"))
                for data in (file.read() for file in members if file):
                    yield _jpeg(ImageOps.mirror(Image.open(io.BytesIO(data)))) if mirrored else data
        if not files:
            yield _jpeg(Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((32, 32)))
        mirrored = not mirrored


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()


def write_shards(folder: Path, count: int) -> str:
    """Shards of images alone, each 10,000."""
    images = photographs()
    for first in range(0, count, _PER_SHARD):
        with tarfile.open(folder / f"s-{first // _PER_SHARD:04}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(first, min(first + _PER_SHARD, count)):
                member, data = tarfile.TarInfo(f"{number:07}.jpg"), next(images)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(folder / "s-*.tar")


def write_model(file: Path) -> int:
    """A run's checkpoint with random weights. Returns the number of the tower's parameters."""
    torch.manual_seed(0)
    backbone = NaFlexViT(width=384, depth=6, num_heads=6, patch_size=16)
    encoder = Encoder(backbone, TextTower(ByteTokenizer(), _TEXT), 512)
    state = {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()}
    torch.save({"encoder": encoder.to_config(), "state_dict": state}, file)
    return sum(weight.numel() for weight in backbone.parameters())


class Alone:
    """Decoding and the forward pass of the images, one slice after the other."""

    def __init__(self, shards: str, model: EncoderEmbedder) -> None:
        self.images, self.model, self.done = ShardImages(Shards(shards)), model, 0
        self.decoding = self.forward = Cost(0, 0)

    def slice(self) -> None:
        """Time the next images."""
        (view,) = self.model.views(["native"])
        last = min(self.done + _SLICE, len(self.images))
        batches: list[Any] = []

        def decode() -> None:
            for first in range(self.done, last, _BATCH):
                prepared = [self.model.prepare(self.images[i], view) for i in range(first, min(first + _BATCH, last))]
                batches.append(self.model.collate(prepared))

        self.decoding += timed(decode)
        self.forward += timed(lambda: [self.model.embed_images(batch) for batch in batches])
        self.done = last

    def beside(self, words: list[str]) -> Cost:
        """Run a command, which is stopped every few seconds while a slice is timed. Returns what the command took."""
        before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), 0.0
        with subprocess.Popen(words) as process:
            while process.poll() is None:
                since = time.perf_counter()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_STRETCH_SECONDS)
                wall += time.perf_counter() - since
                if process.poll() is None and self.done < len(self.images):
                    process.send_signal(signal.SIGSTOP)
                    self.slice()
                    process.send_signal(signal.SIGCONT)
            assert process.returncode == 0
        if not self.done:  # the command was faster than the first stretch
            self.slice()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return Cost(sum(after[:2]) - sum(before[:2]), wall)


def command(shards: str, model: Path, out: Path, dtype: str) -> list[str]:
    """The words of the command."""
    words = ["embed", shards, "--model", str(model), "--out", str(out), "--dtype", dtype]
    sizes = ["--batch_size", str(_BATCH), "--part_size", str(_PART)]
    return [sys.executable, "-m", "indiclip", *words, *sizes, "--device", "cpu"]


def killed(words: list[str], num_parts: int, kills: int, out: Path) -> list[int]:
    """Kill the command at random moments while it works, then let it end. Returns how many parts each kill found."""
    found = []
    for number in range(kills):
        until = random.randint(1, 3) + number * num_parts // max(kills, 1)
        with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and _num_whole(out) < until:
                time.sleep(0.1)
            time.sleep(random.uniform(0, 2))
            assert process.poll() is None, "it ended before it could be killed; embed more images"
            process.send_signal(signal.SIGKILL)
        found.append(_num_whole(out))
    subprocess.run(words, check=True)
    return found


def _num_whole(out: Path) -> int:
    return len(list(out.glob(".parts/0*.json")))


def keys_of(folder: Path) -> list[str]:
    """All keys, in order; as many as there are embeddings in each part."""
    keys: list[str] = []
    for file in sorted(folder.glob("keys-*.parquet")):
        of_part = parquet.read_table(file, columns=["key"])["key"].to_pylist()
        vectors = np.load(folder / f"embeddings-{file.stem[5:]}.npy", mmap_mode="r")
        assert len(vectors) == len(of_part), file
        keys += of_part
    return keys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--dtype", default="fp16", choices=["fp32", "fp16", "int8"])
    parser.add_argument("--out", type=Path, help="where shards and embeddings go (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="indiclip-") as temporary:
        bench(options, options.out or Path(temporary))


def bench(options: argparse.Namespace, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    random.seed(0)
    shards, file = write_shards(folder, options.images), folder / "tower.ckpt"
    parameters = write_model(file)
    model = load_embedder(str(file))
    assert isinstance(model, EncoderEmbedder)
    few = folder / "few"
    few.mkdir(exist_ok=True)
    start_words = command(write_shards(few, 64), file, folder / "start", options.dtype)
    start = timed(lambda: subprocess.run(start_words, check=True))
    alone = Alone(shards, model)
    whole = alone.beside(command(shards, file, folder / "whole", options.dtype))
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    print(f"\n{options.images:,} images, a tower of {parameters / 1e6:.1f}M parameters, load {load}")
    print("| ms per image | CPU | seconds passed |\n|---|---|---|")
    decode, forward = alone.decoding.per(alone.done), alone.forward.per(alone.done)
    both, every, starting = decode + forward, whole.per(options.images), start.per(options.images)
    steady = Cost(every.cpu - starting.cpu, every.wall - starting.wall)
    rows = {
        "decoding alone": decode,
        "forward alone": forward,
        "both": both,
        "the command without its start": steady,
        f"the command ({start.wall:.1f} s of start)": every,
    }
    for name, cost in rows.items():
        print(f"| {name} | {cost.cpu:.3f} | {cost.wall:.3f} |")
    for name, cost in (("without its start", steady), ("with it", every)):
        print(f"speed of the command beside both, {name}: {both.cpu / cost.cpu:.1%} (CPU), {both.wall / cost.wall:.1%}")
    again = folder / "killed"
    num_parts = -(-options.images // _PART)
    parts = killed(command(shards, file, again, options.dtype), num_parts, options.kills, again)
    keys, expected = keys_of(again), list(map(Shards(shards).key, range(options.images)))
    names = sorted(entry.name for entry in (folder / "whole").iterdir() if entry.name != ".lock")
    _, different, missing = filecmp.cmpfiles(folder / "whole", again, names, shallow=False)
    lost, double, others = len({*expected} - {*keys}), len(keys) - len({*keys}), len(different) + len(missing)
    print(f"killed {options.kills} times, with {parts} of {num_parts} parts there:")
    print(f"{lost} rows lost, {double} double, {others} of {len(names)} files different")
    assert keys == expected
    assert not different + missing


if __name__ == "__main__":
    main()
