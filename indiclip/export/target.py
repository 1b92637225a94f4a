"""What a way out has to say and do, and where the targets are found.

Shape letters: see `indiclip.types`.
"""

import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import indiclip.export
from indiclip.encoder import Encoder
from indiclip.names import check_choice
from indiclip.types import Images

_PREFIX = "to_"


class Loss(NamedTuple):
    """Something of an encoder that a target cannot carry.

    Attributes:
        reason: Which setting, what it is, what the target has.
        is_degree: The folder can be written, and how far it differs be measured. Else there is nothing to write.
    """

    reason: str
    is_degree: bool = False


@dataclass
class Reloaded:
    """The written folder, opened by the other library.

    Args:
        image: A batch of one size, or of several, as the other library's own use gives it: vectors or tokens by name.
        text: Unit-length embeddings; None where the target has no text tower.
        cannot: Case of `indiclip.export.parity` -> why the library cannot read such a batch, or changes such texts.
        ours: What `image` is compared with; None is the encoder's embeddings, as `embedding`.
        notes: What a user of the folder should know.
        reads_smaller: Whether images smaller than the canvas of a fixed tower are padded, as the encoder does it; else
            the canvas alone is compared.
        measured: More of what `parity.json` is to hold, outside of the bound.
    """

    image: Callable[[Images], dict[str, Tensor]]
    text: Callable[[list[str]], Tensor] | None = None
    cannot: dict[str, str] = field(default_factory=dict)
    ours: Callable[[Images], dict[str, Tensor]] | None = None
    notes: list[str] = field(default_factory=list)
    reads_smaller: bool = False
    measured: dict[str, Any] = field(default_factory=dict)


class Target(ABC):
    """A way out.

    Attributes:
        library_name: The Hugging Face hub's word for the library that opens it.
        bound: Largest difference between the two sides; an export that is further off is no export.
        libraries: Distributions whose versions the proof names.
        usage: Python lines that open the folder; `{out}` is its path.
    """

    library_name: str
    bound: float
    libraries: tuple[str, ...]
    usage: str

    @abstractmethod
    def check(self, encoder: Encoder) -> list[Loss]:
        """What would be lost; nothing where the way is lossless."""

    @abstractmethod
    def write(self, encoder: Encoder, folder: Path, place: Path) -> None:
        """Write all files but the card and the proof.

        Args:
            encoder: What `check` let pass: in evaluation mode, without batch norm of embeddings (see `fold.py`). Its
                `initial_logits` are those of its contrastive loss.
            folder: Exists and is empty.
            place: Where the folder will be in the end.
        """

    @abstractmethod
    def reload(self, encoder: Encoder, folder: Path) -> Reloaded:
        """Open the folder with the other library. Neither the network nor what is in memory is used for it."""


def target_names() -> list[str]:
    """All targets, by their files."""
    files = (module.name for module in pkgutil.iter_modules(indiclip.export.__path__))
    return sorted(name.removeprefix(_PREFIX) for name in files if name.startswith(_PREFIX))


def find_target(name: str, options: dict[str, Any] | None = None) -> Target:
    """Raises ValueError, with the nearest name, for one that there is not, or that has no such option."""
    check_choice("--to", name, target_names())
    found: type[Target] = importlib.import_module(f"indiclip.export.{_PREFIX}{name}").Target
    takes = inspect.signature(found).parameters
    for option in options or {}:
        if option not in takes:
            raise ValueError(f"--{option}: {name} has no such option")
    return found(**(options or {}))


def stretching_note(height: int, width: int) -> str:
    """What to know of the pixels that a folder's own preprocessing gives."""
    return f"its preprocessing stretches every image to {height} x {width} pixels; the run keeps the aspect"


def who_could(encoder: Encoder, but: str) -> str:
    """Which other targets take the encoder without a loss, in words."""
    names = [name for name in target_names() if name != but and not find_target(name).check(encoder)]
    return f"{', '.join(names)} can take it" if names else "no other target can take it without a loss"
