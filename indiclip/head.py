"""The contract of a task head. A head is one file in `heads/`: module, loss, decoding, metric and picture.

A head borrows the encoder and reads precomputed features; it never runs the backbone. Nothing registers a head: the
YAML names its class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torchmetrics
from torch import Tensor, nn

from indiclip.types import Batch, Features

if TYPE_CHECKING:
    from indiclip.encoder import Encoder


class Head(nn.Module, ABC):
    """A task on top of the shared features.

    Args:
        task: Which of the step's batches this head reads. Heads that name the same task share one batch and its
            features.
        weight: Factor of this head's losses in the step's total.

    Attributes:
        name: Log prefix, `train/<name>/<loss>`: the file's name in `heads/`.
        logged: Detached numbers of the newest `loss` that are logged beside its own and are no part of the total; empty
            when `loss` is called. Their names may differ from step to step and between ranks; `<number>/<language>` is
            a curve in a plot of the number.
        metric: Its `compute()` gives a dict of numbers.
        required_fields: Fields that every sample of its task has; checked before training.
        embeds_images: Whether `loss` calls `encoder.embed_features`.
        embeds_text: Whether `loss` calls `encoder.embed_text`. What no head of a run uses is frozen: distributed
            training waits for a gradient of everything else.
    """

    metric: torchmetrics.Metric
    required_fields: tuple[str, ...] = ()
    embeds_images = True
    embeds_text = True

    def __init__(self, task: str, weight: float) -> None:
        super().__init__()
        self.task = task
        self.weight = weight
        self.name = type(self).__module__.rsplit(".", 1)[-1]
        self.logged: dict[str, Tensor] = {}

    @abstractmethod
    def bind(self, encoder: Encoder) -> None:
        """Create the layers for this encoder's widths. Called once, before the optimizer sees the parameters."""

    def check(self, dataset: Any) -> None:
        """Compare the head with a dataset it will be given, before training.

        Raises:
            ValueError: What does not fit, naming the YAML key.
        """

    @abstractmethod
    def loss(self, features: Features, batch: Batch, encoder: Encoder) -> dict[str, Tensor]:
        """Scalars to be summed. Every parameter of the head gets a gradient, also for images without objects."""

    @abstractmethod
    def predict(self, features: Features, batch: Batch, encoder: Encoder) -> list[dict[str, Any]]:
        """One dict per image, in the resized image's pixels."""

    @abstractmethod
    def update_metric(self, predictions: list[dict[str, Any]], batch: Batch) -> None:
        """Add a batch to `metric`."""

    def visualize(
        self, image_HW3: np.ndarray, prediction: dict[str, Any], target: dict[str, Any]
    ) -> tuple[np.ndarray, str]:
        """A held-out image with the prediction on it, and a line of text below it, for the report.

        Args:
            image_HW3: uint8 RGB, the resized image.
            prediction: One item of `predict`, on the CPU.
            target: The batch's targets of this image.
        """
        return image_HW3, ""
