"""FLOPs of any training step from its token counts, by rates that are counted once, before the first step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from indiclip.distributed import alone
from indiclip.loading.collate import collate
from indiclip.loading.source import settled
from indiclip.loading.steps import Steps
from indiclip.planning.counter import OperatorCounter, count_step
from indiclip.planning.fake import HostValues, fake_batch, faked
from indiclip.planning.parts import IMAGE_TOWER, TEXT_TOWER
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
        image: Of the image tower, where its heads need less than all of it, see `Head.block`.
    """

    per_patch: float
    per_comparison: float
    reads_captions: bool
    prompts: float
    image: TowerFlops | None = None


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of this rank's steps: forward and backward, recomputation and padding aside.

    Attributes:
        image: Of the image tower.
        text: Of the text tower.
        tasks: Of each task beside the towers.
    """

    image: TowerFlops
    text: TowerFlops
    tasks: dict[str, TaskFlops]

    def of(self, batches: Mapping[str, Batch], world: int = 1) -> float:
        """Of a step, one of `world` ranks'. Reads what is on the host."""
        return sum(self._of_task(task, batch, world) for task, batch in batches.items())

    def _of_task(self, task: str, batch: Batch, world: int) -> float:
        of_task, patches, pairs = self.tasks[task], batch["images"]["num_patches"], len(batch["keys"])
        beside = of_task.per_patch * sum(patches) + of_task.per_comparison * pairs**2 * world + of_task.prompts
        image = of_task.image or self.image
        return beside + image.of(patches) + self.text.of(text_lengths(batch) if of_task.reads_captions else [])


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
        tasks = {task: _task_flops(module, {task: batch}) for task, batch in _batches(data, encoder.text.tokenizer)}
        return StepFlops(_image_tower(encoder), _text_tower(encoder), tasks)


def _batches(data: Any, tokenizer: Any) -> Iterator[tuple[str, Batch]]:
    """Some samples of each task, as at the end of the run."""
    run_steps, step = settled(data.train)
    steps = Steps(data.train, data.seed, data.preprocessing, True, run_steps=run_steps, encode=tokenizer.encode)
    for task, plan in steps.plans.items():
        read = (steps.read(task, ref, step) for ref in plan.batch(steps.batches_before(task, step))[:_SAMPLES])
        batch = collate([sample for sample in read if sample is not None])
        batch["origin"] = steps.origins[task]
        yield task, batch


def _task_flops(module: Any, batches: dict[str, Batch]) -> TaskFlops:
    ((task, batch),) = batches.items()
    counts = count_step(module, batches)[task]
    losses = {part for part in counts if part.endswith(" loss")}
    beside = sum(count.flops for part, count in counts.items() if part not in {IMAGE_TOWER, TEXT_TOWER, *losses})
    heads, backbone = [head for head in module.each_head() if head.task == task], module.encoder.backbone
    deepest = max(backbone.block_number(head.block) for head in heads)
    embedding = [head for head in heads if head.embeds_text]
    captioned = any("caption" in (*head.required_fields, *head.loss_fields) for head in embedding)
    return TaskFlops(
        per_patch=beside / sum(batch["images"]["num_patches"]),
        per_comparison=sum(counts[part].flops for part in losses) / len(batch["keys"]) ** 2,
        reads_captions=captioned,
        prompts=0.0 if captioned or TEXT_TOWER not in counts else counts[TEXT_TOWER].flops,
        image=_image_tower(module.encoder, [deepest]) if deepest < len(backbone.blocks) - 1 else None,
    )


def _image_tower(encoder: Any, blocks: Sequence[int] = ()) -> TowerFlops:
    """Of all blocks, or up to the last of some."""
    backbone, some = encoder.backbone, [blocks] if blocks else []

    def images(patches: int) -> Any:
        pixels = np.zeros((backbone.patch_size, backbone.patch_size * patches, 3), np.uint8)
        return backbone.preprocessing.batch([pixels], max(patches, backbone.max_tokens))

    lengths = [1] if backbone.canvas_hw is not None else [1, 2, 4]
    return _tower(backbone, {length: images(length) for length in lengths}, lambda of: backbone(of, *some).tokens)


def _text_tower(encoder: Any) -> TowerFlops:
    text = encoder.text
    longest = text.tokenizer.context_length
    lengths = [longest] if text.pad == "context" else sorted({1, min(2, longest), longest})
    rows = {length: [[text.tokenizer.pad_id + 1] * length] for length in lengths}
    inputs = {
        length: dict(zip(("ids_BT", "valid_BT"), text.padded(row), strict=True)) | {"lengths": [length]}
        for length, row in rows.items()
    }
    return _tower(text, inputs, lambda of: text(**of))


def _tower(tower: Any, inputs: Mapping[int, Any], run: Callable[[Any], Tensor]) -> TowerFlops:
    """The polynomial through a tower's counts for one sequence of each length."""
    found = []
    for of_length in inputs.values():
        known = HostValues()
        with faked(tower) as mode:
            of_length = fake_batch(of_length, mode, known)
            with OperatorCounter(tower, "tower", known) as counter:
                total = run(of_length).sum()
                if total.requires_grad:
                    total.backward()  # type: ignore[no-untyped-call]
        found.append(sum(count.flops for count in counter.counts().values()))
    powers = np.vander(np.asarray([*inputs], np.float64), increasing=True)
    return TowerFlops(tuple(np.linalg.solve(powers, found).tolist()))
