"""Sources -> the loaders of a run. One element of the loader is one step: `{task: batch}`."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from indiclip.data.images import UnreadableSample
from indiclip.data.plan import Place, Plan
from indiclip.data.transforms import Prepared, Transform, collate
from indiclip.data.workers import StepLoader, Workers, reading
from indiclip.types import Batch, Quarantined

_REPLACEMENTS = 100  # tries for another sample in place of an unreadable one, before the source is called broken


@dataclass
class Source:
    """Where the examples of a task come from.

    Args:
        task: The task that reads them; heads name it too.
        dataset: A map-style dataset of `Sample`.
        batch_size: Samples per step, over all ranks and all sources of the task.
        weight: Share among the sources of the same task.
        max_tokens: Most patches per image; larger images are scaled down, aspect kept.
        augment: torchvision v2 transforms for training, which move the annotations too, e.g.
            `torchvision.transforms.v2.RandomHorizontalFlip`.
    """

    task: str
    # A bare class: jsonargparse silently builds a bare Dataset where it is subscripted.
    dataset: Dataset  # type: ignore[type-arg]
    batch_size: int
    weight: float = 1.0
    max_tokens: int = 256
    augment: list[nn.Module] | None = None

    def __post_init__(self) -> None:
        self.transform = Transform(self.max_tokens, self.augment)


class MultiTaskData(L.LightningDataModule):
    """The sources of a run.

    Args:
        train: Sources to train on.
        val: Held-out sources; each is gone through once.
        seed: Decides the order of the samples and their augmentation.
        num_workers: Loader processes.
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
        patch_size: int = 16,
        canvas_hw: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.train, self.val = train, list(val or [])
        self.seed, self.num_workers = seed, num_workers
        self.steps_per_epoch = steps_per_epoch
        self.patch_size, self.canvas_hw = patch_size, canvas_hw

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
        smallest = min((source.batch_size for source in self.val), default=1)
        return [steps[i] for i in range(-(-num_samples // smallest) if self.val else 0)]

    def _loader(self, steps: Steps, sampler: Any) -> DataLoader[dict[str, Batch]]:
        return StepLoader(
            steps,
            batch_size=None,  # a step is already a batch
            sampler=sampler,
            num_workers=self.num_workers,
            worker_init_fn=Workers("train" if steps.train else "val", self.num_workers) if self.num_workers else None,
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
        self._quarantined: list[Quarantined] = []  # not yet handed over

    def _plan(self, task: str, group: list[Source]) -> Plan:
        batch_size = group[0].batch_size
        if any(source.batch_size != batch_size for source in group):
            raise ValueError(f"data: the sources of task {task!r} have different batch_size; they share one batch")
        if self.train and batch_size % self.world_size:
            raise ValueError(
                f"data: batch_size {batch_size} of task {task!r} is over all ranks and must be a multiple of the "
                f"{self.world_size} ranks"
            )
        sizes = [len(source.dataset) for source in group]  # type: ignore[arg-type]
        return Plan(task, sizes, [source.weight for source in group], batch_size, self.seed, shuffle=self.train)

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
        places = plan.batch(step) if self.train else plan.pass_through(step)
        samples: list[Prepared] = []
        for place in places[self.rank :: self.world_size]:
            sample = self.read(task, place)
            if sample is not None:
                samples.append(sample)
        return collate(samples) if samples else None

    def read(self, task: str, place: Place) -> Prepared | None:
        """One prepared sample; in training the next readable one stands in for an unreadable one.

        Raises:
            ValueError: Many in a row are unreadable.
        """
        source = self.sources[task][place.source]
        size = self.plans[task].sizes[place.source]
        attempts = min(_REPLACEMENTS, size) if self.train else 1
        for attempt in range(attempts):
            try:
                index = (place.index + attempt) % size
                random_seed = zlib.crc32(repr((self.seed, task, place)).encode()) if self.train else None
                with reading(task, source.dataset, index):
                    return source.transform(source.dataset[index], self.patch_size, self.canvas_hw, random_seed)
            except UnreadableSample as error:
                self._quarantined.append(Quarantined(task, error.key, error.file, error.reason))
        if self.train:
            last = self._quarantined[-1]
            raise ValueError(
                f"data: {attempts} samples in a row of task {task!r} are unreadable, the last one {last.key}: "
                f"{last.reason}"
            )
        return None
