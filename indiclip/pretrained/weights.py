"""What a pretrained model is to us: an encoder's configuration, tensors by our names, and what has no place in it."""

import re
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from indiclip.lora import merged_tensors
from indiclip.pretrained.sharded import is_sharded, read_sharded

# Part of an encoder -> the beginnings of its tensors' names.
PARTS = {
    "image": ("backbone.", "image_pool."),
    "text": ("text.", "text_pool."),
    "projections": ("image_projection.", "text_projection."),
    "logit_scale": ("logit_scale", "logit_bias"),
}
POOLS = {"image_pool": "pool", "text_pool": "text_pool"}  # module of an encoder -> the argument that says its kind
# Argument of `Encoder` -> the part that it comes along with.
PART_OF = {
    "backbone": "image",
    "pool": "image",
    "text": "text",
    "text_pool": "text",
    "embed_dim": "projections",
    "lengths": "projections",
    "batch_norm": "projections",
    "image_projection": "projections",
    "text_projection": "projections",
}
# Averaged weights first, as timm takes them; of Lightning, OpenCLIP; of DeiT, ConvNeXt.
_ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")
_NORMS = ("backbone.vit.fc_norm", "backbone.vit.norm")
_WRAPPERS = ("module.", "_orig_mod.", "model.")


@dataclass
class Weights:
    """A pretrained model.

    Args:
        origin: As the user wrote it, for messages.
        config: Arguments of `Encoder` as its `to_config()` gives them; an image model alone has only `backbone`.
        tensors: By the names of `Encoder.state_dict()`, and `logit_scale` (the logarithm of the factor on the cosines)
            and `logit_bias` of the contrastive loss.
        unused: The model's tensors that have no place in an encoder, by its own names.
        ignored: As `unused`, but of no use to anybody's encoder: classifiers, counters.
        notes: What was converted, in words.
        step: After how many optimizer steps of our own run they are.
        averaged: Whether they are the averages that the run kept; None where it kept none.
    """

    origin: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    unused: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    step: int | None = None
    averaged: bool | None = None

    @property
    def parts(self) -> list[str]:
        """Which of `PARTS` it has."""
        return [part for part in PARTS if any(of_part(part, self.tensors))]

    def for_encoder(self, encoder: Any, parts: Collection[str] = PARTS) -> "Weights":
        """With tensors by the encoder's names, those of these parts at least.

        They differ in one place: where an encoder pools by itself, a ViT's norm behind the pooling went before it.
        """
        own, kinds = encoder.state_dict(), ("weight", "bias")
        if f"{_NORMS[1]}.weight" not in own or f"{_NORMS[0]}.weight" in own or f"{_NORMS[1]}.weight" in self.tensors:
            return self
        names = {f"{_NORMS[0]}.{kind}": f"{_NORMS[1]}.{kind}" for kind in kinds}
        return replace(self, tensors={names.get(name, name): tensor for name, tensor in self.tensors.items()})

    def merged(self) -> "Weights":
        """With LoRA's adapters, where it has some, added to the weights."""
        if not (lora := self.config.get("lora")):
            return self
        config = {name: value for name, value in self.config.items() if name != "lora"}
        notes = [*self.notes, "LoRA's adapters are added to the weights"]
        return replace(self, config=config, tensors=merged_tensors(self.tensors, lora), notes=notes)

    def logits(self) -> dict[str, float]:
        """`logit_scale` (a logarithm) and `logit_bias` of the contrastive loss, those that it has."""
        found = {name: self.tensors[name] for name in of_part("logit_scale", self.tensors)}
        for name, tensor in found.items():
            if tensor.numel() != 1:
                raise ValueError(f"{self.origin}: {name}: found {tensor.numel()} numbers; expected one")
        return {name: float(tensor) for name, tensor in found.items()}


def to_fill(weights: Weights, part: str, own: Iterable[str]) -> list[str]:
    """Those of an encoder's names that a source is to fill: of the towers, pools and projections that it has."""
    config = weights.config
    modules = {name.partition(".")[0] for name in weights.tensors} | (config.keys() & {"backbone", "text"})
    for side in ("image_projection", "text_projection"):
        modules |= {side} if config.get(side, {"kind": "none"})["kind"] != "none" else set()
    modules |= POOLS.keys()  # also one that the source has not: it would stay initial
    statistics = () if config.get("batch_norm") else tuple(f"{pool}.norm." for pool in POOLS)
    names = of_part(part, own)
    return [name for name in names if name.partition(".")[0] in modules and not name.startswith(statistics)]


def of_part(part: str, names: Iterable[str]) -> list[str]:
    """Those of the names that belong to a part."""
    return [name for name in names if name.startswith(PARTS[part])]


def read_tensors(file: Path, mmap: bool = False) -> dict[str, Any]:
    """What a `.safetensors` holds, or any file of `torch.save` that has only tensors and plain values.

    Args:
        file: Of either kind; or the folder of a run's checkpoint, without what only its training needs.
        mmap: Read a tensor's bytes only where they are used, if the format has them in one place.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is truncated, of another kind, or holds pickled objects.
    """
    if is_sharded(file):
        return read_sharded(file, leave_out=("optimizer_states",))
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of weights")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and is_zipfile(file))
    except SafetensorError as error:
        raise ValueError(f"{file}: no readable safetensors file ({error}); is it whole?") from error
    except Exception as error:
        raise unreadable(file, error) from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: found a {type(found).__name__}; expected a dict of tensors")
    return found


def state_dict(found: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of what a training script saved: out of their entry, without what wrappers put before each name."""
    for entry in _ENTRIES:
        if isinstance(inner := found.get(entry), dict):
            found = inner
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    while tensors and (wrapper := next((w for w in _WRAPPERS if all(name.startswith(w) for name in tensors)), "")):
        tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    return tensors


def check_tensors(tensors: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """The same in float32. Raises ValueError for one that is not finite, naming it."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{origin}: {name} has values that are not finite (NaN or infinity)")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def crc32_of(tensors: Mapping[str, Tensor], crc: int = 0) -> int:
    """Of all of them with their names, on top of the `crc` of others."""
    for name, tensor in tensors.items():
        crc = zlib.crc32(name.encode(), crc)
        content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        crc = zlib.crc32(content, crc)
    return crc


def precision_notes(tensors: dict[str, Tensor]) -> list[str]:
    """A word where tensors are not in float32."""
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.is_floating_point()}
    others = sorted(kinds - {"float32"})
    return [f"{' and '.join(others)} read as float32"] if others else []


def unreadable(file: str | Path, error: Exception) -> Exception:
    """What to raise where `torch.load` fails, which may advise to run the code that a file holds."""
    if isinstance(error, OSError) and error.filename is not None:  # torch gives one without where a file is cut short
        return error
    foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
    reason = f"it holds {foreign[1]}, and reading that can run code" if foreign else "another kind of file, or damaged"
    if "TorchScript" in str(error):
        reason = "a TorchScript program; save its state_dict() as safetensors, and name that"
    return ValueError(f"{file}: not a readable checkpoint ({reason})")
