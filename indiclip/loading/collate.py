"""Prepared samples -> a `Batch`: every field packed as its kind in `indiclip.types.Sample` says."""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from indiclip.patches import stack
from indiclip.types import FIELDS, Batch, Rows

Prepared = dict[str, Any]


def collate(samples: list[Prepared]) -> Batch:
    """Prepared samples -> `Batch`: patches padded to the longest, targets packed."""
    batch = Batch(images=stack(samples), targets=pack(samples), keys=[sample["key"] for sample in samples])
    if views := samples[0].get("views"):
        batch["views"] = {name: stack([view for sample in samples for view in sample["views"][name]]) for name in views}
    return batch


def pack(samples: list[Prepared]) -> dict[str, Any]:
    """The targets of a batch, see `Field`."""
    names = dict.fromkeys(name for sample in samples for name in sample if name in FIELDS and name != "key")
    targets: dict[str, Any] = {}
    # Those that others belong to or point to come first.
    for name in sorted(names, key=lambda name: (FIELDS[name].of != "", FIELDS[name].into != "")):
        values, field = [sample.get(name) for sample in samples], FIELDS[name]
        if field.kind == "text":
            targets[name] = values
        elif field.kind == "scalar":
            targets[name] = torch.tensor([-1 if value is None else int(value) for value in values])
        else:
            targets[name] = _rows(values, targets.get(field.of))
            if field.into:
                first_B = torch.tensor([0, *accumulate(targets[field.into].counts[:-1])])
                targets[name].values += first_B[targets[name].image_R]
    return targets


def _rows(values: list[Tensor | None], owner: Rows | None) -> Rows:
    """One field of all images; its rows are those of `owner`, where it has one."""
    known = [value is not None for value in values]
    if owner is None:
        counts = [0 if value is None else len(value) for value in values]
        image_R = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        owner = Rows(image_R, image_R, counts, known)
    present = [value for value in values if value is not None]
    shape = [max(sides) for sides in zip(*(value.shape[1:] for value in present), strict=True)]
    if all(known) and all(list(value.shape[1:]) == shape for value in present):
        packed = torch.cat(present)
    else:
        packed = present[0].new_zeros(len(owner.image_R), *shape)
        for value, part in zip(values, torch.split(packed, owner.counts), strict=True):
            if value is not None:
                part[(slice(None), *map(slice, value.shape[1:]))] = value
    return Rows(packed, owner.image_R, owner.counts, known)
