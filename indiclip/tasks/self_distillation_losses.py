"""Losses between a student and its own average, the teacher: DINO, iBOT and KoLeo, exact over ranks.

- DINO (Caron et al., ICCV 2021, arXiv:2104.14294): a crop's distribution over prototypes against that of another crop
  of the same image.
- iBOT (Zhou et al., ICLR 2022, arXiv:2111.07832): the same of a patch that the student does not see.
- KoLeo (Sablayrolles et al., ICLR 2019, arXiv:1806.03198): vectors spread over the sphere.
- Sinkhorn centring instead of a centre's average: SwAV (Caron et al., NeurIPS 2020, arXiv:2006.09882), DINOv2 (Oquab et
  al., TMLR 2024, arXiv:2304.07193).

All is computed in the type of what is given, which should be no less than float32. Shape letters: B images, G crops
that the teacher sees, S crops that the student sees, K prototypes, C numbers in a bottleneck, R rows of any kind.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indiclip.distributed import all_reduce, rank_and_world, rows_of_all_ranks, sum_over_ranks

Centring = Literal["sinkhorn", "mean"]


class Projector(nn.Module):
    """Vectors -> points on a sphere, and their cosines to prototypes on it, which are the logits.

    The last layer of DINO's head with its weight norm at 1: rows of `prototypes_KC` are normalised where they are used.

    Args:
        width: Of the vectors.
        hidden_dim: Of the layers between.
        bottleneck_dim: C.
        num_prototypes: K.
        num_layers: Of the perceptron, 2 or more.
    """

    def __init__(
        self, width: int, hidden_dim: int, bottleneck_dim: int, num_prototypes: int, num_layers: int = 3
    ) -> None:
        super().__init__()
        widths = [width, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)  # as DINO
                nn.init.zeros_(layer.bias)
        self.prototypes_KC = nn.Parameter(torch.randn(num_prototypes, bottleneck_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., C), before they are normalised."""
        out: Tensor = self.layers(x)
        return out

    def units(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Points (..., C), as `forward` gives them, and the prototypes (K, C), all at length 1."""
        return F.normalize(points, dim=-1), F.normalize(self.prototypes_KC.to(points.dtype), dim=-1)

    def logits(self, points: Tensor) -> Tensor:
        """(..., C), as `forward` gives them, -> (..., K) in -1..1."""
        unit, unit_KC = self.units(points)
        return unit @ unit_KC.T


@torch.no_grad()
def sinkhorn(logits_RK: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """The teacher's distributions, such that all prototypes are used about equally often by the rows of all ranks.

    Alternately each prototype's share of all rows, and each row, is made to sum to a constant; the last is each row, to
    1. How many rows a rank has may differ; it may have none. Logarithms, so that no temperature is too low.

    Returns:
        (R, K), rows sum to 1.
    """
    log_RK = logits_RK / temperature
    for _ in range(iterations):
        log_RK = log_RK - _log_sum_of_rows(log_RK)
        log_RK = log_RK.log_softmax(-1)
    return log_RK.exp()


def _log_sum_of_rows(log_RK: Tensor) -> Tensor:
    """log of the sum of exp over the rows of all ranks, (K,)."""
    lowest_1K = log_RK.new_full((1, log_RK.shape[1]), torch.finfo(log_RK.dtype).min)
    highest_K = all_reduce(torch.cat([log_RK, lowest_1K]).amax(0), "max")
    return sum_over_ranks((log_RK - highest_K).exp().sum(0)).log() + highest_K


class Targets(nn.Module):
    """The teacher's logits -> what the student is to predict, centred so that no prototype takes all.

    Args:
        num_prototypes: K.
        temperature: Below the student's, so that targets are sharper.
        centring: `sinkhorn`; or `mean`, a softmax of what is left of the logits without their running mean over the
            rows of all ranks (DINO).
        momentum: Share of the old mean.

    Attributes:
        centre_K: The running mean, of `mean`.
    """

    centre_K: Tensor

    def __init__(
        self, num_prototypes: int, temperature: float, centring: Centring = "sinkhorn", momentum: float = 0.9
    ) -> None:
        super().__init__()
        self.temperature, self.centring, self.momentum = temperature, centring, momentum
        if centring == "mean":
            self.register_buffer("centre_K", torch.zeros(num_prototypes))
        self._mean_K: Tensor | None = None  # of the newest rows

    @torch.no_grad()
    def of(self, unit_RC: Tensor, unit_KC: Tensor) -> Callable[[slice], Tensor]:
        """What gives the targets of some rows, which sum to 1. A collective.

        Args:
            unit_RC: The teacher's points; their products with the prototypes are its logits.
            unit_KC: The prototypes.
        """
        if self.centring == "sinkhorn":
            return sinkhorn(unit_RC @ unit_KC.T, self.temperature).__getitem__
        sums = sum_over_ranks(torch.cat([unit_RC.sum(0), unit_RC.new_full((1,), len(unit_RC))]))
        self._mean_K = unit_KC @ (sums[:-1] / sums[-1:].clamp(min=1))
        return lambda rows: ((unit_RC[rows] @ unit_KC.T - self.centre_K) / self.temperature).softmax(-1)

    @torch.no_grad()
    def update(self, made: Tensor) -> None:
        """Move the running mean, where there is one, by the newest rows; for `made` see `Head.after_step`."""
        if self._mean_K is not None:
            moved_K = self.centre_K.lerp(self._mean_K.to(self.centre_K.dtype), 1 - self.momentum)
            # Not by a factor of 0: the rows may be what was not finite.
            self.centre_K.copy_(torch.where(made > 0, moved_K, self.centre_K))
            self._mean_K = None


def dino_loss(targets_BGK: Tensor, logits_BSK: Tensor, temperature: float, same_crops: bool) -> Tensor:
    """The mean cross entropy over images and over all pairs of a teacher's and another student's crop.

    Args:
        targets_BGK: The teacher's.
        logits_BSK: The student's.
        temperature: The student's.
        same_crops: Whether the first G of the student's crops are the teacher's, each of which is not compared with
            itself.
    """
    entropy_BGS = -torch.einsum("bgk,bsk->bgs", targets_BGK, (logits_BSK / temperature).log_softmax(-1))
    B, G, S = entropy_BGS.shape
    pairs = G * (S - same_crops)
    itself = entropy_BGS.diagonal(dim1=1, dim2=2).sum() if same_crops else 0
    return (entropy_BGS.sum() - itself) / (B * pairs)


def koleo_loss(x_BD: Tensor, eps: float = 1e-8) -> Tensor:
    """The mean of -log of the distance of each vector, at length 1, to the nearest one, of all ranks.

    DINOv2 looks for it among those of one GPU; here it does not depend on how many there are. 0 for a single vector.
    """
    x_BD = F.normalize(x_BD, dim=-1, eps=eps)
    all_GD = rows_of_all_ranks(x_BD)
    if len(all_GD) < 2:
        return x_BD.sum() * 0
    with torch.no_grad():
        itself_B = torch.arange(len(x_BD), device=x_BD.device) + rank_and_world()[0] * len(x_BD)
        cosines_BG = (x_BD @ all_GD.T).scatter(1, itself_B[:, None], -2.0)
        nearest_B = cosines_BG.argmax(1)
    distance_B = F.pairwise_distance(x_BD, all_GD[nearest_B], eps=eps)
    return -(distance_B + eps).log().mean()
