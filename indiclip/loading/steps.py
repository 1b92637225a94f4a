"""Step number -> this rank's samples of every task, read and prepared."""

import threading
import warnings
import zlib
from bisect import bisect_right
from collections.abc import Callable
from itertools import chain

from torch.utils.data import Dataset, get_worker_info

from indiclip.datasets.base import SampleDataset
from indiclip.datasets.languages import draw_caption
from indiclip.images import UnreadableSample
from indiclip.loading.collate import Prepared, collate
from indiclip.loading.geometry import without_objects
from indiclip.loading.mixing import mix_pairs
from indiclip.loading.plan import Plan, SampleRef
from indiclip.loading.sampler import BatchSpec
from indiclip.loading.source import Source
from indiclip.loading.source_groups import check_divides, check_shards, check_shared, origin_of, source_keys
from indiclip.loading.stages import TokenBudget
from indiclip.loading.views import make_views
from indiclip.loading.workers import reading
from indiclip.patches import drop_patches
from indiclip.preprocessing import Preprocessing
from indiclip.quiet import OfThisProcess
from indiclip.types import FIELDS, Batch, Quarantined, Sample, Step, Texts

_REPLACEMENTS = 100  # tries for another sample in place of an unreadable one, before the source is called broken


class Steps(Dataset[Step]):
    """Map-style: step number -> this rank's part of `{task: batch}`.

    Args:
        sources: Of all tasks.
        seed: Of the run.
        preprocessing: The backbone's.
        train: Or held out.
        rank: This process's.
        world_size: Of how many.
        run_steps: Steps of the whole run, of which stages are a share; `begin` may say it later.
        encode: The tokenizer's, by which captions are tokenised here; None leaves that to who reads them.
    """

    def __init__(
        self,
        sources: list[Source],
        seed: int,
        preprocessing: Preprocessing,
        train: bool,
        rank: int = 0,
        world_size: int = 1,
        run_steps: int | None = None,
        encode: Callable[[list[str]], list[list[int]]] | None = None,
    ) -> None:
        self.seed, self.preprocessing, self.encode = seed, preprocessing, encode
        self.train, self.rank, self.world_size = train, rank, world_size
        # In training the sources of a task share their batches; held-out ones are scored each by itself.
        self.sources: dict[str, list[Source]] = {}
        for key, source in zip(source_keys(sources, train), sources, strict=True):
            self.sources.setdefault(key, []).append(source)
        self.origins = {key: origin_of(key, group) for key, group in self.sources.items()}
        self._stages = {key: self._plans_of(group) for key, group in self.sources.items()}
        self.plans = {key: plans[0] for key, plans in self._stages.items()}
        self._ends: dict[str, list[list[int]]] | None = None  # of the stages of each source
        self._run_steps: int | None = None
        if run_steps is not None or not train or not any(source.changes_by_share for source in sources):
            self.begin(run_steps)
        self._fetched: dict[tuple[str, int], list[int]] = {}  # shards that were asked for last
        # Not yet handed over. Each worker has what the shards lack; who counts it counts it once.
        self._quarantined = [
            lost._replace(task=source.task) for source in sources for lost in source.dataset.damaged if rank == 0
        ]

    def begin(self, run_steps: int | None) -> None:
        """Say how many steps the run has, and with that where its stages end and its views begin.

        Raises:
            ValueError: One does so beyond the run, or is a share of one without an end.
        """
        self._run_steps = run_steps
        for source in chain(*self.sources.values()) if self.train else ():
            source.change_steps(run_steps)  # says what cannot be
        self._ends = {
            key: [source.stage_ends(run_steps) if self.train else [] for source in group]
            for key, group in self.sources.items()
        }
        for key, plans in self._stages.items():
            starts = [0, *(self.batches_before(key, end) for end in self._ends[key][0])]
            for number in range(1, len(plans)):
                plans[number - 1].then(starts[number] - starts[number - 1], plans[number])

    def _plans_of(self, group: list[Source]) -> list[Plan]:
        """One for each stage, or one for all whose batches stay the same."""
        specs = [source.specs if self.train else source.specs[-1:] for source in group]
        if self.train:
            check_shared(group)
        return [self._plan(group, number, spec) for number, (_, spec) in enumerate(specs[0])]

    def _plan(self, group: list[Source], stage: int, spec: BatchSpec) -> Plan:
        task = group[0].task
        if self.train:
            check_divides(group[0], spec, self.world_size)
        if canvas := self.preprocessing.canvas_tokens:  # the backbone's one size, whatever max_tokens says
            spec = spec._replace(max_tokens=canvas, option="canvas_hw")
        seed = self.seed if self.train else None
        infos = [source.info(self.preprocessing, self._budgets(source)[stage], seed) for source in group]
        if self.train:
            check_shards(task, infos, self.world_size)
        weights, window = [source.weight for source in group], max(source.window for source in group)
        return Plan(task, infos, weights, spec, self.seed, self.train, window)

    def __len__(self) -> int:
        """Steps until the source that takes longest has been gone through."""
        return max(plan.steps_per_epoch * self._every(task) for task, plan in self.plans.items())

    def batches_before(self, task: str, step: int) -> int:
        """How many batches a task has in the steps before this one: the number, in its plan, of the next."""
        return -(-step // self._every(task))

    def _every(self, task: str) -> int:
        return self.sources[task][0].every if self.train else 1

    def __getitem__(self, step: int) -> Step:
        batches = Step()
        batches.idle_tasks = frozenset(task for task in self.plans if step % self._every(task))
        for task in self.plans:
            if task in batches.idle_tasks:
                continue
            batch = self._batch(task, step)
            if batch["keys"] or batch["quarantined"]:
                batches[task] = batch
        return batches

    def _batch(self, task: str, step: int) -> Batch:
        plan, number = self.plans[task], self.batches_before(task, step)
        for source, shards in plan.next_shards(number, self.rank, self.world_size) if self.train else []:
            self._prefetch(task, source, shards)
        read = (self.read(task, ref, step) for ref in plan.batch(number, self.rank, self.world_size))
        samples = [sample for sample in read if sample is not None]
        if self.train and (mix := self.sources[task][0].mix):
            samples = mix_pairs(samples, mix)
        batch = collate(samples) if samples else Batch(keys=[])
        if self.encode is not None:
            for name, texts in batch.get("targets", {}).items():
                if FIELDS[name].embedded and None not in texts:
                    batch["targets"][name] = Texts(texts, _encoded(texts, self.encode))
        batch["origin"], batch["quarantined"] = self.origins[task], self.unreadable()
        return batch

    def _prefetch(self, task: str, source: int, shards: list[int]) -> None:
        """Begin to fetch the shards of the next window, in a thread, unless it was asked for before.

        Each worker begins at another shard; the cache's locks keep two from fetching the same.
        """
        if not shards or self._fetched.get((task, source)) == shards:
            return
        self._fetched[task, source] = shards
        info = get_worker_info()
        first = (self.rank + (info.id if info else 0)) % len(shards)
        arguments = (self.sources[task][source].dataset, shards[first:] + shards[:first])
        threading.Thread(target=_fetch, args=arguments, name="prefetch", daemon=True).start()

    def read(self, task: str, ref: SampleRef, step: int = 0) -> Prepared | None:
        """One prepared sample; in training the next readable one stands in for an unreadable one.

        Args:
            step: Decides the stage.

        Raises:
            ValueError: Many in a row are unreadable.
        """
        source, budget = self.sources[task][ref.source], self._budget(task, ref.source, step)
        size = self.plans[task].sizes[ref.source]
        attempts = min(_REPLACEMENTS, size) if self.train else 1
        # Of the augmentation. The text is the one that runs of every version have hashed.
        place = f"Place(source={ref.source}, index={ref.index}, position={ref.position})"
        random_seed = zlib.crc32(f"({self.seed}, {task!r}, {place})".encode()) if self.train else None
        for attempt in range(attempts):
            try:
                index = (ref.index + attempt) % size
                with reading(source.task, source.dataset, index) as key:
                    whole = Sample(key=key) | source.dataset[index]
                    sample = self._draw_caption(task, ref, whole)
                    sample, image_seed, check = source.taught(index, sample, whole.get("captions"), random_seed)
                    if missing := [name for name in source.required_fields if name not in sample]:
                        raise UnreadableSample(sample["key"], f"has no {missing[0]}, which its task's heads need")
                    if self.train and not source.keeps_objects:
                        sample = without_objects(sample)
                    prepared = source.transform(sample, self.preprocessing, image_seed, budget.max_tokens, check)
                    if random_seed is None:
                        return prepared
                    views = make_views(source.views, sample, self.preprocessing, random_seed, step, self._run_steps)
                    return _in_training(prepared, budget, random_seed) | {"views": views}
            except UnreadableSample as error:
                self._quarantined.append(Quarantined(source.task, error.key, error.file, error.reason))
        if self.train:
            last = self._quarantined[-1]
            raise ValueError(
                f"data: {attempts} samples in a row of task {task!r} are unreadable, the last one {last.key}: "
                f"{last.reason}"
            )
        return None

    def _budget(self, task: str, number: int, step: int) -> TokenBudget:
        """What an image of a source is given in a step."""
        if self._ends is None:
            self.begin(None)  # says what is missing
        assert self._ends is not None
        stage = bisect_right(self._ends[task][number], step)
        return self._budgets(self.sources[task][number])[stage]

    def _budgets(self, source: Source) -> list[TokenBudget]:
        return source.budgets if self.train else [TokenBudget(source.max_tokens)]

    def _draw_caption(self, task: str, ref: SampleRef, sample: Sample) -> Sample:
        """The sample with the caption of one language; a held-out one keeps the others, to be scored in all."""
        if not self.train:
            return draw_caption(sample, sample["key"])
        stream = f"{self.seed}:{task}:{ref.source}:{ref.index}"
        epoch = ref.position // self.plans[task].epoch_sizes[ref.source]
        drawn: Sample = {**draw_caption(sample, stream, epoch)}
        drawn.pop("captions", None)
        return drawn

    def unreadable(self) -> list[Quarantined]:
        """The unreadable samples since the last call, so that each is counted once."""
        found, self._quarantined = self._quarantined, []
        return found


def _encoded(texts: list[str], encode: Callable[[list[str]], list[list[int]]]) -> list[list[int]]:
    distinct = list(dict.fromkeys(texts))
    token_ids = dict(zip(distinct, encode(distinct), strict=True))
    return [token_ids[text] for text in texts]


def _in_training(prepared: Prepared, budget: TokenBudget, random_seed: int) -> Prepared:
    """A sample with its seed, and with those of its patches that are kept."""
    if budget.drop:
        patches = prepared["patches"]
        # Its own stream: the augmentation has drawn from that of the seed.
        seed = zlib.crc32(f"drop:{random_seed}".encode())
        prepared = prepared | {"patches": drop_patches(patches, int(budget.kept(len(patches[0]))), seed)}
    return prepared | {"random_seed": random_seed}


def _fetch(dataset: SampleDataset, shards: list[int]) -> None:
    try:
        dataset.prefetch(shards)
    except (OSError, ValueError) as error:  # who reads the shard meets it again; until then there is time to mend it
        warnings.warn(f"data: {error}", OfThisProcess, stacklevel=1)
