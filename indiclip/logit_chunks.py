"""The logits between this rank's images and the texts of all ranks, a chunk at a time, and the way of gradients back.

No rank ever holds all of its (B, G) logits. The texts arrive in a few blocks: the same rows of every rank, in one
all-gather, while the block before is compared. A block is compared with some images at a time, in chunks no larger
than the block itself or `_MIN_ELEMENTS`. A chunk's gradient goes into the gradients of its images and texts at once,
and those of the block's texts are sent home by one reduce-scatter, during the next block.

So the number of operators hardly depends on the number of ranks, and neither logits nor the graph of autograd wait
for the backward pass. A loss that needs whole rows or columns first, as softmax does, walks over all chunks twice.

Shape letters: as in `indiclip.losses`, and R images and C texts of a chunk.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from indiclip.distributed import all_gather, arrived, begin_gather, begin_reduce_scatter, rank_and_world

_MAX_BLOCKS = 8
# Below this a chunk is not divided: on a CPU 1 MiB in float32, which its caches hold; elsewhere 16 MiB, as kernels of
# fewer numbers end before the next is launched.
_MIN_ELEMENTS = {"cpu": 2**18}
_MIN_ELEMENTS_ELSEWHERE = 2**22


Where = tuple[slice, ...]  # part of a tensor (B,) of images or (W, B) of texts


class Mixture(NamedTuple):
    """Of which two images each image of this rank is made.

    Attributes:
        partner_B: int64, the other one, among this rank's pairs.
        share_B: Float, 0 to 1: how much of the image is its own.
    """

    partner_B: Tensor
    share_B: Tensor


class ScaledPrefixes:
    """Prefixes of embeddings (N, E), scaled to norm 1 or that given (the factor on cosines), and their gradients."""

    def __init__(
        self, x_NE: Tensor, lengths: Sequence[int], dtype: torch.dtype, wanted: bool, norm: Tensor | None = None
    ) -> None:
        self.shape, self.norm = x_NE.shape, norm
        x_NE = x_NE.to(dtype)
        prefixes = [x_NE[:, :length] for length in lengths]
        # The smallest norm is that of torch.nn.functional.normalize.
        norms = [torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(1e-12) for x in prefixes]
        self.factors = [(1 if norm is None else norm) / norm_N1 for norm_N1 in norms]
        self.scaled = [x * factor_N1 for x, factor_N1 in zip(prefixes, self.factors, strict=True)]
        self.gradients = [torch.empty_like(x) for x in self.scaled] if wanted else []

    def pull_back(self, weights: list[float]) -> Tensor:
        """The gradient of the embeddings, from `gradients`, which are used up. Each length has its weight.

        `along` are the derivatives with respect to the logarithm of the norm.
        """
        self.along = [torch.linalg.vecdot(*pair)[:, None] for pair in zip(self.gradients, self.scaled, strict=True)]
        along = self.along if self.norm is None else [a_N1 / self.norm.square() for a_N1 in self.along]
        lengths = zip(self.gradients, self.scaled, along, self.factors, weights, strict=True)
        # Of x / |x|: the part across x, divided by |x|.
        parts = [g.addcmul_(x, a_N1, value=-1).mul_(f_N1 * w) for g, x, a_N1, f_N1, w in lengths]
        # That of the whole length, where there is one, takes up the others.
        whole_NE = parts.pop() if parts[-1].shape == self.shape else parts[-1].new_zeros(self.shape)
        for part in parts:
            whole_NE[:, : part.shape[1]].add_(part)
        return whole_NE

    def of_norm(self, weights: list[float]) -> Tensor:
        """The gradient of the norm that was given, after `pull_back`."""
        assert self.norm is not None
        lengths = zip(self.along, weights, strict=True)
        gradient: Tensor = sum(along_N1.sum() * weight for along_N1, weight in lengths) / self.norm
        return gradient


class Chunk:
    """The logits of some images of this rank and some texts of every rank.

    Attributes:
        image_part: the images, among (B,).
        text_part: the texts, among (W, B).
    """

    def __init__(self, whole: "LogitChunks", rows: slice, columns: slice, text: ScaledPrefixes) -> None:
        self.image_part: Where = (rows,)
        self.text_part: Where = (slice(None), columns)
        self._whole, self._text, self._text_gradients = whole, text.scaled, text.gradients
        # A chunk is the first with its images where the texts begin, and the first with its texts where the images do.
        self._betas = (min(columns.start, 1), min(rows.start, 1))
        self._image = [x[rows] for x in whole.image.scaled]
        self._image_gradients = [gradient[rows] for gradient in whole.image.gradients]

    def logits(self, index: int) -> Tensor:
        """Those of the length with this number: (R, C). Overwrites those before."""
        scaled_RE, text_EC = self._image[index], self._text[index].T
        bias, out = self._whole.bias, self._buffer(1)
        if bias is None:
            return torch.mm(scaled_RE, text_EC, out=out)
        return torch.addmm(bias, scaled_RE, text_EC, out=out)

    def add_gradient(self, index: int, gradient_RC: Tensor, factor: float) -> None:
        """Takes the gradient with respect to `logits(index)`, which is still to be multiplied by the factor."""
        of_image_beta, of_text_beta = self._betas
        self._image_gradients[index].addmm_(gradient_RC, self._text[index], beta=of_image_beta, alpha=factor)
        self._text_gradients[index].addmm_(gradient_RC.T, self._image[index], beta=of_text_beta, alpha=factor)
        if self._whole.bias is not None:
            self._whole.bias_gradient.add_(gradient_RC.sum(), alpha=self._whole.shares[index] * factor)

    def positive(self) -> Tensor:
        """1 where image and text share a key, else 0: (R, C), of the logits' type. Overwrites the logits."""
        return self._sharing(self._whole.image_keys, 0)

    def shown(self) -> Tensor:
        """How much of each image shares a key with each text, 0 to 1: (R, C). Overwrites the logits.

        Without a mixture it is `positive`, and with one it is another tensor, which leaves that one as it is.
        """
        positive_RC, mixture = self.positive(), self._whole.mixture
        if mixture is None:
            return positive_RC
        of_partner_RC = self._sharing(self._whole.partner_keys, 2)
        return of_partner_RC.lerp_(positive_RC, mixture.share_B[self.image_part][:, None].to(positive_RC.dtype))

    def _sharing(self, image_keys: Sequence[Tensor], number: int) -> Tensor:
        """1 where an image of these keys and a text share one, in the buffer of this number."""
        positive_RC = self._buffer(number)
        for kind, (image_keys_B, text_keys_WB) in enumerate(zip(image_keys, self._whole.text_keys, strict=True)):
            pair = image_keys_B[self.image_part][:, None], text_keys_WB[self.text_part].flatten()
            # Floats, whose comparison gives floats: three times as fast as that of integers on a CPU.
            shared_RC = torch.eq(*pair, out=self._buffer(1 if kind else number))
            if kind > 0:
                torch.maximum(positive_RC, shared_RC, out=positive_RC)
        return positive_RC

    def _buffer(self, number: int) -> Tensor:
        """Memory for (R, C) numbers that every chunk uses again: new memory takes a CPU longer than arithmetic does."""
        num_rows, num_columns = len(self._image[0]), len(self._text[0])
        return self._whole.buffers[number, : num_rows * num_columns].view(num_rows, num_columns)


class LogitChunks:
    """All logits of this rank's images, in chunks, and the gradients that the chunks are given.

    Args:
        inputs: embeddings (B, E) of images and of texts, of any norm; the factor on the cosines (1,), whose dtype the
            logits have; where there is one, the bias (1,).
        keys_KB: int64, of this rank's pairs; negative for none. A pair has also one that no other pair has.
        lengths: the prefixes to compare, and the weight of each.
        mixture: of the images, where they are mixed.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        keys_KB: Tensor,
        lengths: list[tuple[int, float]],
        mixture: Mixture | None = None,
    ) -> None:
        self.rank, self.world = rank_and_world()
        self.wanted = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        image_BE, self.text_BE, self.scale, *bias = (x.detach() for x in inputs)
        self.bias = bias[0] if bias else None
        self.num_pairs = len(image_BE)
        self.lengths, self.weights = [length for length, _ in lengths], [weight for _, weight in lengths]
        self.shares = [weight / self.num_pairs for weight in self.weights]  # of each length and pair in the mean
        self.image = ScaledPrefixes(image_BE, self.lengths, self.scale.dtype, self.wanted, self.scale)
        self.bias_gradient = torch.zeros_like(self.scale)
        text_keys_KWB = self._numbers(keys_KB)
        self.text_keys, self.image_keys = text_keys_KWB.unbind(), text_keys_KWB[:, self.rank].unbind()
        self.mixture = mixture
        self.partner_keys = [keys_B[mixture.partner_B] for keys_B in self.image_keys] if mixture else []
        self._divide()

    def _numbers(self, keys_KB: Tensor) -> Tensor:
        """Small numbers for the keys of each kind, the same for the same key: (K, W, B), exact up to 2**24 pairs."""
        num_pairs, device = self.world * self.num_pairs, keys_KB.device
        if len(keys_KB) == 0:
            return torch.arange(num_pairs, dtype=self.scale.dtype, device=device).view(1, self.world, -1)
        own_KWB = torch.arange(-num_pairs, 0, device=device).view(1, self.world, -1)
        keys_KWB = all_gather(keys_KB).transpose(0, 1)
        keys_KG = torch.where(keys_KWB < 0, own_KWB, keys_KWB).flatten(1)
        return torch.searchsorted(keys_KG.sort(1).values, keys_KG).to(self.scale.dtype).view(keys_KWB.shape)

    def _divide(self) -> None:
        elements = _MIN_ELEMENTS.get(self.scale.device.type, _MIN_ELEMENTS_ELSEWHERE)
        num_blocks = min(_MAX_BLOCKS, math.ceil(self.num_pairs**2 * self.world / elements))
        step = math.ceil(self.num_pairs / num_blocks)
        self.columns = [slice(i, min(i + step, self.num_pairs)) for i in range(0, self.num_pairs, step)]
        # Of as many rows as the embeddings have numbers, a chunk is as large as its block of texts.
        step = max(self.text_BE.shape[1], elements // (step * self.world))
        self.rows = [slice(i, min(i + step, self.num_pairs)) for i in range(0, self.num_pairs, step)]
        num_buffers = 2 if self.mixture is None else 3
        self.buffers = self.scale.new_empty(num_buffers, self.rows[0].stop * self.columns[0].stop * self.world)

    def zeros(self, *shape: int) -> Tensor:
        """One tensor per length: (L, *shape)."""
        return self.scale.new_zeros(len(self.lengths), *shape)

    def over_lengths(self, x_LB: Tensor) -> Tensor:
        """The sum over lengths, weighted."""
        total_B, *others = (x_B * weight for x_B, weight in zip(x_LB.unbind(), self.weights, strict=True))
        for other_B in others:
            total_B += other_B
        return total_B

    def walk(self, gradients: bool) -> Iterator[Chunk]:
        """Every chunk, in turn. With `gradients`, each chunk must be given its own for all lengths, in one walk."""
        # Without `map`, at which torch 2.11 breaks a graph.
        sending: list[Tensor] = []
        sent: list[Tensor] = []
        arriving = begin_gather(self.text_BE[self.columns[0]])
        for columns, upcoming in zip(self.columns, [*self.columns[1:], None], strict=True):
            text = ScaledPrefixes(arrived(arriving), self.lengths, self.scale.dtype, gradients)
            if upcoming is not None:
                arriving = begin_gather(self.text_BE[upcoming])
            for rows in self.rows:
                yield Chunk(self, rows, columns, text)
            if gradients:
                sent += [arrived(part) for part in sending]
                sending = [begin_reduce_scatter(text.pull_back(self.shares))]
        sent += [arrived(part) for part in sending]
        self.text_gradients = sent

    def gradients(self) -> list[Tensor]:
        """Those of the mean over this rank's pairs, with respect to the `inputs`; after the walk with gradients."""
        image_gradient_BE = self.image.pull_back(self.shares)
        text_gradient_BE = self.text_gradients[0] if len(self.text_gradients) == 1 else torch.cat(self.text_gradients)
        gradients = [image_gradient_BE, text_gradient_BE, self.image.of_norm(self.shares)]
        return gradients if self.bias is None else [*gradients, self.bias_gradient]
