"""A contrastive step with `model.compile` beside one without, in the same run.

    python tools/bench_compile.py             # CPU
    python tools/bench_compile.py --device cuda --batch 256 --precision bf16

The towers are those of conf/quickstart.yaml. Every step has images of other sizes and aspects and captions of other
lengths. Prints seconds until the first two steps are done, medians of the steps, taken in turns, and how often anything
was compiled in all steps after these two.
"""

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from torch._dynamo.utils import counters

from indiclip.config_files import find_config, read_config
from indiclip.encoder import Encoder
from indiclip.generated.mela import Mela
from indiclip.losses import SoftmaxLoss
from indiclip.sharding import compile_blocks
from indiclip.types import Images

Batch = tuple[Images, list[str]]
PIXELS = (24, 64)  # of a side, from, to; in patches of 8


def quickstart_encoder() -> Encoder:
    """That of conf/quickstart.yaml."""
    parser = ArgumentParser(parser_mode="omegaconf+")
    parser.add_class_arguments(Encoder, "encoder")
    tree = {"encoder": read_config(find_config("quickstart"))["model"]["encoder"]}
    return parser.instantiate(parser.parse_object(tree)).encoder


def batches(encoder: Encoder, size: int) -> Callable[[int], Batch]:
    """Makes the batch of a step, on the encoder's device."""
    scenes = Mela(4 * size, 64, "single", languages=["en", "hi", "ta"], seed=0)
    captions = [text for i in range(len(scenes)) for (text, *_) in scenes[i]["captions"].values()]

    def make(number: int) -> Batch:
        draw, noise = random.Random(number), np.random.default_rng(number)
        sides = [(draw.randrange(*PIXELS, 8), draw.randrange(*PIXELS, 8)) for _ in range(size)]
        pictures = [noise.integers(0, 256, (*side, 3), dtype=np.uint8) for side in sides]
        images: Any = encoder.backbone.preprocessing.batch(pictures, 64)
        moved = {name: x.to(encoder.device) if torch.is_tensor(x) else x for name, x in images.items()}
        return moved, draw.choices(captions, k=size)

    return make


def step_of(encoder: Encoder, low: bool) -> Callable[[Batch], None]:
    """Forward, loss, backward, AdamW."""
    loss = SoftmaxLoss(encoder.lengths).to(encoder.device)
    parameters = [*encoder.parameters(), *loss.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    kind = encoder.device.type

    def step(batch: Batch) -> None:
        images, captions = batch
        optimizer.zero_grad()
        with torch.autocast(kind, torch.bfloat16, enabled=low):
            pairs = encoder.embed_features(encoder.features(images)), encoder.embed_text(captions)
        loss(*pairs).backward()
        optimizer.step()
        if kind == "cuda":
            torch.cuda.synchronize()

    return step


def seconds(function: Callable[[Batch], None], *of: Batch) -> float:
    """That it takes for these batches."""
    start = time.perf_counter()
    for batch in of:
        function(batch)
    return time.perf_counter() - start


def main() -> None:
    """Print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=40, help="of these steps with both")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    encoder = quickstart_encoder().to(arguments.device)
    make, low = batches(encoder, arguments.batch), arguments.precision == "bf16"
    compiled = copy.deepcopy(encoder)
    compile_blocks([compiled.backbone, compiled.text])
    steps = {"eager": step_of(encoder, low), "compiled": step_of(compiled, low)}
    first = {name: seconds(step, make(0), make(1)) for name, step in steps.items()}
    graphs = counters["stats"]["unique_graphs"]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(2, arguments.steps + 2):
        batch = make(number)
        for name, step in steps.items():
            if name == "compiled" or number < arguments.rounds + 2:
                times[name].append(seconds(step, batch))
    print(f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads, {arguments}")
    print(f"first two steps: {first['eager']:.1f} s eager, {first['compiled']:.1f} s compiled, {graphs} graphs")
    eager, ours = (1e3 * statistics.median(of[: arguments.rounds]) for of in times.values())
    print(f"step: {eager:.1f} ms eager, {ours:.1f} ms compiled, {eager / ours:.2f}x")
    again, breaks = counters["stats"]["unique_graphs"] - graphs, sum(counters["graph_break"].values())
    print(f"compiled again in {arguments.steps} more steps: {again}; graph breaks: {breaks}")


if __name__ == "__main__":
    main()
