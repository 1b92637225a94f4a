"""Heads, sources and the backbone fit together: found out before training starts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from indiclip.datasets.base import SampleDataset
from indiclip.head import Head
from indiclip.loading.data_module import MultiTaskData
from indiclip.loading.plan import SampleRef
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.module import MultiTask
from indiclip.names import did_you_mean


def check(model: MultiTask, data: MultiTaskData, training: bool) -> None:
    """Compare heads and sources, and read a sample of each source.

    Raises:
        ValueError: The first thing that does not fit, naming the YAML key.
    """
    heads = model.each_head()
    tasks = {head.task for head in heads}
    parts = [("data.train", data.train)] * training + [("data.val", data.val)]
    for key, sources in parts:
        for i, source in enumerate(sources):
            _check_source(f"{key}[{i}]", source, model, tasks)
    if training:
        given = {source.task for source in data.train}
        for head in heads:
            if head.task not in given:
                raise ValueError(
                    f"model.heads: {head.name} reads the task {head.task!r}, for which data.train has no source"
                    f"{did_you_mean(head.task, given)}"
                )
    for head in heads:
        of_task = {
            f"{key}[{i}]": source.dataset
            for key, sources in parts
            for i, source in enumerate(sources)
            if source.task == head.task
        }
        _check_classes(head.task, of_task)
        for dataset in of_task.values():
            head.check(dataset)
    for key, sources in parts:
        for i, sample in _first_samples(data, sources):
            _check_sample(f"{key}[{i}]", sources[i], sample, heads)


def _check_source(key: str, source: Source, model: MultiTask, tasks: set[str]) -> None:
    if source.task not in tasks:
        raise ValueError(f"{key}.task: no head reads {source.task!r}{did_you_mean(source.task, tasks)}")
    budget = model.encoder.backbone.max_tokens
    if source.max_tokens > budget:
        raise ValueError(
            f"{key}.max_tokens: {source.max_tokens} is over the backbone's budget, "
            f"model.encoder.backbone.max_tokens {budget}"
        )


def _check_classes(task: str, datasets: dict[str, SampleDataset]) -> None:
    """A class number means the same thing in all sources of a task, held-out ones too."""
    lists = {key: list(names) for key, dataset in datasets.items() if (names := dataset.classes)}
    for (key, names), (other, others) in itertools.pairwise(lists.items()):
        if names != others:
            place = next((i for i, pair in enumerate(zip(names, others, strict=False)) if pair[0] != pair[1]), None)
            apart = f"class {place} is {names[place]!r} and {others[place]!r}" if place is not None else "one is longer"
            raise ValueError(
                f"{other}: the sources of task {task!r} must have the same classes in the same order; {key} has "
                f"{len(names)}, {other} has {len(others)}, {apart}"
            )


def _first_samples(data: MultiTaskData, sources: list[Source]) -> Iterator[tuple[int, dict[str, Any]]]:
    """A sample of each source, transformed: what is wrong with all shows here, not in a worker."""
    if not sources:
        return
    steps = Steps(sources, data.seed, data.patch_size, data.canvas_hw, train=True)
    for task in steps.plans:
        of_task = [i for i, source in enumerate(sources) if source.task == task]
        for number, i in enumerate(of_task):
            sample = steps.read(task, SampleRef(number, 0, 0))
            if sample:
                yield i, sample


def _check_sample(key: str, source: Source, sample: dict[str, Any], heads: list[Head]) -> None:
    for head in heads:
        if head.task != source.task:
            continue
        for name in head.required_fields:
            if name not in sample:
                raise ValueError(
                    f"{key}: {head.name} needs {name}, which the samples of {type(source.dataset).__name__} do not "
                    f"have; they have {', '.join(sorted(sample))}"
                )
    if "dp_boxes_xyxy" in sample and source.transform.flips:
        raise ValueError(
            f"{key}.augment: the source has DensePose points and a flip among its augmentations; a mirrored body "
            "needs the symmetry table, which is not part of IndiCLIP"
        )
