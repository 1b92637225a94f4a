"""What a config that is stacked on an experiment changes in the training sources of a task."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from torch import nn

from indiclip.loading.mixing import Mix
from indiclip.loading.source import Source
from indiclip.loading.stages import Stage
from indiclip.loading.teacher_cache import TeacherCache
from indiclip.loading.views import View
from indiclip.names import did_you_mean

_ADDED = ("augment", "views")  # behind the source's own; all else takes the place of it


@dataclass
class SourceOverride:
    """Options of `Source` in place of those that the training sources of a task have. What is None stays.

    Args:
        task: Whose sources.
        augment: As of `Source`, behind the source's own.
        views: As of `Source`, beside the source's own.
        teachers: As of `Source`.
        samples: As of `Source`.
        mix: As of `Source`.
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

    def of(self, source: Source) -> Source:
        """The source with these options."""
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "task"}
        given = {name: value for name, value in options.items() if value is not None}
        added = {name: [*(getattr(source, name) or []), *given[name]] for name in _ADDED if name in given}
        if self.samples is not None:  # of all, though the source itself may have fewer
            given["dataset"] = source.whole_dataset
        return replace(source, **(given | added))


def overridden(sources: Sequence[Source], overrides: Sequence[SourceOverride]) -> list[Source]:
    """The sources after one override has followed the other.

    Raises:
        ValueError: An override of a task that has no source.
    """
    found = list(sources)
    tasks = {source.task for source in found}
    for number, override in enumerate(overrides):
        if override.task not in tasks:
            raise ValueError(
                f"data.overrides[{number}].task: no source of data.train is for {override.task!r}"
                f"{did_you_mean(override.task, tasks)}"
            )
        found = [override.of(source) if source.task == override.task else source for source in found]
    return found
