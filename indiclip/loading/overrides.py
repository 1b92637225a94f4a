"""What configs that are stacked on an experiment change in the training sources of a task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn
from torchvision.transforms import v2

from indiclip.loading.mixing import Mix
from indiclip.loading.source import Source
from indiclip.loading.stages import Stage
from indiclip.loading.teacher_options import TeacherCache
from indiclip.loading.views import View
from indiclip.names import did_you_mean, shorten

_ADDED = ("augment", "views")  # behind the source's own; all else takes the place of it


@dataclass
class SourceOverride:
    """Options of `Source` in place of those that the training sources of a task have. What is None stays.

    Of several overrides of a task all count, whatever their order: none takes the place of what another one says.

    Args:
        task: Whose sources.
        augment: As of `Source`, behind the source's own.
        views: As of `Source`, beside the source's own.
        teachers: As of `Source`.
        samples: As of `Source`.
        mix: As of `Source`. Mixup of one override and CutMix of another are both.
        batch_size: As of `Source`.
        every: As of `Source`.
        max_tokens: As of `Source`.
        drop: As of `Source`.
        stages: As of `Source`.
    """

    task: str
    augment: list[nn.Module] | None = None
    views: list[View] | None = None
    teachers: TeacherCache | None = None
    samples: int | None = None
    mix: Mix | None = None
    batch_size: int | None = None
    every: int | None = None
    max_tokens: int | None = None
    drop: float | None = None
    stages: list[Stage] | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The options that it has."""
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "task"}
        return {name: value for name, value in options.items() if value is not None}


def overridden(sources: Sequence[Source], overrides: Sequence[SourceOverride]) -> list[Source]:
    """The sources with what the overrides say of their tasks.

    Raises:
        ValueError: An override of a task that has no source, or two of a task that want one option differently.
    """
    tasks = {source.task for source in sources}
    of_task: dict[str, dict[str, SourceOverride]] = {task: {} for task in tasks}
    for number, override in enumerate(overrides):
        key = f"data.overrides[{number}]"
        if override.task not in tasks:
            raise ValueError(
                f"{key}.task: no source of data.train is for {override.task!r}{did_you_mean(override.task, tasks)}"
            )
        of_task[override.task][key] = override
    options = {task: _together(of_task[task]) for task in of_task}
    for number, source in enumerate(sources):
        _check_augment(f"data.train[{number}]", source, of_task[source.task])
        _check_views(f"data.train[{number}]", source, of_task[source.task])
    return [_changed(source, options[source.task]) if options[source.task] else source for source in sources]


def _check_augment(key: str, source: Source, overrides: Mapping[str, SourceOverride]) -> None:
    """Raise ValueError for a RandAugment behind another one, as of two levels of AugReg."""
    lists = {key: source.augment} | {of: override.augment for of, override in overrides.items()}
    found = [of for of, augment in lists.items() for step in augment or [] if isinstance(step, v2.RandAugment)]
    if len(found) > 1:
        raise ValueError(
            f"{found[1]}.augment: found a RandAugment behind that of {found[0]}.augment, for the same task "
            f"{source.task!r}; expected one of them"
        )


def _check_views(key: str, source: Source, overrides: Mapping[str, SourceOverride]) -> None:
    """Raise ValueError for two views of one name."""
    lists = {key: source.views} | {of: override.views or [] for of, override in overrides.items()}
    first: dict[str, str] = {}
    for of, view in ((of, view) for of, views in lists.items() for view in views):
        if first.setdefault(view.name, of) != of:
            raise ValueError(
                f"{of}.views: found {view.name!r}, and {first[view.name]}.views has one of that name, for the same "
                f"task {source.task!r}; expected another name, or one of them"
            )


def _together(overrides: Mapping[str, SourceOverride]) -> dict[str, Any]:
    """The options of all overrides of a task, which are given by their keys in the YAML."""
    found: dict[str, Any] = {}
    first: dict[str, str] = {}  # option -> which override had it first
    for key, override in overrides.items():
        for name, value in override.given.items():
            if name in _ADDED:
                value = [*found.get(name, []), *value]
            elif name == "mix" and name in found and (both := found[name].beside(value)):
                value = both
            elif name in found and value != found[name]:
                raise ValueError(
                    f"{key}.{name}: found {shorten(value)}, and {first[name]}.{name} of the same task "
                    f"{override.task!r} is {shorten(found[name])}; expected one of them"
                )
            found[name] = value
            first.setdefault(name, key)
    return found


def _changed(source: Source, options: Mapping[str, Any]) -> Source:
    """The source with these options in place of its own, or behind them."""
    changes = {**options}
    for name in options.keys() & {*_ADDED}:
        changes[name] = [*(getattr(source, name) or []), *options[name]]
    if "samples" in options:  # of all, though the source itself may have fewer
        changes["dataset"] = source.whole_dataset
    return replace(source, **changes)
