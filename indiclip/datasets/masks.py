"""Masks of COCO files: polygons and run-length codes.

pycocotools decodes them in C and checks nothing: a code that is too short leaves memory unwritten, a number that is too
large takes gigabytes. So every code is checked when the file is read.
"""

import math
from typing import Any

import numpy as np
from pycocotools import mask as rle

from indiclip.datasets.tables import is_number
from indiclip.names import shorten

_MOST_BITS = 40  # of a number in a compressed code
_MOST_BYTES = 2**30  # of all masks of an image; a few letters of code can say them all


def check_mask(code: Any, size_hw: list[int], where: str) -> Any:
    """A `segmentation`: polygons, or a run-length code of the image's size.

    Returns:
        The code without the polygons of fewer than three corners, which have no area.

    Raises:
        ValueError: It cannot be decoded, or none of its polygons has an area; begins with `where`.
    """
    if not isinstance(code, list):
        check_run_lengths(code, size_hw, f"{where}: segmentation", "polygons or a run-length code")
        return code
    longest = max(size_hw)
    for polygon in code:
        if (
            not isinstance(polygon, list)
            or len(polygon) % 2
            or not all(map(is_number, polygon))
            or not all(map(math.isfinite, polygon))
        ):
            raise ValueError(f"{where}: a polygon is {shorten(polygon)}; expected [x1, y1, x2, y2, ...]")
        if polygon and not -longest <= min(polygon) <= max(polygon) <= 2 * longest:
            raise ValueError(f"{where}: a polygon reaches from {min(polygon):g} to {max(polygon):g}, out of its image")
    polygons = [polygon for polygon in code if len(polygon) >= 6]
    if any(code) and not polygons:
        raise ValueError(f"{where}: no polygon of {shorten(code)} has three corners; expected one, or an empty list")
    return polygons


def check_run_lengths(code: Any, size_hw: list[int], where: str, expected: str = "a run-length code") -> None:
    """A run-length code `{size, counts}`, its counts a list or COCO's compressed text.

    Raises:
        ValueError: Another size, or runs that do not add up to it; begins with `where`.
    """
    if not isinstance(code, dict) or code.get("size") != size_hw or "counts" not in code:
        found = f"of size {shorten(code.get('size'))}" if isinstance(code, dict) and "counts" in code else shorten(code)
        raise ValueError(f"{where} {found}; expected {expected} of size {size_hw}")
    counts = code["counts"]
    runs = _runs(counts, where) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        raise ValueError(f"{where}: counts is {shorten(runs)}; expected whole numbers from 0")
    if sum(runs) != size_hw[0] * size_hw[1]:
        raise ValueError(f"{where}: the runs cover {shorten(sum(runs))} pixels; expected {size_hw[0] * size_hw[1]}")


def check_room(num_masks: int, height: int, width: int) -> None:
    """Before masks of one image are decoded.

    Raises:
        ValueError: They would take more memory than an image may.
    """
    if num_masks * height * width > _MOST_BYTES:
        raise ValueError(f"{num_masks} masks of {width}x{height} pixels; expected {_MOST_BYTES:,} pixels at most")


def decode_mask(code: Any, size_hw: tuple[int, int]) -> np.ndarray:
    """uint8 (height, width) of a code that `check_mask` passed."""
    if isinstance(code, list):
        empty = np.zeros(size_hw, np.uint8)
        return np.asarray(rle.decode(rle.merge(rle.frPyObjects(code, *size_hw)))) if code else empty
    code = code | {"size": list(size_hw)}  # whole numbers: C takes no 20.0
    packed = rle.frPyObjects(code, *size_hw) if isinstance(code["counts"], list) else code
    return np.asarray(rle.decode(packed))


def _runs(text: str, where: str) -> list[int]:
    """Run lengths of COCO's compressed text: five bits a letter, the lowest first, with a bit that says whether the
    number goes on; from the fourth number on it is the difference from the last but one."""
    runs: list[int] = []
    value = shift = 0
    for letter in text.encode():
        bits = letter - 48
        if not 0 <= bits < 64 or shift > _MOST_BITS:
            raise ValueError(f"{where}: counts is {shorten(text)}; expected COCO's compressed run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError(f"{where}: counts ends in the middle of a number")
    return runs
