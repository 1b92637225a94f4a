"""Seconds to score a card whose embeddings are there, beside those of the bare matrix products of images and classes.

    python tools/bench_scoring.py --images 10000 --classes 391 --languages 13

A card of that many classes, of which 95% have a name in each language; drawn embeddings; zero-shot, hard pairs and what
English does better, with all intervals and predictions. Best of `--times` runs, in turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from indiclip.evals.card_scorer import CardScorer, texts_of
from indiclip.evals.cards.card import Card, CardClass
from indiclip.evals.images.items import Items
from indiclip.evals.protocols.hard_pairs import HardPairs
from indiclip.evals.protocols.protocol import Options
from indiclip.evals.protocols.zero_shot import ZeroShot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=391)
    parser.add_argument("--languages", type=int, default=13)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    items = card_items(args.images, args.classes, args.languages)
    generator = torch.Generator().manual_seed(0)
    class_CE = F.normalize(torch.randn(args.classes, args.width, generator=generator), dim=1)
    noise_NE = 0.15 * torch.randn(args.images, args.width, generator=generator)
    image_NE = F.normalize(class_CE[torch.from_numpy(items.labels)] + noise_NE, dim=1)
    place = {f"{code} {i}": i for i, one in enumerate(items.card.classes) for code in one.names}
    texts = {text: class_CE[place[text.removeprefix("a photo of ")]] for text in texts_of(items, Options())}

    def product() -> None:
        class_EC = class_CE.T.contiguous()
        for _ in range(args.languages):
            for part_BE in image_NE.split(2_000):
                part_BE @ class_EC

    def score() -> None:
        CardScorer(items, {"native": image_NE}, texts, [args.width], Options()).run()

    seconds = best_of(args.times, {"bare products": product, "the card's numbers": score})
    for name, taken in seconds.items():
        print(f"{name:20} {taken:8.3f} s")
    bare, whole = seconds.values()
    print(f"{'ratio':20} {whole / bare:8.2f}")


def card_items(images: int, classes: int, languages: int) -> Items:
    generator = np.random.default_rng(0)
    codes = ["en", *(f"x{i}" for i in range(1, languages))]
    made = tuple(
        CardClass(
            f"class_{i}",
            {code: f"{code} {i}" for code in codes if code == "en" or generator.random() < 0.95},
            confusable_with=(f"class_{(i + 1) % classes}",),
        )
        for i in range(classes)
    )
    card = Card(
        "drawn", "Drawn", "own", "classification", (ZeroShot(), HardPairs()), made, {"en": ("a photo of {c}", "{c}")},
        "acc1", "", "", "", "drawn.yaml", 1 / classes,
    )  # fmt: skip
    keys = [f"{i}.jpg" for i in range(images)]
    return Items(card, [None] * images, keys, generator.integers(0, classes, images))


def best_of(times: int, parts: dict[str, Callable[[], None]]) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(times):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            taken[name].append(time.perf_counter() - start)
    return {name: min(seconds) for name, seconds in taken.items()}


if __name__ == "__main__":
    main()
