"""Contrastive losses: softmax (CLIP) and sigmoid (SigLIP), label-aware, Matryoshka, exact across ranks.

Both modules turn the embeddings of image-text pairs into one scalar and own its temperature (and bias). What
a rank returns is the mean over its own pairs; averaged over the ranks, values and gradients (after DDP's or
FSDP's averaging) are those of one process with the whole batch. Every rank must bring the same number of
pairs, and either all ranks or none labels (caption ids).

The two pay for the other ranks differently. Softmax needs whole rows, so it gathers every embedding and
computes (B, G) logits. Sigmoid is a sum over pairs, so texts walk around a ring of ranks and meet the images
in (B, B) chunks. Both compute the gradient of a block of logits (one Matryoshka length, one direction or one
rank's texts) together with its loss. So one block is alive at a time, nothing is computed twice, and no
logits wait for the backward pass. The price is that the losses cannot be differentiated twice.

Shape letters: B pairs on this rank, W ranks, G = W * B pairs on all ranks, E embedding length, K kinds of
keys (labels, caption ids).
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from indiclip.distributed import rank_and_world

# Logits are at most 100 times the cosines (CLIP, arXiv 2103.00020, section 2.5).
MAX_LOGIT_SCALE = math.log(100)


def caption_ids(captions: Sequence[str]) -> Tensor:
    """Numbers captions so that equal captions have equal ids on every rank, machine and run.

    Python's own `hash` is salted per process, hence blake2b; any two of a million different captions collide
    with a probability of 5e-8.

    Args:
        captions: the B captions, compared exactly (case and Unicode form included).

    Returns:
        int64 (B,) on the CPU, 0 <= id < 2**63.
    """
    digests = (hashlib.blake2b(caption.encode(), digest_size=8).digest() for caption in captions)
    return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests], dtype=torch.int64)


class ContrastiveLoss(nn.Module, ABC):
    """What both losses share: the interface, the temperature and the Matryoshka lengths.

    Args:
        init_logit_scale: logarithm of the factor on the cosines at the start.
        lengths: prefixes of the embedding, ascending, each of which must work as an embedding by itself; the
            loss is their mean (Matryoshka, arXiv 2205.13147). None is the full length alone.
        length_weights: share of each length, >= 0 and of any sum; None weighs all the same.

    Attributes:
        logit_scale: (1,), logarithm of the factor on the cosines, <= log(100). Not a 0-dimensional tensor
            because FSDP2 refuses to shard those.
        pair_losses_B: what each of this rank's pairs has in the newest loss, which is their mean; no gradient.
    """

    pair_losses_B: Tensor | None = None

    def __init__(self, init_logit_scale: float, lengths: list[int] | None, length_weights: list[float] | None) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.full((1,), init_logit_scale))
        if lengths is not None and (not lengths or lengths[0] < 1 or any(a >= b for a, b in pairwise(lengths))):
            valid = sorted({max(length, 1) for length in lengths}) or [64, 128, 256]
            raise ValueError(f"lengths={lengths}: expected them >= 1, ascending and different, such as {valid}")
        self.lengths = lengths
        count = len(lengths or [0])
        weights = [1.0] * count if length_weights is None else length_weights
        if len(weights) != count or min(weights) < 0 or sum(weights) <= 0:
            expected = f"{count} weight(s) >= 0, not all 0: one per length"
            raise ValueError(f"length_weights={weights} for lengths={lengths}: expected {expected}")
        self.length_weights = [weight / sum(weights) for weight in weights]

    def begin_with(self, logits: Mapping[str, float]) -> None:
        """Take `logit_scale` and `logit_bias` of a pretrained model, those that are given.

        Raises:
            ValueError: This loss has no such parameter.
        """
        for name, value in logits.items():
            if not hasattr(self, name):
                raise ValueError(
                    f"model.encoder.init_from: gives a {name}, which {type(self).__name__} lacks; name `parts` without "
                    "logit_scale, or another loss"
                )
            nn.init.constant_(getattr(self, name), value)

    def forward(
        self,
        image_BE: Tensor,
        text_BE: Tensor,
        labels_B: Tensor | None = None,
        caption_ids_B: Tensor | None = None,
    ) -> Tensor:
        """Compares this rank's pairs with those of all ranks.

        Args:
            image_BE: embeddings of the images, of any norm: each prefix is L2-normalised here.
            text_BE: embeddings of their texts, likewise.
            labels_B: int class of each pair, negative for none; pairs of one class are positives of each
                other.
            caption_ids_B: from `caption_ids`; pairs with equal captions are positives of each other.

        Returns:
            Scalar >= 0, float64 if an embedding is, else float32 (also under autocast).

        Raises:
            ValueError: if shapes differ or a length exceeds E.
        """
        if image_BE.ndim != 2 or image_BE.shape != text_BE.shape:
            shapes = f"image_BE {tuple(image_BE.shape)}, text_BE {tuple(text_BE.shape)}"
            raise ValueError(f"{shapes}: expected both (B, E), and row i of both from pair i")
        # Not below float32: a bf16 logit near 100 is off by up to 0.25.
        dtype = torch.float64 if torch.float64 in (image_BE.dtype, text_BE.dtype) else torch.float32
        with torch.autocast(image_BE.device.type, enabled=False):
            keys_KB = _stack_keys(image_BE, labels_B=labels_B, caption_ids_B=caption_ids_B)
            # Here, so that after the gather only the shorter prefixes are left to normalise for all ranks' rows.
            image_BE, text_BE = (F.normalize(x.to(dtype), dim=-1) for x in (image_BE, text_BE))
            total = self._total(image_BE, text_BE, keys_KB)
            self.pair_losses_B = total.loss_B
            return total.result()

    @abstractmethod
    def _total(self, image_BE: Tensor, text_BE: Tensor, keys_KB: Tensor) -> "_Total":
        """Computes `forward` from unit vectors and the keys of `_stack_keys`."""

    def _scale(self, dtype: torch.dtype) -> Tensor:
        """Returns the factor on the cosines (1,), at most 100 unless it is frozen.

        The parameter itself is clamped, outside of autograd: a clamp in the graph would zero the gradient
        above the bound, and one on the value alone would let the parameter run far above it.
        """
        if self.logit_scale.requires_grad:
            with torch.no_grad():
                self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        return self.logit_scale.to(dtype).exp()

    def _weighted_lengths(self, full_length: int) -> list[tuple[int, float]]:
        lengths = self.lengths or [full_length]
        if lengths[-1] > full_length:
            raise ValueError(f"lengths={lengths}: the embeddings allow 1 to {full_length}")
        return list(zip(lengths, self.length_weights, strict=True))


class SoftmaxLoss(ContrastiveLoss):
    """Each image finds its texts among all texts, and each text its images: CLIP with UniCL's targets.

    The target of a row is uniform over its positives; the loss is the mean of both directions' cross
    entropies (CLIP, arXiv 2103.00020, figure 3; UniCL, arXiv 2204.03610, whose sum is halved here).
    `logit_scale` starts at log(1 / 0.07). A pair's part is the mean of its image's row and its text's.
    """

    def __init__(self, lengths: list[int] | None = None, length_weights: list[float] | None = None) -> None:
        super().__init__(math.log(1 / 0.07), lengths, length_weights)

    def _total(self, image_BE: Tensor, text_BE: Tensor, keys_KB: Tensor) -> "_Total":
        rank, world = rank_and_world()
        first = rank * len(image_BE)  # the column of this rank's first pair
        positive_BG = _positives(keys_KB, _all_gather(keys_KB.T).T, first)
        total = _Total(image_BE, text_BE, _gather(text_BE), _gather(image_BE), self._scale(image_BE.dtype))
        for length, weight in self._weighted_lengths(image_BE.shape[1]):
            for slots in ((0, 2, 4), (1, 3, 4)) if world > 1 else ((0, 2, 4),):
                leaves = total.leaves(*(total.inputs[slot] for slot in slots))
                logits_BG = leaves[2] * _prefix(leaves[0], length) @ _prefix(leaves[1], length).T
                # Where all pairs are here, the logits of the other direction are these, transposed.
                dims = (1,) if world > 1 else (1, 0)
                loss_B, gradient_BG = _cross_entropy(logits_BG.detach(), positive_BG, dims)
                total.add(weight / 2, loss_B, gradient_BG, logits_BG, leaves, slots)
        return total


class SigmoidLoss(ContrastiveLoss):
    """Each image and text are classified as belonging together or not: SigLIP (arXiv 2303.15343, alg. 1).

    The loss is summed over an image's pairs and averaged over the images. `logit_scale` starts at log(10). A pair's
    part is the sum of its image.

    Attributes:
        logit_bias: (1,), added to the logits; starts at -10 so that the many negatives begin as such.
    """

    def __init__(self, lengths: list[int] | None = None, length_weights: list[float] | None = None) -> None:
        super().__init__(math.log(10), lengths, length_weights)
        self.logit_bias = nn.Parameter(torch.full((1,), -10.0))

    def _total(self, image_BE: Tensor, text_BE: Tensor, keys_KB: Tensor) -> "_Total":
        world = rank_and_world()[1]
        total = _Total(image_BE, text_BE, self._scale(image_BE.dtype), self.logit_bias.to(image_BE.dtype))
        chunk_BE, chunk_keys_KB = text_BE.detach(), keys_KB
        # In step s this rank holds the texts of rank (own - s) while the next ones are under way. The gradient of
        # the texts walks with them and is home after `world` steps.
        for step in range(world):
            arriving = _Shift(chunk_BE, chunk_keys_KB) if step < world - 1 else None
            positive_BB = _positives(keys_KB, chunk_keys_KB, first=0 if step == 0 else None)
            for length, weight in self._weighted_lengths(image_BE.shape[1]):
                leaves = total.leaves(image_BE, chunk_BE, *total.inputs[2:])
                scaled_BE = leaves[2] * _prefix(leaves[0], length)
                logits_BB = torch.addmm(leaves[3], scaled_BE, _prefix(leaves[1], length).T)
                loss_B, gradient_BB = _binary_entropy(logits_BB.detach(), positive_BB)
                total.add(weight, loss_B, gradient_BB, logits_BB, leaves, (0, 1, 2, 3))
            if world > 1 and (text_gradient_BE := total.gradients[1]) is not None:
                total.gradients[1] = _Shift(text_gradient_BE).wait()[0]
            if arriving is not None:
                chunk_BE, chunk_keys_KB = arriving.wait()
        return total


class _Total:
    """A sum of losses per pair, and the gradients of its mean with respect to `inputs`, block by block of logits.

    The first of the inputs has a row per pair.
    """

    def __init__(self, *inputs: Tensor) -> None:
        self.inputs = inputs
        self.wanted = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        self.loss_B = inputs[0].new_zeros(len(inputs[0]))
        self.gradients: list[Tensor | None] = [None] * len(inputs)

    def leaves(self, *values: Tensor) -> list[Tensor]:
        """Returns what a block of logits is to be computed from."""
        return [x.detach().requires_grad_(self.wanted) for x in values]

    def add(
        self,
        weight: float,
        loss_B: Tensor,
        gradient: Tensor,
        logits: Tensor,
        leaves: list[Tensor],
        slots: Sequence[int],
    ) -> None:
        """Adds `weight * loss_B`; `gradient` (overwritten) is that of the sum of `loss_B` with respect to `logits`.

        The logits were computed from `leaves`, which stand for the inputs numbered `slots`.
        """
        self.loss_B += weight * loss_B
        if not self.wanted:
            return
        parts = torch.autograd.grad(logits, leaves, gradient.mul_(weight / len(self.loss_B)))
        for slot, part in zip(slots, parts, strict=True):
            so_far = self.gradients[slot]
            self.gradients[slot] = part if so_far is None else so_far + part

    def result(self) -> Tensor:
        loss = self.loss_B.mean()
        if not self.wanted:
            return loss
        return cast(Tensor, _WithGradients.apply(loss, self.gradients, *self.inputs))


def _cross_entropy(logits_BG: Tensor, positive_BG: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Cross entropies along each of `dims`, added up per pair (B,), and the gradient of their sum."""
    loss_B, gradient_BG = logits_BG.new_zeros(len(logits_BG)), None
    for dim in dims:
        log_probs_BG = logits_BG.log_softmax(dim)
        target_BG = positive_BG.to(logits_BG.dtype)
        target_BG /= target_BG.sum(dim, keepdim=True)
        loss_B -= (target_BG * log_probs_BG).sum(dim)
        part_BG = log_probs_BG.exp_().sub_(target_BG)
        gradient_BG = part_BG if gradient_BG is None else gradient_BG.add_(part_BG)
    assert gradient_BG is not None
    return loss_B, gradient_BG


def _binary_entropy(logits_BB: Tensor, positive_BB: Tensor) -> tuple[Tensor, Tensor]:
    """-log sigmoid(+-logit), summed per row (B,), and the gradient of its sum, which overwrites the logits."""
    # -log sigmoid(-x) = softplus(x), so positives change their sign before, and their gradient after.
    sign_BB = 1 - 2 * positive_BB.to(logits_BB.dtype)
    logits_BB.mul_(sign_BB)
    # torch's default threshold of 20 would be off by 2e-9: too coarse for float64.
    loss_B = F.softplus(logits_BB, threshold=50).sum(1)
    return loss_B, logits_BB.sigmoid_().mul_(sign_BB)


def _prefix(unit_BE: Tensor, length: int) -> Tensor:
    return unit_BE if length == unit_BE.shape[1] else F.normalize(unit_BE[:, :length], dim=-1)


def _positives(row_keys_KB: Tensor, column_keys_KG: Tensor, first: int | None) -> Tensor:
    """Says which rows and columns share a key >= 0 or are the same pair: bool (B, G).

    Column `first` is the same pair as row 0; None says that no pair is in both.
    """
    shape = (row_keys_KB.shape[1], column_keys_KG.shape[1])
    positive_BG = torch.zeros(shape, dtype=torch.bool, device=row_keys_KB.device)
    for row_B, column_G in zip(row_keys_KB, column_keys_KG, strict=True):
        positive_BG |= (row_B[:, None] == column_G) & (row_B >= 0)[:, None]
    if first is not None:
        positive_BG.diagonal(offset=first).fill_(True)
    return positive_BG


class _WithGradients(torch.autograd.Function):
    """Gives a loss the gradients that were computed along with it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if gradient is None else outer * gradient for gradient in ctx.saved_tensors)


class _AllGather(torch.autograd.Function):
    """(B, E) of every rank -> (G, E); the gradients of every rank are summed on their way back."""

    @staticmethod
    def forward(ctx: Any, x_BE: Tensor) -> Tensor:
        return _all_gather(x_BE)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_GE: Tensor) -> Tensor:
        gradient_BE = gradient_GE.new_empty(len(gradient_GE) // rank_and_world()[1], *gradient_GE.shape[1:])
        dist.reduce_scatter_tensor(gradient_BE, gradient_GE.contiguous())
        return gradient_BE


class _Shift:
    """Tensors under way to the next rank of the ring; `wait` returns those of the rank before."""

    def __init__(self, *tensors: Tensor) -> None:
        rank, world = rank_and_world()
        self.sent = [tensor.contiguous() for tensor in tensors]
        self.received = [torch.empty_like(tensor) for tensor in self.sent]
        sends = [dist.P2POp(dist.isend, tensor, (rank + 1) % world) for tensor in self.sent]
        receives = [dist.P2POp(dist.irecv, tensor, (rank - 1) % world) for tensor in self.received]
        self.works = dist.batch_isend_irecv(sends + receives)

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.received


def _gather(x_BE: Tensor) -> Tensor:
    return x_BE if rank_and_world()[1] == 1 else cast(Tensor, _AllGather.apply(x_BE))


def _all_gather(x: Tensor) -> Tensor:
    world = rank_and_world()[1]
    if world == 1:
        return x
    all_ranks = x.new_empty(world * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(all_ranks, x.contiguous())
    return all_ranks


def _stack_keys(like_BE: Tensor, **named: Tensor | None) -> Tensor:
    """Returns the given keys as int64 (K, B); without any a row of those that are shared by none."""
    rows = []
    for name, keys_B in named.items():
        if keys_B is None:
            continue
        if keys_B.shape != like_BE.shape[:1] or keys_B.is_floating_point():
            found = f"{keys_B.dtype} {tuple(keys_B.shape)}"
            raise ValueError(f"{name} is {found}, expected an integer per pair: ({len(like_BE)},)")
        rows.append(keys_B.to(like_BE.device, torch.int64))
    return torch.stack(rows or [torch.full((len(like_BE),), -1, device=like_BE.device)])
