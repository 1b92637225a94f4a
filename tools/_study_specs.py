"""What `scores` of a grid says: for each set of held-out data, protocols on embeddings or a probe on frozen tokens.

    cifar10:
      dataset: {class_path: ..., init_args: {...}}     # of the test part
      gallery: {class_path: ..., init_args: {...}}     # what kNN, linear probe and shots learn from
      protocols: [zero_shot, knn, linear_probe, shots, retrieval]
      templates: ["a photo of a {}"]
      max_tokens: 64

or which head is trained on the frozen encoder's tokens, and what of its metric counts:

    boxes:
      dataset: {...}
      train: {...}
      head: {class_path: heads.detection.Detection, init_args: {...}}
      metrics: {ap50: higher}
      steps: 200
      batch_size: 16
      lr: 1.0e-3
      max_tokens: 144

Names of scores are `<data>/<protocol>@<length>` for the shortest trained length and the full one, and
`<data>/<metric>`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from _study_protocols import PROTOCOLS, SHOTS
from _typed_yaml import typed
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from indiclip.names import check_choice, check_range, check_whole, did_you_mean

Direction = Literal["higher", "lower"]
DATA = ("dataset", "gallery", "train")
_NEED_GALLERY = ("knn", "linear_probe", "shots")
# Of protocols whose scores are not called as they are.
_SCORES = {"shots": [f"shots_{count}" for count in SHOTS], "retrieval": ["recall5/LANGUAGE"]}


@dataclass(frozen=True)
class EmbeddingScores:
    """Protocols on embeddings of `dataset`; see the module."""

    dataset: dict[str, Any]
    protocols: tuple[str, ...]
    gallery: dict[str, Any] | None = None
    templates: tuple[str, ...] = ("{}",)
    max_tokens: int = 256
    batch_size: int = 64

    def check(self, key: str) -> None:
        """Raise ValueError for what does not fit together."""
        for place, protocol in enumerate(self.protocols):
            check_choice(f"{key}.protocols[{place}]", protocol, PROTOCOLS)
            if protocol in _NEED_GALLERY and self.gallery is None:
                raise ValueError(f"{key}.gallery: found nothing; expected what {protocol} learns from")
        if not self.templates:
            raise ValueError(f"{key}.templates: found []; expected one or more texts such as 'a photo of a {{}}'")
        for place, template in enumerate(self.templates):
            if "{}" not in template:
                raise ValueError(f"{key}.templates[{place}]: found {template!r}; expected {{}} where the class stands")

    def names(self) -> list[str]:
        """Of its scores."""
        return [f"{name}@LENGTH" for protocol in self.protocols for name in _SCORES.get(protocol, [protocol])]


@dataclass(frozen=True)
class ProbeScores:
    """A head on frozen tokens, which learns from `train`; see the module."""

    dataset: dict[str, Any]
    train: dict[str, Any]
    head: dict[str, Any]
    metrics: dict[str, Direction]
    steps: int = 200
    batch_size: int = 64
    lr: float = 1e-3
    max_tokens: int = 256

    def check(self, key: str) -> None:
        """Raise ValueError for what does not fit together."""
        check_whole({f"{key}.steps": self.steps}, 1)
        check_range({f"{key}.lr": self.lr}, without=0)

    def names(self) -> list[str]:
        """Of its scores."""
        return [*self.metrics]


Spec = EmbeddingScores | ProbeScores


def read_specs(scores: Mapping[str, dict[str, Any]], build: bool = False) -> dict[str, Spec]:
    """The specifications of a grid, whose classes are there and take the arguments.

    Args:
        scores: Of the grid.
        build: Whether every dataset and head is built too, which tells missing data and wrong values.

    Raises:
        ValueError: What does not fit, naming its key.
    """
    specs: dict[str, Spec] = {}
    for name, tree in scores.items():
        key = f"scores.{name}"
        specs[name] = spec = typed(key, tree, ProbeScores if "head" in tree else EmbeddingScores)
        check_whole({f"{key}.max_tokens": spec.max_tokens, f"{key}.batch_size": spec.batch_size}, 1)
        spec.check(key)
        for part in (*DATA, "head"):
            if part in tree:
                made(f"{key}.{part}", tree[part], build)
    return specs


def check_score_names(key: str, names: tuple[str, ...], specs: Mapping[str, Spec]) -> None:
    """Raise ValueError for a name that no score can have. Which lengths and languages there are shows the first one."""
    valid = [f"{data}/{name}" for data, spec in specs.items() for name in spec.names()]
    for place, name in enumerate(names):
        if re.sub(r"@\d+$", "@LENGTH", re.sub(r"/recall5/\w+@", "/recall5/LANGUAGE@", name)) not in valid:
            near = did_you_mean(name, valid)
            raise ValueError(f"{key}[{place}]: found {name!r}{near}; expected one of {', '.join(valid)}")


def made(key: str, tree: dict[str, Any], build: bool = True) -> Any:
    """The dataset or head of a `class_path` and `init_args`.

    Args:
        key: Where it stands in the grid; its last part says which of the two it is.
        tree: With references to the environment, which are resolved.
        build: Else it is only looked whether the class is there and takes the arguments.

    Raises:
        ValueError: It cannot be made, naming its key.
    """
    from jsonargparse import ArgumentParser

    from indiclip.datasets.base import SampleDataset
    from indiclip.head import Head
    from indiclip.training.config_errors import explain

    before, _, part = key.rpartition(".")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{part}", type=Head if part == "head" else SampleDataset)
    try:
        parsed = parser.parse_object(OmegaConf.to_container(OmegaConf.create({part: tree}), resolve=True))
        return parser.instantiate_classes(parsed)[part] if build else None
    except argparse.ArgumentError as error:
        raise ValueError(f"{before}.{' '.join(explain(str(error)).split())}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{key}: {' '.join(str(error).split())}") from error
    except (ValueError, TypeError, OSError) as error:  # of the class
        raise ValueError(f"{key}: {' '.join(str(error).split())[:300]}") from error
