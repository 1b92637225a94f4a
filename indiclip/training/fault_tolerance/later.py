"""Numbers of the device that the host reads without waiting for it."""

from typing import Any

import torch
from torch import Tensor


class Later:
    """Numbers on their way to the host, to be read when the device has got there: a step later it mostly has.

    Args:
        numbers: (n,), on any device.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.detach()
        self._arrived: Any = None
        if numbers.is_cuda:
            self._numbers = self._numbers.to("cpu", non_blocking=True)  # into pinned memory
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    @property
    def arrived(self) -> bool:
        """Whether `read` would not wait."""
        return self._arrived is None or bool(self._arrived.query())

    def read(self) -> list[float]:
        """The numbers; waits until they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[float] = self._numbers.tolist()
        return found
