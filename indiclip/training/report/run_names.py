"""What people call the numbers that a run logs.

Names are `train/<head>/<loss>`, `val/<head>/<metric>` or `val/<head>/<source>/<metric>`, each with `/<language>` behind
it where it is of one, `eval/<suite>/<card>/<language>/<metric>` and `throughput/<number>`. The heads say what their
metrics are called, see `Measure` of `indiclip.head`.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from indiclip.evals.formatting import NAMES, language_name, metric_name, words

if TYPE_CHECKING:
    from indiclip.presentation import Measure

# A head's name, or `head/source` of a task with several held-out sources -> what it is called, and its metrics.
HeadNames = Mapping[str, tuple[str, Mapping[str, "Measure"]]]


class Named(NamedTuple):
    """A logged number, for people.

    Attributes:
        subject: Whose it is, such as `Detection`.
        words: What it is, such as `AP at IoU 0.5`.
        unit: Empty for shares and ratios.
        better: `higher`, `lower` or empty.
        language: Its name; empty where the number is of none.
    """

    subject: str
    words: str
    unit: str = ""
    better: str = ""
    language: str = ""

    @property
    def full(self) -> str:
        """All of it."""
        said = f"{self.subject}: {self.words}" if self.subject else self.words
        return f"{said}, {self.language}" if self.language else said


def named(name: str, heads: HeadNames) -> Named:
    """A number by its logged name; one that nobody describes is called by that."""
    suite, *parts = name.split("/")
    if suite == "eval" and len(parts) == 4:
        benchmark, card, language, metric = parts
        subject = NAMES["suites"].get(benchmark, words(benchmark))
        return Named(subject, f"{words(card)}, {metric_name(metric)}", language=language_name(language))
    if suite == "throughput" and len(parts) == 1:
        return Named("", *NAMES["throughput"].get(parts[0], [words(parts[0])]))
    if suite not in ("train", "val") or len(parts) < 2:
        return Named("", words(name))

    place = "/".join(parts[:2]) if "/".join(parts[:2]) in heads else parts[0]
    metric, *rest = parts[place.count("/") + 1 :]
    subject, measures = heads.get(place, (spoken(place), {}))
    language = language_name(rest[0]) if rest else ""
    if suite == "val" and metric in measures:
        measure = measures[metric]
        return Named(subject, measure.words, measure.unit, measure.better, language)
    return Named(subject, words(metric), language=language)


def spoken(place: str) -> str:
    """`Mask rcnn, first` of `mask_rcnn/first`, for a head that has no title."""
    said = words(place.replace("/", ", "))
    return f"{said[:1].upper()}{said[1:]}"


def reading_order(name: str, heads: HeadNames) -> tuple[Any, ...]:
    """Sorts logged names as people read them: by head and in the order that it gives, else by the numbers in the names
    (64, 128, 256), that without one last.
    """
    suite, *parts = name.split("/")
    if suite == "val":
        for place, (key, (_, measures)) in enumerate(heads.items()):
            metric, *language = name.removeprefix(f"val/{key}/").split("/")
            if name.startswith(f"val/{key}/") and metric in measures:
                return (suite, place, list(measures).index(metric), language)
    return (suite, len(heads), *_natural(parts))


def _natural(parts: list[str]) -> list[Any]:
    last = (10**9, "\uffff")
    split = [[piece.strip("_") for piece in re.split(r"(\d+)", part)] for part in parts]
    return [
        [*((int(piece), "") if piece.isdecimal() else (10**9, piece) for piece in pieces if piece), last]
        for pieces in split
    ]
