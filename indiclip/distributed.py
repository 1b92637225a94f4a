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
    if rank_and_world()[1] == 1:
        return numbers
    total = numbers.detach().clone()
    dist.all_reduce(total)
    return total


def rows_of_all_ranks(rows: Tensor) -> Tensor:
    """Those of one rank after the other's, as many of each; gradients of every rank's loss reach the rank whose row it
    is. A collective, in the backward pass too.
    """
    if rank_and_world()[1] == 1:
        return rows
    from torch.distributed.nn.functional import all_gather  # see `mean_over_ranks`

    return torch.cat(all_gather(rows.contiguous()))  # type: ignore[no-untyped-call]


def mean_over_ranks(numbers: Tensor) -> Tensor:
    """Their mean; the gradients of every rank's loss reach every rank. A collective, in the backward pass too."""
    world = rank_and_world()[1]
    if world == 1:
        return numbers
    from torch.distributed.nn.functional import all_reduce  # takes a second to import, which only many ranks need

    return cast(Tensor, all_reduce(numbers)) / world  # type: ignore[no-untyped-call]


def dealt_rows(rows: Tensor) -> Tensor:
    """As `rows_of_all_ranks`, in the order in which a step's samples are dealt to the ranks."""
    world = rank_and_world()[1]
    return rows_of_all_ranks(rows).reshape(world, *rows.shape).transpose(0, 1).flatten(0, 1)
