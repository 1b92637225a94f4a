"""What a run's encoder is worth on held-out data: protocols on embeddings, and probes on frozen tokens.

Which they are says `scores` of a grid, see `_study_specs`.

Shape letters: N images, E embedding length, T texts, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _study_grid import Grid, digest_of
from _study_protocols import PROTOCOLS, Embedded, Found
from _study_runs import Place, begin_process, spent
from _study_specs import DATA, EmbeddingScores, ProbeScores, Spec, made

from indiclip import json_lines
from indiclip.names import check_choice

Scores = dict[str, float]


def directions(grid: Grid) -> dict[str, str]:
    """Which direction is better of the metrics of probes; of all others it is `higher`, and of a gap `lower`."""
    probes = {name: spec.metrics for name, spec in grid.specs.items() if isinstance(spec, ProbeScores)}
    return {f"{name}/{metric}": better for name, metrics in probes.items() for metric, better in metrics.items()}


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
        found[mark], hits = score_encoder(place.snapshot(mark), grid.specs, place.run.seed, data)
        np.savez_compressed(place.folder / f"hits-{mark}.npz", **hits)
        content = {"digest": digest_of(grid.scores), "steps": found}
        json_lines.write_whole(place.folder / "scores.json", json.dumps(content).encode())
        done += 1
    spent(place.root, place.run.arm, place.run.name, "score", done)


def score_encoder(
    snapshot: Path, specs: Mapping[str, Spec], seed: int, data: dict[str, HeldOut]
) -> tuple[Scores, dict[str, np.ndarray]]:
    """All scores of an encoder, and by score which images were right, where it is such a score.

    Args:
        snapshot: What `indiclip.load` reads.
        specs: Of a grid.
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
        if isinstance(spec, ProbeScores):
            of_probe = _probe(encoder, name, spec, data[name], seed)
            scores |= {f"{name}/{metric}": value for metric, value in of_probe.items()}
            continue
        with torch.no_grad():
            found = _protocols(encoder, spec, data[name])
        scores |= {f"{name}/{score}": value for score, (value, _) in found.items()}
        hits |= {f"{name}/{score}": hit_N for score, (_, hit_N) in found.items() if hit_N is not None}
    return scores, hits


@dataclass
class HeldOut:
    """Batches of held-out data, with the tokens or embeddings still to be made."""

    test: list[Any]
    learn: list[Any] = field(default_factory=list)  # of the gallery, or of a probe's training
    classes: list[str] = field(default_factory=list)

    @staticmethod
    def read(name: str, spec: Spec, encoder: Any) -> HeldOut:
        """Read what a specification names, for this encoder's patches."""
        trees = {key: tree for key in DATA if (tree := getattr(spec, key, None))}
        datasets = {key: made(f"scores.{name}.{key}", tree) for key, tree in trees.items()}
        fields = made(f"scores.{name}.head", spec.head).required_fields if isinstance(spec, ProbeScores) else ()
        batches = {key: [*_batches(one, encoder, spec, fields)] for key, one in datasets.items()}
        learn = batches.get("gallery") or batches.get("train") or []
        return HeldOut(batches["dataset"], learn, list(datasets["dataset"].classes))


def _batches(one: Any, encoder: Any, spec: Spec, fields: tuple[str, ...]) -> Iterator[Any]:
    from indiclip.loading.source import Source
    from indiclip.loading.steps import Steps

    source = Source("held_out", one, batch_size=spec.batch_size, max_tokens=spec.max_tokens)
    source.required_fields = fields
    steps = Steps([source], 0, encoder.backbone.preprocessing, train=False)
    for step in range(len(steps)):
        batch = next(iter(steps[step].values()))
        if batch["keys"]:
            yield batch


def _protocols(encoder: Any, spec: EmbeddingScores, data: HeldOut) -> Found:
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
        [*spec.templates],
        encoder,
    )
    found: Found = {}
    for protocol in spec.protocols:
        for length in (encoder.lengths[0], encoder.lengths[-1]):
            values = PROTOCOLS[protocol](embedded, length)
            found |= {f"{name}@{length}": value for name, value in values.items()}
    return found


def _probe(encoder: Any, name: str, spec: ProbeScores, data: HeldOut, seed: int) -> Scores:
    """Train a head on the frozen encoder's tokens, by AdamW with a one-cycle schedule, and score it."""
    from indiclip.head import Losses, computed
    from indiclip.ratios import over_all_ranks

    torch.manual_seed(seed)
    head = made(f"scores.{name}.head", spec.head)
    head.bind(encoder)
    with torch.no_grad():
        learn = [(encoder.features(batch["images"]), batch) for batch in data.learn]
    optimizer = torch.optim.AdamW(head.parameters(), lr=spec.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, spec.lr, total_steps=spec.steps, pct_start=0.1)
    order = np.random.default_rng(seed)
    head.train()
    for step in range(spec.steps):
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
    for metric in spec.metrics:
        check_choice(f"scores.{name}.metrics", metric, values)
    return {metric: float(values[metric]) for metric in spec.metrics}
