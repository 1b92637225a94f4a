"""DensePose annotations of COCO files -> the `dp_*` fields of a `Sample`.

In the file everything is relative to the person's box, stretched to 256x256: `dp_masks` are 14 run-length codes of
coarse body parts, `dp_x`, `dp_y` the annotated points (0 to 255), `dp_I` their part (1 to 24), `dp_U`, `dp_V` the place
on the part's surface (0 to 1). See Güler et al. 2018, "DensePose: Dense Human Pose Estimation In The Wild".
"""

from typing import Any

import numpy as np

from indiclip.datasets.masks import check_room, check_run_lengths, decode_mask
from indiclip.datasets.tables import is_number, xywh_to_xyxy
from indiclip.names import shorten
from indiclip.types import Sample

_GRID = 256
_NUM_PARTS = 24
_RANGES = {"dp_x": (0, 256), "dp_y": (0, 256), "dp_I": (1, _NUM_PARTS), "dp_U": (0, 1), "dp_V": (0, 1)}

NAMES = ("dp_masks", *_RANGES)


def person(entry: dict[str, Any], where: str) -> dict[str, Any] | None:
    """The checked DensePose part of an annotation, None where it has none.

    Raises:
        ValueError: A field is missing or of another length, or a value is out of range; begins with `where`.
    """
    if not any(name in entry for name in NAMES):
        return None
    for name in NAMES:
        if not isinstance(found := entry.get(name), list):
            raise ValueError(f"{where}: {name} is {shorten(found)}; expected a list, as of the other dp_ fields")
    lengths = {name: len(entry[name]) for name in _RANGES}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{where}: the dp_ fields have different lengths {lengths}")
    for name, (low, high) in _RANGES.items():
        if not all(map(is_number, entry[name])):
            raise ValueError(f"{where}: {name} is {shorten(entry[name])}; expected numbers")
        values = np.array(entry[name], dtype=np.float64)
        wrong = ~((values >= low) & (values <= high))  # NaN too
        if name == "dp_I":
            wrong |= values != values.round()
        if wrong.any():
            raise ValueError(f"{where}: {name} is {values[wrong][0]:g}; expected {low} to {high}")
    for code in entry["dp_masks"]:
        if code != []:
            check_run_lengths(code, [_GRID, _GRID], f"{where}: a dp_masks entry")
    return entry


def fields(people: list[dict[str, Any]], height: int, width: int) -> Sample:
    """The `dp_*` fields of an image, of people as `person` gives them.

    A point at (dp_x, dp_y) is (dp_x, dp_y) / 255 of the way through the box, as in DensePose's own evaluation.

    Raises:
        ValueError: The masks together are too large.
    """
    check_room(len(people), height, width)

    def of_points(*names: str) -> np.ndarray:
        """float64 (S, number of names): these values of all people's points."""
        values = [one for entry in people for one in zip(*(entry[name] for name in names), strict=True)]
        return np.array(values, dtype=np.float64).reshape(-1, len(names))

    # The box as annotated, because the points are relative to that; not the clipped one of the detection targets.
    boxes_xywh = np.array([entry["bbox"] for entry in people], dtype=np.float64).reshape(-1, 4)
    sizes_hw = np.tile([height, width], (len(people), 1))
    person = np.repeat(np.arange(len(people)), [len(entry["dp_x"]) for entry in people])
    points_xy = boxes_xywh[person, :2] + of_points("dp_x", "dp_y") / 255 * boxes_xywh[person, 2:]
    inside = np.nextafter(np.array([width, height], dtype=np.float32), np.float32(0))  # the edges are exclusive
    return Sample(
        dp_boxes_xyxy=xywh_to_xyxy(boxes_xywh, sizes_hw, ["dp"] * len(people), tolerance=np.inf),
        dp_masks=np.array([_body(entry, height, width) for entry in people], np.uint8).reshape(-1, height, width),
        dp_points_xy=points_xy.astype(np.float32).clip(0, inside),
        dp_person=person,
        dp_part=of_points("dp_I")[:, 0].astype(np.int64),
        dp_uv=of_points("dp_U", "dp_V").astype(np.float32),
    )


def _body(entry: dict[str, Any], height: int, width: int) -> np.ndarray:
    """uint8 (height, width): 1 where any of the coarse parts covers the pixel's middle."""
    grid = np.zeros((_GRID, _GRID), np.uint8)
    for code in entry["dp_masks"]:
        if code:
            grid |= decode_mask(code, (_GRID, _GRID))
    left, top, box_width, box_height = entry["bbox"]
    columns = (np.arange(width) + 0.5 - left) / box_width * _GRID
    rows = (np.arange(height) + 0.5 - top) / box_height * _GRID
    body = np.zeros((height, width), np.uint8)
    in_columns, in_rows = (columns >= 0) & (columns < _GRID), (rows >= 0) & (rows < _GRID)
    cells = grid[np.ix_(rows[in_rows].astype(int), columns[in_columns].astype(int))]
    body[np.ix_(in_rows, in_columns)] = cells
    return body
