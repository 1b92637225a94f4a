"""What a step needs of each GPU's memory, by part, and what would make it fit.

Weights, gradients and the optimizer's state are kept in float32, as Lightning's bf16-mixed does. With DDP every rank
has all of them; FSDP2 shares them out over all ranks, HSDP over those of a node.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from indiclip.parameter_groups import parameter_groups
from indiclip.planning.counter import Count, Counts, OperatorCounter
from indiclip.planning.fake import faked
from indiclip.planning.hardware import Strategy
from indiclip.planning.parts import IMAGE_TOWER, TEXT_TOWER, blocks


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights, in float32.

    Attributes:
        total: Of all.
        trained: Of those that are not frozen.
        optimizer: Of the optimizer's state.
        largest_block: Of the largest block of a tower; 0 where they have none.
        outside: Of all that lies in no block of a tower.
        num_blocks: Part -> blocks of the tower.
        update: What the optimizer's step does.
        separate_heads: Heads of each of which `model.task_weights` has all gradients by themselves, as PCGrad.
        stay_gathered: Whether shards stay gathered from the forward pass to the backward pass.
    """

    total: float
    trained: float
    optimizer: float
    largest_block: float
    outside: float
    num_blocks: Mapping[str, int]
    update: Count
    separate_heads: int = 0
    stay_gathered: bool = False

    def shards(self, strategy: Strategy, nodes: int, gpus_per_node: int) -> int:
        """Over how many GPUs the weights are shared out."""
        return {"ddp": 1, "fsdp": nodes * gpus_per_node, "hsdp": gpus_per_node}[strategy]


def weigh(model: Any) -> Weights:
    """Bytes of the weights of a `MultiTask`, and of its optimizer's state, after a step on fake gradients."""
    towers = {IMAGE_TOWER: blocks(model.encoder.backbone), TEXT_TOWER: blocks(model.encoder.text)}
    of_blocks = [_bytes(block) for tower in towers.values() for block in tower]
    with faked(model):
        optimizer = model.optimizer(parameter_groups(model, model.lr_scale, model.layer_decay))
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        with OperatorCounter(model, "update", read_as=1.0) as counter:
            optimizer.step()
        state = [value for of in optimizer.state.values() for value in of.values() if isinstance(value, torch.Tensor)]
        return Weights(
            total=_bytes(model),
            trained=sum(parameter.numel() * 4 for parameter in trained),
            optimizer=sum(value.numel() * value.element_size() for value in state),
            largest_block=max(of_blocks, default=0),
            outside=_bytes(model) - sum(of_blocks),
            num_blocks={part: len(tower) for part, tower in towers.items()},
            update=counter.counts()["update"],
            separate_heads=len(list(model.each_head())) if model.task_weights.makes_gradients else 0,
            stay_gathered=model.task_weights.compares_heads,
        )


def _bytes(module: nn.Module) -> float:
    return sum(parameter.numel() * 4 for parameter in module.parameters())


def per_gpu(
    weights: Weights,
    counts: Counts,
    loss_peak: float,
    strategy: Strategy,
    shards: int,
    world: int,
    computes_in: int = 4,
    micro_batches: int = 1,
    checkpointing: bool = False,
) -> dict[str, float]:
    """Bytes of a GPU by what they are for.

    Args:
        weights: From `weigh`.
        counts: Of all tasks of a rank's step, by part.
        loss_peak: Bytes that contrastive losses hold at once.
        strategy: How ranks share the weights.
        shards: Over how many GPUs, see `Weights.shards`.
        world: All GPUs.
        computes_in: Bytes of a number in which layers compute.
        micro_batches: Parts in which the batch goes through the towers (gradient caching): activations of one live.
        checkpointing: Towers keep the inputs of their blocks, and make the rest of a block anew.
    """
    kept = sum(checkpointed(counts, weights).values()) if checkpointing else sum(c.saved for c in counts.values())
    buffers = weights.trained if world > 1 else 0.0  # DDP's buckets hold a copy of all gradients
    if strategy != "ddp":
        # FSDP2 gathers a block while the one before computes; what lies outside of the blocks stays gathered. Of one
        # block the whole gradient, in float32, waits to be reduced.
        gathered = weights.total if weights.stay_gathered else 2 * weights.largest_block + weights.outside
        gathered = gathered / 4 * computes_in
        buffers = gathered + weights.largest_block if shards > 1 else 0.0
    # At most, as if all heads reached all that is trained: of each its gradients, and a copy of them in one row; of one
    # the row before and after another one's part is taken away, and that part; and the sum.
    copies = 2 * weights.separate_heads + 4
    of_each_head = {"gradients of each head": copies * weights.trained} if weights.separate_heads else {}
    return {
        "weights": weights.total / shards,
        "gradients": weights.trained / shards,
        "optimizer state": weights.optimizer / shards,
        "activations": kept / micro_batches,
        "loss (logits, embeddings)": loss_peak,
        "communication buffers": buffers,
        **of_each_head,
    }


def checkpointed(counts: Counts, weights: Weights) -> dict[str, float]:
    """Bytes that are kept of each part with activation checkpointing of the towers' blocks.

    Of a tower with L blocks these are the blocks' inputs, and everything of one block: 1 / L of all.
    """
    kept = {part: count.saved for part, count in counts.items()}
    for part, count in counts.items():
        if weights.num_blocks.get(part, 0) > 1:
            kept[part] = min(count.saved, count.block_inputs + count.saved / weights.num_blocks[part])
    return kept
