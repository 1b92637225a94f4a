"""FSDP2 and HSDP by `fully_shard`: which parts of a model are gathered together, and where a call gathers them.

Every rank reads samples of its own, whatever the mesh: (replicate, shard) says only where the weights lie.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import register_dataclass
from torch.utils.checkpoint import checkpoint

from indiclip import packing
from indiclip.types import Features

# What is called from outside beside `forward`, and reads weights. None calls another one of the same part, at whose end
# the weights would go. What comes after these in a step finds them gathered: the encoder's projections, and a head's
# losses of the whole batch.
_ENTRIES = ("training_step", "predictions", "pool_features", "pool_text", "pool", "loss", "predict")
_KEEPS = "_keeps_weights"  # mark of a part that stays gathered until its backward pass
_PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16}

# Before torch 2.15 FSDP2 finds the tensors of a result, before whose gradients it gathers weights, in pytrees alone.
# Private to torch; tried with 2.11 and 2.15.
register_dataclass(Features)


def shard(
    module: nn.Module, towers: Sequence[nn.Module], parts: Sequence[nn.Module], mesh: Any, precision: str
) -> None:
    """Share out a model's weights over the ranks, in place; names and shapes of its parameters stay.

    Gathered together are: each block of a tower, the rest of the tower, each other part, and what remains. Autocast
    chooses the type of each operation, as without sharding. In `bf16-mixed` the matrices of blocks travel as bfloat16,
    to which it would cast them anyway, and their gradients are summed in float32; all else (norms, position tables,
    temperatures, heads) travels and stays in float32.

    Args:
        module: With the same weights on all ranks.
        towers: Those of its parts that consist of blocks.
        parts: The others whose weights are to be gathered apart, the inner ones first. Nobody calls their `forward` but
            they themselves.
        mesh: Two-dimensional, (replicate, shard).
        precision: Lightning's word.

    Raises:
        ValueError: A precision that does not go with shards, or a parameter that is one number.
    """
    if precision not in _PRECISIONS:
        raise ValueError(f"trainer.precision: found {precision}; expected {' or '.join(_PRECISIONS)} with sharding")
    single = [name for name, parameter in module.named_parameters() if parameter.ndim == 0]
    if single:
        raise ValueError(f"trainer.strategy: {single[0]} is a single number, which cannot be shared out; expected ddp")
    if mesh.size(0) == 1:
        assert mesh.mesh_dim_names is not None
        mesh = mesh[mesh.mesh_dim_names[1]]  # no reduction over groups of one
    policy = _policy(_PRECISIONS[precision])
    for tower in towers:
        for block in blocks(tower):
            _shard(block, mesh, mp_policy=policy)
        _shard(tower, mesh)
    for part in parts:
        # Called several times a step, last where the losses of all parts are put together; small beside the towers.
        _shard(part, mesh, reshard_after_forward=False)
        # Of `forward`, which `loss` and `predict` may call: at its end the weights would go in the middle of those.
        # Private to torch.nn; tried with torch 2.15.
        vars(part)[_KEEPS] = True
        part._forward_pre_hooks.clear()
        part._forward_hooks.clear()
    _shard(module, mesh)


def _policy(low: torch.dtype | None) -> MixedPrecisionPolicy:
    """Of blocks. Vectors keep their type: not every device's norms take another one than that of their inputs."""
    # From torch 2.15 on; before, blocks travel in the type that they are stored in.
    if low is None or "param_dtype_override_fn" not in MixedPrecisionPolicy.__dataclass_fields__:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        low,
        torch.float32,
        cast_forward_inputs=False,
        param_dtype_override_fn=lambda parameter: parameter.dtype if parameter.ndim < 2 else low,
    )


def _shard(part: nn.Module, mesh: DeviceMesh, **options: Any) -> None:
    own = type(part)
    fully_shard(part, mesh=mesh, **options)
    made = type(part)
    # A checkpoint names the classes of its parts, and so do tables.
    made.__name__, made.__qualname__, made.__module__ = own.__name__, own.__qualname__, own.__module__
    for entry in _ENTRIES:
        if hasattr(part, entry):
            register_fsdp_forward_method(part, entry)


def blocks(tower: nn.Module) -> list[nn.Module]:
    """The repeated parts of a tower, such as the layers of a transformer; of nested ones the innermost."""
    found: dict[nn.Module, None] = {}
    for part in tower.modules():
        if isinstance(part, nn.ModuleList | nn.Sequential) and len({type(child) for child in part}) == 1:
            found |= dict.fromkeys(child for child in part if any(True for _ in child.children()))
    return [block for block in found if not any(part in found for part in block.modules() if part is not block)]


def compile_blocks(towers: Sequence[nn.Module]) -> None:
    """Compile the blocks of the towers, each kind of them once.

    Only their own `forward`: what is to come around it (activation checkpointing, the gathering of shards) stays
    outside, and must come after this. Names of parameters stay, and a copy of a tower has blocks of its own.
    """
    # Stages of a tower, training and evaluation are other code; torch's own limit of 8 is for what never ends.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.optimize_ddp = False  # it would divide a block where a bucket of gradients ends
    # A number of tokens that by chance equals a width, or that of sequences, is still a number by itself.
    torch.fx.experimental._config.use_duck_shape = False
    for tower in towers:
        setattr(tower, "compiled", True)  # noqa: B010
        any_size = getattr(tower, "canvas_hw", None) is None
        for block in blocks(tower):
            if "forward" not in vars(block):
                kind: Any = type(block)
                block.forward = MethodType(_compiled(kind, any_size), block)  # type: ignore[method-assign]


@cache
def _compiled(kind: Any, any_size: bool) -> Any:
    return torch.compile(kind.forward, dynamic=True if any_size else None)


def checkpoint_activations(towers: Sequence[nn.Module]) -> None:
    """Make each block of the towers keep its inputs alone for the backward pass, and compute the rest again there."""
    for block in (block for tower in towers for block in blocks(tower)):
        if not isinstance(vars(block).get("forward"), partial):
            again = partial(checkpoint, block.forward, use_reentrant=False, context_fn=packing.while_recomputing)
            block.forward = again  # type: ignore[method-assign]


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has been here."""
    return isinstance(module, FSDPModule)


@contextmanager
def gathered_weights(module: nn.Module) -> Iterator[None]:
    """All weights on each rank, so that no call waits for another rank: they may make different ones. A collective.

    In evaluation the number of calls depends on the samples, which are not equally many on all ranks.
    """
    gather(module)
    try:
        yield
    finally:
        release(module)


@contextmanager
def gathered_through_gradients(module: nn.Module) -> Iterator[None]:
    """All weights on each rank, for a step that goes back several times; the backward pass after it lets them go.

    Inside, a parameter is the whole one, with which the forward pass is made: `torch.autograd.grad` takes it. A forward
    pass outside of it keeps the weights too, until `release`. Without effect on a module that is not sharded.
    """
    try:
        gather(module)
        for part in _units(module):
            part.set_reshard_after_backward(False, recurse=False)
        yield
    finally:
        for part in _units(module):
            part.set_reshard_after_backward(True, recurse=False)


def gather(module: nn.Module) -> None:
    """Enter `gathered_weights`. Without effect on a module that is not sharded."""
    with torch.inference_mode(False), torch.no_grad():  # what is made here is trained with
        for part in _units(module):
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()


def release(module: nn.Module) -> None:
    """Leave `gathered_weights`."""
    for part in _units(module):
        part.set_reshard_after_forward(not vars(part).get(_KEEPS, False), recurse=False)
        part.reshard()


def reshard(module: nn.Module) -> None:
    """Leave each rank its own shards alone, to read and write them. Without effect on a module that is not sharded."""
    for part in _units(module) if is_sharded(module) else ():
        part.reshard()


def _units(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, if it is a shard on this rank. A collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that each rank has whole, or shares out already, as `other` is shared out."""
    if isinstance(tensor, DTensor) or not isinstance(other, DTensor):
        return whole(tensor) if not isinstance(other, DTensor) else tensor
    mesh = other.device_mesh
    return distribute_tensor(tensor.to(other.device), mesh, other.placements, src_data_rank=None)


def mesh_of(module: nn.Module) -> DeviceMesh | None:
    """Over which the weights are shared out."""
    shards = (parameter for parameter in module.parameters() if isinstance(parameter, DTensor))
    return first.device_mesh if (first := next(shards, None)) is not None else None
