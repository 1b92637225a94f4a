"""LoRA (Hu et al., ICLR 2022, arXiv:2106.09685): adapters beside frozen weights of a tower, through `peft`."""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from indiclip.names import check_choice, check_range, did_you_mean

_Module = TypeVar("_Module", bound=nn.Module)
_IN_A_BLOCK = re.compile(r"\.\d+\.")


@dataclass
class LoRA:
    """Which adapters a tower gets.

    Args:
        r: Rank of the adapters.
        alpha: The adapters' product is scaled by alpha / r.
        dropout: Of the adapters' input, in training.
        towers: `image`, `text` or both.
        targets: Last parts of the names of the linear layers that get one, e.g. `[qkv, proj]`; None is every linear
            layer of the towers' blocks.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    towers: list[str] = field(default_factory=lambda: ["image", "text"])
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        check_range({"model.encoder.lora.r": self.r}, 1)
        check_range({"model.encoder.lora.alpha": self.alpha}, without=0)
        check_range({"model.encoder.lora.dropout": self.dropout}, 0, 1, without=1)
        for name, listed in {"towers": self.towers, "targets": self.targets}.items():
            if listed == []:
                raise ValueError(f"model.encoder.lora.{name}: found none; expected one at least, or no lora")
        for tower in self.towers:
            check_choice("model.encoder.lora.towers", tower, ("image", "text"))


def add_lora(towers: dict[str, nn.Module], lora: LoRA) -> None:
    """Give the towers adapters, which alone of them are trained from now on. The output stays what it was.

    Args:
        towers: `image` and `text`.
        lora: What to add.

    Raises:
        ModuleNotFoundError: There is no `peft`.
        ValueError: A target that no layer has.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("model.encoder.lora: needs the package peft (pip install peft)") from error
    layers = {tower: _linear_layers(towers[tower]) for tower in lora.towers}
    last_parts = {path.rpartition(".")[2] for paths in layers.values() for path in paths}
    for target in lora.targets or []:
        if target not in last_parts:
            raise ValueError(
                f"model.encoder.lora.targets: no linear layer {target!r}{did_you_mean(target, last_parts)}"
            )
    for tower, paths in layers.items():
        chosen = [path for path in paths if lora.targets is None or path.rpartition(".")[2] in lora.targets]
        if not chosen:
            raise ValueError(
                f"model.encoder.lora.towers: the blocks of {tower} have none of the linear layers asked for"
            )
        # Of no matrix has any change a higher rank.
        largest = max(min(towers[tower].get_parameter(f"{path}.weight").shape) for path in chosen)
        check_range({"model.encoder.lora.r": lora.r}, 1, largest)
        options = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=chosen)  # type: ignore[arg-type]
        inject_adapter_in_model(options, towers[tower])


def check_adapters(tower: str, model: nn.Module, try_out: Callable[[], Any]) -> None:
    """Raise ValueError where an adapter has no effect: the layer's owner reads its weight and never calls it.

    Args:
        tower: `image` or `text`, for the message.
        model: The tower, with adapters.
        try_out: Runs it once, on any input.
    """
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    called: set[str] = set()
    hooks = [layer.register_forward_hook(lambda *_, path=path: called.add(path)) for path, layer in layers.items()]
    training = model.training
    model.eval()
    with torch.no_grad():
        try_out()
    model.train(training)
    for hook in hooks:
        hook.remove()
    if unused := [path for path in layers if path not in called]:
        wrong = {path.rpartition(".")[2] for path in unused}
        others = sorted({path.rpartition(".")[2] for path in layers} - wrong)
        raise ValueError(
            f"model.encoder.lora.targets: the {tower} tower reads the weights of {', '.join(sorted(wrong))} past their "
            f"adapters (such as {unused[0]}), which would have no effect; expected some of [{', '.join(others)}]"
        )


def merge_lora(module: _Module) -> _Module:
    """A copy in which the adapters are added to the weights: plain layers, the same output, no `peft`."""
    from peft.tuners.lora import LoraLayer

    merged = copy.deepcopy(module)
    for path, layer in [*merged.named_modules()]:
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)  # type: ignore[operator]
            parent, _, name = path.rpartition(".")
            setattr(merged.get_submodule(parent), name, layer.get_base_layer())
    return merged


def merged_tensors(tensors: Mapping[str, Tensor], lora: Mapping[str, Any]) -> dict[str, Tensor]:
    """An adapted encoder's tensors by the names of a plain one: each adapter is added to the weight of its layer.

    Args:
        tensors: By the names of its `state_dict()`.
        lora: The fields of its `LoRA`.
    """
    merged = {}
    for name, tensor in tensors.items():
        if ".lora_" in name:
            continue
        if name.endswith(".base_layer.weight"):
            layer = name.removesuffix("base_layer.weight")
            down, up = (tensors[f"{layer}lora_{letter}.default.weight"] for letter in "AB")
            tensor = tensor + lora["alpha"] / lora["r"] * (up @ down)
        merged[name.replace(".base_layer.", ".")] = tensor
    return merged


def _linear_layers(tower: nn.Module) -> list[str]:
    return [
        path for path, part in tower.named_modules() if isinstance(part, nn.Linear) and _IN_A_BLOCK.search(f".{path}.")
    ]
