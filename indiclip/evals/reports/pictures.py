"""Pictures of scored images, for reports."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from indiclip.evals.images.items import Items
from indiclip.evals.results import part_of
from indiclip.images import UnreadableSample
from indiclip.preprocessing import read_upright, resize, upright_hw


def thumbnail(image: Any, max_side: int) -> np.ndarray:
    """An image as `Items.images` gives it, upright: uint8 (height, width, 3), scaled down to `max_side` if larger.

    Raises:
        UnreadableSample: It cannot be decoded.
    """
    height, width = upright_hw(image)
    scale = min(1.0, max_side / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return resize(read_upright(image, size), size).permute(1, 2, 0).numpy()


class Pictures:
    """(card, part, key) -> uint8 (height, width, 3), decoded when it is asked for; None where there is no such image.

    Args:
        every: What was scored.
        max_side: Larger ones are scaled down to this many pixels.
    """

    def __init__(self, every: Sequence[Items], max_side: int = 160) -> None:
        self.max_side = max_side
        self._places = {
            (items.card.id, part_of(items.procedural), key): (items.images, place)
            for items in every
            for place, key in zip(range(items.num_images), items.keys, strict=False)  # texts have none
        }

    def __call__(self, card: str, part: str, key: str) -> np.ndarray | None:
        if (card, part, key) not in self._places:
            return None
        images, place = self._places[card, part, key]
        try:
            return thumbnail(images[place], self.max_side)
        except UnreadableSample:
            return None
