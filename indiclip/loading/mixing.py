"""Mixup and CutMix of images of any size, in the loader: which images are mixed is the same on any number of ranks.

Image k of a rank's part of a batch is mixed with image k + half of the part. As ranks are dealt the samples of a batch
in turn, these two lie half of the whole batch apart, whatever the number of ranks. What is drawn is a function of their
seeds, which are functions of their places in the run.

As in timm's `mix_batch_variable_size` images overlap in their middles and no image is resized; here it is patches that
are mixed, so that none has to be put together again. Shape letters: N patches of an image, P numbers in a patch.
"""

import zlib
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from indiclip.loading.collate import Prepared
from indiclip.names import check_range

_COLUMNS = 2**20  # more than any image has, so that a row and a column are one number


@dataclass
class Mix:
    """How the images of a task are mixed with each other in training, two by two; its heads learn from both captions.

    Args:
        mixup: Images are blended, one's share drawn from Beta(mixup, mixup) (Zhang et al., ICLR 2018,
            arXiv:1710.09412); 0 is never.
        cutmix: A rectangle of whole patches comes from the other image, its area drawn from Beta(cutmix, cutmix) (Yun
            et al., ICCV 2019, arXiv:1905.04899); 0 is never. With both, one is drawn for each pair, with equal
            chances (as of timm's `Mixup` in its mode `pair`).
        prob: Share of the pairs that are mixed.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0

    def __post_init__(self) -> None:
        check_range({"data: mix.mixup": self.mixup, "data: mix.cutmix": self.cutmix})
        check_range({"data: mix.prob": self.prob}, 0, 1)

    def beside(self, other: "Mix") -> "Mix | None":
        """What has the kinds of both; None where they want the same kind, or `prob`, differently."""
        pairs = ((self.mixup, other.mixup), (self.cutmix, other.cutmix))
        if self.prob != other.prob or any(own and others and own != others for own, others in pairs):
            return None
        return Mix(self.mixup or other.mixup, self.cutmix or other.cutmix, self.prob)

    def __bool__(self) -> bool:
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)


def mix_pairs(samples: list[Prepared], mix: Mix) -> list[Prepared]:
    """This rank's samples of a batch, an even number, with `mix_partner` and `mix_share` (see `Sample`)."""
    half = len(samples) // 2
    pairs = [mix_two(first, second, mix) for first, second in zip(samples[:half], samples[half:], strict=True)]
    firsts = [first | {"mix_partner": i + half} for i, (first, _) in enumerate(pairs)]
    return [*firsts, *(second | {"mix_partner": i} for i, (_, second) in enumerate(pairs))]


def mix_two(first: Prepared, second: Prepared, mix: Mix) -> tuple[Prepared, Prepared]:
    """Each with a part of the other, and with `mix_share`, how much of it is its own."""
    rng = np.random.default_rng(zlib.crc32(f"mix:{first['random_seed']}:{second['random_seed']}".encode()))
    if rng.random() >= mix.prob:
        return first | {"mix_share": 1.0}, second | {"mix_share": 1.0}
    cuts = mix.cutmix > 0 and (mix.mixup == 0 or rng.random() < 0.5)
    share = float(rng.beta(mix.cutmix, mix.cutmix) if cuts else rng.beta(mix.mixup, mix.mixup))
    places = _cut(first, second, share, rng) if cuts else _overlap(first, second)[:2]
    if cuts:
        share = 0.0  # of the patches in the rectangle
    return _with(first, second, *places, share), _with(second, first, *places[::-1], share)


def _overlap(first: Prepared, second: Prepared) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The patches of both that lie on each other where their middles do, and row and column in the first."""
    (patches_NP, coords_N2), (_, other_N2) = first["patches"], second["patches"]
    patch_size = round(sqrt(patches_NP.shape[1] / 3))
    shift = [(own - other) // patch_size // 2 for own, other in zip(first["size_hw"], second["size_hw"], strict=True)]
    step = np.array([_COLUMNS, 1])
    # Negative columns would be those of another row.
    keys, others = coords_N2.numpy() + _COLUMNS // 2, other_N2.numpy() + _COLUMNS // 2 + shift
    _, at, at_other = np.intersect1d(keys @ step, others @ step, assume_unique=True, return_indices=True)
    return at, at_other, coords_N2.numpy()[at]


def _cut(first: Prepared, second: Prepared, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """As `_overlap`, in a rectangle of it that leaves about this share."""
    at, at_other, coords_M2 = _overlap(first, second)
    if len(at) == 0:  # so few patches were kept
        return at, at_other
    low, size = coords_M2.min(0), np.ptp(coords_M2, axis=0) + 1
    cut = (size * sqrt(1 - share)).astype(int)
    begin = low + rng.integers(0, size - cut + 1)
    inside = ((coords_M2 >= begin) & (coords_M2 < begin + cut)).all(1)
    return at[inside], at_other[inside]


def _with(own: Prepared, other: Prepared, at: np.ndarray, at_other: np.ndarray, share: float) -> Prepared:
    """A sample with patches of another laid over its own, which keep this share there."""
    patches_NP, coords_N2 = own["patches"]
    mixed_NP = patches_NP.clone()
    mixed_NP[at] = blend(patches_NP[at], other["patches"][0][at_other], share)
    kept = 1 - (1 - share) * len(at) / len(patches_NP)
    return own | {"patches": (mixed_NP, coords_N2), "mix_share": kept}


def blend(own: Tensor, other: Tensor, share: float) -> Tensor:
    """uint8, the nearest to share * own + (1 - share) * other."""
    return other.float().lerp(own.float(), share).round().to(torch.uint8)
