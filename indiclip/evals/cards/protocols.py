"""Protocols by their class paths, or by the names of those that come with IndiCLIP; and cards with more of them."""

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from inspect import Parameter, isabstract, signature
from typing import Any

from indiclip.evals import protocols as room
from indiclip.evals.cards.classes import Card
from indiclip.evals.cards.objects import object_of
from indiclip.evals.protocols.protocol import Protocol
from indiclip.names import check_choice


def protocol_of(entry: Any, where: str) -> Protocol:
    """The protocol that a class path or the name of one of ours stands for, with its arguments if any.

    Raises:
        ValueError: It is none; begins with `where`.
    """
    is_mapping = isinstance(entry, dict) and "class_path" in entry
    name = entry["class_path"] if is_mapping else entry
    if isinstance(name, str) and "." not in name:
        ours = protocol_classes()
        check_choice(where, name, ours)
        path = f"{ours[name].__module__}.{ours[name].__qualname__}"
        entry = {**entry, "class_path": path} if is_mapping else path
    protocol: Protocol = object_of(entry, where, Protocol)
    return protocol


def with_protocols(cards: Sequence[Card], names: Sequence[str]) -> list[Card]:
    """The cards, each with those of these protocols that it lacks and whose required fields it knows.

    Args:
        cards: The main protocol of each stays.
        names: Class paths, or short names such as `few_shot`.

    Raises:
        ValueError: There is no such protocol, or it fits none of the cards.
    """
    for name in dict.fromkeys(names):
        if "." not in name:
            # A command's words have no place for arguments.
            free = [own for own, one in protocol_classes().items() if not required_arguments(one)]
            check_choice("--protocols", name, free)
        protocol = protocol_of(name, "--protocols")
        fits = [protocol.required_fields <= card.required_fields for card in cards]
        if not any(fits):
            lacking = ", ".join(sorted(protocol.required_fields - {"class"})) or "class"
            raise ValueError(f"--protocols: {name} needs {lacking} of each image, which none of the cards has")
        cards = [_added(card, protocol) if fit else card for card, fit in zip(cards, fits, strict=True)]
    return list(cards)


def _added(card: Card, protocol: Protocol) -> Card:
    there = any(protocol.name == other.name for other in card.protocols)
    return card if there else replace(card, protocols=(*card.protocols, protocol))


@cache
def protocol_classes() -> dict[str, type[Protocol]]:
    """Name of each protocol that comes with IndiCLIP -> its class."""
    modules = [
        importlib.import_module(f"{room.__name__}.{found.name}") for found in pkgutil.iter_modules(room.__path__)
    ]
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    ours = {one for one in classes if issubclass(one, Protocol) and not isabstract(one)}
    return dict(sorted((one.name if required_arguments(one) else one().name, one) for one in ours))


def required_arguments(protocol: type[Protocol]) -> list[str]:
    """The names of those that it cannot be made without, as `--protocols` would."""
    return [name for name, one in signature(protocol).parameters.items() if one.default is Parameter.empty]
