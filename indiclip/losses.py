"""Contrastive losses: softmax (CLIP) and sigmoid (SigLIP), label-aware, Matryoshka, exact across ranks.

Both modules turn the embeddings of image-text pairs into one scalar and own its temperature (and bias). What
a rank returns is the mean over its own pairs; averaged over the ranks, values and gradients (after DDP's or
FSDP's averaging) are those of one process with the whole batch. Every rank must bring the same number of
pairs, and either all ranks or none labels (caption ids).

Both walk over the logits of this rank's images and all texts chunk by chunk (`indiclip.logit_chunks`) and compute
gradients along with the loss, so that no logits wait for the backward pass. Sigmoid is a sum over pairs: one walk.
Softmax needs the sums of whole rows and columns before any gradient: one walk finds these, and another computes the
logits again. The price is that the losses cannot be differentiated twice.

Of mixed images (mixup, CutMix), image i is the share a_i of its own and the rest of its partner's, p(i). With P[i, j]
1 where pairs i and j are positives of each other, else 0, it shows S[i, j] = a_i P[i, j] + (1 - a_i) P[p(i), j] of
text j. Sigmoid has S as targets. Softmax finds image i's texts with a_i P[i] / n_i + (1 - a_i) P[p(i)] / n_p(i), n
being the numbers of positives, and text j's images with S[:, j] / n_j, whose sum is how much this text counts: 1 where
both images of each pair have the same share. All this is linear in the shares: losses of hard targets, averaged.

Shape letters: B pairs on this rank, W ranks, G = W * B pairs on all ranks, E embedding length, K kinds of
keys (labels, caption ids).
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from indiclip.autograd import with_gradients
from indiclip.logit_chunks import Chunk, LogitChunks
from indiclip.logit_chunks import Mixture as Mixture
from indiclip.softmax_sums import softmax_sums, softmax_targets


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


class PairLoss(nn.Module, ABC):
    """What losses that compare all images with all texts share: the temperature and the Matryoshka lengths.

    Args:
        lengths: prefixes of the embedding, ascending, each of which must work as an embedding by itself; the
            loss is their mean (Matryoshka, arXiv 2205.13147). None is the full length alone.
        length_weights: share of each length, >= 0 and of any sum; None weighs all the same.
        init_logit_scale: factor on the cosines at the start, one over the temperature; None is the paper's.
        max_logit_scale: most that it may become, see `bound_scale`; None is the paper's.
        key: what messages have before the names of these, such as `heads.contrastive.`.

    Attributes:
        logit_scale: (1,), logarithm of the factor on the cosines, at most that of `max_logit_scale`. Not a
            0-dimensional tensor because FSDP2 refuses to shard those.
    """

    paper_logit_scale: float
    paper_max_logit_scale = 100.0  # CLIP's, arXiv 2103.00020, section 2.5

    def __init__(
        self,
        lengths: list[int] | None = None,
        length_weights: list[float] | None = None,
        init_logit_scale: float | None = None,
        max_logit_scale: float | None = None,
        key: str = "",
    ) -> None:
        super().__init__()
        scale = self.paper_logit_scale if init_logit_scale is None else init_logit_scale
        self.max_logit_scale = self.paper_max_logit_scale if max_logit_scale is None else max_logit_scale
        if not 0 < scale <= self.max_logit_scale:
            raise ValueError(
                f"{key}init_logit_scale: found {scale:g} with max_logit_scale {self.max_logit_scale:g}; expected more "
                "than 0 and no more than the latter"
            )
        self._key, self._given_scale = key, 0.0
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(scale)))
        if lengths is not None and (not lengths or lengths[0] < 1 or any(a >= b for a, b in pairwise(lengths))):
            valid = sorted({max(length, 1) for length in lengths}) or [64, 128, 256]
            raise ValueError(f"lengths={lengths}: expected them >= 1, ascending and different, such as {valid}")
        self.lengths = lengths
        count = len(lengths or [0])
        weights = [1.0] * count if length_weights is None else length_weights
        if len(weights) != count or min(weights) < 0 or sum(weights) <= 0:
            expected = f"{count} weight(s) >= 0, not all 0: one per length"
            raise ValueError(f"{key}length_weights: found {weights} for the lengths {lengths}; expected {expected}")
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
        self._given_scale = math.exp(logits.get("logit_scale", -math.inf))

    def check_scale(self) -> None:
        """Raise ValueError where a pretrained factor that is trained is above `max_logit_scale`, as SigLIP's may be,
        which has no such bound: the first step would bring it down.
        """
        if self.logit_scale.requires_grad and self._given_scale > 1.001 * self.max_logit_scale:  # CLIP's are rounded
            raise ValueError(
                f"{self._key}max_logit_scale: found {self.max_logit_scale:g}, and model.encoder.init_from gives a "
                f"logit_scale of {self._given_scale:.4g}; expected more, `parts` without logit_scale, or "
                "model.freeze: [logit_scale]"
            )

    @torch.no_grad()
    def bound_scale(self) -> None:
        """Bring the temperature back within `max_logit_scale`, unless it is frozen: after each step of the optimizer.

        A clamp in the forward pass would do less: in the graph it would zero the gradient above the bound, on the value
        alone it would let the parameter run far above it, and of a sharded parameter it would reach a copy.
        """
        if self.logit_scale.requires_grad:
            parameter = self.logit_scale
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            own.clamp_(max=math.log(self.max_logit_scale))

    @abstractmethod
    def example(self, num_pairs: int, embed_dim: int) -> dict[str, Tensor]:
        """Arguments of `forward` for so many pairs of a rank, all zeros, by which it is counted what that does."""

    def _scale(self, dtype: torch.dtype) -> Tensor:
        """Returns the factor on the cosines (1,)."""
        return self.logit_scale.to(dtype).exp()

    def _weighted_lengths(self, full_length: int) -> list[tuple[int, float]]:
        lengths = self.lengths or [full_length]
        if lengths[-1] > full_length:
            raise ValueError(f"lengths={lengths}: the embeddings allow 1 to {full_length}")
        return list(zip(lengths, self.length_weights, strict=True))


class ContrastiveLoss(PairLoss):
    """What both contrastive losses share: the interface, and chunks of logits.

    Attributes:
        pair_losses_B: what each of this rank's pairs has in the newest loss, which is their mean; no gradient.
    """

    pair_losses_B: Tensor | None = None

    def forward(
        self,
        image_BE: Tensor,
        text_BE: Tensor,
        labels_B: Tensor | None = None,
        caption_ids_B: Tensor | None = None,
        mixture: Mixture | None = None,
    ) -> Tensor:
        """Compares this rank's pairs with those of all ranks.

        Args:
            image_BE: embeddings of the images, of any norm: each prefix is L2-normalised here.
            text_BE: embeddings of their texts, likewise.
            labels_B: int class of each pair, negative for none; pairs of one class are positives of each
                other.
            caption_ids_B: from `caption_ids`; pairs with equal captions are positives of each other.
            mixture: of which two images each image is made; on all ranks or on none.

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
        keys_KB = _stack_keys(image_BE, labels_B=labels_B, caption_ids_B=caption_ids_B)
        lengths = self._weighted_lengths(image_BE.shape[1])
        with torch.autocast(image_BE.device.type, enabled=False):
            inputs = [image_BE, text_BE, self._scale(dtype), *self._bias(dtype)]
            chunks = LogitChunks(inputs, keys_KB, lengths, mixture)
            self.pair_losses_B = self._pair_losses(chunks)
            loss = self.pair_losses_B.mean()
            return with_gradients(loss, chunks.gradients(), inputs) if chunks.wanted else loss

    @abstractmethod
    def _pair_losses(self, chunks: LogitChunks) -> Tensor:
        """Computes `pair_losses_B` and, if wanted, gives every chunk the gradient of their sum."""

    def example(self, num_pairs: int, embed_dim: int) -> dict[str, Tensor]:
        """Embeddings and caption ids, without labels."""
        image_BE, text_BE = (torch.zeros(num_pairs, embed_dim, requires_grad=True) for _ in range(2))
        ids_B = torch.zeros(num_pairs, dtype=torch.int64)
        return {"image_BE": image_BE, "text_BE": text_BE, "caption_ids_B": ids_B}

    def _bias(self, dtype: torch.dtype) -> list[Tensor]:
        return []


class SoftmaxLoss(ContrastiveLoss):
    """Each image finds its texts among all texts, and each text its images: CLIP with UniCL's targets.

    The target of a row is uniform over its positives; the loss is the mean of both directions' cross
    entropies (CLIP, arXiv 2103.00020, figure 3; UniCL, arXiv 2204.03610, whose sum is halved here).
    The factor on the cosines starts at 1 / 0.07. A pair's part is the mean of its image's row and its text's.
    """

    paper_logit_scale = 1 / 0.07

    def _pair_losses(self, chunks: LogitChunks) -> Tensor:
        image, text = softmax_sums(chunks)
        entropy_LB = image.cross_entropy() + text.cross_entropy()[:, chunks.rank]
        for chunk in chunks.walk(gradients=True) if chunks.wanted else ():
            log_sum_LR, log_sum_LC = image.part(chunk.image_part), text.part(chunk.text_part)
            target_RC = softmax_targets(chunk, image, text)
            for index in range(len(log_sum_LR)):
                logits_RC = chunk.logits(index)
                gradient_RC = (logits_RC - log_sum_LR[index, :, None]).exp_().sub_(target_RC)
                shares_RC = logits_RC.sub_(log_sum_LC[index]).exp_()
                gradient_RC += (
                    shares_RC if text.weight is None else shares_RC.mul_(text.weight[chunk.text_part].flatten())
                )
                chunk.add_gradient(index, gradient_RC, 0.5)
        return chunks.over_lengths(entropy_LB / 2)


class SigmoidLoss(ContrastiveLoss):
    """Each image and text are classified as belonging together or not: SigLIP (arXiv 2303.15343, alg. 1).

    The loss is summed over an image's pairs and averaged over the images. The factor on the cosines starts at 10. A
    pair's part is the sum of its image.

    Args:
        init_logit_bias: added to the logits at the start; -10, the paper's, has the many negatives begin as such.
        **common: of every `ContrastiveLoss`.

    Attributes:
        logit_bias: (1,), added to the logits.
    """

    paper_logit_scale = 10.0
    paper_max_logit_scale = math.inf  # the paper names none

    def __init__(self, *args: Any, init_logit_bias: float = -10.0, **common: Any) -> None:
        super().__init__(*args, **common)
        self.logit_bias = nn.Parameter(torch.full((1,), init_logit_bias))

    def _bias(self, dtype: torch.dtype) -> list[Tensor]:
        return [self.logit_bias.to(dtype)]

    def _pair_losses(self, chunks: LogitChunks) -> Tensor:
        loss_B = chunks.scale.new_zeros(chunks.num_pairs)
        for chunk in chunks.walk(gradients=chunks.wanted):
            if chunks.mixture is not None:
                self._add_mixed(chunk, chunks, loss_B)
                continue
            sign_RC = torch.threshold_(chunk.positive(), 0.5, -1)  # 1 of positives, -1 of others
            for index, weight in enumerate(chunks.weights):
                logits_RC = chunk.logits(index).mul_(sign_RC)
                # These two share an exponential, unlike softplus and sigmoid.
                log_sigmoid_RC, buffer = torch.ops.aten.log_sigmoid_forward(logits_RC)
                loss_B[chunk.image_part].sub_(log_sigmoid_RC.sum(1), alpha=weight)
                del log_sigmoid_RC
                if chunks.wanted:
                    gradient_RC = torch.ops.aten.log_sigmoid_backward(sign_RC, logits_RC, buffer)
                    chunk.add_gradient(index, gradient_RC, -1)
        return loss_B

    def _add_mixed(self, chunk: Chunk, chunks: LogitChunks, loss_B: Tensor) -> None:
        """Of targets between 0 and 1: log(1 + exp(logit)) - target * logit, and the gradient of it."""
        target_RC = chunk.shown()
        for index, weight in enumerate(chunks.weights):
            logits_RC = chunk.logits(index)
            loss_RC = F.softplus(logits_RC, threshold=40).addcmul_(target_RC, logits_RC, value=-1)
            loss_B[chunk.image_part].add_(loss_RC.sum(1), alpha=weight)
            if chunks.wanted:
                chunk.add_gradient(index, logits_RC.sigmoid_().sub_(target_RC), 1)


def _stack_keys(like_BE: Tensor, **named: Tensor | None) -> Tensor:
    """Returns the given keys as int64 (K, B)."""
    rows = []
    for name, keys_B in named.items():
        if keys_B is None:
            continue
        if keys_B.shape != like_BE.shape[:1] or keys_B.is_floating_point():
            found = f"{keys_B.dtype} {tuple(keys_B.shape)}"
            raise ValueError(f"{name} is {found}, expected an integer per pair: ({len(like_BE)},)")
        rows.append(keys_B.to(like_BE.device, torch.int64))
    return torch.stack(rows) if rows else torch.empty((0, len(like_BE)), dtype=torch.int64, device=like_BE.device)
