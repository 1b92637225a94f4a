"""How the losses of a step's heads become one: fixed weights, learned ones, or gradients that are made to agree.

`model.task_weights` names one of the strategies. Whatever it is, a head's own `weight` stays a factor of its loss.

Shape letters: K heads that take part in the step; P numbers of all parameters that more than one of them reaches.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from indiclip.autograd import with_gradients
from indiclip.distributed import mean_over_ranks
from indiclip.names import check_range
from indiclip.sharding import blocks
from indiclip.types import in_float32

Gradients = Mapping[str, Sequence[Tensor | None]]  # of each head, on each watched parameter; None where it reaches none


class TaskWeights(nn.Module):
    """The sum of the heads' losses, each times its `weight`; the base of all strategies.

    Attributes:
        logged: Numbers of the last step by head and name, without gradient, such as `detection/log_variance`.
        makes_gradients: Whether `total` makes all of the step's gradients, of those that it is given.
        compares_heads: Whether it does nothing with a single head.
    """

    makes_gradients = compares_heads = False

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, Tensor] = {}

    def bind(self, weights: Mapping[str, float]) -> None:
        """Create what is learned, for heads of these names and weights. Called once, before there is an optimizer."""
        self.weights = dict(weights)

    def learned_for(self, head: str) -> list[nn.Parameter]:
        """The parameters that only this head's part uses."""
        return []

    def part(self, head: str, loss: Tensor) -> Tensor:
        """A head's part of the total."""
        return self.weights[head] * loss

    def watched(self, module: Any) -> list[nn.Parameter]:
        """The parameters of a `MultiTask` on which `total` wants the gradient of each head's part."""
        return []

    def total(self, loss: Tensor, gradients: Gradients, watched: Sequence[nn.Parameter], seed: int) -> Tensor:
        """What the backward pass of the step begins with. Not called where nothing is watched.

        Args:
            loss: The sum of the parts.
            gradients: Of the parts, of this rank; in the sense in which DDP will average those of all ranks.
            watched: What `watched` gave.
            seed: Of the step, the same on all ranks.
        """
        return loss


class Fixed(TaskWeights):
    """The heads' own `weight`."""


class Uncertainty(TaskWeights):
    """Weights learned as the tasks' uncertainty (Kendall, Gal, Cipolla, CVPR 2018, arXiv:1705.07115).

    exp(-s) * loss + s instead of the loss: twice what equation 10 has for regression, with s = log sigma^2, for every
    loss. Each head's s is learned from 0 on.
    """

    def bind(self, weights: Mapping[str, float]) -> None:
        super().bind(weights)
        # Not 0-dimensional: FSDP2 refuses to share those out.
        self.log_variances = nn.ParameterDict({head: nn.Parameter(torch.zeros(1)) for head in weights})

    def learned_for(self, head: str) -> list[nn.Parameter]:
        return [self.log_variances[head]]

    def part(self, head: str, loss: Tensor) -> Tensor:
        s: Tensor = self.log_variances[head]
        self.logged[f"{head}/log_variance"] = s.detach().squeeze()
        return self.weights[head] * (torch.exp(-s) * loss + s).squeeze()


class GradNorm(TaskWeights):
    """Weights that make the tasks train at similar rates (Chen et al., ICML 2018, arXiv:1711.02257).

    The norm of each head's weighted gradient on one block of the backbone is led to their mean times r^alpha, r being
    the share of its first loss that a head has still to go, over the mean of these shares (its equations 1 and 2,
    algorithm 1). After each step of gradient descent the weights are divided so that their mean is 1: those of a step
    in which not all heads take part keep their sum. Beyond the paper, the distance is divided by the mean norm, so that
    `lr` has no unit. Costs a backward pass of each head alone.

    The block is the last that all heads share: of those that are trained, the last before which no head with a weight
    takes its tokens (`block`). A head without a gradient there is no part of the means, and keeps its weight: one of
    `weight` 0, one that learns from texts alone, and in some steps one that has no targets yet.

    Args:
        alpha: How strongly a task that lags behind is helped; 0 makes all norms equal. The paper's range is 0 to 3.
        lr: Of the weights.
    """

    compares_heads = True

    def __init__(self, alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__()
        check_range({"model.task_weights.alpha": alpha})
        check_range({"model.task_weights.lr": lr}, without=0)
        self.alpha, self.lr = alpha, lr

    def bind(self, weights: Mapping[str, float]) -> None:
        super().bind(weights)
        self.heads = list(weights)
        self.learned_K: Tensor
        self.first_losses_K: Tensor
        self.register_buffer("learned_K", torch.ones(len(weights)))
        self.register_buffer("first_losses_K", torch.zeros(len(weights)))  # 0 of a head that has not begun
        self._losses: dict[str, Tensor] = {}

    def part(self, head: str, loss: Tensor) -> Tensor:
        self._losses[head] = loss.detach()
        number = self.heads.index(head)
        self.logged[f"{head}/task_weight"] = self.learned_K[number].clone()
        return self.weights[head] * self.learned_K[number].clone() * loss

    def watched(self, module: Any) -> list[nn.Parameter]:
        backbone: Any = module.encoder.backbone
        every = [*backbone.blocks] or blocks(backbone)  # the former, where heads may stand behind any of them
        trained = [n for n, block in enumerate(every) if any(p.requires_grad for p in block.parameters())]
        heads = [head for head in module.each_head() if head.weight]
        ends = [backbone.block_number(head.block) if backbone.blocks else len(every) for head in heads]
        # The last that each head trains; one that reads tokens before all that is trained shares none.
        last = [max(reached) for end in ends if (reached := [n for n in trained if n <= end])]
        return [p for p in (every[min(last)] if last else backbone).parameters() if p.requires_grad]

    def total(self, loss: Tensor, gradients: Gradients, watched: Sequence[nn.Parameter], seed: int) -> Tensor:
        heads = [head for head in self.heads if head in gradients]
        rows = torch.tensor([self.heads.index(head) for head in heads])
        rows = rows.to(loss.device, non_blocking=True)
        norms_K = torch.stack([mean_over_ranks(flat(gradients[head], watched)).norm() for head in heads])
        losses_K = mean_over_ranks(torch.stack([self._losses[head].float() for head in heads]))
        weights_K, first_K = self.learned_K[rows], self.first_losses_K[rows]
        first_K = torch.where((first_K == 0) & losses_K.isfinite(), losses_K, first_K)
        self.first_losses_K[rows] = first_K
        updated_K = self.updated(weights_K, norms_K, losses_K / first_K)
        is_finite = updated_K.isfinite().all() & losses_K.isfinite().all()  # also a loss that has no gradient here
        self.learned_K[rows] = torch.where(is_finite, updated_K, weights_K)
        return loss

    def updated(self, weights_K: Tensor, norms_K: Tensor, shares_K: Tensor) -> Tensor:
        """The weights after a step.

        Args:
            weights_K: Those that the step was made with.
            norms_K: Of the heads' gradients, weighted so; 0 of a head that is left out.
            shares_K: Each head's loss over its first one.
        """
        is_in_K = norms_K != 0  # also what is not a number, which is to be seen in all weights
        count = is_in_K.sum().clamp(min=1)
        mean = norms_K.sum() / count
        relative_K = shares_K / (torch.where(is_in_K, shares_K, 0).sum() / count)
        targets_K = mean * relative_K.clamp(min=0) ** self.alpha
        # Of the sum of |weight * norm without it - target|; targets are constants.
        slopes_K = torch.sign(norms_K - targets_K) * norms_K / weights_K / mean.clamp(min=1e-12)
        moved_K = (weights_K - self.lr * slopes_K).clamp(min=1e-3)
        before, after = (torch.where(is_in_K, of_K, 0).sum() for of_K in (weights_K, moved_K))
        return torch.where(is_in_K, moved_K * (before / after), weights_K)


class PCGrad(TaskWeights):
    """Projects conflicting gradients of the tasks (Yu et al., NeurIPS 2020, arXiv:2001.06782).

    On the parameters that more than one head reaches: from each head's gradient, the mean over all ranks, that part is
    taken which points against another head's, one after the other in an order that is drawn for each step and head
    (algorithm 1); then they are summed. All others keep their gradient. Costs a backward pass through the shared
    parameters for each head instead of one for all, and memory for a gradient of each.
    """

    makes_gradients = compares_heads = True

    def watched(self, module: Any) -> list[nn.Parameter]:
        return [p for p in module.parameters() if p.requires_grad]

    def total(self, loss: Tensor, gradients: Gradients, watched: Sequence[nn.Parameter], seed: int) -> Tensor:
        reached = [[g for g in column if g is not None] for column in zip(*gradients.values(), strict=True)]
        shared = [number for number, own in enumerate(reached) if len(own) > 1]
        found = {number: own[0] for number, own in enumerate(reached) if len(own) == 1}
        if shared:
            parameters = [watched[number] for number in shared]
            rows = [mean_over_ranks(flat([of[n] for n in shared], parameters)) for of in gradients.values()]
            pieces = torch.split(project(rows, seed), [parameter.numel() for parameter in parameters])
            found |= {n: piece.view_as(watched[n]) for n, piece in zip(shared, pieces, strict=True)}
        numbers = sorted(found)
        return with_gradients(loss.detach(), [found[n] for n in numbers], [watched[n] for n in numbers])


def project(rows: Sequence[Tensor], seed: int) -> Tensor:
    """The sum of gradients (P,), each without what points against another one (PCGrad, algorithm 1)."""
    draw, total = random.Random(seed), torch.zeros_like(rows[0])
    squares = [row.square().sum().clamp(min=1e-30) for row in rows]
    for number, row in enumerate(rows):
        others = [other for other in range(len(rows)) if other != number]
        draw.shuffle(others)
        for other in others:
            row = row - (row @ rows[other]).clamp(max=0) / squares[other] * rows[other]
        total += row
    return total


def gradients_of(parts: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> dict[str, list[Tensor | None]]:
    """The gradient of each loss on each parameter; without a loss of a head that is frozen, on what is frozen."""
    return {
        name: list(torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True))
        for name, part in parts.items()
        if part.requires_grad
    }


def flat(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """Gradients on parameters as one vector, at least in float32; 0 where there is none."""

    def row(gradient: Tensor | None, p: Tensor) -> Tensor:
        if gradient is None:  # not `zeros_like`: what is gathered in float8 has no such numbers
            return torch.zeros(p.numel(), dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        return in_float32(gradient).flatten()

    return torch.cat([row(gradient, p) for gradient, p in zip(gradients, parameters, strict=True)])
