"""Step number -> this rank's samples of every task, read and prepared."""

import threading
import warnings
import zlib

from torch.utils.data import Dataset, get_worker_info

from indiclip.datasets.base import SampleDataset
from indiclip.datasets.languages import draw_caption
from indiclip.images import UnreadableSample
from indiclip.loading.collate import Prepared, collate
from indiclip.loading.plan import Plan, SampleRef
from indiclip.loading.sampler import SourceInfo
from indiclip.loading.source import Source
from indiclip.loading.workers import reading
from indiclip.preprocessing import Preprocessing
from indiclip.types import Batch, Origin, Quarantined, Sample

_REPLACEMENTS = 100  # tries for another sample in place of an unreadable one, before the source is called broken


class Steps(Dataset[dict[str, Batch]]):
    """Map-style: step number -> this rank's part of `{task: batch}`."""

    def __init__(
        self,
        sources: list[Source],
        seed: int,
        preprocessing: Preprocessing,
        train: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.seed, self.preprocessing = seed, preprocessing
        self.train, self.rank, self.world_size = train, rank, world_size
        # In training the sources of a task share their batches; held-out ones are scored each by itself.
        self.sources: dict[str, list[Source]] = {}
        for key, source in zip(_keys(sources, train), sources, strict=True):
            self.sources.setdefault(key, []).append(source)
        self.origins = {key: _origin(key, group) for key, group in self.sources.items()}
        self.plans = {key: self._plan(group) for key, group in self.sources.items()}
        self._fetched: dict[tuple[str, int], list[int]] = {}  # shards that were asked for last
        # Not yet handed over. Each worker has what the shards lack; who counts it counts it once.
        self._quarantined = [
            lost._replace(task=source.task) for source in sources for lost in source.dataset.damaged if rank == 0
        ]

    def _plan(self, group: list[Source]) -> Plan:
        task, spec = group[0].task, group[0].spec
        if any(source.spec != spec for source in group):
            raise ValueError(
                f"data: the sources of task {task!r} differ in batch_size, batch_tokens, batch_multiple or max_tokens; "
                "they share their batches"
            )
        if self.train and spec.samples % self.world_size:
            name = "batch_size" if spec.tokens is None else "batch_multiple"
            raise ValueError(
                f"data: {name} {spec.samples} of task {task!r} is over all ranks and must be a multiple of the "
                f"{self.world_size} ranks"
            )
        if canvas := self.preprocessing.canvas_tokens:  # the backbone's one size, whatever max_tokens says
            spec = spec._replace(max_tokens=canvas, option="canvas_hw")
        infos = [source.info(self.preprocessing) for source in group]
        if self.train:
            _check_ranks(task, infos, self.world_size)
        weights, window = [source.weight for source in group], max(source.window for source in group)
        return Plan(task, infos, weights, spec, self.seed, self.train, window)

    def __len__(self) -> int:
        """Steps until the source that takes longest has been gone through."""
        return max(plan.steps_per_epoch for plan in self.plans.values())

    def __getitem__(self, step: int) -> dict[str, Batch]:
        batches: dict[str, Batch] = {}
        for task in self.plans:
            batch = self._batch(task, step)
            if batch["keys"] or batch["quarantined"]:
                batches[task] = batch
        return batches

    def _batch(self, task: str, step: int) -> Batch:
        plan = self.plans[task]
        for number, shards in plan.next_shards(step, self.rank, self.world_size) if self.train else []:
            self._prefetch(task, number, shards)
        read = (self.read(task, ref) for ref in plan.batch(step, self.rank, self.world_size))
        samples = [sample for sample in read if sample is not None]
        batch = collate(samples) if samples else Batch(keys=[])
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

    def read(self, task: str, ref: SampleRef) -> Prepared | None:
        """One prepared sample; in training the next readable one stands in for an unreadable one.

        Raises:
            ValueError: Many in a row are unreadable.
        """
        source = self.sources[task][ref.source]
        size = self.plans[task].sizes[ref.source]
        attempts = min(_REPLACEMENTS, size) if self.train else 1
        # Of the augmentation. The text is the one that runs of every version have hashed.
        place = f"Place(source={ref.source}, index={ref.index}, position={ref.position})"
        random_seed = zlib.crc32(f"({self.seed}, {task!r}, {place})".encode()) if self.train else None
        for attempt in range(attempts):
            try:
                index = (ref.index + attempt) % size
                with reading(source.task, source.dataset, index) as key:
                    sample = Sample(key=key) | source.dataset[index]
                    sample = self._draw_caption(task, ref, sample)
                    if missing := [name for name in source.required_fields if name not in sample]:
                        raise UnreadableSample(sample["key"], f"has no {missing[0]}, which its task's heads need")
                    prepared = source.transform(sample, self.preprocessing, random_seed)
                    return prepared if random_seed is None else prepared | {"random_seed": random_seed}
            except UnreadableSample as error:
                self._quarantined.append(Quarantined(source.task, error.key, error.file, error.reason))
        if self.train:
            last = self._quarantined[-1]
            raise ValueError(
                f"data: {attempts} samples in a row of task {task!r} are unreadable, the last one {last.key}: "
                f"{last.reason}"
            )
        return None

    def _draw_caption(self, task: str, ref: SampleRef, sample: Sample) -> Sample:
        """The sample with the caption of one language; a held-out one keeps the others, to be scored in all."""
        if not self.train:
            return draw_caption(sample, sample["key"])
        stream = f"{self.seed}:{task}:{ref.source}:{ref.index}"
        epoch = ref.position // self.plans[task].sizes[ref.source]
        drawn: Sample = {**draw_caption(sample, stream, epoch)}
        drawn.pop("captions", None)
        return drawn

    def unreadable(self) -> list[Quarantined]:
        """The unreadable samples since the last call, so that each is counted once."""
        found, self._quarantined = self._quarantined, []
        return found


def _fetch(dataset: SampleDataset, shards: list[int]) -> None:
    try:
        dataset.prefetch(shards)
    except (OSError, ValueError) as error:  # who reads the shard meets it again; until then there is time to mend it
        warnings.warn(f"data: {error}", stacklevel=1)


def _check_ranks(task: str, infos: list[SourceInfo], world_size: int) -> None:
    """Check that ranks that are to read shards of their own have at least one each.

    Raises:
        ValueError: There are more ranks than shards.
    """
    for number, info in enumerate(infos):
        if info.groups > 1 and info.starts is not None and len(info.starts) - 1 < world_size:
            raise ValueError(
                f"data: source {number} of task {task!r} has {len(info.starts) - 1} shards for {world_size} ranks, and "
                f"shard_groups {info.groups} has each rank read its own; cut the data into more shards, or set "
                "shard_groups to 1, with which every rank reads every shard"
            )


def _keys(sources: list[Source], train: bool) -> list[str]:
    """What the batches of each source are called in a step: their task, or `task/source` of several held-out ones.

    Raises:
        ValueError: Two held-out sources of a task have one name.
    """
    tasks = [source.task for source in sources]
    if train:
        return tasks
    keys: list[str] = []
    for i, source in enumerate(sources):
        key = source.task
        if tasks.count(key) > 1:
            key += f"/{source.name or tasks[:i].count(key)}"
        if key in keys:
            raise ValueError(f"data.val[{i}].name: {key} is the name of an earlier source too")
        keys.append(key)
    return keys


def _origin(key: str, group: list[Source]) -> Origin:
    task = group[0].task
    classes = next((names for source in group if (names := source.dataset.classes)), ())
    return Origin(task, key.removeprefix(task).removeprefix("/"), classes)
