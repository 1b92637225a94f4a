"""Scenes per second that `Mela` draws on one core, by size and layout.

    python tools/bench_mela.py [--seconds 2]

The peer in each row is a plain PNG of the same size read with PIL: what a data set on disk would cost to decode.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable

import torch
from PIL import Image

from indiclip.generated.mela import Mela

SIZES = (64, 96, 128, 256)
SETTINGS: dict[str, dict[str, object]] = {
    "single": {"layout": "single"},
    "mixed": {"layout": "mixed"},
    "mixed, no people": {"layout": "mixed", "people": 0.0},
    "mixed, people=1": {"layout": "mixed", "people": 1.0},
    "single, hard": {"layout": "single", "difficulty": "hard"},
    "mixed, hard": {"layout": "mixed", "difficulty": "hard"},
}


def per_second(make: Callable[[int], object], seconds: float) -> float:
    """How often `make(0)`, `make(1)`, ... can be called in a second."""
    make(0)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        make(count)
        count += 1
    return count / (time.perf_counter() - start)


def png_reads(size: int, seconds: float) -> float:
    """Decodes per second of a scene stored as PNG."""
    file = io.BytesIO()
    Image.fromarray(Mela(size=size)[1]["image"]).save(file, "png")
    return per_second(lambda _: Image.open(io.BytesIO(file.getvalue())).convert("RGB").tobytes(), seconds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each cell")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    print(f"{'samples/s on one core':24}" + "".join(f"{size:>8} px" for size in SIZES))
    for name, settings in SETTINGS.items():
        cells = [per_second(Mela(size=size, **settings).__getitem__, seconds) for size in SIZES]  # type: ignore[arg-type]
        print(f"{name:24}" + "".join(f"{cell:11.0f}" for cell in cells))
    print(f"{'decode one PNG':24}" + "".join(f"{png_reads(size, seconds):11.0f}" for size in SIZES))


if __name__ == "__main__":
    main()
