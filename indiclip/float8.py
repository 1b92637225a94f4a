"""Towers whose matrix products run in 8-bit floating point while they train, through `torchao`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from indiclip.names import check_choice
from indiclip.sharding import blocks

Recipe = Literal["rowwise", "tensorwise"]
RECIPES = ("rowwise", "tensorwise")
_MULTIPLE = 16  # of both widths of a matrix, as the hardware wants
_CAPABILITY = (8, 9)  # of the first GPUs (Ada, Hopper) whose tensor cores multiply such numbers


def convert_to_float8(
    towers: Sequence[nn.Module], recipe: Recipe, precision: str, device: torch.device, gather_in_float8: bool = False
) -> None:
    """Make the trained linear layers of the towers' blocks multiply in float8, in place, forward and backward.

    Their weights stay what they are, in float32 and under the same names: checkpoints and exports know nothing of it.
    Patch embeddings, poolings, projections, heads, frozen weights, and matrices with a width that is no multiple of 16
    are left alone. A CPU computes the same numbers more slowly, in float32 of rounded factors.

    Args:
        towers: Those that consist of blocks, see `indiclip.sharding.blocks`.
        recipe: Of torchao: one scale for each row of a factor, or one for each matrix.
        precision: Lightning's word; float8 is for what would else be bfloat16.
        device: Where it trains.
        gather_in_float8: Of tensorwise layers whose weights are shared out afterwards: they travel in float8.

    Raises:
        ValueError: Another precision, a GPU without such products, or no layer to convert.
        ModuleNotFoundError: There is no `torchao`.
    """
    check_choice("model.float8", recipe, RECIPES)
    if precision != "bf16-mixed":
        raise ValueError(f"trainer.precision: found {precision}; expected bf16-mixed with model.float8 {recipe}")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"model.float8: found {recipe}, and {name} has no products in float8 (compute capability 8.9 has); "
            "expected null"
        )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("model.float8: needs the package torchao (pip install torchao)") from error
    # The gradient of weights is summed over tokens, which are any number.
    config = replace(
        Float8LinearConfig.from_recipe_name(recipe),
        pad_inner_dim=True,
        emulate=device.type != "cuda",
        enable_fsdp_float8_all_gather=recipe == "tensorwise" and gather_in_float8,
    )
    for block in (block for tower in towers for block in blocks(tower)):
        convert_to_float8_training(block, config=config, module_filter_fn=lambda layer, _: _converts(layer))
    if not any(map(float8_layers, towers)):
        raise ValueError(
            f"model.float8: found {recipe}, and no tower has a trained linear layer in its blocks whose widths are "
            "multiples of 16; expected null"
        )


def float8_layers(module: nn.Module) -> int:
    """How many of its layers multiply in float8; known by name, since torchao may not be there."""
    return sum(type(layer).__name__ == "Float8Linear" for layer in module.modules())


def share_scales(module: nn.Module) -> None:
    """Of tensorwise weights that travel in float8: one reduction for all of them instead of one for each. A collective.

    Once a step, after the optimizer's.
    """
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    precompute_float8_dynamic_scale_for_fsdp(module)


def forget_scales(module: nn.Module) -> None:
    """Of such weights, which were changed by something other than the optimizer: each is measured when it travels."""
    for parameter in module.parameters():
        shard = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if hasattr(shard, "_precomputed_scale"):
            shard._precomputed_scale = None


def _converts(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or not layer.weight.requires_grad:
        return False
    return all(width % _MULTIPLE == 0 for width in layer.weight.shape)
