"""The sums over rows and columns of logits that the softmax loss is made of, chunk by chunk, and its targets.

What they are of mixed images stands in `indiclip.losses`. Shape letters: as there, and L lengths; R images and C texts
of a chunk.
"""

import torch
from torch import Tensor

from indiclip.distributed import all_gather, all_reduce
from indiclip.logit_chunks import Chunk, LogitChunks, Where


class SoftmaxSums:
    """What the cross entropies of rows (or columns) of logits, and their gradients, are made of.

    Attributes:
        log_sum_exp: (L, *shape), of all logits of a row, at each of the L lengths.
        target_logits: (L, *shape), the sum of its positives, each as much as it is shown.
        divisor: (*shape), of `target_logits`: the number of positives; of a mixed image, its partner's.
        own_logits, own_factor: of mixed images, what they have of `target_logits` is divided by another number: the sum
            of the positives of the image's own pair, and a factor that makes up for it. Else None.
        weight: (*shape), how much each row counts; None is 1.
    """

    def __init__(self, chunks: LogitChunks, *shape: int) -> None:
        self.log_sum_exp = chunks.zeros(*shape).fill_(-torch.inf)
        self.target_logits = chunks.zeros(*shape)
        self.divisor = chunks.zeros(*shape)[0]
        self.own_logits: Tensor | None = None
        self.own_factor: Tensor | None = None
        self.weight: Tensor | None = None

    def cross_entropy(self) -> Tensor:
        log_sum_exp = self.log_sum_exp if self.weight is None else self.log_sum_exp * self.weight
        entropy = log_sum_exp - self.target_logits / self.divisor
        if self.own_logits is None or self.own_factor is None:
            return entropy
        return entropy - self.own_logits * self.own_factor

    def part(self, where: Where) -> Tensor:
        """`log_sum_exp` of a chunk's rows or columns."""
        return self.log_sum_exp[:, *where].flatten(1)


def softmax_sums(chunks: LogitChunks) -> tuple[SoftmaxSums, SoftmaxSums]:
    """Those of this rank's images, over all texts, and those of all texts (W, B), over all images."""
    image, text = SoftmaxSums(chunks, chunks.num_pairs), SoftmaxSums(chunks, chunks.world, chunks.num_pairs)
    if chunks.mixture is not None:
        image.own_logits, text.weight = torch.zeros_like(image.target_logits), torch.zeros_like(text.divisor)
    for chunk in chunks.walk(gradients=False):
        shown_RC = chunk.shown()
        positive_RC = shown_RC if chunks.mixture is None else chunk.positive()
        image.divisor[chunk.image_part].add_(positive_RC.sum(1))
        if text.weight is not None:
            text.weight[chunk.text_part].add_(shown_RC.sum(0).view_as(text.weight[chunk.text_part]))
        for index in range(len(image.log_sum_exp)):
            logits_RC = chunk.logits(index)
            target_logits_RC = logits_RC * shown_RC
            for sums, where, dim in ((image, chunk.image_part, 1), (text, chunk.text_part, 0)):
                so_far = sums.target_logits[index][where]
                so_far += target_logits_RC.sum(dim).view_as(so_far)
                so_far = sums.log_sum_exp[index][where]
                so_far.copy_(torch.logaddexp(so_far, _log_sum_exp(logits_RC, dim).view_as(so_far)))
            if image.own_logits is not None:
                image.own_logits[index][chunk.image_part].add_((logits_RC * positive_RC).sum(1))
    # So far each rank has its own images' share of a text's sums.
    highest = all_reduce(text.log_sum_exp, "max")
    exp_sum, text.target_logits = all_reduce(torch.stack([(text.log_sum_exp - highest).exp_(), text.target_logits]))
    text.log_sum_exp = exp_sum.log_().add_(highest)
    text.divisor = all_gather(image.divisor)  # a text has as many positives as the image of its pair
    if chunks.mixture is not None and text.weight is not None:
        text.weight = all_reduce(text.weight) / text.divisor
        number, image.divisor = image.divisor, image.divisor[chunks.mixture.partner_B]
        image.own_factor = (1 / number - 1 / image.divisor) * chunks.mixture.share_B.to(number.dtype)
    return image, text


def softmax_targets(chunk: Chunk, image: SoftmaxSums, text: SoftmaxSums) -> Tensor:
    """Of both directions together: (R, C)."""
    factor_RC = 1 / image.divisor[chunk.image_part][:, None] + 1 / text.divisor[chunk.text_part].flatten()
    target_RC = chunk.shown().mul_(factor_RC)
    if image.own_factor is not None:
        target_RC += chunk.positive().mul_(image.own_factor[chunk.image_part][:, None])
    return target_RC


def _log_sum_exp(x: Tensor, dim: int) -> Tensor:
    """As torch's, in two thirds of the time on a CPU, for finite numbers."""
    highest = x.amax(dim, keepdim=True)
    return (x - highest).exp_().sum(dim).log_().add_(highest.squeeze(dim))
