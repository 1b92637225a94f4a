"""What a run's encoder is worth on held-out data: protocols on embeddings, and probes on frozen tokens.

`scores` of a grid has a name for each set of held-out data, which says either which protocols are run on embeddings:

    cifar10:
      dataset: {class_path: ..., init_args: {...}}     # of the test part
      gallery: {class_path: ..., init_args: {...}}     # what kNN, linear probe and shots learn from
      protocols: [zero_shot, knn, linear_probe, shots, retrieval]
      templates: ["a photo of a {}"]
      max_tokens: 64

or which head is trained on the frozen encoder's tokens, and what of its metric counts:

    boxes:
      dataset: {...}
      train: {...}
      head: {class_path: heads.detection.Detection, init_args: {...}}
      metrics: {ap50: higher}
      steps: 200
      batch_size: 16
      lr: 1.0e-3
      max_tokens: 144

Names are `<data>/<protocol>@<length>` for the shortest trained length and the full one, and `<data>/<metric>`.

Shape letters: N images, E embedding length, T texts, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _study_grid import Grid, digest_of
from _study_protocols import PROTOCOLS, Embedded, Found
from _study_runs import Place, begin_process, spent
from omegaconf import OmegaConf

from indiclip import json_lines
from indiclip.names import check_choice

Scores = dict[str, float]
_KEYS = {
    "protocols": {"dataset", "gallery", "protocols", "templates", "max_tokens", "batch_size"},
    "head": {"dataset", "train", "head", "metrics", "steps", "batch_size", "lr", "max_tokens"},
}


def directions(grid: Grid) -> dict[str, str]:
    """Which direction is better of the metrics of probes; of all others it is `higher`, and of a gap `lower`."""
    return {
        f"{name}/{metric}": better
        for name, spec in grid.scores.items()
        for metric, better in spec.get("metrics", {}).items()
    }


def check_scores(grid: Grid) -> None:
    """Raise ValueError for a specification that does not fit, naming its key."""
    for name, spec in grid.scores.items():
        key = f"{grid.file}: scores.{name}"
        kind = "head" if "head" in spec else "protocols"
        for option in spec:
            check_choice(key, option, _KEYS[kind])
        for option in ("dataset", "protocols") if kind == "protocols" else ("dataset", "train", "metrics"):
            if option not in spec:
                raise ValueError(f"{key}.{option}: found nothing; expected it beside {kind}")
        for protocol in spec.get("protocols", []):
            check_choice(f"{key}.protocols", protocol, PROTOCOLS)
            if protocol in ("knn", "linear_probe", "shots") and "gallery" not in spec:
                raise ValueError(f"{key}.gallery: found nothing; expected what {protocol} learns from")
        for metric, better in spec.get("metrics", {}).items():
            check_choice(f"{key}.metrics.{metric}", better, ("higher", "lower"))


def scored(place: Place, grid: Grid) -> dict[int, Scores]:
    """Step -> scores of a run, as far as they are there and are those that the grid asks for."""
    file = place.folder / "scores.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    if content.get("digest") != digest_of(grid.scores):
        return {}
    return {int(step): values for step, values in content["steps"].items()}


def score(place: Place, grid: Grid) -> None:
    """Score the weights of a run at its marks; in a process of its own."""
    begin_process(place.file("log"), grid.environment(place.run.seed))
    found, done = scored(place, grid), 0
    data: dict[str, HeldOut] = {}
    for mark in place.run.marks:
        if mark in found:
            continue
        snapshot = place.folder / "snapshots" / f"{mark}.ckpt"
        found[mark], hits = score_encoder(snapshot, grid.scores, place.run.seed, data)
        np.savez_compressed(place.folder / f"hits-{mark}.npz", **hits)
        content = {"digest": digest_of(grid.scores), "steps": found}
        json_lines.write_whole(place.folder / "scores.json", json.dumps(content).encode())
        done += 1
    spent(place.root, place.run.arm, place.run.name, "score", done)


def score_encoder(
    snapshot: Path, specs: dict[str, dict[str, Any]], seed: int, data: dict[str, HeldOut]
) -> tuple[Scores, dict[str, np.ndarray]]:
    """All scores of an encoder, and by score which images were right, where it is such a score.

    Args:
        snapshot: What `indiclip.load` reads.
        specs: `scores` of a grid.
        seed: Of the probes' weights and batches.
        data: Batches that were read before, by name; it is filled.
    """
    import indiclip

    encoder = indiclip.load(snapshot)
    scores: Scores = {}
    hits: dict[str, np.ndarray] = {}
    for name, spec in specs.items():
        if name not in data:
            data[name] = HeldOut.read(name, spec, encoder)
        with torch.no_grad():
            found = _protocols(encoder, spec, data[name]) if "protocols" in spec else {}
        scores |= {f"{name}/{score}": value for score, (value, _) in found.items()}
        hits |= {f"{name}/{score}": hit_N for score, (_, hit_N) in found.items() if hit_N is not None}
        if "head" in spec:
            scores |= {f"{name}/{metric}": value for metric, value in _probe(encoder, spec, data[name], seed).items()}
    return scores, hits


@dataclass
class HeldOut:
    """Batches of held-out data, with the tokens or embeddings still to be made."""

    test: list[Any]
    learn: list[Any] = field(default_factory=list)  # of the gallery, or of a probe's training
    classes: list[str] = field(default_factory=list)

    @staticmethod
    def read(name: str, spec: dict[str, Any], encoder: Any) -> HeldOut:
        """Read what a specification names, for this encoder's patches."""
        datasets = {key: dataset(f"scores.{name}.{key}", spec[key]) for key in _KEYS_OF_DATA if key in spec}
        size, tokens = spec.get("batch_size", 64), spec.get("max_tokens", 256)
        batches = {key: [*_batches(one, size, tokens, encoder, spec)] for key, one in datasets.items()}
        learn = batches.get("gallery") or batches.get("train") or []
        return HeldOut(batches["dataset"], learn, list(datasets["dataset"].classes))


_KEYS_OF_DATA = ("dataset", "gallery", "train")


def dataset(key: str, tree: Any) -> Any:
    """A dataset from its `class_path` and `init_args`."""
    from indiclip.datasets.base import SampleDataset

    return _instance(key, tree, SampleDataset)


def _instance(key: str, tree: Any, kind: type) -> Any:
    from jsonargparse import ArgumentParser

    resolved = OmegaConf.to_container(OmegaConf.create({"it": tree}), resolve=True)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=kind)
    try:
        return parser.instantiate_classes(parser.parse_object(resolved)).it
    except Exception as error:  # jsonargparse's own, or of the class
        raise ValueError(f"{key}: {' '.join(str(error).split())[:300]}") from error


def _batches(one: Any, size: int, max_tokens: int, encoder: Any, spec: dict[str, Any]) -> Iterator[Any]:
    from indiclip.loading.source import Source
    from indiclip.loading.steps import Steps

    source = Source("held_out", one, batch_size=size, max_tokens=max_tokens)
    if "head" in spec:
        source.required_fields = _instance("head", spec["head"], _head()).required_fields
    steps = Steps([source], 0, encoder.backbone.preprocessing, train=False)
    for step in range(len(steps)):
        batch = next(iter(steps[step].values()))
        if batch["keys"]:
            yield batch


def _head() -> type:
    from indiclip.head import Head

    return Head


def _protocols(encoder: Any, spec: dict[str, Any], data: HeldOut) -> Found:
    batches = [*data.learn, *data.test]
    image_NE = torch.cat([encoder.embed_features(encoder.features(batch["images"])) for batch in batches])
    targets = [(batch, batch["targets"]) for batch in batches]
    embedded = Embedded(
        image_NE,
        np.concatenate([np.asarray(of.get("label", [-1] * len(batch["keys"]))) for batch, of in targets]),
        np.repeat([True, False], [sum(len(b["keys"]) for b in part) for part in (data.learn, data.test)]),
        [key for batch in batches for key in batch["keys"]],
        [captions for batch, of in targets for captions in of.get("captions", [{}] * len(batch["keys"]))],
        data.classes,
        spec.get("templates", ["{}"]),
        encoder,
    )
    found: Found = {}
    for protocol in spec["protocols"]:
        for length in (encoder.lengths[0], encoder.lengths[-1]):
            values = PROTOCOLS[protocol](embedded, length)
            found |= {f"{name}@{length}": value for name, value in values.items()}
    return found


def _probe(encoder: Any, spec: dict[str, Any], data: HeldOut, seed: int) -> Scores:
    """Train a head on the frozen encoder's tokens, by AdamW with a one-cycle schedule, and score it."""
    from indiclip.head import Losses, computed
    from indiclip.ratios import over_all_ranks

    torch.manual_seed(seed)
    head = _instance("head", spec["head"], _head())
    head.bind(encoder)
    with torch.no_grad():
        learn = [(encoder.features(batch["images"]), batch) for batch in data.learn]
    optimizer = torch.optim.AdamW(head.parameters(), lr=spec.get("lr", 1e-3), weight_decay=0.05)
    steps = spec.get("steps", 200)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, spec.get("lr", 1e-3), total_steps=steps, pct_start=0.1)
    order = np.random.default_rng(seed)
    head.train()
    for step in range(steps):
        if step % len(learn) == 0:
            shuffled = order.permutation(len(learn))
        features, batch = learn[shuffled[step % len(learn)]]
        losses = computed(head.loss(features, batch, encoder))
        assert isinstance(losses, Losses)
        optimizer.zero_grad()
        sum(over_all_ranks(losses.terms).values(), torch.zeros(())).backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    head.eval()
    with torch.no_grad():
        for batch in data.test:
            features = encoder.features(batch["images"])
            head.update_metric(head.predict(features, batch, encoder), features, batch)
    values = head.metric.compute()
    return {metric: float(values[metric]) for metric in spec["metrics"]}
