"""Views: other crops of a sample's image, made beside it for what compares them with each other."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from indiclip.loading.collate import Prepared
from indiclip.loading.transforms import Transform
from indiclip.names import check_range
from indiclip.preprocessing import Preprocessing, read_upright
from indiclip.steps import check_starts, start_within
from indiclip.types import Sample


@dataclass
class View:
    """One or more augmented copies of each image of a source, in the batch's `views` under their name.

    Args:
        name: What heads call them.
        count: How many of each image; each is augmented anew.
        augment: torchvision v2 transforms of the image alone, e.g. a RandomResizedCrop. Their random numbers are a
            function of (seed, sample position, name, number).
        max_tokens: Most patches; larger ones are scaled down, aspect kept.
        start: Where the run begins to make them: a share of its steps below 1, or the number of a step.
    """

    name: str
    count: int = 1
    augment: list[nn.Module] = field(default_factory=list)
    max_tokens: int = 256
    start: float = 0.0

    def __post_init__(self) -> None:
        check_range({f"{self._key}: count": self.count, f"{self._key}: max_tokens": self.max_tokens}, 1)
        check_starts({f"{self._key}: start": self.start})
        self.transform = Transform(self.max_tokens, self.augment)

    @property
    def _key(self) -> str:
        """In messages."""
        return f"data: view {self.name!r}"

    def start_step(self, run_steps: int | None) -> int:
        """The step in which a run begins to make them.

        Args:
            run_steps: Of the whole run; None where it has no end.

        Raises:
            ValueError: It is behind the run's last one, or a share of a run without an end.
        """
        return start_within(f"{self._key}: start", self.start, run_steps)


def check_views(views: Sequence[View], key: str) -> None:
    """Raise ValueError for two views of one name."""
    names = [view.name for view in views]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{key}: {', '.join(repeated)} stands there more than once")


def make_views(
    views: Sequence[View],
    sample: Sample,
    preprocessing: Preprocessing,
    random_seed: int,
    step: int,
    run_steps: int | None,
) -> dict[str, list[Prepared]]:
    """Name -> the copies of a sample's image, of those views that have begun by this step.

    Raises:
        UnreadableSample: The image cannot be decoded.
    """
    begun = [view for view in views if step >= view.start_step(run_steps)]
    if not begun:
        return {}
    pixels_HW3 = read_upright(sample["image"]).permute(1, 2, 0).numpy()  # decoded once for all
    image = cast(Sample, {"key": sample["key"], "image": pixels_HW3})

    def seed(view: View, number: int) -> int:
        return zlib.crc32(f"view:{view.name}:{number}:{random_seed}".encode())

    return {
        view.name: [view.transform(image, preprocessing, seed(view, number)) for number in range(view.count)]
        for view in begun
    }
