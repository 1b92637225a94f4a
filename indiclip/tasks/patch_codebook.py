"""A k-means codebook of image patches, learned while a run trains: the words that masked image modelling predicts.

Codes follow exponential averages of the patches nearest to them (van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete
Representation Learning", NeurIPS 2017, arXiv:1711.00937, appendix A.1), over all ranks and micro-batches of a step. A
code that few patches are nearest to is drawn anew from the step's patches (as Dhariwal et al., "Jukebox",
arXiv:2005.00341, section 3.1), so that the first step gives the first codes.

Shape letters: see `indiclip.types`; C codes, K patches, R micro-batches, J patches of each image that may become codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from indiclip.distributed import dealt_rows, sum_over_ranks
from indiclip.moving_average import update_averages
from indiclip.names import check_range, check_whole
from indiclip.types import in_float32

CANDIDATES = 4  # J
_DEAD = 0.03  # share of the mean number of patches, below which a code is drawn anew with twice as many


@dataclass(frozen=True)
class Codebook:
    """Options of a codebook.

    Args:
        size: Codes.
        decay: Share of the old average in a step.
        until: The share of the run's steps until which codes move; then targets stay what they are.
    """

    size: int = 512
    decay: float = 0.99
    until: float = 1.0

    def check(self, key: str) -> None:
        """Raise ValueError for a number out of its range; `key` is that of the options in the YAML."""
        check_whole({f"{key}.size": self.size}, 2)
        check_range({f"{key}.decay": self.decay}, 0, 1, without=1)
        check_range({f"{key}.until": self.until}, 0, 1, without=0)


class PatchCodebook(nn.Module):
    """Patches -> the numbers of the nearest codes.

    Args:
        options: See there.
        mean_P: Of pixels in 0..255, with which patches are normalised.
        std_P: As `mean_P`.

    Attributes:
        sums_CP: Average sums of the patches of each code.
        counts_C: Average numbers of them.
        steps: Of which codes were learned.
    """

    sums_CP: Tensor
    counts_C: Tensor
    steps: Tensor
    mean_P: Tensor
    std_P: Tensor

    def __init__(self, options: Codebook, mean_P: Tensor, std_P: Tensor) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("sums_CP", torch.zeros(options.size, len(mean_P)))
        self.register_buffer("counts_C", torch.zeros(options.size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean_P", mean_P.clone(), persistent=False)
        self.register_buffer("std_P", std_P.clone(), persistent=False)
        self._seen: tuple[Tensor, Tensor] | None = None
        self._has_codes = False

    @property
    def is_learned(self) -> Tensor:
        """Whether there are codes, a bool scalar on the device: not in the first step."""
        return self.steps > 0

    @property
    def codes_CP(self) -> Tensor:
        """In normalised pixels."""
        return self.sums_CP / self.counts_C.clamp(min=1e-12)[:, None]

    def normalise(self, patches: Tensor) -> Tensor:
        """uint8 pixels (..., P) -> zero mean and unit variance."""
        return (patches.to(self.mean_P.dtype) - self.mean_P) / self.std_P

    def pixels(self, codes_K: Tensor) -> Tensor:
        """uint8 patches (K, P) that the codes stand for."""
        return (self.codes_CP[codes_K] * self.std_P + self.mean_P).round().clamp(0, 255).to(torch.uint8)

    @torch.no_grad()
    def forward(self, patches_KP: Tensor) -> Tensor:
        """The codes (K,) of normalised patches: the nearest by Euclidean distance."""
        with torch.autocast(patches_KP.device.type, enabled=False):
            codes_CP = self.codes_CP
            distances_KC = codes_CP.square().sum(1) - 2 * in_float32(patches_KP) @ codes_CP.T
        return distances_KC.argmin(1)

    @torch.no_grad()
    def sums(self, patches_KP: Tensor, codes_K: Tensor) -> Tensor:
        """Of the patches of each code, the sum and, last, the number: (C, P + 1)."""
        one_K1 = torch.ones_like(patches_KP[:, :1])
        sums_CQ = patches_KP.new_zeros(self.options.size, patches_KP.shape[1] + 1)
        return sums_CQ.index_add_(0, codes_K, torch.cat([patches_KP, one_K1], 1))

    def see(self, sums_RCQ: Tensor, candidates_BJP: Tensor) -> None:
        """Keep what `update` will read of a step's patches.

        Args:
            sums_RCQ: As of `sums`.
            candidates_BJP: Some normalised patches of each image, of which codes may be drawn.
        """
        self._seen = sums_RCQ.sum(0).detach(), candidates_BJP.detach()

    @torch.no_grad()
    def update(self, progress: float, made: Tensor) -> None:
        """Move the codes, by what was seen last on all ranks. A collective.

        Args:
            progress: The share of the run's steps that are done.
            made: As of `indiclip.head.Head.after_step`.
        """
        if self._seen is None:
            return
        sums_CQ, candidates_BJP = self._seen
        self._seen = None
        if progress > self.options.until:  # a head that begins later has no codes yet
            self._has_codes = self._has_codes or bool(self.is_learned)  # waits for the device, once
            if self._has_codes:
                return
        sums_CQ = sum_over_ranks(sums_CQ).to(self.sums_CP.dtype)
        update_averages([self.sums_CP, self.counts_C], [sums_CQ[:, :-1], sums_CQ[:, -1]], self.options.decay, made)
        # The same on any number of ranks: the first patch of each image of the step, then the second, ...
        drawn_MP = dealt_rows(candidates_BJP.transpose(0, 1).flatten(0, 1)[: self.options.size])
        mean = self.counts_C.mean().clamp(min=1e-12)
        dead_C = ((self.counts_C < _DEAD * mean) | ~self.is_learned) & (made > 0)
        drawn_CP = drawn_MP[(dead_C.cumsum(0) - 1).clamp(min=0) % len(drawn_MP)].to(self.sums_CP.dtype)
        count = 2 * _DEAD * mean
        self.sums_CP.copy_(torch.where(dead_C[:, None], drawn_CP * count, self.sums_CP))
        self.counts_C.copy_(torch.where(dead_C, count, self.counts_C))
        self.steps += made > 0
