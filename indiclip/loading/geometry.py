"""How the fields of a sample move with its image, by their kind in `indiclip.types.Sample`: no field is known by name.

The geometry is torchvision's (transforms v2 on tv_tensors): what moves is wrapped in the tv_tensor of its kind. A box
that is rotated, sheared or bent becomes the upright box around it, which is larger than the object.
"""

from numbers import Integral
from typing import Any, cast, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from indiclip.images import TURNS
from indiclip.loading.kernels import ExactMask, SmoothMask, as_boxes, plain
from indiclip.names import did_you_mean, shorten
from indiclip.preprocessing import Size
from indiclip.types import FIELDS, Sample

Region = tuple[int, int, int, int]  # top, left, height, width
Fields = dict[str, Any]

# What a field is made of. NumPy has whole numbers of its own.
_TYPES: dict[str, Any] = {
    name: {Any: np.ndarray, int: Integral}.get(hint, get_origin(hint) or hint)
    for name, hint in get_type_hints(Sample).items()
}


_OBJECTS = {
    name for name, field in FIELDS.items() if field.of or field.kind in ("boxes", "points", "areas", "masks", "map")
}

# Of the square that an area is: in its sides, from its middle.
_CORNERS = torch.tensor([[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5]])


def without_objects(sample: Sample) -> Sample:
    """The sample without what lies at places of its image, or belongs to that."""
    return cast(Sample, {name: value for name, value in sample.items() if name not in _OBJECTS})


def wrap(sample: Sample, canvas: Size) -> Fields:
    """The fields of a sample, without its image, as tensors that move.

    Args:
        canvas: (height, width) of the frame that its annotations are in.

    Raises:
        ValueError: A field that is not declared, or an array of another shape than its kind has.
    """
    key, fields = sample["key"], Fields()
    for name, value in sample.items():
        if name not in FIELDS:
            raise ValueError(
                f"sample {key!r} has a field {name!r}, which indiclip.types.Sample does not declare"
                f"{did_you_mean(name, FIELDS)}"
            )
        if value is not None and FIELDS[name].kind != "image":
            fields[name] = _wrap(name, value, canvas, key)
    for name, value in fields.items():
        owner = FIELDS[name].of
        if owner and (owner not in fields or fields[owner].shape[0] != value.shape[0]):
            found = f"has {len(fields[owner])}" if owner in fields else "is missing"
            raise ValueError(f"{name} of sample {key!r} has {len(value)} rows, but {owner} {found}")
        if FIELDS[name].kind == "areas":
            fields[name] = _squares(value, fields[owner])
    return fields


def _squares(area_M: Tensor, boxes: Tensor) -> Any:
    """Areas as three corners, one row after the other, of squares in the middle of their boxes.

    What makes of them is exact where lines stay straight and parallel; a perspective one is taken at the box.
    """
    middle_M2 = (plain(boxes)[:, :2].double() + plain(boxes)[:, 2:]) / 2
    corners_M32 = middle_M2[:, None] + area_M.double().sqrt()[:, None, None] * _CORNERS
    return as_boxes(corners_M32.reshape(-1, 2).repeat(1, 2), boxes.canvas_size, None)  # type: ignore[attr-defined]


def _wrap(name: str, value: Any, canvas: Size, key: str) -> Any:
    field = FIELDS[name]
    if not isinstance(value, _TYPES[name]):
        raise ValueError(f"{name} of sample {key!r}: found {shorten(value)}; expected {_TYPES[name].__name__}")
    if field.kind in ("text", "scalar"):
        return value
    tensor = torch.from_numpy(value)
    if field.kind in ("boxes", "points"):
        # Points are boxes without an extent: v2's KeyPoints count from the pixel's middle, boxes and our points from
        # its edge. They are not clamped, because a clamped point would lie on the border instead of outside.
        is_box = field.kind == "boxes"
        corners = tensor.reshape(-1, 4) if is_box else tensor.reshape(-1, 2).repeat(1, 2)
        return as_boxes(corners, canvas, "soft" if is_box else None)
    if field.kind in ("rows", "areas"):
        return tensor
    expected = (*value.shape[:1], *canvas) if field.kind == "masks" else canvas
    if value.shape != expected:
        raise ValueError(f"{name} of sample {key!r}: found shape {value.shape}, expected {expected}, as its image")
    return (SmoothMask if field.bilinear else ExactMask)(tensor if field.kind == "masks" else tensor[None])


def turn(value: Any, orientation: int) -> Any:
    """Turn what moves with an image upright, from EXIF's `orientation`."""
    if orientation == 1 or not isinstance(value, tv_tensors.TVTensor):
        return value
    transpose, left_right, top_bottom = TURNS[orientation]
    if transpose and isinstance(value, tv_tensors.BoundingBoxes):
        swapped = plain(value)[:, [1, 0, 3, 2]]
        value = tv_tensors.wrap(swapped, like=value, canvas_size=value.canvas_size[::-1])
    elif transpose:
        value = tv_tensors.wrap(plain(value).transpose(-1, -2), like=value)
    if left_right:
        value = TF.horizontal_flip(value)
    return TF.vertical_flip(value) if top_bottom else value


def move(value: Any, region: Region, size: Size) -> Any:
    """A field of a part of the image at another size."""
    if not isinstance(value, tv_tensors.TVTensor):
        return value
    if region[2:] == tuple(TF.get_size(value)):
        return value if region[2:] == size else TF.resize(value, list(size), antialias=True)
    return TF.resized_crop(value, *region, list(size), antialias=True)


def drop_outside(fields: Fields, size: Size) -> Fields:
    """Remove what an augmentation moved out of the image, from all fields that have a row for it."""
    edge = torch.tensor([size[1], size[0]])
    kept: dict[str, Tensor] = {}
    # Of a point, which has no extent, the far edge is inside: mirroring moves the near one there, `unwrap` it back.
    shows = {"boxes": torch.lt, "points": torch.le}
    for name, value in fields.items():
        if is_shown := shows.get(FIELDS[name].kind):
            low, high = plain(value)[:, :2], plain(value)[:, 2:]
            kept[name] = is_shown(low.clamp(min=0), torch.minimum(high, edge)).all(1)
    for name, value in fields.items():
        field = FIELDS[name]
        if field.into:
            kept[field.of] = kept[field.of] & kept[field.into][value]
            fields[name] = (kept[field.into].cumsum(0) - 1)[value]  # the rows that stay are numbered anew
    for name, value in fields.items():
        if (rows := kept.get(FIELDS[name].of or name)) is None:
            continue
        if FIELDS[name].kind == "areas":
            rows = rows.repeat_interleave(len(_CORNERS))
        fields[name] = value[rows]
        if isinstance(value, tv_tensors.TVTensor):  # indexing makes a plain tensor of it, which v2 leaves as it is
            fields[name] = tv_tensors.wrap(fields[name], like=value)
    return fields


def unwrap(fields: Fields, size: Size) -> Fields:
    """Plain tensors in the final image: points on its far edges are moved to the last number before them."""
    found = {name: plain(value) for name, value in fields.items()}
    for name, value in found.items():
        if FIELDS[name].kind == "points":
            edge = torch.tensor([size[1], size[0]], dtype=value.dtype)
            found[name] = torch.minimum(value[:, :2].clamp(min=0), torch.nextafter(edge, torch.zeros_like(edge)))
        elif FIELDS[name].kind == "areas":
            corner_M2, *others = value[:, :2].reshape(-1, 3, 2).unbind(1)
            (x1_M, y1_M), (x2_M, y2_M) = ((other_M2 - corner_M2).unbind(1) for other_M2 in others)
            found[name] = (x1_M * y2_M - x2_M * y1_M).abs().float()
    return found
