"""The parts of a model that plans and profiles tell apart, and hooks that say which of them runs."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, cast

from torch import nn

from indiclip.head import Head
from indiclip.losses import PairLoss
from indiclip.task_weights import Fixed, TaskWeights

IMAGE_TOWER, TEXT_TOWER, PROJECTIONS = "image tower", "text tower", "pools, projections"


class SomeHeads(nn.Module):
    """As much of a `MultiTask` as is read to count its steps, with some of its heads.

    Args:
        encoder: Of the model.
        heads: Those that take part.
        task_weights: Its strategy, whose passes count too; None leaves them out.
    """

    def __init__(self, encoder: nn.Module, heads: Sequence[Head], task_weights: TaskWeights | None = None) -> None:
        super().__init__()
        self.encoder, self.heads = encoder, nn.ModuleList(heads)
        self.task_weights = task_weights or Fixed()

    def each_head(self) -> list[Head]:
        return cast(list[Head], list(self.heads))


class Recorder(Protocol):
    """What is told which part of a model runs."""

    def enter(self, part: str, *_: Any) -> None: ...

    def leave(self, *_: Any) -> None: ...


@contextmanager
def parts_of(module: Any, heads: list[Head], recorder: Recorder) -> Iterator[None]:
    """While it lasts, the model tells a recorder which of its parts runs; heads themselves do not."""
    encoder = module.encoder
    modules = {encoder.backbone: IMAGE_TOWER, encoder.text: TEXT_TOWER}
    for head in heads:
        modules |= {part: f"{head.name} loss" for part in head.modules() if isinstance(part, PairLoss)}
    with ExitStack() as undo:
        for part, name in modules.items():
            undo.callback(part.register_forward_pre_hook(partial(recorder.enter, name)).remove)
            undo.callback(part.register_forward_hook(recorder.leave, always_call=True).remove)
        for name in ("pool_features", "pool_text", "project_image", "project_text"):  # methods, which have no hooks
            undo.enter_context(within_part(encoder, name, PROJECTIONS, recorder))
        yield


@contextmanager
def within_part(owner: nn.Module, name: str, part: str, recorder: Recorder) -> Iterator[None]:
    """While it lasts, a module's method belongs to a part."""
    method, own = getattr(owner, name), vars(owner).get(name)  # FSDP puts one of its own there

    def run(*arguments: Any, **options: Any) -> Any:
        recorder.enter(part)
        try:
            return method(*arguments, **options)
        finally:
            recorder.leave()

    vars(owner)[name] = run
    try:
        yield
    finally:
        del vars(owner)[name]
        if own is not None:
            vars(owner)[name] = own


def blocks(tower: nn.Module) -> list[nn.Module]:
    """The blocks of a tower: the items of its list of modules with the most weights. None, where there is no list."""
    lists = [part for part in tower.modules() if isinstance(part, nn.ModuleList | nn.Sequential) and len(part) > 1]
    largest = max(lists, key=lambda part: sum(p.numel() for p in part.parameters()), default=())
    return [*largest]
