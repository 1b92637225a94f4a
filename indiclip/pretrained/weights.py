"""What a pretrained model is to us: an encoder's configuration, tensors by our names, and what has no place in it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# Part of an encoder -> the beginnings of its tensors' names.
PARTS = {
    "image": ("backbone.",),
    "text": ("text.",),
    "projections": ("image_pool.", "text_pool.", "image_projection.", "text_projection."),
    "logit_scale": ("logit_scale", "logit_bias"),
}


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
    """

    origin: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    unused: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def parts(self) -> list[str]:
        """Which of `PARTS` it has."""
        return [part for part in PARTS if any(of_part(part, self.tensors))]

    def logits(self) -> dict[str, float]:
        """`logit_scale` (a logarithm) and `logit_bias` of the contrastive loss, those that it has."""
        return {name: float(self.tensors[name].reshape(())) for name in of_part("logit_scale", self.tensors)}


def of_part(part: str, names: Iterable[str]) -> list[str]:
    """Those of the names that belong to a part."""
    return [name for name in names if name.startswith(PARTS[part])]


def read_tensors(file: Path) -> dict[str, Any]:
    """What a `.safetensors` holds, or any file of `torch.save` that has only tensors and plain values.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is truncated, of another kind, or holds pickled objects.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of weights")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{file}: no readable safetensors file ({error}); is it whole?") from error
    except Exception as error:
        raise unreadable(file, error) from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: found a {type(found).__name__}; expected a dict of tensors")
    return found


def check_tensors(tensors: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """The same in float32. Raises ValueError for one that is not finite, naming it."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{origin}: {name} has values that are not finite (NaN or infinity)")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def unreadable(file: str | Path, error: Exception) -> Exception:
    """What to raise where `torch.load` fails, which may advise to run the code that a file holds."""
    if isinstance(error, OSError):
        return error
    foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
    reason = f"it holds {foreign[1]}, and reading that can run code" if foreign else "another kind of file, or damaged"
    return ValueError(f"{file}: not a readable checkpoint ({reason})")
