"""Which heads take part in a step, and what nobody trains meanwhile."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from indiclip.head import Head
from indiclip.steps import start_within
from indiclip.task_weights import TaskWeights


def start_steps(heads: Sequence[Head], num_steps: int) -> dict[str, int]:
    """Head -> the step in which it begins.

    Args:
        heads: All of a run.
        num_steps: Of the run.

    Raises:
        ValueError: One begins behind the run's last step, or none in its first.
    """
    starts = {head.name: start_within(f"heads.{head.name}.start", head.start, num_steps) for head in heads}
    name, first = min(starts.items(), key=lambda item: item[1])
    if first:
        raise ValueError(f"heads.{name}.start: no head begins before step {first}; expected one with start 0")
    return starts


def unused_parts(heads: Sequence[Head]) -> list[str]:
    """Paths of what the losses of none of these heads use: distributed training waits for gradients of all else."""
    paths: list[str] = []
    if not any(head.embeds_images or head.pools_images for head in heads):
        paths += ["encoder.image_pool"]
    if not any(head.embeds_images for head in heads):
        paths += ["encoder.image_projection"]
    if not any(head.embeds_text for head in heads):
        read = any(head.reads_text for head in heads)
        paths += ["encoder.text"] * (not read) + ["encoder.text_pool", "encoder.text_projection"]
    return paths


def idle_parameters(
    module: nn.Module, heads: Sequence[Head], active: Sequence[Head], task_weights: TaskWeights
) -> list[nn.Parameter]:
    """What will be trained, but not in a step in which only some of the heads take part.

    Args:
        module: Which `unused_parts` are parts of.
        heads: All of the run.
        active: Those that take part.
        task_weights: Of all heads.
    """
    idle = [head for head in heads if head not in active]
    if not idle:
        return []
    parts = [*idle, *(module.get_submodule(path) for path in unused_parts(active))]
    backbone: Any = module.get_submodule("encoder.backbone")
    parts += backbone.blocks_behind([head.block for head in active])
    parameters = [parameter for part in parts for parameter in part.parameters()]
    parameters += [parameter for head in idle for parameter in task_weights.learned_for(head.name)]
    return [parameter for parameter in parameters if parameter.requires_grad]
