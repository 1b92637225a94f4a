"""What `MultiTask` refuses, so that no run trains for something else than it seems to."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from indiclip.encoder import Encoder
from indiclip.head import Head
from indiclip.task_weights import TaskWeights


def check_heads(heads: Sequence[Head]) -> None:
    """Raise ValueError for no head or weight, two of one name, or a head without the one that it learns from."""
    if not heads:
        raise ValueError("model.heads: the list is empty; name at least one head")
    if not any(head.weight for head in heads):
        every = ", ".join(head.name for head in heads)
        raise ValueError(f"model.heads: weight is 0 of all ({every}), which trains nothing; expected one above 0")
    names = [head.name for head in heads]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"model.heads: {', '.join(repeated)} stands there more than once; two heads of one class need a `name`"
        )
    for head in heads:
        if head.reads_embeddings and not any(other.embeds_images and other.embeds_text for other in heads):
            raise ValueError(
                f"heads.{head.name}.{head.reads_embeddings}: reads embeddings of images and texts, which no head "
                "trains; expected heads.contrastive.Contrastive beside"
            )


def check_blocks(heads: Sequence[Head], encoder: Encoder) -> None:
    """Raise ValueError for a head behind a block that is not there, or blocks that nothing would train."""
    number = len(encoder.backbone.blocks)
    for head in heads:
        if head.block is not None and not (head.needs_all_patches or head.reads_tokens):
            raise ValueError(
                f"heads.{head.name}.block: found {head.block}, for heads that read the tokens of images, as for boxes "
                f"or captions; {head.name} reads what the whole backbone makes of them; expected null"
            )
        if head.block is not None and not -number <= head.block < number:
            expected = f"{-number} to {number - 1}, of its {number} blocks" if number else "null, or a NaFlexViT"
            kind = type(encoder.backbone).__name__
            raise ValueError(f"heads.{head.name}.block: found {head.block} with a {kind}; expected {expected}")
    if encoder.backbone.blocks_behind([head.block for head in heads]):
        raise ValueError(
            "model.heads: every head reads tokens before the backbone's last block, which nothing would train; "
            "expected a head without `block`, or a lower model.encoder.backbone.depth"
        )


def check_adapters_train(encoder: Encoder, unused: Sequence[str]) -> None:
    """Raise ValueError where LoRA's adapters of a tower that is used are frozen as the tower itself is."""
    for tower in encoder.lora.towers if encoder.lora else ():
        path, part = ("encoder.backbone", encoder.backbone) if tower == "image" else ("encoder.text", encoder.text)
        if path not in unused and not any(parameter.requires_grad for parameter in part.parameters()):
            raise ValueError(
                f"model.freeze: freezes all of LoRA's adapters in the {tower} tower, whose own weights are frozen "
                f"by model.encoder.lora already; expected either without {tower}"
            )


def check_accumulation(trainer: L.Trainer) -> None:
    """Raise ValueError where a trainer adds up gradients of parts of a batch."""
    schedulers = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    if trainer.accumulate_grad_batches != 1 or schedulers:
        parts = trainer.accumulate_grad_batches if not schedulers else "k"
        raise ValueError(
            "trainer.accumulate_grad_batches: accumulated gradients compare each image with the texts of its own "
            f"part alone; expected model.micro_batches {parts}, whose gradients are the whole batch's, and "
            "data.train[i].batch_size of all parts together"
        )


def check_precision(trainer: L.Trainer) -> None:
    """Raise ValueError for weights in half precision."""
    if trainer.precision in ("bf16-true", "16-true"):
        raise ValueError(
            f"trainer.precision: found {trainer.precision}, in which a step below 1/256 of a weight is lost; "
            "expected bf16-mixed, or 32-true"
        )


def check_micro_batches(encoder: Encoder) -> None:
    """Raise ValueError for a tower that cannot see a batch in parts."""
    norms = [path for path, part in encoder.named_modules() if isinstance(part, _BatchNorm)]
    norms = [path for path in norms if path not in ("image_pool.norm", "text_pool.norm")]
    if norms:
        raise ValueError(
            f"model.micro_batches: encoder.{norms[0]} normalises over the batch, and would over each part alone; "
            "expected 1, or a tower without batch norm"
        )


def check_task_weights(task_weights: TaskWeights, module: Any, trainer: L.Trainer, compiles: bool) -> None:
    """Raise ValueError where there are no heads to compare, or the gradients of each cannot be had by themselves."""
    if not task_weights.compares_heads:
        return
    name = f"model.task_weights: {type(task_weights).__name__}"
    weighted = [head.name for head in module.each_head() if head.weight]
    if len(weighted) == 1:
        raise ValueError(
            f"{name} compares heads; found {weighted[0]} alone with a weight; expected two, or no task_weights"
        )
    if not task_weights.watched(module):
        raise ValueError(
            f"{name} compares gradients on a block of the backbone, of which nothing is trained (model.freeze, "
            "model.encoder.lora); expected some of it trained, or no task_weights"
        )
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise ValueError(
            f"{name} needs each head's whole gradients on each rank, and this trainer.strategy shares them out; "
            "expected ddp, or indiclip.training.sharding.ShardedStrategy"
        )
    if trainer.precision == "16-mixed":
        raise ValueError(
            f"{name} takes gradients before they are scaled, of which float16 loses many; expected "
            "trainer.precision bf16-mixed or 32-true"
        )
    if compiles:
        raise ValueError(
            f"{name} goes back through a block once for each head, which compiled blocks allow but once; expected "
            "model.compile false"
        )


def check_weights(saved: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raise ValueError for a checkpoint of another model."""
    shapes, own_shapes = ({name: tuple(weight.shape) for name, weight in weights.items()} for weights in (saved, own))
    apart = sorted(name for name in shapes.keys() | own_shapes.keys() if shapes.get(name) != own_shapes.get(name))
    if not saved or not apart:
        return
    heads, own_heads = (sorted({n.split(".")[1] for n in names if n.startswith("heads.")}) for names in (saved, own))
    if heads != own_heads:
        raise ValueError(
            f"--ckpt_path: found the heads {', '.join(heads)}; the config has {', '.join(own_heads)}; a run goes on "
            "with its own, and a new one may begin with its encoder (model.encoder.init_from)"
        )
    raise ValueError(
        f"--ckpt_path: {len(apart)} tensors are not those of the config's model, such as {apart[0]}: "
        f"found shape {shapes.get(apart[0], 'missing')}, expected {own_shapes.get(apart[0], 'missing')}"
    )
