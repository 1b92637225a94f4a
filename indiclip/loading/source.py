"""A source: which dataset a task reads, how much of it in a step, and how its images are prepared."""

import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from torch import Tensor, nn

from indiclip.datasets.base import SampleDataset
from indiclip.datasets.subset import Subset
from indiclip.loading.clusters import ClusterDraws, Clusters, cluster_sizes
from indiclip.loading.mixing import Mix
from indiclip.loading.sampler import LARGEST_WINDOW, BatchSpec, SourceInfo
from indiclip.loading.stages import Stage, TokenBudget, check_stages, stage_ends
from indiclip.loading.teacher_cache import CachedViews, Captions
from indiclip.loading.teacher_options import TeacherCache
from indiclip.loading.transforms import Transform
from indiclip.loading.views import View, check_views
from indiclip.names import check_range
from indiclip.preprocessing import Preprocessing, count_tokens
from indiclip.types import Sample


@dataclass
class Source:
    """Where the examples of a task come from.

    A step has `batch_size` samples, or as many as `batch_tokens` hold: one of the two. With `batch_size` and several
    sources of a task, each of them gives its part of every step.

    Args:
        task: The task that reads them; heads name it too.
        dataset: Where the samples are.
        batch_size: Samples per step, over all ranks and all sources of the task.
        every: The task has a batch in each step whose number is a multiple of this, from 0 on, and none in the others,
            in which its heads rest as if they had not begun. Its batches are those that it would have step by step,
            none left out. Of all sources of the task alike; some other task needs a batch in each step. A head's
            `weight` stays what it is: nothing multiplies it by this. `train/<head>/...` is of the last batch.
        weight: Share among the sources of the same task.
        max_tokens: Most patches per image; larger images are scaled down, aspect kept.
        augment: torchvision v2 transforms for training, which move the annotations too, e.g.
            `torchvision.transforms.v2.RandomHorizontalFlip`.
        views: What is made of each image beside it, in training: see `View`.
        teachers: Embeddings of its images and captions that teachers gave, for distillation: see `TeacherCache`.
        samples: Only so many of the dataset's samples, the first; None is all.
        mix: Mixup and CutMix, in training: see `Mix`. Of all sources of the task, whose heads all have to know how to
            learn from two images in one. Views are not mixed.
        batch_tokens: Patches per step over all ranks, each image padded to the longest of its batch. The sources of
            the task then take turns, step by step.
        batch_multiple: With `batch_tokens`, the samples of a step are a multiple of this, and the number of ranks must
            divide it.
        window: Shards among which samples are shuffled; it bounds how many shards are read at a time.
        group_by_length: Make batches of images of similar length in tokens, so that less is padded. What a batch holds
            then goes with the images' sizes, and where classes do too (scans small and square, photos wide) a batch has
            one class and little is learned: counting on real photos was 2.5 times as wrong, for 1.6% fewer patches.
            Worth it where lengths differ much and sizes say nothing of the content. Without effect where lengths are
            not known beforehand: an augmentation that crops, a dataset without `sizes_hw`, a backbone of one size.
            With `batch_tokens`, all sizes are looked at when the run starts, a second for a million.
        drop: Share of an image's patches, drawn anew in each step, that training leaves out (FLIP, arXiv 2212.00794).
            They are not sent to the device either. `batch_tokens` counts those that stay.
        stages: What the first steps of the run have in place of `max_tokens`, `drop` and `batch_size`, e.g. smaller
            images: `{until: 0.9, max_tokens: 49}`. With `batch_tokens` their batches have more images. Rates of their
            own are `model.lr_schedule`'s, see `indiclip.optim.Staged`.
        clusters: Which samples an epoch has, by their clusters; None takes all, once.
        shard_groups: Groups that the shards are dealt to. Each step has samples of all groups, in equal parts, and the
            ranks take them in blocks, so that each of N nodes reads about 1/N of the shards, of remote ones copies that
            many; with 1, every node reads every shard. It belongs to the order of the samples, as the seed does, and is
            the same on any number of nodes: choose a multiple of the most nodes that the run may have. `window` is then
            of each group.
        name: Of a held-out source. Where a task has several of them, each is scored by itself, as
            `val/<head>/<name>/<metric>`; without a name, it is the source's place among them, from 0. The only one of
            its task is `val/<head>/<metric>`, whatever its name.
    """

    task: str
    dataset: SampleDataset
    batch_size: int | None = None
    weight: float = 1.0
    max_tokens: int = 256
    augment: list[nn.Module] | None = None
    views: list[View] = field(default_factory=list)
    teachers: TeacherCache | None = None
    samples: int | None = None
    mix: Mix | None = None
    batch_tokens: int | None = None
    batch_multiple: int = 8
    window: int = 16
    group_by_length: bool = False
    drop: float = 0.0
    stages: list[Stage] = field(default_factory=list)
    clusters: Clusters | None = None
    shard_groups: int = 1
    name: str = ""
    every: int = 1

    def __post_init__(self) -> None:
        self._check_options()
        self._check_combinations()
        self.whole_dataset = self.dataset
        if self.samples is not None and self.samples < len(self.dataset):
            self.dataset = Subset(self.dataset, np.arange(self.samples))
        self.required_fields: tuple[str, ...] = ()  # of its task's heads: a sample without one counts as unreadable
        self.keeps_objects = True  # False where none of them reads boxes and the like in training
        self.transform = Transform(self.max_tokens, self.augment, at_full_size=self.teachers is not None)
        self._cached: CachedViews | None = None
        self._draws: dict[int, ClusterDraws] = {}  # by seed; of 100 million samples they take ten seconds

    def _check_options(self) -> None:
        """Raise ValueError for one that is wrong by itself."""
        if not isinstance(self.dataset, SampleDataset):
            raise ValueError(
                f"data: dataset of task {self.task!r}: found {type(self.dataset).__name__}; expected a SampleDataset "
                "(indiclip.datasets.base)"
            )
        names = ("batch_size", "batch_tokens", "batch_multiple", "window", "max_tokens", "shard_groups", "every")
        check_range({f"data: {name} of task {self.task!r}": getattr(self, name) for name in (*names, "samples")}, 1)
        if (self.batch_size is None) == (self.batch_tokens is None):
            both = "; found both" if self.batch_size is not None else ""
            raise ValueError(f"data: task {self.task!r} needs one of batch_size and batch_tokens{both}")
        if not re.fullmatch(r"[\w.-]*", self.name):
            raise ValueError(f"data: name of task {self.task!r} is {self.name!r}; expected letters, digits, _, . and -")
        check_range({f"data: task {self.task!r}: drop": self.drop}, 0, 1, without=1)
        check_stages(self.stages, f"data: task {self.task!r}: stages")
        check_views(self.views, f"data: task {self.task!r}: views")
        if self.clusters is not None:
            self.clusters.check(f"data: task {self.task!r}: clusters")

    def _check_combinations(self) -> None:
        """Raise ValueError for options that do not go together."""
        own_batches = [i for i, stage in enumerate(self.stages) if stage.batch_size is not None]
        if own_batches and self.batch_tokens:
            raise ValueError(
                f"data: task {self.task!r}: stages[{own_batches[0]}].batch_size: found one beside batch_tokens, with "
                "which a stage's batch is as large as the budget holds; expected batch_size in place of batch_tokens"
            )
        if self.clusters is not None and self.group_by_length:
            raise ValueError(
                f"data: task {self.task!r}: clusters: they draw other samples in each epoch; leave out either them or "
                "group_by_length"
            )
        if self.shard_groups == 1:
            return
        if self.mix:
            raise ValueError(
                f"data: task {self.task!r}: shard_groups is {self.shard_groups}, and ranks take blocks of a batch; mix "
                "needs batches that are dealt to the ranks in turn, with shard_groups 1"
            )
        apart = {
            "clusters": self.clusters is not None,
            "stages with batch_tokens": self.stages and self.batch_tokens,
            "stages with a batch_size": own_batches,
        }
        if others := [name for name, found in apart.items() if found]:
            raise ValueError(
                f"data: task {self.task!r}: shard_groups is {self.shard_groups}; leave out either it or {others[0]}"
            )

    def open_teachers(self, key: str) -> CachedViews:
        """The cache of its teachers, which is opened and checked once.

        Args:
            key: Of the source in the YAML, for messages.
        """
        assert self.teachers is not None
        if self._cached is None:
            self._cached = CachedViews(self.teachers, self.dataset, self.transform, key)
        return self._cached

    def taught(
        self, index: int, sample: Sample, captions: Captions | None, random_seed: int | None
    ) -> tuple[Sample, int | None, Callable[[Tensor], None] | None]:
        """A training sample with what its teachers say of it, the seed of the augmentation that they saw, and what
        compares the augmented picture with theirs.

        Args:
            index: Of the sample.
            sample: With its caption.
            captions: All of them by language.
            random_seed: Of the sample in its step, which is given back where there are no teachers.
        """
        if self.teachers is None or random_seed is None:
            return sample, random_seed, None
        cached = self.open_teachers(f"data: a source of task {self.task!r}")
        key = self.dataset.key(index)
        view, image_seed = cached.draw(index, key, random_seed)
        taught = sample | cached.fields(index, view, sample, captions or {}, random_seed)
        return taught, image_seed, partial(cached.check_picture, index, key, view)

    @property
    def budgets(self) -> list[TokenBudget]:
        """Of an image in each of the stages, and in the rest of the run."""
        stages = [
            TokenBudget(stage.max_tokens or self.max_tokens, self.drop if stage.drop is None else stage.drop)
            for stage in self.stages
        ]
        return [*stages, TokenBudget(self.max_tokens, self.drop)]

    @property
    def changes(self) -> list[float]:
        """When the run does something else with its images, as shares of its steps (below 1) or steps."""
        return [*(stage.until for stage in self.stages), *(view.start for view in self.views if view.start)]

    def stage_ends(self, run_steps: int | None) -> list[int]:
        """The first step behind each stage, see `indiclip.loading.stages.stage_ends`."""
        return stage_ends(self.stages, run_steps, f"data: task {self.task!r}: stages")

    def change_steps(self, run_steps: int | None) -> list[int]:
        """As `changes`, as numbers of steps of a run.

        Raises:
            ValueError: One is beyond the run, or a share of one without an end.
        """
        return [*self.stage_ends(run_steps), *(view.start_step(run_steps) for view in self.views if view.start)]

    @property
    def changes_by_share(self) -> bool:
        """Whether it has to be known how long the run is."""
        return any(change < 1 for change in self.changes)

    @property
    def specs(self) -> list[tuple[float, BatchSpec]]:
        """How many samples make a batch of the task, and until when: see `Stage`."""
        ends = [*(stage.until for stage in self.stages), math.inf]
        if self.batch_size is not None:
            sizes = [*(stage.batch_size or self.batch_size for stage in self.stages), self.batch_size]
            if len({*sizes}) == 1:
                return [(math.inf, BatchSpec(self.batch_size))]
            return [(end, BatchSpec(size)) for end, size in zip(ends, sizes, strict=True)]
        return [
            (end, BatchSpec(self.batch_multiple, self.batch_tokens, budget.most_kept))
            for end, budget in zip(ends, self.budgets, strict=True)
        ]

    def info(self, preprocessing: Preprocessing, budget: TokenBudget, seed: int | None = None) -> SourceInfo:
        """What a plan has to know of the source.

        Args:
            seed: Of the run; None takes all samples once.
        """
        size, starts = len(self.dataset), self.dataset.starts
        patch_size, sizes_hw = preprocessing.patch_size, None
        max_tokens = preprocessing.canvas_tokens or budget.max_tokens
        if preprocessing.canvas_hw is None and self.transform.keeps_size:
            sizes_hw = self.dataset.sizes_hw
        if self.group_by_length:
            return SourceInfo(
                size, starts, TokenCounts(sizes_hw, patch_size, max_tokens, budget.drop), groups=self.shard_groups
            )
        if sizes_hw is not None and 0 < size <= LARGEST_WINDOW and np.all(sizes_hw):  # 0: an unreadable header
            max_tokens = min(max_tokens, int((-(-sizes_hw // patch_size)).prod(1).max()))
        draws = None if seed is None or not size else self.draws(seed)
        return SourceInfo(size, starts, longest=int(budget.kept(max_tokens)), draws=draws, groups=self.shard_groups)

    def draws(self, seed: int) -> ClusterDraws | None:
        """What of the clusters comes in an epoch; None without clusters.

        Raises:
            ValueError: The dataset has no clusters, or an epoch cannot be drawn from them.
        """
        if self.clusters is None:
            return None
        if seed not in self._draws:
            key = f"data: task {self.task!r}: clusters"
            numbers = self.clusters.read(self.dataset, key)
            shares = self.clusters.shares(cluster_sizes(numbers), key)
            self._draws = {seed: ClusterDraws(numbers, shares, (seed, zlib.crc32(self.task.encode())))}
        return self._draws[seed]


def settled(sources: Sequence[Source]) -> tuple[int, int]:
    """`(run_steps, step)` of a run, and of its last step, in which all stages are over and all views have begun."""
    changes = [change for source in sources for change in source.changes]
    step = max((int(change) + 2 for change in changes), default=0)
    return step + 1, step


def keyed(key: str, sources: list[Source]) -> dict[str, Source]:
    """Sources by their place in the config, such as `data.train[0]`."""
    return {f"{key}[{i}]": source for i, source in enumerate(sources)}


@dataclass
class TokenCounts:
    """Indices of samples -> how many tokens their images have, `max_tokens` where sizes are unknown; without `drop`."""

    sizes_hw: np.ndarray | None
    patch_size: int
    max_tokens: int
    drop: float = 0.0

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        return TokenBudget(self.max_tokens, self.drop).kept(self._before_drop(indices))

    def _before_drop(self, indices: np.ndarray) -> np.ndarray:
        if self.sizes_hw is None:
            return np.full(len(indices), self.max_tokens)
        codes = self.sizes_hw[indices].astype(np.int64) @ np.array([2**32, 1])
        distinct, of_sample = np.unique(codes, return_inverse=True)
        sizes = np.stack([distinct >> 32, distinct % 2**32], axis=1)
        counts = count_tokens(sizes, self.patch_size, self.max_tokens)
        counts[(sizes == 0).any(1)] = self.max_tokens  # an unreadable header may be any image's
        return np.asarray(counts[of_sample])
