"""How far an exported folder is from the encoder, measured with the other library.

Shape letters: see `indiclip.types`.
"""

import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indiclip import __version__
from indiclip.encoder import Encoder
from indiclip.export.target import Reloaded, Target
from indiclip.patches import patchify, stack
from indiclip.types import Images

TEXTS = [
    "a photo of a kite",
    "Two brass lamps, and a drum!",
    "मसाला डोसा और चाय",
    "மூன்று பட்டங்கள்",
    "ایک پتنگ",
    "",
    " ".join(["a long row of small clay lamps on the steps of a river bank at dusk"] * 8),
]
# Case -> texts that are not as most are: libraries differ in what they do to them before a tokenizer reads them.
UNUSUAL_TEXTS = {
    "not in NFC": ["लड\u095cका", "cafe\u0301 \u0915\u095e\u0928"],
    "HTML entities and spaces": ["kite &amp; a  drum", "\tkite &amp;amp; a\n"],
}
_SEED = 0
_LAYERS = 48  # those of 12 blocks; a ViT-S of random weights is 8e-7 off in timm where positions are resampled


def own_grid(encoder: Encoder) -> tuple[int, int]:
    """Rows and columns of patches that the table of positions is made for, or of the canvas."""
    backbone = encoder.backbone
    if backbone.canvas_hw is not None:
        return backbone.canvas_hw[0] // backbone.patch_size, backbone.canvas_hw[1] // backbone.patch_size
    table: Tensor | None = getattr(backbone.vit.embeds, "pos_embed", None)  # type: ignore[union-attr]
    return (int(table.shape[1]), int(table.shape[2])) if table is not None and table.ndim == 4 else (16, 16)


def grids(encoder: Encoder) -> dict[str, list[tuple[int, int]]]:
    """Case -> rows and columns of patches of each image of a batch."""
    H, W = own_grid(encoder)
    own, less = (H, W), ((H + 1) // 2, (W + 1) // 2)
    return {
        "own grid": [own, own],
        "smaller": [less, less],
        "larger": [(H + less[0], W + less[1])] * 2,
        "not square": [(H, less[1]), (H, less[1])],
        "mixed sizes, padded": [own, less, (less[0], W)],
    }


def _cannot(encoder: Encoder, reloaded: Reloaded) -> dict[str, str]:
    """Case -> why it is not compared."""
    canvas_hw = encoder.backbone.canvas_hw
    if canvas_hw is None:
        return reloaded.cannot
    why = f"the tower has one size, {canvas_hw[0]} x {canvas_hw[1]} pixels"
    others = [case for case in grids(encoder) if case != "own grid"]
    return dict.fromkeys(["larger"] if reloaded.reads_smaller else others, why) | reloaded.cannot


def noise(sizes: list[tuple[int, int]], patch_size: int) -> Images:
    """Images of noise, of so many rows and columns of patches."""
    generator = torch.Generator().manual_seed(_SEED)
    prepared = []
    for H, W in sizes:
        size_hw = (H * patch_size, W * patch_size)
        pixels = torch.randint(0, 256, (3, *size_hw), dtype=torch.uint8, generator=generator)
        prepared.append({"patches": patchify(pixels, patch_size), "size_hw": size_hw, "scale": (1.0, 1.0)})
    return stack(prepared)


def bound(target: Target, encoder: Encoder) -> float:
    """The target's for up to twelve blocks of a ViT. Rounding adds up with depth: 24 may be twice as far."""
    layers = sum(isinstance(part, nn.Linear | nn.Conv2d) for part in encoder.backbone.modules())
    return target.bound * max(1.0, layers / _LAYERS)


@torch.no_grad()
def measure(target: Target, encoder: Encoder, reloaded: Reloaded) -> dict[str, Any]:
    """What `parity.json` holds: a row for each case, and whether all are within the bound."""
    ours = reloaded.ours or (lambda images: {"embedding": encoder.embed_image(images)})
    image: dict[str, Any] = {}
    cannot = _cannot(encoder, reloaded)
    for case, sizes in grids(encoder).items():
        if case in cannot:
            image[case] = {"cannot": cannot[case]}
        else:
            images = noise(sizes, encoder.backbone.patch_size)
            image[case] = {"grids": [list(size) for size in sizes]} | _compare(ours(images), reloaded.image, images)
    rows = [row for case in image.values() for row in case.values() if isinstance(row, dict)]
    record: dict[str, Any] = {"bound": bound(target, encoder), "image": image}
    if reloaded.text is not None:
        record["text"] = {}
        for case, texts in ({"usual": TEXTS} | UNUSUAL_TEXTS).items():
            if case in cannot:
                record["text"][case] = {"cannot": cannot[case]}
            else:
                rows.append(_row(encoder.embed_text(texts), reloaded.text(texts)))
                record["text"][case] = {"embedding": rows[-1]}
    # `not <=`, so that NaN is outside.
    record["largest_difference"] = max((row["difference"] for row in rows), key=lambda one: (one != one, one))
    record["within_bound"] = record["largest_difference"] <= record["bound"]
    record |= reloaded.measured
    record["notes"] = reloaded.notes
    record["versions"] = {"indiclip": __version__, "python": platform.python_version()}
    record["versions"] |= {name: version_of(name) for name in ("torch", *target.libraries)}
    return record


def version_of(library: str) -> str:
    """Of a distribution; of its module where that is another's (onnxruntime-gpu) or nobody's (a checkout)."""
    try:
        return version(library)
    except PackageNotFoundError:
        return str(getattr(sys.modules.get(library.removesuffix("_torch")), "__version__", "unknown"))


def _compare(
    ours: dict[str, Tensor], other: Callable[[Images], dict[str, Tensor]], images: Images
) -> dict[str, dict[str, float]]:
    theirs = other(images)
    return {name: _row(ours[name], theirs[name]) for name in theirs}


def _row(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Largest difference of a number (over the largest one, where that is more than 1), smallest cosine of a vector."""
    difference = (ours.float() - theirs.float()).abs().max() / ours.abs().max().clamp(min=1)
    cosine = F.cosine_similarity(ours.double(), theirs.double(), dim=-1).min()
    return {"difference": float(difference), "cosine": float(cosine)}
