"""Heads, sources and the backbone fit together: found out before training starts."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from indiclip.backbone import Backbone
from indiclip.head import Head
from indiclip.head_schedule import start_steps
from indiclip.loading.data_module import MultiTaskData
from indiclip.loading.plan import SampleRef
from indiclip.loading.source import Source, keyed, settled
from indiclip.loading.stages import stage_ends
from indiclip.loading.steps import Steps
from indiclip.module import MultiTask
from indiclip.names import did_you_mean
from indiclip.training.teachers import prepare_teachers


def check(model: MultiTask, data: MultiTaskData, stage: str) -> None:
    """Compare heads and sources, and read a sample of each source.

    Args:
        stage: `fit`, `validate`, `test` or `predict`, which needs less of the samples.

    Raises:
        ValueError: The first thing that does not fit, naming the YAML key.
    """
    if stage != "fit" and not data.val:
        raise ValueError(f"data.val: found no source; {stage} reads it")
    heads, scores = model.each_head(), stage != "predict"
    train, held_out = keyed("data.train", data.train if stage == "fit" else []), keyed("data.val", data.val)
    for sources, trains in ((train, True), (held_out, False)):
        for key, source in sources.items():
            _check_source(key, source, heads, model.encoder.backbone, trains)
    if stage == "fit":
        for head in heads:
            for reason in dict.fromkeys(head.idle_options.values()):
                options = ", ".join(name for name, why in head.idle_options.items() if why == reason)
                warnings.warn(f"heads.{head.name}: no effect of {options} {reason}", stacklevel=2)
        _check_tasks(data, heads)
        prepare_teachers(model.encoder, data, heads)  # may take long: it comes behind what is soon checked
    for sources, trains in ((train, True), (held_out, False)):
        _check_samples(data, sources, heads, scores, trains)
    for head in heads if scores else ():
        of_task = [
            {key: source.dataset for key, source in sources.items() if source.task == head.task}
            for sources in (train, held_out)
        ]
        head.check(*of_task)


def check_length(model: MultiTask, data: MultiTaskData, num_steps: int) -> None:
    """Refuse heads, stages and views that begin or end behind a run's last step; warn of a source that is read once.

    Args:
        num_steps: Of the run, or more.

    Raises:
        ValueError: The first of them, naming the YAML key.
    """
    starts = start_steps(model.each_head(), num_steps)
    for key, source in keyed("data.train", data.train).items():
        stage_ends(source.stages, num_steps, f"{key}.stages")
        source.change_steps(num_steps)
        found = f"{key}.every: found {source.every} of {num_steps} steps in all"
        for name in (head.name for head in model.each_head() if head.task == source.task):
            first = math.ceil(starts[name] / source.every) * source.every
            if first >= num_steps:
                raise ValueError(
                    f"{found}: heads.{name} begins in step {starts[name]}, and no batch comes from then on"
                )
        if 1 < num_steps <= source.every:
            warnings.warn(f"{found}: the task {source.task!r} has a batch in the first alone", stacklevel=2)


def _check_source(key: str, source: Source, heads: Sequence[Head], backbone: Backbone, trains: bool) -> None:
    """Refuse a source that nobody reads, or whose images the backbone or a head does not take so."""
    tasks = {head.task for head in heads}
    if source.task not in tasks:
        raise ValueError(f"{key}.task: no head reads {source.task!r}{did_you_mean(source.task, tasks)}")
    source.dataset.inventory.check_used(key)
    of_stages = {f"{key}.stages[{i}].max_tokens": stage.max_tokens or 0 for i, stage in enumerate(source.stages)}
    for name, max_tokens in ({f"{key}.max_tokens": source.max_tokens} | of_stages).items():
        if max_tokens > backbone.max_tokens:
            raise ValueError(
                f"{name}: {max_tokens} is over the backbone's budget, model.encoder.backbone.max_tokens "
                f"{backbone.max_tokens}"
            )
    readers = [head for head in heads if head.task == source.task]
    _check_tokens(key, source, readers, backbone, trains)
    for head in readers:
        _check_views(key, source, head, trains)
        _check_mix(key, source, head, trains)
    read = [name for head in readers for name in head.required_views]
    for view in source.views:
        if view.name not in read:
            raise ValueError(
                f"{key}.views: found {view.name!r}, which no head of the task {source.task!r} reads"
                f"{did_you_mean(view.name, read)}; expected {', '.join(read) or 'none'}"
            )


def _check_tasks(data: MultiTaskData, heads: Sequence[Head]) -> None:
    """Refuse heads without a source, and steps that would train nothing; warn of batches larger than the data."""
    samples = data.train_sizes
    for key, source in keyed("data.train", data.train).items():
        largest = max(spec.samples for _, spec in source.specs) if source.batch_size else 0
        if largest > samples[source.task]:
            found = f"{largest} is more than the {samples[source.task]} samples of task {source.task!r}"
            warnings.warn(f"{key}.batch_size: {found}: a batch has some of them more than once", stacklevel=2)
    _check_every(data.train, heads)
    for head in heads:
        if head.task not in samples:
            raise ValueError(
                f"model.heads: {head.name} reads the task {head.task!r}, for which data.train has no source"
                f"{did_you_mean(head.task, samples)}"
            )


def _check_samples(
    data: MultiTaskData, sources: Mapping[str, Source], heads: Sequence[Head], scores: bool, trains: bool
) -> None:
    """Refuse a source whose first sample a head could not read, and tell each what its samples must have."""
    if trains:
        for source in sources.values():
            source.keeps_objects = any(head.reads_objects for head in heads if head.task == source.task)
    needed = {
        key: [(head, _needed(head, scores, trains)) for head in heads if head.task == source.task]
        for key, source in sources.items()
    }
    samples = dict(_first_samples(data, sources, trains))
    for key, sample in samples.items():
        for head, fields in needed[key]:
            _check_sample(key, sources[key], sample, head, fields)
    for head in heads if trains else ():
        head.check_samples({key: of for key, of in samples.items() if sources[key].task == head.task})
    for key, source in sources.items():
        names = [name for _, fields in needed[key] for name in fields if scores]
        source.required_fields = tuple(dict.fromkeys(names))


def _check_every(sources: Sequence[Source], heads: Sequence[Head]) -> None:
    """Refuse a run some of whose steps would train nothing."""
    rare = {source.task: source.every for source in sources if source.every > 1}
    if rare and all(head.task in rare or head.start for head in heads):
        task, every = next(iter(rare.items()))
        raise ValueError(
            f"data.train: task {task!r} has every {every}, and no head that begins with the run reads a task with "
            "every 1; expected one, as a step without a batch would train nothing"
        )


def _needed(head: Head, scores: bool, trains: bool) -> tuple[str, ...]:
    """Fields of a source's samples that a head needs."""
    fields = head.required_fields if scores else head.predict_fields
    return (*fields, *head.loss_fields) if trains else fields


def _check_tokens(key: str, source: Source, heads: Sequence[Head], backbone: Backbone, trains: bool) -> None:
    """Refuse what gives images other tokens, or other samples, where that cannot be."""
    drops = any(budget.drop for budget in source.budgets)
    changes = {"drop": drops and not source.stages, "stages": source.stages, "clusters": source.clusters}
    changes |= {"teachers": source.teachers is not None, "every": source.every > 1}
    names = [name for name, found in changes.items() if found]
    if names and not trains:
        raise ValueError(f"{key}.{names[0]}: held-out data are read whole; expected it in data.train alone")
    fewer = drops or any(stage.max_tokens is not None for stage in source.stages)
    if backbone.canvas_hw is not None and fewer:
        height, width = backbone.canvas_hw
        raise ValueError(
            f"{key}.{names[0]}: the backbone reads whole images of one size, {height}x{width}; expected a NaFlexViT "
            "for fewer tokens"
        )
    if drops and not backbone.reads_parts:
        raise ValueError(
            f"{key}.{names[0]}: the backbone's positions are those of whole images; expected no drop, or a NaFlexViT "
            "with a learned table of them, pos_embed_use_grid_sample, and no rope"
        )
    for head in heads:
        if drops and head.needs_all_patches:
            raise ValueError(
                f"{key}.{names[0]}: {head.name} reads the source and needs all patches of an image; expected no drop"
            )


def _first_samples(
    data: MultiTaskData, sources: Mapping[str, Source], trains: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A sample of each source, transformed: what is wrong with all shows here, not in a worker."""
    # Held-out ones, each of which has batches of its own, are read as in training too: that finds a readable sample.
    groups = [sources] if trains else [{key: source} for key, source in sources.items()]
    for group in groups:
        run_steps, step = settled([*group.values()])  # so that views that begin late are made, too
        # Of one rank, whatever the run has: held-out batches need not be shared out evenly.
        steps = Steps([*group.values()], data.seed, data.preprocessing, train=True, run_steps=run_steps)
        for task in steps.plans:
            of_task = [key for key, source in group.items() if source.task == task]
            for number, key in enumerate(of_task):
                if sample := _first_sample(key, steps, task, SampleRef(number, 0, 0), step):
                    yield key, sample


def _first_sample(key: str, steps: Steps, task: str, ref: SampleRef, step: int) -> dict[str, Any] | None:
    try:
        return steps.read(task, ref, step)
    except Exception as error:
        own = isinstance(error, ValueError | OSError)
        where = [*getattr(error, "__notes__", []), "(INDICLIP_TRACEBACK=1 shows where)"]
        found = str(error) if own else " ".join([f"{type(error).__name__}: {error}", *where])
        raise ValueError(f"{key}: {found}") from error


def _check_views(key: str, source: Source, head: Head, trains: bool) -> None:
    """Refuse a source without the views that a head reads, or with views that begin after the head."""
    if not trains:
        if source.views:
            raise ValueError(f"{key}.views: held-out images are read as they are; expected views in data.train alone")
        return
    starts = {view.name: view.start for view in source.views}
    for name in head.required_views:
        if name not in starts:
            raise ValueError(f"{key}.views: {head.name} reads {name!r}; found no such view{did_you_mean(name, starts)}")
        if starts[name] not in (0, head.start):
            raise ValueError(
                f"{key}.views: {name!r} has start {starts[name]:g}; expected heads.{head.name}.start {head.start:g}, "
                "whose head reads it, or 0"
            )
    head.check_views({view.name: view.count for view in source.views})


def _check_mix(key: str, source: Source, head: Head, trains: bool) -> None:
    """Refuse mixed images where they are scored, or read by a head that takes them for one image."""
    if source.mix and not trains:
        raise ValueError(f"{key}.mix: held-out images are read as they are; expected mix in data.train alone")
    if source.mix and not head.mixes:
        raise ValueError(
            f"{key}.mix: {head.name} reads the task {source.task!r} and cannot learn from two images in one; expected "
            "no mix, in data.overrides neither"
        )


def _check_sample(key: str, source: Source, sample: dict[str, Any], head: Head, fields: Sequence[str]) -> None:
    for name in fields:
        if name not in sample:
            raise ValueError(
                f"{key}: {head.name} needs {name}, which the samples of {type(source.dataset).__name__} do not have; "
                f"they have {', '.join(sorted(sample))}"
            )
    if source.transform.flips and head.no_flip:
        raise ValueError(
            f"{key}.augment: a flip is among the augmentations, and {head.name} reads the source: {head.no_flip}"
        )
