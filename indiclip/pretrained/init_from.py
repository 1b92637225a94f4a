"""Pretrained weights into an encoder: strict, counted, and with a word for whatever is converted."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from indiclip.names import check_choice
from indiclip.pretrained.build import build, naming
from indiclip.pretrained.convert import fit_tensor
from indiclip.pretrained.read import read_weights
from indiclip.pretrained.traits import differing_traits
from indiclip.pretrained.weights import PART_OF, PARTS, POOLS, Weights, of_part, to_fill


@dataclass
class InitFrom:
    """Weights that an encoder begins with.

    Args:
        weights: A run or checkpoint of ours, a folder, file or name of another library; see
            `indiclip.pretrained.read.read_weights`.
        parts: Which of `image`, `text`, `projections` and `logit_scale` to take; None is all that it has.
        allow: Names of tensors (with `*`) that may stay as they were initialised, by our names, or be left unused, by
            the source's or ours. Any other such tensor is an error. `image_pool*` and `text_pool*` are also what allows
            the encoder to pool in another way than the source.
    """

    weights: str
    parts: list[str] | None = None
    allow: list[str] = field(default_factory=list)


class InitialWeights:
    """All of `model.encoder.init_from`, read once. Of a part that several have, the last counts.

    Raises:
        FileNotFoundError, ValueError: One cannot be read, or lacks a part.
    """

    def __init__(self, items: Sequence[InitFrom]) -> None:
        self._of: dict[str, tuple[InitFrom, Weights]] = {}
        self._read: list[Weights] = []
        for number, item in enumerate(items):
            key = f"model.encoder.init_from[{number}]"
            weights = read_weights(item.weights).merged()
            self._read.append(weights)
            if item.parts is not None and not item.parts:
                raise ValueError(f"{key}.parts: found none; expected some of {', '.join(weights.parts)}")
            for part in item.parts or weights.parts:
                check_choice(f"{key}.parts", part, PARTS)
                if part not in weights.parts:
                    raise ValueError(f"{key}: {item.weights} has no {part}; it has {', '.join(weights.parts)}")
                self._of[part] = item, weights

    def config(self) -> dict[str, Any]:
        """The encoder's arguments that come along; objects are `{class_path, init_args}`."""
        found = {}
        for name, part in PART_OF.items():
            if part in self._of and name in (config := self._of[part][1].config):
                found[name] = config[name]
        return found

    def parts(self, names: Iterable[str]) -> dict[str, Any]:
        """These arguments, as objects."""
        config = self.config()
        found: dict[str, Any] = {}
        for name in names:
            if name in config:
                found |= build({name: config[name]}, self._of[PART_OF[name]][1].origin)
        return found

    def fill(self, encoder: nn.Module) -> list[str]:
        """Load them. Returns what was done, a line for each source.

        Raises:
            ValueError: A tensor does not fit, stayed initial or unused and `allow` does not name it, or the model
                computes something else than the source's: another activation, epsilon, number of heads.
        """
        own = encoder.state_dict()
        lines = []
        for weights in self._read:
            parts = [part for part, (_, other) in self._of.items() if other is weights]
            if parts:
                item, _ = self._of[parts[0]]
                try:
                    lines.append(_fill(encoder, own, weights, parts, item.allow))
                except ValueError as error:
                    raise ValueError(f"model.encoder.init_from: {error}") from error
            else:
                lines.append(f"nothing from {weights.origin}: later weights have all of its parts")
        for part in PARTS:
            if part not in self._of and (names := of_part(part, own)):
                lines.append(f"{len(names)} tensors ({part}) stay initial: no weights have them")
        encoder.load_state_dict(own)
        return lines

    def logits(self) -> dict[str, float]:
        """Those of the source of `logit_scale`, see `Weights.logits`."""
        return self._of["logit_scale"][1].logits() if "logit_scale" in self._of else {}


def fill(encoder: nn.Module, weights: Weights) -> None:
    """Load all of a model into the encoder that was built from its configuration.

    Raises:
        ValueError: A tensor is missing, has no place or another shape.
    """
    own = encoder.state_dict()
    _fill(encoder, own, weights, [part for part in PARTS if part != "logit_scale"])
    encoder.load_state_dict(own)


def _fill(
    encoder: nn.Module,
    own: dict[str, Tensor],
    weights: Weights,
    parts: Sequence[str],
    allow: Sequence[str] | None = None,
) -> str:
    """Put a source's tensors into `own`; for the errors see `InitialWeights.fill`. Of `allow`, None is where nobody can
    say it: where the encoder is the source's own.
    """
    hints = ["`allow` names those that may"] if allow is not None else []
    allow = allow or ()
    weights = weights.for_encoder(encoder, parts)
    targets = [name for part in parts for name in to_fill(weights, part, own)]
    sources = [name for part in parts for name in of_part(part, weights.tensors) if part != "logit_scale"]
    notes = list(weights.notes)
    missing = [name for name in targets if name not in weights.tensors]
    unused = [*weights.unused, *(name for name in sources if name not in own)]
    for name in sources:
        if name in own:
            with naming(weights.origin, f"{name} does not fit"):
                own[name], note = fit_tensor(name, weights.tensors[name], own[name], weights.origin)
            notes += [note] if note else []
    pools = _other_pools(encoder, weights, parts, allow)
    for kind, names in {"stay initial": missing, "are unused": unused}.items():
        wrong = [name for name in names if not _is_allowed(name, allow)]
        if wrong:
            raise ValueError(
                "; ".join([f"{weights.origin}: {len(wrong)} tensors {kind}: {_listed(wrong)}", *hints, *pools])
            )
    differing = differing_traits(encoder, weights.config, parts) + pools
    if differing:
        raise ValueError(f"{weights.origin}: computes something else: {'; '.join(differing)}")
    taken = len([name for name in sources if name in own]) + len(weights.logits() if "logit_scale" in parts else ())
    said = [f"{taken} tensors ({', '.join(parts)}) from {weights.origin}"]
    said += [f"{len(missing)} stay initial ({_listed(missing)})"] if missing else []
    said += [f"{len(unused)} unused ({_listed(unused)})"] if unused else []
    idle = [pattern for pattern in allow if not any(_is_allowed(n, [pattern]) for n in (*missing, *unused, *POOLS))]
    said += [f"`allow` matches nothing by {', '.join(idle)}"] if idle else []
    said += [f"{len(weights.ignored)} left out ({_listed(weights.ignored)})"] if weights.ignored else []
    return "; ".join(said + notes)


def _other_pools(encoder: nn.Module, weights: Weights, parts: Sequence[str], allow: Sequence[str]) -> list[str]:
    """In words, where the encoder pools in another way than the source and `allow` does not say that it may."""
    found = []
    for pool, argument in POOLS.items():
        own, theirs = getattr(encoder, pool).kind, weights.config.get(argument)
        if PART_OF[argument] in parts and theirs not in (None, own) and not _is_allowed(pool, allow):
            found.append(f"{argument}: found {own}, the source has {theirs} (`allow: [{pool}*]`)")
    return found


def _is_allowed(name: str, allow: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in allow)


def _listed(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
