"""How people read a number of the benchmark: its words, and how its colour and length show it."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from indiclip.evals.results import PHOTOGRAPHS, CardResult, Score, corrected

NAMES: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_name("names.yaml").read_text("utf-8"))


def language_name(code: str) -> str:
    """`Hindi` of `hi`, `Hindi, romanised` of `hi-Latn`."""
    language, _, script = code.partition("-")
    name = NAMES["languages"].get(language, language)
    return name if not script else f"{name}, romanised" if script == "Latn" else f"{name}, {script}"


def metric_name(metric: str) -> str:
    """`image to text R@5` of `image_to_text_r5`; `against English, top-1` of `parity_acc1`."""
    if metric.startswith("parity_"):
        return f"against English, {metric_name(metric.removeprefix('parity_'))}"
    return NAMES["metrics"].get(metric, re.sub(r" r(\d+)$", r" R@\1", words(metric)))


def protocol_name(protocol: str) -> str:
    return NAMES["protocols"].get(protocol, words(protocol))


def title(card: CardResult) -> str:
    """Of a card, with a word where its pictures are generated."""
    return card.title if card.part == PHOTOGRAPHS else f"{card.title} (generated)"


def found_by(found: dict[str, Any]) -> str:
    """How images of a card were looked for in training data, and how many were found by each way.

    Args:
        found: Of the card, as `indiclip.evals.overlap.flag` gives it; of runs of before some counts are missing.
    """
    ways = {"bytes": "the same bytes", "image": "the same looks", "caption": "a caption"}
    looked_for = found.get("looked_for", [kind for kind in ways if f"by_{kind}" in found])
    parts = [f"{ways[kind]} {found[f'by_{kind}']:,}" for kind in looked_for]
    if few := found.get("not_comparable"):
        parts.append(f"with too little structure to be known by its looks {few:,}")
    if nowhere := [name for kind, name in ways.items() if kind not in looked_for and "looked_for" in found]:
        parts.append(f"not looked for: {', '.join(nowhere)}")
    return "; ".join(parts) or "not said how"


def words(name: str, most: int | None = None) -> str:
    """An id for people, cut to `most` characters."""
    name = name.replace("_", " ")
    return name if most is None or len(name) <= most else f"{name[: most - 1]}…"


def markdown_cell(text: str) -> str:
    """Words that leave a table of Markdown whole."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def is_distance(metric: str) -> bool:
    """Whether less is better, and the unit a kilometre."""
    return metric.endswith("_km")


def number(value: float | None, metric: str = "", digits: int = 3) -> str:
    """A value for people."""
    if value is None or not math.isfinite(value):
        return "–"
    said = f"{value:,.0f} km" if is_distance(metric) else f"{value:.{digits}f}"
    return said.lstrip("-") if not said.strip("-0.km ") else said.replace("-", "−")  # no minus before what rounds to 0


def signed(value: float | None, metric: str = "") -> str:
    """A difference for people."""
    said = number(value, metric)
    return f"+{said}" if said.strip("0.km ") and said[0].isdigit() else said


def interval(low: float | None, high: float | None, metric: str = "") -> str:
    """Both ends, or nothing where there are none, or where they are one: resamples of nothing but misses say little."""
    if low is None or high is None or not math.isfinite(low + high) or low == high:
        return ""
    return f"{number(low, metric)} to {number(high, metric)}"


def chance_of(scores: Iterable[Score | None]) -> float | None:
    """Of the first of a card's scores: English, which comes first, names every class."""
    return next((score.chance for score in scores if score is not None), None)


def share(value: float, of: float = 1.0) -> str:
    """A length, from 0% to 100%."""
    return f"{100 * min(1.0, max(0.0, value / of)):.1f}%"


def heat(value: float, chance: float | None = None, metric: str = "") -> str:
    """How strong a cell's colour is: nothing at chance or below, and 55%, on which text can be read, where all is
    right.
    """
    has_scale = not is_distance(metric) and not metric.startswith("parity_")
    return f"{55 * min(1.0, max(0.0, corrected(value, chance))):.0f}%" if has_scale else "0%"


Gap = tuple[float, float | None, float | None]  # a difference and its interval


class Bar(NamedTuple):
    """A row of a chart."""

    name: str
    score: Score
    kind: str = ""  # en, a, b: its colour
    gap: Gap | None = None  # to another bar


def longest(bars: Iterable[Bar], metric: str) -> float:
    """Where the axis of a chart ends: at 1, or at the longest distance."""
    ends = [end for bar in bars for end in (bar.score.value, bar.score.high) if end is not None and math.isfinite(end)]
    return (is_distance(metric) and max(ends, default=1.0)) or 1.0
