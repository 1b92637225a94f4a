"""FLOPs of any training step from its token counts, by rates that are counted once, before the first step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from indiclip.distributed import alone
from indiclip.head import Head
from indiclip.loading.collate import collate
from indiclip.loading.source import settled
from indiclip.loading.steps import Steps
from indiclip.planning.counter import OperatorCounter, count_step
from indiclip.planning.fake import HostValues, fake_batch, faked
from indiclip.planning.parts import IMAGE_TOWER, TEXT_TOWER, SomeHeads
from indiclip.types import Batch, Texts

_SAMPLES = 16  # of a task, by which its heads are counted


@dataclass(frozen=True)
class TowerFlops:
    """FLOPs of a tower for a sequence of n tokens: a polynomial in n, constant term first.

    Linear layers are linear in n and attention is quadratic; class tokens make that a polynomial with all three terms.
    A tower that fills every sequence up to one length has the first term alone.
    """

    coefficients: tuple[float, ...]

    def of(self, lengths: Sequence[int]) -> float:
        """Of sequences of these lengths, padding aside."""
        lengths_B = np.asarray(lengths, np.float64)
        return float(sum(c * (lengths_B**power).sum() for power, c in enumerate(self.coefficients)))


@dataclass(frozen=True)
class TaskFlops:
    """FLOPs of a task beside the towers.

    Attributes:
        per_patch: Of pools, projections and heads.
        per_comparison: Of contrastive losses, for a pair compared with a pair.
        reads_captions: Whether its heads embed the samples' captions.
        prompts: Of what else the text tower reads in a step.
        image_passes: What the image tower does in a step over one pass over the batch's images: more than 1 where heads
            run it on views, or on images with hidden patches; less where they need not all of its blocks. Other copies
            of it, such as a teacher's, are of heads.
        text_passes: Likewise what the text tower does, over one pass over the batch's different captions.
    """

    per_patch: float
    per_comparison: float
    reads_captions: bool
    prompts: float
    image_passes: float = 1.0
    text_passes: float = 1.0


_NOTHING = TaskFlops(0.0, 0.0, False, 0.0, 0.0)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of this rank's steps: forward and backward, recomputation and padding aside.

    Attributes:
        image: Of the image tower.
        text: Of the text tower.
        tasks: Of each task beside the towers, with all of its heads.
        without: Head that does not begin with the run -> its task, and what that is without it.
    """

    image: TowerFlops
    text: TowerFlops
    tasks: dict[str, TaskFlops]
    without: dict[str, tuple[str, TaskFlops]] = field(default_factory=dict)

    def of(self, batches: Mapping[str, Batch], world: int = 1, idle: Sequence[str] = ()) -> float:
        """Of a step, one of `world` ranks'. Reads what is on the host.

        Args:
            batches: Of the step.
            world: Ranks.
            idle: Heads that take no part: not begun, or of a task without a batch.
        """
        total = sum(self._of_task(self.tasks[task], batch, world) for task, batch in batches.items())
        for task, without in (self.without[name] for name in idle if name in self.without):
            if task in batches:
                both = (self._of_task(of_task, batches[task], world) for of_task in (self.tasks[task], without))
                total -= next(both) - next(both)
        return total

    def _of_task(self, of_task: TaskFlops, batch: Batch, world: int) -> float:
        patches, pairs = batch["images"]["num_patches"], len(batch["keys"])
        beside = of_task.per_patch * sum(patches) + of_task.per_comparison * pairs**2 * world + of_task.prompts
        image = of_task.image_passes * self.image.of(patches)
        text = of_task.text_passes * self.text.of(text_lengths(batch) if of_task.reads_captions else [])
        return beside + image + text


def text_lengths(batch: Batch) -> list[int]:
    """Tokens of each different text that the loader has tokenised: equal ones are encoded once."""
    of_text: dict[str, int] = {}
    for value in batch["targets"].values():
        if isinstance(value, Texts):
            of_text |= dict(zip(value.strings, map(len, value.token_ids), strict=True))
    return [*of_text.values()]


def step_flops(module: Any, data: Any) -> StepFlops:
    """Count a model before its first step; takes some seconds.

    Args:
        module: A `MultiTask`, or what has its `encoder` and `each_head`; neither sharded nor compiled yet.
        data: A `MultiTaskData`, of which some samples are read.
    """
    encoder = module.encoder
    with alone():  # what is counted has no values that could be exchanged with other ranks
        tasks, without = {}, {}
        for task, batch in _batches(data, encoder.text.tokenizer):
            heads = [head for head in module.each_head() if head.task == task]
            tasks[task] = _task_flops(encoder, heads, batch)
            for late in (head for head in heads if head.start):
                others = [head for head in heads if head is not late]
                without[late.name] = (task, _task_flops(encoder, others, batch) if others else _NOTHING)
        return StepFlops(_image_tower(encoder), _text_tower(encoder), tasks, without)


def _batches(data: Any, tokenizer: Any) -> Iterator[tuple[str, Batch]]:
    """Some samples of each task, as at the end of the run."""
    run_steps, step = settled(data.train)
    steps = Steps(data.train, data.seed, data.preprocessing, True, run_steps=run_steps, encode=tokenizer.encode)
    for task, plan in steps.plans.items():
        refs = plan.batch(steps.batches_before(task, step))
        read = (steps.read(task, ref, step) for ref in refs[:_SAMPLES])
        batch = collate([sample for sample in read if sample is not None])
        batch["origin"] = steps.origins[task]
        yield task, batch


def _task_flops(encoder: Any, heads: Sequence[Head], batch: Batch) -> TaskFlops:
    task, images = heads[0].task, batch["images"]
    counts = count_step(SomeHeads(encoder, heads), {task: batch})[task]
    losses = {part for part in counts if part.endswith(" loss")}
    beside = sum(count.flops for part, count in counts.items() if part not in {IMAGE_TOWER, TEXT_TOWER, *losses})
    reading = [head for head in heads if head.embeds_text or head.reads_text]
    captioned = any("caption" in (*head.required_fields, *head.loss_fields) for head in reading)
    once = _flops(encoder.backbone, images, lambda of: encoder.backbone(of).tokens)
    text_passes = 0.0
    if captioned and TEXT_TOWER in counts:
        captions = [*dict.fromkeys(batch["targets"]["caption"])]
        of_texts = _text_inputs(encoder.text, encoder.text.tokenizer.encode(captions))
        text_passes = counts[TEXT_TOWER].flops / _flops(encoder.text, of_texts, lambda of: encoder.text(**of))
    return TaskFlops(
        per_patch=beside / sum(images["num_patches"]),
        per_comparison=sum(counts[part].flops for part in losses) / len(batch["keys"]) ** 2,
        reads_captions=captioned,
        prompts=0.0 if captioned or TEXT_TOWER not in counts else counts[TEXT_TOWER].flops,
        image_passes=counts[IMAGE_TOWER].flops / once,
        text_passes=text_passes,
    )


def _image_tower(encoder: Any) -> TowerFlops:
    backbone = encoder.backbone

    def images(patches: int) -> Any:
        pixels = np.zeros((backbone.patch_size, backbone.patch_size * patches, 3), np.uint8)
        return backbone.preprocessing.batch([pixels], max(patches, backbone.max_tokens))

    lengths = [1] if backbone.canvas_hw is not None else [1, 2, 4]
    return _tower(backbone, {length: images(length) for length in lengths}, lambda of: backbone(of).tokens)


def _text_tower(encoder: Any) -> TowerFlops:
    text = encoder.text
    longest = text.tokenizer.context_length
    lengths = [longest] if text.pad == "context" else sorted({1, min(2, longest), longest})
    inputs = {length: _text_inputs(text, [[text.tokenizer.pad_id + 1] * length]) for length in lengths}
    return _tower(text, inputs, lambda of: text(**of))


def _text_inputs(text: Any, rows: list[list[int]]) -> dict[str, Any]:
    """What the tower takes of texts of these ids."""
    ids_BT, valid_BT = text.padded(rows)
    return {"ids_BT": ids_BT, "valid_BT": valid_BT, "lengths": [max(len(row), 1) for row in rows]}


def _tower(tower: Any, inputs: Mapping[int, Any], run: Callable[[Any], Tensor]) -> TowerFlops:
    """The polynomial through a tower's counts for one sequence of each length."""
    found = [_flops(tower, of_length, run) for of_length in inputs.values()]
    powers = np.vander(np.asarray([*inputs], np.float64), increasing=True)
    return TowerFlops(tuple(np.linalg.solve(powers, found).tolist()))


def _flops(tower: Any, inputs: Any, run: Callable[[Any], Tensor]) -> float:
    """Of a tower's pass over its inputs, and of its backward pass."""
    known = HostValues()
    with faked(tower) as mode:
        inputs = fake_batch(inputs, mode, known)
        with OperatorCounter(tower, "tower", known) as counter:
            total = run(inputs).sum()
            if total.requires_grad:
                total.backward()  # type: ignore[no-untyped-call]
    return float(sum(count.flops for count in counter.counts().values()))
