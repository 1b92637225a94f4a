"""How long a step takes on a processor, from how fast this one is at a few plain things.

A processor overlaps little, so the times of its kinds of work add up: matrix products, attention, whose matrices are
small, bytes that are read and written, numbers that need an exponential, and what each operator costs before it begins.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from indiclip.planning.counter import Count

_ROUNDS = 7
_FLOATS = 4_000_000  # of a vector too large for a cache of one core


@dataclass(frozen=True)
class Processor:
    """Rates of a processor, with torch's current number of threads.

    Attributes:
        flops: FLOPS of matrix products in float32.
        attention: FLOPS of fused attention, forward and backward.
        bandwidth: Bytes that an operator reads and writes in a second.
        exponential: Seconds that a GELU takes over a number beside reading and writing it.
        operator: Seconds of an operator on next to nothing.
    """

    flops: float
    attention: float
    bandwidth: float
    exponential: float
    operator: float

    def seconds(self, count: Count) -> float:
        """How long it takes over all that is counted."""
        products = (count.flops - count.attention) / self.flops + count.attention / self.attention
        pointwise = count.moved / self.bandwidth + count.exponentials * self.exponential
        return products + pointwise + count.operators * self.operator


def measure(rows: int, tokens: int, width: int, flops: float | None = None) -> Processor:
    """Measure this machine; a few seconds.

    Args:
        rows: Tokens of a batch, the rows of the matrices.
        tokens: Of an image.
        width: Of a token: the matrices are those of an MLP's first layer, its gradients' too.
        flops: Known FLOPS of matrix products, instead of measuring them.
    """
    x, y, few = torch.randn(_FLOATS), torch.randn(_FLOATS), torch.rand(8)
    bandwidth = 3 * 4 * _FLOATS / _median(lambda: x + y)
    exponential = _median(lambda: F.gelu(x)) / _FLOATS - 2 * 4 / bandwidth
    operator = _median(lambda: [few + few for _ in range(1000)]) / 1000
    attention = attention_rate(max(1, rows // tokens), tokens)
    return Processor(flops or matrix_rate(rows, width), attention, bandwidth, max(0.0, exponential), operator)


def matrix_rate(rows: int, width: int) -> float:
    """FLOPS of the three products of a linear layer from `width` to four times that: output and both gradients."""
    x, weight, gradient = torch.rand(rows, width), torch.rand(width, 4 * width), torch.rand(rows, 4 * width)

    def products() -> None:
        _ = x @ weight, gradient @ weight.T, x.T @ gradient

    return 3 * 2 * rows * width * 4 * width / _median(products)


def attention_rate(images: int, tokens: int) -> float:
    """FLOPS of attention in one head of width 64: two products forward, five backward, as torch counts them."""
    x = torch.rand(images, 1, tokens, 64, requires_grad=True)

    def attend() -> None:
        F.scaled_dot_product_attention(x, x, x).backward(x.detach())  # type: ignore[no-untyped-call]

    return 7 * 2 * images * tokens**2 * 64 / _median(attend)


def clock() -> float:
    """Seconds; of one thread those that it ran, so that other work on the machine counts little."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _median(act: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        start = clock()
        act()
        seconds.append(clock() - start)
    return statistics.median(seconds[1:])  # the first one finds caches empty
