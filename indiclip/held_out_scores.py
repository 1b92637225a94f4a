"""The metrics of a validation: one for each head and held-out source, over the samples of all ranks."""

from collections.abc import Sequence
from typing import Any

import torch

from indiclip.distributed import gathered
from indiclip.head import Head, Metrics, Prediction
from indiclip.types import Batch, Features


class HeldOutScores:
    """Copies of the heads' metrics that are filled batch by batch.

    Args:
        heads: Bound, each with its empty metric.
    """

    def __init__(self, heads: Sequence[Head]) -> None:
        # Copied here: later their sums are converted with the weights, and a profiler's hooks cannot be copied.
        self._empty = {head.name: head.metric.clone() for head in heads}
        self._filled: dict[str, Metrics] = {}

    def begin(self) -> None:
        """Forget all batches."""
        self._filled.clear()

    def add(
        self,
        name: str,
        head: Head,
        predictions: list[Prediction],
        features: Features,
        batch: Batch,
        device: torch.device,
    ) -> None:
        """Add a batch.

        Args:
            name: Of the scores: the head's, or `head/source` where its task has several held-out sources.
            head: Whose `update_metric` gets the batch.
            predictions: Of the head.
            features: Of the batch.
            batch: See there.
            device: Where the metric is to be.
        """
        if name not in self._filled:
            self._filled[name] = self._empty[head.name].clone().to(device)
        head.metric, empty = self._filled[name], head.metric
        head.update_metric(predictions, features, batch)
        head.metric = empty

    def compute(self, device: torch.device) -> dict[str, Any]:
        """`name/number` -> its value over all ranks, and forget all batches. A collective."""
        found: dict[str, Any] = {}
        for name in self._names_of_all_ranks():
            # Ranks may have got different numbers of samples, but all must take part in a metric's exchange.
            metric = self._filled.get(name) or self._empty[name.partition("/")[0]].clone().to(device)
            found |= {f"{name}/{number}": value for number, value in metric.compute().items()}
        self.begin()
        return found

    def _names_of_all_ranks(self) -> list[str]:
        """What any rank has scored, in the same order on all of them."""
        parts = {name: metric.modules() for name, metric in self._filled.items()}
        names = [name for name, of in parts.items() if any(getattr(part, "update_called", False) for part in of)]
        return sorted(set().union(*gathered(names)))
