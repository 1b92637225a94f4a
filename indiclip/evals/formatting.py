"""How people read a number of the benchmark: its words, and how its colour and length show it."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from indiclip.evals.results import PHOTOGRAPHS, CardResult, Score
from indiclip.names import plain

NAMES: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_name("names.yaml").read_text("utf-8"))
_STRONGEST = 50  # percent of a colour, on which text can be read


def language_name(code: str) -> str:
    """`Hindi` of `hi`, `Hindi, romanised` of `hi-Latn`."""
    language, _, script = code.partition("-")
    name = NAMES["languages"].get(language, language)
    if not script:
        return name
    return f"{name}, {'romanised' if script == 'Latn' else script}"


def metric_name(metric: str) -> str:
    """`image to text R@5` of `image_to_text_r5`; `against English, top-1` of `parity_acc1`."""
    if metric.startswith("parity_"):
        return f"against English, {metric_name(metric.removeprefix('parity_'))}"
    if metric in NAMES["metrics"]:
        return NAMES["metrics"][metric]
    for pattern, said in NAMES["metric_patterns"].items():
        metric = re.sub(pattern, said, metric)
    return words(metric)


def in_reading_order(metrics: Iterable[str]) -> list[str]:
    """Those that differ in numbers only stand together, where the first of them is, in the order of these numbers."""
    families: dict[str, list[str]] = {}
    for metric in dict.fromkeys(metrics):
        families.setdefault(re.sub(r"\d+", "#", metric), []).append(metric)
    for family in families.values():
        family.sort(key=lambda metric: [int(part) for part in re.findall(r"\d+", metric)])
    return [metric for family in families.values() for metric in family]


def protocol_name(protocol: str) -> str:
    return NAMES["protocols"].get(protocol, words(protocol))


def suite_name(suite: str) -> str:
    return NAMES["suite_names"].get(suite, suite)


def group_name(protocol: str) -> str:
    """What a protocol's numbers of part of the images, or of one way to ask, are by."""
    return NAMES["groups"].get(protocol, "group")


class ClassName(NamedTuple):
    """A class for people: its English name, and the one in another language, or nothing."""

    english: str
    native: str = ""
    language: str = ""  # of the latter

    def __str__(self) -> str:
        return f"{self.english} · {self.native}" if self.native else self.english


def class_name(card: CardResult, answer: str) -> ClassName:
    """Of a class by its id; where a card ranks texts, the text itself."""
    if card.candidates != "classes":
        return ClassName(answer)
    names = card.names.get(answer, {})
    native = next(((name, code) for code, name in names.items() if code != "en"), ("", ""))
    return ClassName(names.get("en", words(answer)), *native)


def title(card: CardResult) -> str:
    """Of a card, with a word where its pictures are generated."""
    return card.title if card.part == PHOTOGRAPHS else f"{card.title} (generated)"


def found_by(found: dict[str, Any]) -> str:
    """How images of a card were looked for in training data, and how many were found by each way.

    Args:
        found: Of the card, as `indiclip.evals.overlap.flag` gives it; of earlier runs some counts are missing.
    """
    kinds = {"bytes": "the same bytes", "image": "the same looks", "caption": "a caption"}
    looked_for = found.get("looked_for", [kind for kind in kinds if f"by_{kind}" in found])
    parts = [f"{kinds[kind]} {found[f'by_{kind}']:,}" for kind in looked_for]
    if few := found.get("not_comparable"):
        parts.append(f"with too little structure to be known by its looks {few:,}")
    if nowhere := [name for kind, name in kinds.items() if kind not in looked_for and "looked_for" in found]:
        parts.append(f"not looked for: {', '.join(nowhere)}")
    return "; ".join(parts) or "not said how"


def when(date: str) -> str:
    """`2026-01-02 03:04:05 UTC` of an ISO date and time; other words as they are."""
    return f"{date[:10]} {date[11:-6]} UTC" if date.endswith("+00:00") else date


def words(name: str, most: int | None = None) -> str:
    """An id for people, cut to `most` characters."""
    name = name.replace("_", " ")
    return name if most is None or len(name) <= most else f"{name[: most - 1]}…"


def markdown_cell(text: str) -> str:
    """Words that leave a table of Markdown whole."""
    return " ".join(plain(text).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def is_distance(metric: str) -> bool:
    """Whether less is better, and the unit a kilometre."""
    return metric.endswith("_km") and not metric.startswith("within_")


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


def chance_of(scores: Iterable[Any]) -> float | None:
    """Of the first of a card's scores that has one: English, which comes first, names every class."""
    return next((score.chance for score in scores if score is not None and score.chance is not None), None)


def share(value: float, of: float = 1.0) -> str:
    """A length, from 0% to 100%."""
    return f"{100 * min(1.0, max(0.0, value / of)):.1f}%"


def heat(share: float) -> str:
    """How strong the colour of a share is, in every table and map of every page: as its square root, so that one in a
    hundred can be seen.
    """
    return f"{_STRONGEST * min(1.0, max(0.0, share)) ** 0.5:.0f}%" if math.isfinite(share) else "0%"


def is_share(score: Score) -> bool:
    """Whether a number is a share of what was asked, which has a colour: no distance, difference or similarity."""
    return not is_distance(score.metric) and not score.metric.startswith(tuple(NAMES["no_shares"]))


Gap = tuple[float, float | None, float | None]  # a difference and its interval


class Bar(NamedTuple):
    """A row of a chart."""

    name: str
    score: Score
    kind: str = ""  # en, a, b: its colour
    gap: Gap | None = None  # to another bar


def longest(bars: Iterable[Bar], metric: str) -> float:
    """Where the axis of a chart ends: at 1, or at the longest distance."""
    if not is_distance(metric):
        return 1.0
    ends = [end for bar in bars for end in (bar.score.value, bar.score.high) if end is not None and math.isfinite(end)]
    return max(ends, default=0.0) or 1.0
