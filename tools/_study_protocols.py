"""Protocols on embeddings for a study: numbers of the benchmark's own functions, and which images were right.

Shape letters: N images, E embedding length, T texts, P prompts, C classes, S pairs, M images that are predicted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from indiclip.evals.protocols import probes
from indiclip.evals.protocols.cosines import pair_ranks, truncate_normalize
from indiclip.evals.protocols.few_shot import FewShot
from indiclip.evals.protocols.zero_shot import class_embeddings, rank_classes

SHOTS = (1, 2, 4, 8, 16)


Found = dict[str, tuple[float, np.ndarray | None]]  # protocol -> value, and which images were right


@dataclass
class Embedded:
    """Held-out images and their truth.

    Attributes:
        image_NE: Of the gallery first, where there is one.
        label_N: -1 for none.
        is_train_N: Which are of the gallery.
        captions: Language -> captions of each image.
    """

    image_NE: Tensor
    label_N: np.ndarray
    is_train_N: np.ndarray
    keys: list[str]
    captions: list[dict[str, list[str]]]
    classes: list[str]
    templates: list[str]
    encoder: Any

    def texts(self, strings: list[str]) -> Tensor:
        """(T, E) of texts, some at a time."""
        parts = [self.encoder.embed_text(strings[i : i + 256]) for i in range(0, len(strings), 256)]
        return torch.cat(parts)


def _zero_shot(data: Embedded, length: int) -> Found:
    """Among the classes that the test part shows."""
    test_N = ~data.is_train_N
    shown = np.unique(data.label_N[test_N & (data.label_N >= 0)])
    prompts = [template.replace("{}", data.classes[label]) for label in shown for template in data.templates]
    owner_P = np.repeat(np.arange(len(shown)), len(data.templates))
    class_CE = class_embeddings(data.texts(prompts), owner_P, len(shown), length)
    images = truncate_normalize(data.image_NE[test_N], length)
    ranking = rank_classes(images, class_CE, data.label_N[test_N], shown)
    hit_N = ranking.rank_M == 0
    return {"zero_shot": (float(hit_N.mean()), hit_N)}


def _probe_of_images(name: str) -> Callable[[Embedded, int], Found]:
    def run(data: Embedded, length: int) -> Found:
        found = getattr(probes, name)(data.image_NE[:, :length], data.label_N, data.is_train_N)
        hit_N = found.class_M == data.label_N[found.image_M]
        return {name: (float(hit_N.mean()), hit_N)}

    return run


def _shots(data: Embedded, length: int) -> Found:
    """The benchmark's protocol, which asks a scorer for what stands here."""
    items = SimpleNamespace(
        keys=data.keys, labels=data.label_N, is_train=data.is_train_N, tested_N=~data.is_train_N & (data.label_N >= 0)
    )
    found: Found = {}

    def rows(protocol: str, language: str, values: dict[str, Any], *_: Any) -> list[Any]:
        count = int(next(iter(values)).split("_")[1])
        found[f"shots_{count}"] = (next(iter(values.values())).value, None)
        return []

    scorer = SimpleNamespace(items=items, image_NE=truncate_normalize(data.image_NE, length), rows=rows)
    list(FewShot(SHOTS).run(scorer))  # type: ignore[arg-type]
    return found


def _retrieval(data: Embedded, length: int) -> Found:
    """Recall@5, the mean of both ways, in each language; equal captions are one candidate."""
    test = np.flatnonzero(~data.is_train_N)
    languages = sorted({language for image in test for language in data.captions[image]})
    found: Found = {f"recall5/{code}": (_recall5(data, length, test, code), None) for code in languages}
    others = [value for name, (value, _) in found.items() if not name.endswith("/en")]
    if "recall5/en" in found and others:
        found["recall5/others"] = (float(np.mean(others)), None)
        found["recall5/gap_to_english"] = (found["recall5/en"][0] - float(np.mean(others)), None)
    return found


def _recall5(data: Embedded, length: int, test: np.ndarray, language: str) -> float:
    images = [image for image in test if data.captions[image].get(language)]
    pairs = [(place, text) for place, image in enumerate(images) for text in data.captions[image][language]]
    number = {text: i for i, text in enumerate(dict.fromkeys(text for _, text in pairs))}
    text_TE = truncate_normalize(data.texts([*number]), length)
    image_NE = truncate_normalize(data.image_NE[images], length)
    image_S, text_S = torch.tensor([(place, number[text]) for place, text in pairs]).T
    ranks = pair_ranks(image_NE, text_TE, image_S, text_S)
    return float(np.mean([(rank < 5).float().mean().item() for rank in ranks]))


PROTOCOLS: dict[str, Callable[[Embedded, int], Found]] = {
    "zero_shot": _zero_shot,
    "knn": _probe_of_images("knn"),
    "linear_probe": _probe_of_images("linear_probe"),
    "shots": _shots,
    "retrieval": _retrieval,
}
