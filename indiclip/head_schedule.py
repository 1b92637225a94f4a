"""Which heads take part in a step, and what nobody trains meanwhile."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import nn

from indiclip.head import Head
from indiclip.pooling import running_statistics
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


def idle_parts(module: nn.Module, heads: Sequence[Head], active: Sequence[Head]) -> list[nn.Module]:
    """What a step does not reach in which only some of the heads take part, and other steps do.

    Args:
        module: Which `unused_parts` are parts of.
        heads: All of the run.
        active: Those that take part.
    """
    idle = [head for head in heads if head not in active]
    if not idle:
        return []
    backbone: Any = module.get_submodule("encoder.backbone")
    unused = [module.get_submodule(path) for path in unused_parts(active)]
    return [*idle, *unused, *backbone.blocks_behind([head.block for head in active])]


def idle_parameters(
    module: nn.Module, heads: Sequence[Head], active: Sequence[Head], task_weights: TaskWeights
) -> list[nn.Parameter]:
    """What will be trained, but not in such a step.

    Args:
        module: As of `idle_parts`, as `heads` and `active` are.
        heads: See there.
        active: See there.
        task_weights: Of all heads.
    """
    parameters = [p for part in idle_parts(module, heads, active) for p in part.parameters()]
    parameters += [p for head in heads if head not in active for p in task_weights.learned_for(head.name)]
    return [parameter for parameter in parameters if parameter.requires_grad]


def idle_names(module: nn.Module, heads: Sequence[Head], active: Sequence[Head], task_weights: TaskWeights) -> set[str]:
    """Of `idle_parameters`, and of the running statistics beside them."""
    statistics = (running_statistics(part) for part in idle_parts(module, heads, active))
    idle = {id(tensor) for tensor in chain(idle_parameters(module, heads, active, task_weights), *statistics)}
    if not idle:
        return set()
    return {name for name, tensor in chain(module.named_parameters(), module.named_buffers()) if id(tensor) in idle}
