"""A few images of each card with their embeddings, from which the report draws a map.

Shape letters: N images, S of the sample, E embedding length.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np
from torch import Tensor

from indiclip.datasets.tables import stable_hash
from indiclip.evals.images.items import Items
from indiclip.evals.results import part_of

MOST = 500  # images of a card


class Sample(NamedTuple):
    """Some of the images that were scored, in the main setting.

    Attributes:
        keys: Theirs.
        classes: The id of each image's class, "" where it has none.
        image_SE: float32, of unit length.
    """

    card: str
    part: str
    keys: list[str]
    classes: list[str]
    image_SE: np.ndarray

    @property
    def key(self) -> tuple[str, str]:
        """The part of a card that it is of."""
        return self.card, self.part


def sample_of(items: Items, image_NE: Tensor, most: int = MOST) -> list[Sample]:
    """One sample of a card's images, or none of a card without any.

    Of every class one image is taken before a second of any; which ones is up to their keys alone.
    """
    if not items.num_images:
        return []
    usable = np.flatnonzero(items.tested_N & image_NE.isfinite().all(1).numpy()).tolist()
    usable.sort(key=lambda place: stable_hash(items.keys[place]))
    labels, count_of_class, place_in_class = items.labels.tolist(), Counter[int](), dict[int, int]()
    for place in usable:
        place_in_class[place] = count_of_class[labels[place]]
        count_of_class[labels[place]] += 1
    chosen = sorted(sorted(usable, key=place_in_class.__getitem__)[:most])
    ids = [*items.card.ids, ""]
    classes = [ids[labels[place]] for place in chosen]  # "" where it is -1
    keys = [items.keys[place] for place in chosen]
    return [Sample(items.card.id, part_of(items.procedural), keys, classes, image_NE[chosen].numpy())]
