"""The data path beside its peers: raw reads, JPEG to tensor, the index of a million members, resume, worker memory;
and what it costs to know which samples make a step.

    python tools/bench_loader.py [--images FOLDER] [--batches 20000] [--only raw jpeg index resume memory plan]

Peers: webdataset's own pipeline for raw members, and PIL to a normalised float32 tensor for images. Each line is per
CPU-second, ours and the peer's in turn, the median of the rounds.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from indiclip.images import EncodedImage
from indiclip.loading.data_module import MultiTaskData, StepSampler
from indiclip.loading.plan import Plan
from indiclip.loading.sampler import BatchSpec, SourceInfo
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.loading.transforms import Transform
from indiclip.preprocessing import Preprocessing
from indiclip.webdataset.shards import Shards

SIDE, PATCH, TOKENS = 224, 16, 196


def cpu_rate(work: Callable[[], int]) -> float:
    """What `work` counts, per CPU-second of this process and of its children that have ended."""
    start = _cpu_seconds()
    count = work()
    return count / (_cpu_seconds() - start)


def _cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def beside(name: str, ours: Callable[[], int], peer: Callable[[], int], rounds: int, unit: str) -> None:
    """Print both rates, in turn, and their ratio."""
    rates = [(cpu_rate(ours), cpu_rate(peer)) for _ in range(rounds)]
    mine, other = (statistics.median(rate) for rate in zip(*rates, strict=True))
    ratio = statistics.median(a / b for a, b in rates)
    print(f"{name:34} ours {mine:12,.0f}   peer {other:12,.0f}   {ratio:6.2f}x   {unit}", flush=True)


def write_shards(folder: Path, num_shards: int, per_shard: int, image: bytes) -> str:
    """Shards of one image over and over, each with a text and a class."""
    for shard in range(num_shards):
        with tarfile.open(folder / f"s-{shard:05}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(per_shard):
                key = f"{shard:05}{i:06}"
                for kind, data in (("jpg", image), ("txt", b"a photo of a diya"), ("cls", b"3")):
                    member = tarfile.TarInfo(f"{key}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(folder / "s-*.tar")


def jpeg(width: int, height: int, quality: int = 90, source: Image.Image | None = None) -> bytes:
    """A JPEG with the detail of noise at an eighth of its size, or of a photo."""
    if source is None:
        noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        source = Image.fromarray(noise)
    file = io.BytesIO()
    source.convert("RGB").resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return file.getvalue()


def bench_raw(folder: Path, rounds: int) -> None:
    """Members of 20 shards of 1,000 samples: ours jpg and txt in random order (the class is in the index), the peer's
    jpg, txt and cls as they come."""
    urls = write_shards(folder, 20, 1000, jpeg(32, 32))
    shards = Shards(urls)
    order = np.random.default_rng(0).permutation(len(shards)).tolist()
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]

    def ours() -> int:
        return sum(len(shards.parts(index)) for index in order)

    def peer() -> int:
        dataset = webdataset.WebDataset(paths, shardshuffle=False)
        return sum(sum(name in sample for name in ("jpg", "txt", "cls")) for sample in dataset)

    beside("raw members", ours, peer, rounds, "members per CPU-second")


def bench_jpeg(images: Path | None, rounds: int) -> None:
    """One JPEG after the other to what the model takes."""
    photos = [Image.open(file) for file in sorted(images.iterdir())[:64]] if images else [None] * 64
    for width, height in ((640, 480), (1600, 1200)):
        files = [jpeg(width, height, source=photo) for photo in photos]
        whole = Transform(TOKENS)

        def ours(files: list[bytes] = files, transform: Transform = whole) -> int:
            for data in files:
                transform({"image": EncodedImage(data, "k"), "key": "k"}, PATCH, None, None)
            return len(files)

        def peer(files: list[bytes] = files) -> int:
            for data in files:
                image = Image.open(io.BytesIO(data)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
                ((torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - 0.5) / 0.5).contiguous()
            return len(files)

        beside(f"JPEG {width}x{height} to tensor", ours, peer, rounds, "images per CPU-second")


def bench_index(folder: Path) -> None:
    """A million members in 100 shards: what a process pays that has not seen them before."""
    urls = write_shards(folder, 100, 3334, b"\xff\xd8\xff" + bytes(400))
    start = time.perf_counter()
    number = len(Shards(urls))
    print(f"index of {number * 3:,} members in 100 shards: built in {time.perf_counter() - start:.1f} s")
    code = (
        "import sys, time, resource\n"
        "from indiclip.webdataset.shards import Shards\n"
        "def rss(): return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()\n"
        "before, start = rss(), time.perf_counter()\n"
        "shards = Shards(sys.argv[1])\n"
        "took = time.perf_counter() - start\n"
        "print(f'loaded in {took:.2f} s, {(rss() - before) / 2**20:.0f} MiB; {shards.key(len(shards) - 1)}')\n"
    )
    subprocess.run([sys.executable, "-c", code, urls], check=True)


def bench_resume(folder: Path) -> None:
    """The first batch at several places of a run over a million samples, each with indexes and loader of its own."""
    urls = write_shards(folder, 100, 10_000, jpeg(64, 48))
    Shards(urls)  # makes the indexes
    for share in (0.0, 0.3, 0.9, 2.5):
        start = time.perf_counter()
        source = Source("t", Shards(urls), batch_tokens=64 * 12, max_tokens=12)
        steps = Steps([source], 0, Preprocessing(PATCH), train=True)
        step = int(share * steps.plans["t"].steps_per_epoch)
        batch = next(iter(DataLoader(steps, batch_size=None, sampler=range(step, step + 9), num_workers=2)))
        took = time.perf_counter() - start
        print(f"first batch at step {step:,} ({share:g} epochs): {took:.2f} s, {len(batch['t']['keys'])} samples")


def bench_memory(folder: Path, batches: int) -> None:
    """Memory of the workers while they make many batches."""
    urls = write_shards(folder, 40, 1000, jpeg(96, 64))
    data = MultiTaskData([Source("t", Shards(urls), batch_size=16, max_tokens=24)], num_workers=2, patch_size=PATCH)
    steps = data.steps(data.train, train=True)
    loader = DataLoader(steps, batch_size=None, sampler=StepSampler(batches, None), num_workers=2)
    for done, _ in enumerate(_workers_reported(loader, every=max(1, batches // 10)), start=1):
        if done == batches:
            break


def bench_plan() -> None:
    """CPU-seconds until the first step of a source is known, and for each step after it: a rank's part of 64."""
    images, tokens, lengths = 10**9, BatchSpec(64, 4096 * 256, 256), _few_lengths
    shards = np.arange(0, images + 1, 10_000)
    small = SourceInfo(10**7, shards[:1001])
    for name, info, spec in (
        ("4,096 samples, no shards", SourceInfo(images), BatchSpec(4096)),
        ("token budget, no shards", SourceInfo(images), tokens),
        ("token budget, 100,000 shards", SourceInfo(images, shards), tokens),
        ("262,144 samples, 100,000 shards", SourceInfo(images, shards), BatchSpec(262_144)),
        ("262,144 samples, 10 million in 1,000 shards", small, BatchSpec(262_144)),
        ("the same, by length", small._replace(lengths=lengths), BatchSpec(262_144)),
        ("token budget by length, 10 million", small._replace(lengths=lengths), tokens),
    ):
        start = time.process_time()
        plan = Plan("t", [info], [1.0], spec, 0)
        plan.batch(plan.steps_per_epoch // 2, 3, 64)
        first, start = time.process_time() - start, time.process_time()
        for step in range(20):
            plan.batch(step, 3, 64)
        print(f"{name:45} first {first:6.2f} s, then {(time.process_time() - start) / 20 * 1e3:6.1f} ms a step")


def _few_lengths(indices: np.ndarray) -> np.ndarray:
    return indices % 256 + 1


def _workers_reported(loader: DataLoader[object], every: int) -> Iterator[object]:
    for done, batch in enumerate(loader):
        if done % every == every // 2:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            own = [_private_mib(int(child)) for child in children]
            print(f"batch {done:7,}: {', '.join(f'{size:.1f}' for size in own)} MiB private to each worker", flush=True)
        yield batch


def _private_mib(pid: int) -> float:
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith(("Private_Dirty", "Private_Clean"))) / 1024


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of photos for the JPEG line (default: drawn noise)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=20_000, help="for the memory of workers")
    parser.add_argument("--only", nargs="+", default=["raw", "jpeg", "index", "resume", "memory", "plan"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        os.environ["INDICLIP_CACHE"] = f"{place}/cache"
        folders = {name: Path(place, name) for name in arguments.only}
        for folder in folders.values():
            folder.mkdir()
        if "raw" in folders:
            bench_raw(folders["raw"], arguments.rounds)
        if "jpeg" in folders:
            bench_jpeg(arguments.images, arguments.rounds)
        if "index" in folders:
            bench_index(folders["index"])
        if "resume" in folders:
            bench_resume(folders["resume"])
        if "plan" in folders:
            bench_plan()
        if "memory" in folders:
            bench_memory(folders["memory"], arguments.batches)


if __name__ == "__main__":
    main()
