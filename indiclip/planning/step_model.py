"""How a rank's step grows with its batch and with the number of ranks, from counts of small batches.

A batch of some dozens of samples is read and counted, and twice that; all but the contrastive loss grows linearly in
the samples, because a batch's token counts stay. The loss compares this rank's pairs with those of all ranks: it is
counted at the real number of pairs on two and four ranks that are not there, and grows linearly in the ranks. How many
different captions there are, each of which is embedded once, is estimated from those of the samples.

Shape letters: see `indiclip.types`.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from indiclip.head import Head
from indiclip.images import EncodedImage
from indiclip.loading.collate import Prepared, collate
from indiclip.loading.plan import SampleRef
from indiclip.loading.source import settled
from indiclip.loading.steps import Steps
from indiclip.losses import PairLoss
from indiclip.planning.counter import Count, Counts, OperatorCounter, count_step
from indiclip.planning.fake import faked
from indiclip.planning.parts import TEXT_TOWER
from indiclip.types import Batch

SAMPLES = 64  # of a task that are read
CAPTIONS = 1024  # samples of a task whose captions are read: the longest of the batch decides how long all are
_TILE = "\0"  # behind a caption that is a copy: its number


@dataclass
class TaskModel:
    """A task's part of the step.

    Attributes:
        batch_size: Samples of a rank's step.
        once: What is done for the samples that were read.
        growth: What as many samples more add.
        read: How many were read.
        captions: Of the samples that were read.
        losses: Part of `once` -> the contrastive loss that it is.
        tokens: Of an image, the longest.
        text_tokens: Of a caption, the longest.
        image_bytes: Of an encoded image, the mean; None for generated ones.
        every: One of so many steps has a batch of the task: all of the above is of such a step.
    """

    batch_size: int
    read: int
    once: Counts
    growth: Counts
    captions: list[str] = field(default_factory=list)
    losses: dict[str, PairLoss] = field(default_factory=dict)
    embed_dim: int = 0
    tokens: int = 0
    text_tokens: int = 0
    image_bytes: float | None = None
    every: int = 1
    _at_worlds: dict[tuple[str, int], "LossCount"] = field(default_factory=dict)

    @property
    def times(self) -> float:
        """The batch as a multiple of the samples that were read."""
        return self.batch_size / self.read

    @property
    def mean_batch(self) -> float:
        """Samples of a rank's step, the mean over steps with and without a batch of the task."""
        return self.batch_size / self.every

    @property
    def distinct(self) -> float:
        """Different captions of a batch, an estimate."""
        if self.batch_size <= self.read:
            return len({*self.captions}) * self.times
        return expected_distinct(self.captions, self.batch_size)

    def counts(self, world: int) -> Counts:
        """Part -> what one of `world` ranks, which all have such a batch, does in a step with a batch of the task."""
        counts: Counts = {}
        for part, once in self.once.items():
            times = self.distinct / len({*self.captions}) if part == TEXT_TOWER and self.captions else self.times
            counts[part] = Count.combine([(1, once), (times - 1, self.growth[part])])
        return counts | {part: self.loss(part, world).count for part in self.losses}

    def loss(self, part: str, world: int) -> "LossCount":
        """Of a contrastive loss."""
        if world in (1, 2, 4):
            if (part, world) not in self._at_worlds:
                counted = count_loss(self.losses[part], self.batch_size, self.embed_dim, world)
                self._at_worlds[part, world] = counted
            return self._at_worlds[part, world]
        two, four = self.loss(part, 2), self.loss(part, 4)
        more = (world - 2) / 2
        count = Count.combine([(1 - more, two.count), (more, four.count)])
        return LossCount(count, (1 - more) * two.peak + more * four.peak)


@dataclass(frozen=True)
class LossCount:
    """What a contrastive loss does, and the most bytes that it holds at once: logits, gathered embeddings."""

    count: Count
    peak: float


def step_model(
    model: Any, data: Any, world: int, autocast: torch.dtype | None, at: tuple[int, int] | None = None
) -> dict[str, TaskModel]:
    """Count the tasks of a run.

    Args:
        model: A `MultiTask`; its weights are not read.
        data: A `MultiTaskData`.
        world: Ranks that share each batch.
        autocast: Data type of mixed precision.
        at: The steps of the run, and which of them; None is one in which all stages are over and all views have begun.

    Returns:
        Task that a head reads -> its part of a rank's step.

    Raises:
        ValueError: A batch that does not divide over the ranks; names the key.
    """
    run_steps, step = at or settled(data.train)
    steps = Steps(data.train, data.seed, data.preprocessing, True, 0, world, run_steps)
    model.train()
    read = {head.task for head in model.each_head()}
    return {task: _task_model(model, steps, task, step, autocast) for task in steps.plans if task in read}


def _task_model(model: Any, steps: Steps, task: str, step: int, autocast: torch.dtype | None) -> TaskModel:
    number = steps.batches_before(task, step)
    batch_size = len(steps.plans[task].batch(number, 0, steps.world_size))
    refs = steps.plans[task].batch(number)  # of all ranks: the few samples of one say less
    prepared = [sample for ref in refs[:SAMPLES] if (sample := steps.read(task, ref, step)) is not None]
    origin, tokenizer = steps.origins[task], model.encoder.text.tokenizer
    captions = [sample["caption"] for sample in prepared if sample.get("caption")]
    others = [text for ref in refs[SAMPLES:CAPTIONS] for text in _captions(steps, task, ref)] if captions else []
    text_tokens = max(map(len, tokenizer.encode([*captions, *others])), default=0)
    batch = _tiled(prepared, 1, origin)
    once = _count(model, task, batch, text_tokens, autocast)
    growth = once
    if batch_size != len(prepared):
        twice = _count(model, task, _tiled(prepared, 2, origin), text_tokens, autocast)
        growth = {part: Count.combine([(1, twice[part]), (-1, count)]) for part, count in once.items()}
    heads: list[Head] = [head for head in model.each_head() if head.task == task]
    encoded = [len(image.data) for image in _images(steps, task, refs[:SAMPLES:4]) if isinstance(image, EncodedImage)]
    return TaskModel(
        batch_size=batch_size,
        read=len(prepared),
        once=once,
        growth=growth,
        captions=captions,
        losses={f"{head.name} loss": loss for head in heads for loss in _pair_losses(head)},
        embed_dim=model.encoder.embed_dim,
        tokens=batch["images"]["patches_BNP"].shape[1],
        text_tokens=text_tokens,
        image_bytes=sum(encoded) / len(encoded) if encoded else None,
        every=steps.sources[task][0].every,
    )


def _images(steps: Steps, task: str, refs: list[Any]) -> list[Any]:
    return [steps.sources[task][ref.source].dataset[ref.index]["image"] for ref in refs]


def _pair_losses(head: Head) -> list[PairLoss]:
    return [part for part in head.modules() if isinstance(part, PairLoss)]


def _tiled(prepared: list[Prepared], times: int, origin: Any) -> Batch:
    """A batch of the samples and of copies of them; the captions of copies differ, but not in their tokens."""
    samples = [sample | {"key": f"{sample['key']}{_TILE}{tile}"} for tile in range(times) for sample in prepared]
    for number, sample in enumerate(samples):
        if number >= len(prepared) and sample.get("caption"):
            sample["caption"] = f"{sample['caption']}{_TILE}{number // len(prepared)}"
    batch = collate(samples)
    batch["origin"] = origin
    return batch


def _captions(steps: Steps, task: str, ref: SampleRef) -> list[str]:
    """All captions of a sample whose image is not read."""
    captions = steps.sources[task][ref.source].dataset.captions(ref.index)
    return [text for of_language in captions.values() for text in of_language]


def _count(model: Any, task: str, batch: Batch, text_tokens: int, autocast: torch.dtype | None) -> Counts:
    """Of one task's batch with copied captions, which are padded to as many tokens."""
    text, captions = model.encoder.text, batch["targets"].get("caption")
    tokenizer = text.tokenizer

    def encode(texts: list[str]) -> list[list[int]]:
        rows: list[list[int]] = tokenizer.encode([text.partition(_TILE)[0] for text in texts])
        if captions and texts[0] == captions[0]:
            rows[0] = [*rows[0], *[rows[0][-1]] * (text_tokens - len(rows[0]))]
        return rows

    text.tokenizer = copy.copy(tokenizer)
    text.tokenizer.encode = encode
    try:
        return count_step(model, {task: batch}, autocast)[task]
    finally:
        text.tokenizer = tokenizer


def expected_distinct(texts: list[str], number: int) -> float:
    """How many different texts `number` draws have, estimated from some draws.

    As of draws from S equally frequent texts, of which n draws have S (1 - (1 - 1/S)^n) different ones: S is such that
    the given texts have as many as they have. Rarer texts among frequent ones are underestimated.

    Args:
        texts: Draws; without two equal ones, all are taken for different.
        number: As many or more.
    """
    n, found = len(texts), len({*texts})
    if found == n:
        return float(number)

    def different(kinds: float, draws: int) -> float:
        return -kinds * math.expm1(draws * math.log1p(-1 / kinds)) if kinds > 1 else 1.0

    low, high = float(found), 1e12  # `different` grows with the kinds, and is at most as many as there are
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if different(middle, n) < found else (low, middle)
    return different(low, number)


def count_loss(loss: PairLoss, pairs: int, embed_dim: int, world: int) -> LossCount:
    """Count a contrastive loss, forward and backward, on one of `world` ranks.

    Args:
        loss: It is not changed.
        pairs: Of each rank.
        embed_dim: Length of the embeddings.
        world: Ranks, of which only this one is there.
    """
    with _fake_ranks(world), faked(loss):
        example = loss.example(pairs, embed_dim)
        with OperatorCounter(loss, "loss") as counter:
            loss(**example).backward()
    return LossCount(counter.counts()["loss"], counter.peak)


@contextmanager
def _fake_ranks(world: int) -> Iterator[None]:
    """This process as one of many: torch's `fake` backend exchanges nothing."""
    if world > 1:
        dist.init_process_group("fake", rank=0, world_size=world)
    try:
        yield
    finally:
        if world > 1:
            dist.destroy_process_group()
