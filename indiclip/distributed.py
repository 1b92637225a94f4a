"""What the ranks of a run tell each other; a process without others is rank 0 of 1."""

from typing import Any

import torch.distributed as dist


def rank_and_world() -> tuple[int, int]:
    """The number of this rank, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gathered(value: Any) -> list[Any]:
    """The `value` of each rank, on every rank. A collective: for rare things."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values
