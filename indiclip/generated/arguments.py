"""Checks of what the generated data sets are asked for."""

from __future__ import annotations

from collections.abc import Iterable

from indiclip.names import did_you_mean


def must_be_one_of(argument: str, found: object, allowed: Iterable[str]) -> None:
    """Raise ValueError that names the argument, what was found, what is allowed and the nearest of it."""
    if found not in (allowed := list(allowed)):
        hint = did_you_mean(str(found), allowed)
        raise ValueError(f"{argument}: expected one of {', '.join(allowed)}; found {found!r}{hint}")


def must_be_at_least(least: int, **arguments: int) -> None:
    """Raise ValueError that names the argument which is less."""
    for name, value in arguments.items():
        if value < least:
            raise ValueError(f"{name}: expected a whole number from {least} up; found {value!r}")


def height_width(size: int | list[int], least: int) -> tuple[int, int]:
    """Of images: one number for square ones, or [height, width], each at least so many pixels."""
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= least for side in sides):
        expected = f"one number or [height, width], each at least {least} pixels"
        raise ValueError(f"size: expected {expected}; found {size!r}")
    return sides[0], sides[1]
