"""How pages about the benchmark show a number: its words, a heated cell, bars with their interval; and their style."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from indiclip.evals.pages.page import Html, many, tag
from indiclip.evals.results import IMAGES, PHOTOGRAPHS, CardResult, Score, corrected

STYLE = """
:root { --hit: light-dark(#12787a, #4fc3c0); --miss: light-dark(#c2410c, #ff9a5c); --a: light-dark(#5b6b8c, #9fb2d8);
        --b: var(--hit); --soft: color-mix(in srgb, currentColor 6%, transparent); --quiet: color-mix(in srgb,
        currentColor 62%, transparent); --page: light-dark(#fff, #16181c); }
body { background: var(--page); color: light-dark(#1c1e22, #e7e7ea); }
h1 { line-height: 1.2; margin-bottom: .3rem; overflow-wrap: anywhere; }
h2 { margin-bottom: .6rem; } h3 { margin: 1.6rem 0 .4rem; }
a { color: inherit; text-decoration-color: var(--line); text-underline-offset: .2em; }
small, .quiet { color: var(--quiet); } small.miss { color: var(--miss); display: block; } small { font-size: 12px; }
.eyebrow { color: var(--quiet); margin: 0; letter-spacing: .04em; }
.covers { font-size: 1.35rem; line-height: 1.35; margin: 1.2rem 0 .8rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.6rem, 1fr)); gap: .6rem; }
.tile { background: var(--soft); border-radius: 8px; padding: .55rem .75rem .7rem; display: flex;
        flex-direction: column; line-height: 1.3; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile .track { margin-top: .35rem; height: 5px; } .tile b { margin-top: auto; }
.badge { font-size: 12px; font-weight: normal; border: 1px solid var(--line); border-radius: 99px;
         padding: .05rem .55rem; margin-left: .5rem; vertical-align: middle; white-space: nowrap; }
.badge.procedural { border-style: dashed; }
th { font-weight: 600; font-size: 13px; vertical-align: bottom; } tbody th { padding-top: .9rem; }
td { vertical-align: top; } td.number, th.number { padding: .15rem .5rem; } h4 { margin: 0 0 .2rem; font-size: 13px; }
th small { display: block; font-weight: normal; } details h4 { margin-top: .8rem; }
td.number small { display: block; line-height: 1.2; white-space: nowrap; }
td.heat { background: color-mix(in srgb, var(--hit) var(--v), transparent); }
tr.mean td { font-weight: 600; } td.reason { color: var(--quiet); }
.beside { display: flex; flex-wrap: wrap; gap: 1rem 2.6rem; align-items: flex-start; }
.beside > * { max-width: 100%; }
.beside h3 { margin-top: .6rem; } .beside th.number { max-width: 6.6rem; } .beside ul { font-size: 13px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1.4rem 2.4rem; }
.panels h3 { font-size: 1rem; margin: 0 0 .3rem; }
.bar { display: grid; grid-template-columns: 7rem 1fr 3rem 11rem; gap: .5rem; align-items: center;
       line-height: 1.45; font-size: 13px; font-variant-numeric: tabular-nums; }
.bar > :nth-child(3) { text-align: right; } .bar > :last-child { color: var(--quiet); font-size: 12px; }
.bar.a { margin-top: .35rem; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; }
.key.a { background: var(--a); } .key.b { background: var(--b); }
.track { position: relative; display: block; height: 11px; background: var(--soft); border-radius: 2px; }
.track i { position: absolute; top: 0; bottom: 0; }
.track .fill { left: 0; width: var(--v); border-radius: 2px;
               background: color-mix(in srgb, var(--hit) 62%, transparent); }
.track .fill.en { background: var(--hit); }
.track .fill.a { background: var(--a); } .track .fill.b { background: var(--b); }
.track .whisker { left: var(--low); width: calc(var(--high) - var(--low)); border: solid currentColor;
                  border-width: 0 1px; top: 2px; bottom: 2px; }
.track .whisker::after { content: ""; position: absolute; left: 0; right: 0; top: 50%; border-top: 1px solid; }
.track .chance { left: var(--c); border-left: 2px dotted var(--miss); top: -2px; bottom: -2px; }
.pictures.small { grid-template-columns: repeat(auto-fill, minmax(9.4rem, 1fr)); gap: .9rem; }
.pictures.pairs { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.pair { background: var(--soft); border-radius: 8px; padding: .6rem; } .pair p { margin: 0 0 .4rem; font-size: 13px; }
.pair div { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; }
.small figure img, .pair figure img, .blank { width: 100%; aspect-ratio: 4/3; object-fit: contain;
       background: var(--soft); border-radius: 4px; display: block; }
.blank { display: grid; place-items: center; color: var(--quiet); font-size: 12px; }
figcaption { line-height: 1.4; margin-top: .25rem; white-space: normal; } figcaption b { font-weight: 600; }
figcaption .clamp { display: -webkit-box; -webkit-line-clamp: 4; -webkit-box-orient: vertical; overflow: hidden; }
.hit { color: var(--hit); } .miss { color: var(--miss); }
.matrix { display: block; font: 10.5px system-ui, "Noto Sans", sans-serif; fill: currentColor; }
.matrix .count { pointer-events: none; font-size: 12px; }
.matrix .right { fill: var(--hit); } .matrix .wrong { fill: var(--miss); } .matrix .grid { stroke: var(--line); }
.note { border-left: 3px solid var(--miss); padding-left: .8rem; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--quiet); }
ul.plain { padding-left: 1.1rem; margin: .4rem 0; } section { scroll-margin-top: 1rem; }
pre { background: var(--soft); padding: .8rem; border-radius: 6px; }
.board td { white-space: nowrap; }
.all td, .all th { font-size: 12px; padding-right: .8rem; }
.all :is(td, th):nth-child(n+6) { text-align: right; font-variant-numeric: tabular-nums; }
.overview td:first-child { min-width: 6.5rem; }
.scroll td:first-child { position: sticky; left: 0; background: var(--page); z-index: 1; }
@media (max-width: 40rem) { body { margin: 1rem auto; } .bar { grid-template-columns: 6.2rem 1fr 2.6rem 3.2rem; }
       .bar .ends { display: none; } .badge { margin-left: 0; } .pictures.small { grid-template-columns: 1fr 1fr; } }
"""

_LANGUAGES = {
    "as": "Assamese",
    "bn": "Bengali",
    "en": "English",
    "gu": "Gujarati",
    "hi": "Hindi",
    "kn": "Kannada",
    "ml": "Malayalam",
    "mr": "Marathi",
    "ne": "Nepali",
    "or": "Odia",
    "pa": "Punjabi",
    "sa": "Sanskrit",
    "ta": "Tamil",
    "te": "Telugu",
    "ur": "Urdu",
    IMAGES: "images only",
}
_METRICS = {
    "acc1": "top-1",
    "acc5": "top-5",
    "mean_per_class_recall": "mean recall per class",
    "median_km": "median distance",
}
_PROTOCOLS = {"knn": "k nearest neighbours", "classes": "the classes told apart"}


def language_name(code: str) -> str:
    """`Hindi` of `hi`, `Hindi, romanised` of `hi-Latn`."""
    language, _, script = code.partition("-")
    name = _LANGUAGES.get(language, language)
    return name if not script else f"{name}, romanised" if script == "Latn" else f"{name}, {script}"


def metric_name(metric: str) -> str:
    """`image to text R@5` of `image_to_text_r5`; `against English, top-1` of `parity_acc1`."""
    if metric.startswith("parity_"):
        return f"against English, {metric_name(metric.removeprefix('parity_'))}"
    return _METRICS.get(metric, re.sub(r" r(\d+)$", r" R@\1", metric.replace("_", " ")))


def protocol_name(protocol: str) -> str:
    return _PROTOCOLS.get(protocol, protocol.replace("_", " "))


def title(card: CardResult) -> str:
    """Of a card, with a word where its pictures are generated."""
    return card.title if card.part == PHOTOGRAPHS else f"{card.title} (generated)"


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
    words = number(value, metric)
    return f"+{words}" if words.strip("0.km ") and words[0].isdigit() else words


def interval(low: float | None, high: float | None, metric: str = "") -> str:
    """Both ends, or nothing where there are none, or where they are one: resamples of nothing but misses say little."""
    if low is None or high is None or not math.isfinite(low + high) or low == high:
        return ""
    return f"{number(low, metric)} to {number(high, metric)}"


def heated(score: Score | None) -> Html:
    """A cell with the value over its interval, coloured by how far it is above chance."""
    if score is None:
        return tag("td", "", class_="number")
    heat = 0.0 if is_distance(score.metric) or score.metric.startswith("parity_") else above_chance(score)
    small = tag("small", interval(score.low, score.high, score.metric))
    return heat_cell(many([number(score.value, score.metric), small]), heat)


def heat_cell(words: str, heat: float) -> Html:
    """A number's cell.

    Args:
        words: The number.
        heat: How strong its colour is, 0 to 1.
    """
    share = 55 * min(max(heat, 0.0), 1.0)  # of a colour on which black and white can still be read
    return tag("td", words, class_="number heat", style=f"--v:{share:.0f}%")


def above_chance(score: Score) -> float:
    """0 at chance or below, 1 where all is right."""
    value = corrected(score.value, score.chance)
    return min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0


def images_were(count: int) -> str:
    return f"{count:,} image{'s were' if count != 1 else ' was'}"


class Bar(NamedTuple):
    """A row of a chart."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""  # words or Html
    kind: str = ""  # en, a, b: its colour


def chart(rows: Iterable[Bar], metric: str = "", chance: float | None = None) -> Html:
    """Bars from 0 to 1 (of a distance: to the longest), with their intervals and a dotted line at chance."""
    rows = list(rows)
    ends = [end for row in rows for end in (row.value, row.high) if end is not None and math.isfinite(end)]
    longest = max(ends, default=1.0) if is_distance(metric) else 1.0
    return many(_bar(row, metric, chance, longest or 1.0) for row in rows)


def _bar(row: Bar, metric: str, chance: float | None, longest: float) -> Html:
    marks = []
    if math.isfinite(row.value):
        marks.append(tag("i", class_=f"fill {row.kind}".strip(), style=f"--v:{_share(row.value, longest)}"))
    if row.low is not None and row.high is not None and math.isfinite(row.low + row.high):
        ends = f"--low:{_share(row.low, longest)};--high:{_share(row.high, longest)}"
        marks.append(tag("i", class_="whisker", style=ends))
    if chance is not None:
        marks.append(tag("i", class_="chance", style=f"--c:{_share(chance, longest)}"))
    cells = [tag("span", row.name), tag("span", *marks, class_="track")]
    return tag(
        "div", *cells, tag("span", number(row.value, metric)), tag("span", row.note), class_=f"bar {row.kind}".strip()
    )


def _share(value: float, longest: float) -> str:
    return f"{100 * min(max(value / longest, 0.0), 1.0):.1f}%"
