"""Sources -> the loaders of a run. One element of the loader is one step: `{task: batch}`."""

from __future__ import annotations

import math
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from indiclip.data.images import UnreadableSample
from indiclip.data.plan import Budget, Place, Plan, Samples
from indiclip.data.prefetch import Prefetch
from indiclip.data.transforms import Prepared, Transform, collate
from indiclip.patches import count_tokens
from indiclip.types import Batch, Quarantined

_ALWAYS_ALLOWED = 10  # unreadable samples of a task, however small its sources
_REPLACEMENTS = 100  # tries for another sample in place of an unreadable one, before the source is called broken


@dataclass
class Source:
    """Where the examples of a task come from.

    A step has `batch_size` samples, or as many as `batch_tokens` hold: one of the two.

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

    def __post_init__(self) -> None:
        for name in ("batch_size", "batch_tokens", "batch_multiple", "window", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data: {name} of task {self.task!r} is {value}; expected 1 or more")
        if (self.batch_size is None) == (self.batch_tokens is None):
            raise ValueError(f"data: task {self.task!r} needs one of batch_size and batch_tokens")
        self.transform = Transform(self.max_tokens, self.augment)

    @property
    def budget(self) -> Budget:
        """How many samples make a batch of the task."""
        if self.batch_size is not None:
            return Budget(self.batch_size)
        return Budget(self.batch_multiple, self.batch_tokens, self.max_tokens)

    def samples(self, patch_size: int, canvas_hw: tuple[int, int] | None) -> Samples:
        """What a plan has to know of the source."""
        sizes = getattr(self.dataset, "sizes_hw", None)
        lengths = None
        if sizes is not None and canvas_hw is None and self.transform.keeps_size:
            lengths = TokenCounts(sizes, patch_size, self.max_tokens)
        return Samples(len(self.dataset), getattr(self.dataset, "starts", None), lengths)  # type: ignore[arg-type]


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


class MultiTaskData(L.LightningDataModule):
    """The sources of a run.

    Args:
        train: Sources to train on.
        val: Held-out sources; each is gone through once.
        seed: Decides the order of the samples and their augmentation.
        num_workers: Loader processes.
        quarantine: Share of a task's training samples that may be unreadable before the run stops; ten always may.
        steps_per_epoch: Steps between validations; None goes once through the source that takes longest.
        patch_size: Linked to the backbone's by the command.
        canvas_hw: Linked to the backbone's by the command.
    """

    def __init__(
        self,
        train: list[Source],
        val: list[Source] | None = None,
        seed: int = 0,
        num_workers: int = 0,
        steps_per_epoch: int | None = None,
        quarantine: float = 0.01,
        patch_size: int = 16,
        canvas_hw: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= quarantine <= 1:
            raise ValueError(f"data.quarantine: found {quarantine}; expected a share, 0 to 1")
        self.quarantine = quarantine
        self.train, self.val = train, list(val or [])
        self.seed, self.num_workers = seed, num_workers
        self.steps_per_epoch = steps_per_epoch
        self.patch_size, self.canvas_hw = patch_size, canvas_hw

    @property
    def quarantine_limits(self) -> dict[str, int]:
        """Task -> distinct unreadable samples after which the run stops."""
        sizes: Counter[str] = Counter()
        for source in self.train:
            sizes[source.task] += len(source.dataset)  # type: ignore[arg-type]
        return {task: max(_ALWAYS_ALLOWED, math.ceil(self.quarantine * size)) for task, size in sizes.items()}

    def steps(self, sources: list[Source], train: bool) -> Steps:
        """The steps of this rank."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return Steps(sources, self.seed, self.patch_size, self.canvas_hw, train, rank, world)

    def train_dataloader(self) -> DataLoader[dict[str, Batch]]:
        """Steps from where the run stands to the end of the epoch."""
        steps = self.steps(self.train, train=True)
        length = self.steps_per_epoch or max(plan.steps_per_epoch for plan in steps.plans.values())
        return self._loader(steps, StepSampler(length, self.trainer))

    def val_dataloader(self) -> DataLoader[dict[str, Batch]] | list[Any]:
        """Every held-out sample once."""
        if not self.val:
            return []
        steps = self.steps(self.val, train=False)
        return self._loader(steps, range(max(plan.steps_per_epoch for plan in steps.plans.values())))

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def first_val_batches(self, num_samples: int) -> list[dict[str, Batch]]:
        """Held-out steps with the first `num_samples` of every source, read in this process (for pictures)."""
        steps = Steps(self.val, self.seed, self.patch_size, self.canvas_hw, train=False)
        smallest = min((sum(plan.counts) for plan in steps.plans.values()), default=1)
        return [steps[i] for i in range(-(-num_samples // smallest) if self.val else 0)]

    def _loader(self, steps: Steps, sampler: Any) -> DataLoader[dict[str, Batch]]:
        return DataLoader(
            steps,
            batch_size=None,  # a step is already a batch
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=False,  # the sampler reads the position anew each epoch
        )


class StepSampler(Sampler[int]):
    """The numbers of the steps still to do in this epoch.

    The position is Lightning's own count of finished batches, asked for when the iteration starts: exact in
    mid-epoch, and independent of workers and ranks.
    """

    def __init__(self, length: int, trainer: L.Trainer | None) -> None:
        self.length, self.trainer = length, trainer

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed if self.trainer else 0  # type: ignore[attr-defined]
        return iter(range(done, done + self.length))  # Lightning leaves a resumed epoch at its end


class Steps(Dataset[dict[str, Batch]]):
    """Map-style: step number -> this rank's part of `{task: batch}`."""

    def __init__(
        self,
        sources: list[Source],
        seed: int,
        patch_size: int,
        canvas_hw: tuple[int, int] | None,
        train: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.seed, self.patch_size, self.canvas_hw = seed, patch_size, canvas_hw
        self.train, self.rank, self.world_size = train, rank, world_size
        self.sources: dict[str, list[Source]] = {}
        for source in sources:
            self.sources.setdefault(source.task, []).append(source)
        self.plans = {task: self._plan(task, group) for task, group in self.sources.items()}
        self._prefetch = Prefetch()
        # Not yet handed over. Each worker has what the shards lack; who counts it counts it once.
        self._quarantined = [
            lost._replace(task=source.task)
            for source in sources
            for lost in getattr(source.dataset, "damaged", [])
            if rank == 0
        ]

    def _plan(self, task: str, group: list[Source]) -> Plan:
        budget = group[0].budget
        if any(source.budget != budget for source in group):
            raise ValueError(
                f"data: the sources of task {task!r} differ in batch_size, batch_tokens, batch_multiple or max_tokens; "
                "they share their batches"
            )
        if self.train and budget.samples % self.world_size:
            name = "batch_size" if budget.tokens is None else "batch_multiple"
            raise ValueError(
                f"data: {name} {budget.samples} of task {task!r} is over all ranks and must be a multiple of the "
                f"{self.world_size} ranks"
            )
        samples = [source.samples(self.patch_size, self.canvas_hw) for source in group]
        weights, window = [source.weight for source in group], max(source.window for source in group)
        return Plan(task, samples, weights, budget, self.seed, self.train, window)

    def __getitem__(self, step: int) -> dict[str, Batch]:
        batches = {task: self._batch(task, step) for task in self.plans}
        found = {task: batch for task, batch in batches.items() if batch is not None}
        if self._quarantined and not found:
            warnings.warn(f"data: nothing in held-out step {step} is readable: {self._quarantined}", stacklevel=2)
        for batch in found.values():
            # All with the first batch, so that each is counted once; where there is none, with the next step's.
            batch["quarantined"], self._quarantined = self._quarantined, []
        return found

    def _batch(self, task: str, step: int) -> Batch | None:
        plan = self.plans[task]
        info = get_worker_info()
        worker = self.rank + (info.id if info else 0)
        places = plan.batch(step) if self.train else plan.pass_through(step)
        for number, shards in plan.next_shards(step) if self.train else []:
            self._prefetch(task, number, self.sources[task][number].dataset, shards, worker)
        budget = self.sources[task][0].budget
        # Whatever an augmentation makes of the images, the batch stays within the tokens.
        max_tokens = budget.tokens // max(len(places), 1) if budget.tokens else None
        samples: list[Prepared] = []
        for place in places[self.rank :: self.world_size]:
            sample = self.read(task, place, max_tokens)
            if sample is not None:
                samples.append(sample)
        return collate(samples) if samples else None

    def read(self, task: str, place: Place, max_tokens: int | None = None) -> Prepared | None:
        """One prepared sample; in training the next readable one stands in for an unreadable one.

        Args:
            max_tokens: A smaller budget than the source's own.

        Raises:
            ValueError: Many in a row are unreadable.
        """
        source = self.sources[task][place.source]
        size = self.plans[task].sizes[place.source]
        attempts = min(_REPLACEMENTS, size) if self.train else 1
        for attempt in range(attempts):
            try:
                sample = source.dataset[(place.index + attempt) % size]
                random_seed = zlib.crc32(repr((self.seed, task, place)).encode()) if self.train else None
                return source.transform(sample, self.patch_size, self.canvas_hw, random_seed, max_tokens)
            except UnreadableSample as error:
                self._quarantined.append(Quarantined(task, error.key, error.file, error.reason))
        if self.train:
            last = self._quarantined[-1]
            raise ValueError(
                f"data: {attempts} samples in a row of task {task!r} are unreadable, the last one {last.key}: "
                f"{last.reason}"
            )
        return None
