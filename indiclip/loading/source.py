"""A source: which dataset a task reads, how much of it in a step, and how its images are prepared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from indiclip.loading.plan import BatchSpec, SourceInfo
from indiclip.loading.transforms import Transform
from indiclip.patches import count_tokens


@dataclass
class Source:
    """Where the examples of a task come from.

    A step has `batch_size` samples, or as many as `batch_tokens` hold: one of the two. Images of similar length come
    together, so that little is padded. With `batch_size` and several sources of a task, each of them gives its part of
    every step, and only within the parts are the lengths similar: sources of different lengths need `batch_tokens`.

    Args:
        task: The task that reads them; heads name it too.
        dataset: A map-style dataset of `Sample`.
        batch_size: Samples per step, over all ranks and all sources of the task.
        weight: Share among the sources of the same task.
        max_tokens: Most patches per image; larger images are scaled down, aspect kept.
        augment: torchvision v2 transforms for training, which move the annotations too, e.g.
            `torchvision.transforms.v2.RandomHorizontalFlip`.
        batch_tokens: Patches per step over all ranks, each image padded to the longest of its batch. The sources of
            the task then take turns, step by step.
        batch_multiple: With `batch_tokens`, the samples of a step are a multiple of this, and the number of ranks must
            divide it.
        window: Shards among which samples are shuffled; it bounds how many shards are read at a time.
    """

    task: str
    # A bare class: jsonargparse silently builds a bare Dataset where it is subscripted.
    dataset: Dataset  # type: ignore[type-arg]
    batch_size: int | None = None
    weight: float = 1.0
    max_tokens: int = 256
    augment: list[nn.Module] | None = None
    batch_tokens: int | None = None
    batch_multiple: int = 8
    window: int = 16
    group_by_length: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "batch_tokens", "batch_multiple", "window", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data: {name} of task {self.task!r} is {value}; expected 1 or more")
        if (self.batch_size is None) == (self.batch_tokens is None):
            both = "; found both" if self.batch_size is not None else ""
            raise ValueError(f"data: task {self.task!r} needs one of batch_size and batch_tokens{both}")
        self.transform = Transform(self.max_tokens, self.augment)

    @property
    def budget(self) -> BatchSpec:
        """How many samples make a batch of the task."""
        if self.batch_size is not None:
            return BatchSpec(self.batch_size)
        return BatchSpec(self.batch_multiple, self.batch_tokens, self.max_tokens)

    def samples(self, patch_size: int, canvas_hw: tuple[int, int] | None) -> SourceInfo:
        """What a plan has to know of the source."""
        sizes = getattr(self.dataset, "sizes_hw", None)
        lengths = None
        if self.group_by_length and sizes is not None and canvas_hw is None and self.transform.keeps_size:
            lengths = TokenCounts(sizes, patch_size, self.max_tokens)
        return SourceInfo(len(self.dataset), getattr(self.dataset, "starts", None), lengths)  # type: ignore[arg-type]


@dataclass
class TokenCounts:
    """Indices of samples -> how many tokens their images have."""

    sizes_hw: np.ndarray
    patch_size: int
    max_tokens: int

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        codes = self.sizes_hw[indices].astype(np.int64) @ np.array([2**32, 1])
        distinct, of_sample = np.unique(codes, return_inverse=True)
        sizes = np.stack([distinct >> 32, distinct % 2**32], axis=1)
        counts = count_tokens(sizes, self.patch_size, self.max_tokens)
        counts[(sizes == 0).any(1)] = self.max_tokens  # an unreadable header may be any image's
        return np.asarray(counts[of_sample])
