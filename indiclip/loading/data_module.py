"""Sources -> the loaders of a run. One element of the loader is one step: `{task: batch}`."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Sampler, SequentialSampler

from indiclip.datasets.inventory import Inventory
from indiclip.lightning_internals import batches_done, run_steps
from indiclip.loading.overrides import SourceOverride, overridden
from indiclip.loading.source import Source, keyed
from indiclip.loading.steps import Steps
from indiclip.loading.workers import StepLoader, Workers
from indiclip.names import check_range
from indiclip.preprocessing import Interpolation, Preprocessing
from indiclip.types import Step

_ALWAYS_ALLOWED = 10  # unreadable samples of a task, however small its sources


class MultiTaskData(L.LightningDataModule):
    """The sources of a run.

    Args:
        train: Sources to train on.
        val: Held-out sources; each is gone through once.
        seed: Decides the order of the samples and their augmentation.
        num_workers: Loader processes.
        quarantine: Share of a task's training samples that may be unreadable before the run stops; ten always may.
        steps_per_epoch: Steps between validations; None goes once through the source that takes longest.
        overrides: Changes to the training sources of a task, by which one config is stacked on another, e.g.
            `[{task: contrastive, drop: 0.5}]`; a further config appends its own to `overrides+`. Two that want an
            option of a task differently are refused.
        patch_size: Linked to the backbone's by the command.
        canvas_hw: Linked to the backbone's by the command.
        interpolation: Linked to the backbone's by the command.
        encode: The tokenizer's, linked to the text tower's by the command: captions are tokenised in the workers.
    """

    def __init__(
        self,
        train: list[Source],
        val: list[Source] | None = None,
        seed: int = 0,
        num_workers: int = 0,
        steps_per_epoch: int | None = None,
        quarantine: float = 0.01,
        overrides: list[SourceOverride] | None = None,
        patch_size: int = 16,
        canvas_hw: tuple[int, int] | None = None,
        interpolation: Interpolation = "bilinear",
        encode: Callable[[list[str]], list[list[int]]] | None = None,
    ) -> None:
        super().__init__()
        check_range({"data.quarantine": quarantine}, 0, 1)
        check_range({"data.num_workers": num_workers, "seed_everything (data.seed)": seed})
        check_range({"data.steps_per_epoch": steps_per_epoch}, 1)
        self.quarantine = quarantine
        self.train, self.val = overridden(train, overrides or []), list(val or [])
        self.seed, self.num_workers = seed, num_workers
        self.steps_per_epoch = steps_per_epoch
        self.preprocessing, self.encode = Preprocessing(patch_size, canvas_hw, interpolation), encode

    @property
    def train_sizes(self) -> Counter[str]:
        """Task -> samples to train on."""
        sizes: Counter[str] = Counter()
        for source in self.train:
            sizes[source.task] += len(source.dataset)
        return sizes

    @property
    def quarantine_limits(self) -> dict[str, int]:
        """Task -> distinct unreadable samples after which the run stops."""
        return {
            task: max(_ALWAYS_ALLOWED, math.ceil(self.quarantine * size)) for task, size in self.train_sizes.items()
        }

    def inventories(self) -> dict[str, Inventory]:
        """YAML key of each source, such as `data.train[0]` -> what the files of its dataset hold."""
        sources = keyed("data.train", self.train) | keyed("data.val", self.val)
        return {key: source.dataset.inventory for key, source in sources.items()}

    def steps(self, sources: list[Source], train: bool) -> Steps:
        """The steps of this rank."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return Steps(sources, self.seed, self.preprocessing, train, rank, world, encode=self.encode if train else None)

    def state_dict(self) -> dict[str, Any]:
        """Of which teachers' embeddings the run learns; the position is the step's number."""
        sources = keyed("data.train", self.train).items()
        digests = {key: source.open_teachers(key).digest for key, source in sources if source.teachers is not None}
        return {"teachers": digests} if digests else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare; a run that went on with other embeddings would not be the one that was begun."""
        own = self.state_dict().get("teachers", {})
        for key, digest in state_dict.get("teachers", {}).items():
            if key in own and own[key] != digest:
                raise ValueError(
                    f"{key}.teachers.folder: holds the cache {own[key]}; the run was begun with the cache {digest}"
                )

    def setup(self, stage: str) -> None:
        """Tell Lightning that nothing is held out; it would wait for the end of a validation that never begins."""
        if not self.val and self.trainer is not None:
            self.trainer.limit_val_batches = 0

    def train_dataloader(self) -> DataLoader[Step]:
        """Steps from where the run stands to the end of the epoch."""
        steps = self.steps(self.train, train=True)
        length = self.steps_per_epoch or len(steps)
        if self.trainer:
            steps.begin(run_steps(self.trainer, length))
        if self.trainer and self.trainer.overfit_batches:  # type: ignore[attr-defined]  # the same steps in each epoch
            return self._loader(steps, SequentialSampler(range(length)))
        return self._loader(steps, StepSampler(length, self.trainer))

    def val_dataloader(self) -> DataLoader[Step] | list[Any]:
        """Every held-out sample once."""
        if not self.val:
            return []
        steps = self.steps(self.val, train=False)
        return self._loader(steps, SequentialSampler(steps))  # Lightning replaces anything else under `overfit_batches`

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def first_val_batches(self, num_samples: int) -> list[Step]:
        """Held-out steps with the first `num_samples` of every source, read in this process (for pictures)."""
        steps = Steps(self.val, self.seed, self.preprocessing, train=False)
        smallest = min((sum(plan.counts) for plan in steps.plans.values()), default=1)
        return [steps[i] for i in range(-(-num_samples // smallest) if self.val else 0)]

    def _loader(self, steps: Steps, sampler: Any) -> DataLoader[Step]:
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
        done = batches_done(self.trainer) if self.trainer else 0
        return iter(range(done, done + self.length))  # Lightning leaves a resumed epoch at its end
