"""Sums with what they are to be divided by, put together from the micro-batches and ranks of a step."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from indiclip.distributed import gathered, rank_and_world, sum_over_ranks


class Ratio(NamedTuple):
    """A sum over objects, to be divided by their number in the whole step: on all ranks, in all micro-batches.

    Attributes:
        total: The sum over the objects of this batch, a scalar.
        number: How many they are, a scalar without gradient. Where no rank has any, the sum is divided by 1.
    """

    total: Tensor
    number: Tensor


Values = Mapping[str, Tensor | Ratio]  # a tensor is a mean over as many things on every rank


def as_ratios(values: Values, number: int) -> dict[str, Ratio]:
    """Means over a `number` of things, and ratios as they are."""
    return {
        name: value if isinstance(value, Ratio) else Ratio(value * number, torch.full_like(value.detach(), number))
        for name, value in values.items()
    }


def by_group(values_B: Tensor, groups: Mapping[str, np.ndarray]) -> dict[str, Ratio]:
    """The mean of values over each group that has any; without waiting for the device.

    Args:
        values_B: A number for each sample.
        groups: Name -> bool (B,), which samples it has.
    """
    groups = {name: of_B for name, of_B in groups.items() if of_B.any()}
    if not groups:
        return {}
    of_GB = torch.from_numpy(np.stack([*groups.values()])).to(values_B.device, non_blocking=True)
    # No product with 0 and 1: a value that is not finite would make all groups so.
    ratios = zip(torch.where(of_GB, values_B, 0).sum(1), of_GB.sum(1), strict=True)
    return {name: Ratio(*ratio) for name, ratio in zip(groups, ratios, strict=True)}


def added(parts: Sequence[Mapping[str, Ratio]]) -> dict[str, Ratio]:
    """Sums and numbers of each name; not all parts need have it."""
    names = dict.fromkeys(name for ratios in parts for name in ratios)
    columns = {name: zip(*(ratios[name] for ratios in parts if name in ratios), strict=True) for name in names}
    return {name: Ratio(*(torch.stack(column).sum(0) for column in pair)) for name, pair in columns.items()}


def over_all_ranks(values: Values) -> dict[str, Tensor]:
    """Each value such that its mean over the ranks is that of the whole step, gradients too. A collective."""
    ratios = {name: value for name, value in values.items() if isinstance(value, Ratio)}
    if not ratios:
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}
    numbers = torch.stack([ratio.number.detach().double() for ratio in ratios.values()])
    shares = rank_and_world()[1] / sum_over_ranks(numbers).clamp(min=1)
    share_of = dict(zip(ratios, shares, strict=True))
    return {
        name: value.total * share_of[name].to(value.total) if isinstance(value, Ratio) else value
        for name, value in values.items()
    }


@torch.no_grad()  # with micro-batches the numbers are leaves, though nothing goes back through them
def means_over_ranks(values: Values, device: torch.device) -> dict[str, Tensor]:
    """Of numbers of which each rank may have different ones. A collective, for which the host waits."""
    ratios = as_ratios(values, 1)
    names = sorted(set().union(*gathered([*ratios])))
    if not names:
        return {}
    zero = torch.zeros((), device=device)
    rows = torch.stack([torch.stack([*ratios.get(name, Ratio(zero, zero))]).double() for name in names])
    totals, numbers = sum_over_ranks(rows).unbind(1)
    return dict(zip(names, (totals / numbers).float(), strict=True))
