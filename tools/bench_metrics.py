"""Seconds that the benchmark's numbers take once the embeddings are there, part by part, beside scikit-learn.

    python tools/bench_metrics.py --images 10000 --classes 10 --languages 12

Embeddings are drawn: one direction per class and noise whose variance falls with the dimension. Best of `--times` runs;
scikit-learn runs once, on the same folds, to the same objective (tol 1e-4, its default, is looser than ours).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from indiclip.evals.protocols import metrics, probes
from indiclip.evals.protocols.retrieval import caption_ranks
from indiclip.evals.protocols.zero_shot import class_embeddings, rank_classes

LENGTHS = (64, 128, 256)
Draw = tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--languages", type=int, default=12)
    parser.add_argument("--templates", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help="scikit-learn too (minutes)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    drawn = draw(args.images, args.classes, args.templates)
    total = 0.0
    for name, part in parts(drawn, args.classes, args.languages).items():
        total += (seconds := best_of(args.times, part))
        print(f"{name:42} {seconds * 1000:8.1f} ms", flush=True)
    print(f"{'all':42} {total * 1000:8.1f} ms")
    if args.peer:
        peers(drawn)


def draw(images: int, classes: int, templates: int) -> Draw:
    """Images, prompts, the class of each prompt, the label of each image."""
    generator = torch.Generator().manual_seed(0)
    spread_E = torch.arange(1, LENGTHS[-1] + 1) ** -0.5
    centre_CE = torch.randn(classes, LENGTHS[-1], generator=generator) * spread_E
    label_N = torch.randint(classes, (images,), generator=generator)
    image_NE = centre_CE[label_N] / 2 + torch.randn(images, LENGTHS[-1], generator=generator) * spread_E
    class_P = torch.arange(classes).repeat_interleave(templates)
    prompt_PE = centre_CE[class_P] + torch.randn(len(class_P), LENGTHS[-1], generator=generator) * spread_E
    return torch.nn.functional.normalize(image_NE, dim=1), prompt_PE, class_P, label_N.numpy()


def parts(drawn: Draw, classes: int, languages: int) -> dict[str, Callable[[], object]]:
    image_NE, prompt_PE, class_P, label_N = drawn
    text_CLE = {length: class_embeddings(prompt_PE, class_P, classes, length) for length in LENGTHS}
    confusable = [[(c + 1) % classes, (c + 2) % classes] for c in range(classes)]
    unit_LNE = {length: torch.nn.functional.normalize(image_NE[:, :length], dim=1) for length in LENGTHS}
    hits = [rank_classes(unit_LNE[length], text_CLE[length], label_N).rank_M < 1 for length in LENGTHS]
    each = [(length, text_CLE[length]) for length in LENGTHS] * languages

    def intervals() -> None:
        for hit_N in hits * languages:
            metrics.hit_rate(hit_N)
            metrics.hit_rate(hit_N)
            metrics.mean_per_class_recall(hit_N, label_N)
            metrics.parity_gap(hits[-1], hit_N)
            metrics.parity_gap(hits[-1], hit_N, label_N)

    def product() -> None:
        for length, text_CE in each:
            for part in unit_LNE[length].split(1_000):
                part @ text_CE.T

    return {
        f"bare products, {languages} languages": product,
        f"classes told apart, {languages} languages": lambda: [
            rank_classes(
                unit_LNE[length],
                class_embeddings(prompt_PE, class_P, classes, length),
                label_N,
                confusable=confusable,
            )
            for length, _ in each
        ],
        "captions, 1,000 images of 5": lambda: [
            caption_ranks(image_NE[:1000], image_NE[:5000], np.arange(5000) // 5, length) for length in LENGTHS
        ],
        "kNN, leave one out": lambda: [probes.knn(unit_LNE[length], label_N) for length in LENGTHS],
        "linear probe, 5 folds": lambda: [probes.linear_probe(unit_LNE[length], label_N) for length in LENGTHS],
        f"intervals, {languages} languages": intervals,
    }


def best_of(times: int, part: Callable[[], object]) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        part()
        taken.append(time.perf_counter() - start)
    return min(taken)


def peers(drawn: Draw) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    image_NE, _, _, label_N = drawn
    x_NE = image_NE.numpy()
    fold_N = probes.folds(label_N, [str(i) for i in range(len(label_N))]).numpy()

    def linear() -> None:
        for length in LENGTHS:
            unit = torch.nn.functional.normalize(image_NE[:, :length], dim=1).double().numpy()
            for fold in range(probes.FOLDS):
                model = LogisticRegression(C=probes.INVERSE_PENALTY, max_iter=2000)
                model.fit(unit[fold_N != fold], label_N[fold_N != fold]).predict(unit[fold_N == fold])

    def neighbours() -> None:
        for length in LENGTHS:
            model = KNeighborsClassifier(21, metric="cosine", algorithm="brute").fit(x_NE[:, :length], label_N)
            model.kneighbors(x_NE[:, :length])

    print(f"{'scikit-learn, kNN':42} {best_of(1, neighbours) * 1000:8.1f} ms")
    print(f"{'scikit-learn, linear probe':42} {best_of(1, linear) * 1000:8.1f} ms")


if __name__ == "__main__":
    main()
