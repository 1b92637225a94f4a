"""Sources that share the batches of a task: what these are called, and what the sources must agree on."""

import math
from collections.abc import Sequence
from typing import Any

from indiclip.loading.sampler import BatchSpec, SourceInfo
from indiclip.loading.source import Source
from indiclip.types import Origin


def source_keys(sources: list[Source], train: bool) -> list[str]:
    """What the batches of each source are called in a step: their task, or `task/source` of several held-out ones.

    Raises:
        ValueError: Two held-out sources of a task have one name.
    """
    tasks = [source.task for source in sources]
    if train:
        return tasks
    keys: list[str] = []
    for i, source in enumerate(sources):
        key = source.task
        if tasks.count(key) > 1:
            key += f"/{source.name or tasks[:i].count(key)}"
        if key in keys:
            raise ValueError(f"data.val[{i}].name: {key} is the name of an earlier source too")
        keys.append(key)
    return keys


def origin_of(key: str, group: Sequence[Source]) -> Origin:
    """Where the samples of these batches come from.

    Args:
        key: Of the batches, see `source_keys`.
        group: The sources that share them.
    """
    task = group[0].task
    dataset = next((source.dataset for source in group if source.dataset.classes), group[0].dataset)
    in_turn = all(source.shard_groups == 1 for source in group)
    return Origin(task, key.removeprefix(task).removeprefix("/"), dataset.classes, dataset.category_ids, in_turn)


def check_shared(group: Sequence[Source]) -> None:
    """Check that training sources that share their batches want the same done with these.

    Raises:
        ValueError: Two do not.
    """
    options: dict[str, list[Any]] = {
        "batch_size, batch_tokens, batch_multiple, max_tokens or stages": [source.specs for source in group],
        "mix": [source.mix or None for source in group],
        "every": [source.every for source in group],
        "views (name, count or start)": [{view.name: (view.count, view.start) for view in of.views} for of in group],
    }
    for name, values in options.items():
        if any(value != values[0] for value in values):
            other = next(value for value in values if value != values[0])
            raise ValueError(
                f"data: the sources of task {group[0].task!r} differ in {name}, such as {_told(values[0])} and "
                f"{_told(other)}; they share their batches"
            )


def _told(value: Any) -> str:
    """What a source wants: of batches in the words of its options."""
    if not isinstance(value, list):
        return str(value)
    words = []
    for end, of in value:
        size = f"{of.samples} samples" if of.tokens is None else f"{of.tokens} tokens, {of.max_tokens} an image"
        words.append(f"{size} until {end:g}" if math.isfinite(end) else size)
    return " then ".join(words)


def check_divides(source: Source, spec: BatchSpec, world_size: int) -> None:
    """Check that the batches of a source's task can be dealt to the ranks, and mixed there.

    Raises:
        ValueError: They cannot.
    """
    name = "batch_size" if spec.tokens is None else "batch_multiple"
    if spec.samples % world_size:
        raise ValueError(
            f"data: {name} {spec.samples} of task {source.task!r} is over all ranks and must be a multiple of the "
            f"{world_size} ranks, such as {math.ceil(spec.samples / world_size) * world_size}"
        )
    if source.mix and spec.samples % (2 * world_size):
        raise ValueError(
            f"data: task {source.task!r} has mix, which takes images two by two: {name} {spec.samples} must be a "
            f"multiple of twice the {world_size} ranks"
        )


def check_shards(task: str, infos: Sequence[SourceInfo], world_size: int) -> None:
    """Check that ranks that are to read shards of their own have at least one each.

    Raises:
        ValueError: There are more ranks than shards.
    """
    for number, info in enumerate(infos):
        if info.groups > 1 and info.starts is not None and len(info.starts) - 1 < world_size:
            raise ValueError(
                f"data: source {number} of task {task!r} has {len(info.starts) - 1} shards for {world_size} ranks, and "
                f"shard_groups {info.groups} has each rank read its own; cut the data into more shards, or set "
                "shard_groups to 1, with which every rank reads every shard"
            )
