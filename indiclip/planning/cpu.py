"""How long a step takes on a processor: matrix products at its matrix rate, and all that operators read and write.

A processor overlaps little, so the times add up: FLOPs over the matrix rate, bytes over the bandwidth, and what each
operator costs before it begins.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from indiclip.planning.counter import Count

_ROUNDS = 7
_FLOATS = 4_000_000  # of a vector too large for a cache of one core


@dataclass(frozen=True)
class Processor:
    """Rates of a processor, with torch's current number of threads.

    Attributes:
        flops: FLOPS of matrix products in float32.
        bandwidth: Bytes that an operator reads and writes in a second.
        operator: Seconds of an operator on next to nothing.
    """

    flops: float
    bandwidth: float
    operator: float

    def seconds(self, count: Count) -> float:
        """How long it takes over all that is counted."""
        return count.flops / self.flops + count.moved / self.bandwidth + count.operators * self.operator


def measure(rows: int, width: int, flops: float | None = None) -> Processor:
    """Measure this machine; about a second.

    Args:
        rows: Tokens of a batch, the rows of the matrices.
        width: Of the tokens: the matrices are those of an MLP's first layer, its gradients' too.
        flops: Known FLOPS of matrix products, instead of measuring them.
    """
    x, y = torch.rand(_FLOATS), torch.rand(_FLOATS)
    out, few = torch.empty_like(x), torch.rand(8)
    bandwidth = 3 * 4 * _FLOATS / _median(lambda: torch.add(x, y, out=out))
    operator = _median(lambda: [few + few for _ in range(1000)]) / 1000
    return Processor(flops or matrix_rate(rows, width), bandwidth, operator)


def matrix_rate(rows: int, width: int) -> float:
    """FLOPS of the three products of a linear layer from `width` to four times that: output and both gradients."""
    x, weight, gradient = torch.rand(rows, width), torch.rand(width, 4 * width), torch.rand(rows, 4 * width)

    def products() -> None:
        _ = x @ weight, gradient @ weight.T, x.T @ gradient

    return 3 * 2 * rows * width * 4 * width / _median(products)


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
