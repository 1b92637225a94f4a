"""What the ranks of a run tell each other; a process without others is rank 0 of 1."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

_is_alone = False  # a context variable would break the graph of a compiled loss with torch 2.11


@contextmanager
def alone() -> Iterator[None]:
    """This process is rank 0 of 1, whatever ranks there are, for all that asks `rank_and_world`."""
    global _is_alone
    _is_alone = True
    try:
        yield
    finally:
        _is_alone = False


def rank_and_world() -> tuple[int, int]:
    """The number of this rank, and how many there are."""
    if _is_alone or not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def local_device(device: str) -> str:
    """`auto` and `cuda` as the device of this process, which need not have met the others yet."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    number = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    if device == "cuda" and torch.cuda.is_available() and number:
        return f"cuda:{int(number) % torch.cuda.device_count()}"
    return device


def gathered(value: Any) -> list[Any]:
    """The `value` of each rank, on every rank. A collective: for rare things."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(numbers: Tensor) -> Tensor:
    """Their sum, without gradients. A collective."""
    return all_reduce(numbers.detach())


def rows_of_all_ranks(rows: Tensor) -> Tensor:
    """Those of one rank after the other's, as many of each; gradients of every rank's loss reach the rank whose row it
    is. A collective, in the backward pass too.
    """
    return rows if rank_and_world()[1] == 1 else cast(Tensor, _Rows.apply(rows))


def mean_over_ranks(numbers: Tensor) -> Tensor:
    """Their mean; the gradients of every rank's loss reach every rank. A collective, in the backward pass too."""
    world = rank_and_world()[1]
    return numbers if world == 1 else cast(Tensor, _Sum.apply(numbers)) / world


def dealt_rows(rows: Tensor) -> Tensor:
    """As `rows_of_all_ranks`, in the order in which a step's samples are dealt to the ranks."""
    world = rank_and_world()[1]
    return rows_of_all_ranks(rows).reshape(world, *rows.shape).transpose(0, 1).flatten(0, 1)


# torch's traceable collectives: each is under way until `arrived`, and has no gradient. Unlike those of
# torch.distributed with `async_op=True`, they break no graph of torch.compile. They are private; tried with torch 2.15
# (2.11 has the same names).


def all_gather(x: Tensor) -> Tensor:
    """`x` of every rank, stacked: (W, *x.shape)."""
    return arrived(begin_gather(x[None]))


def reduce_scatter(gathered: Tensor) -> Tensor:
    """The rows of this rank, among the rows of all ranks (W * B, ...), summed up over the ranks."""
    return arrived(begin_reduce_scatter(gathered))


def all_reduce(x: Tensor, operation: str = "sum") -> Tensor:
    """The sum (or `max`) of `x` over all ranks; `x` itself if there is one."""
    return x if rank_and_world()[1] == 1 else arrived(_collective("all_reduce", x, operation, _group()))


def begin_gather(x: Tensor) -> Tensor:
    """Rows of every rank under way to all of them."""
    world = rank_and_world()[1]
    return x if world == 1 else _collective("all_gather_into_tensor", x.contiguous(), world, _group())


def begin_reduce_scatter(gathered: Tensor) -> Tensor:
    """Gradients of gathered rows under way to the ranks that the rows came from, where they are summed up."""
    world = rank_and_world()[1]
    if world == 1:
        return gathered
    return _collective("reduce_scatter_tensor", gathered.contiguous(), "sum", world, _group())


def arrived(x: Tensor) -> Tensor:
    """What was under way."""
    return x if rank_and_world()[1] == 1 else _collective("wait_tensor", x)


def _collective(name: str, *arguments: Any) -> Tensor:
    return cast(Tensor, getattr(torch.ops._c10d_functional, name)(*arguments))


def _group() -> str:
    assert dist.group.WORLD is not None
    return dist.group.WORLD.group_name


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return arrived(begin_gather(rows))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return reduce_scatter(gradient)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Tensor) -> Tensor:
        return all_reduce(numbers)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce(gradient)
