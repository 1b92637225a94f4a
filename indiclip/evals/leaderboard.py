"""What a leaderboard keeps of a run of the benchmark, and which rows may stand in one table."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from statistics import fmean
from typing import Any

from indiclip.evals.leaderboard_file import Row
from indiclip.evals.results import PHOTOGRAPHS, PROBES, Result, Score, corrected, finite
from indiclip.evals.suites import INDIA, OWN

Estimate = tuple[float | None, ...]  # a number and both ends of its interval
Where = tuple[str, str]  # card and language


def rows_of(result: Result) -> list[Row]:
    """A row for each suite of which photographs have a main number or a probe's; own cards are a suite too."""
    rows = (row_of(result, suite) for suite in sorted({card.suite for card in result.cards}))
    return [row for row in rows if any(row["cards"].values())]


def row_of(result: Result, suite: str = INDIA) -> Row:
    """What the leaderboard keeps of a run.

    `run` tells runs apart: the same model at another time is another run. `data` tells which images they are over, the
    photographs of the suite that were scored; `asked` by which names and prompts, per language.
    """
    headline, languages = result.headline(suite), result.languages()
    scored = {card.card: card for card in result.photographs(suite)}
    digests, asked = result.about.get("data", {}), result.about.get("asked", {})
    data = _digest({card: digests[card] for card in scored}) if scored and scored.keys() <= digests.keys() else ""
    date = str(result.about.get("date", ""))
    identity = [result.model, date, result.lengths, result.views, sorted(scored), data]

    scores = _main_scores(result, scored)
    found = result.gaps()
    gaps = {where: _estimate(found[score.measured]) for where, score in scores.items() if score.measured in found}
    means = _means(_corrected(scores))
    return {
        "run": _digest(identity if suite == INDIA else [suite, *identity]),
        "suite": suite,
        "model": result.model,
        "date": date,
        "covered": headline["covered"],
        "of": headline["of"],
        "mean": {language: mean[0] for language, mean in means.items()},
        "mean_interval": {language: mean[1:] for language, mean in means.items()},
        "mean_gap": _means(gaps),
        "cards": _nested(scored, {where: finite(score.value) for where, score in scores.items()}),
        "intervals": _nested(scored, {where: _estimate(score)[1:] for where, score in scores.items()}),
        "gaps": _nested(scored, gaps),
        "titles": {name: card.title for name, card in scored.items()},
        "metrics": {name: card.metric for name, card in scored.items()},
        "chances": _nested(scored, {where: score.chance for where, score in scores.items()}),
        "precision": str(result.about.get("options", {}).get("precision", "fp32")),
        "lengths": result.lengths,
        "views": result.views,
        "data": data,
        "asked": {of: _digest({card: asked[card].get(of) for card in scored}) for of in languages} if asked else {},
    }


def _main_scores(result: Result, cards: Container[str]) -> dict[Where, Score]:
    """The main numbers of the photographs of these cards by language, and the probes beside these."""
    columns = result.mains() | {protocol: result.probes(protocol) for protocol in PROBES}
    return {
        (card, column): score
        for column, found in columns.items()
        for (card, part), score in found.items()
        if part == PHOTOGRAPHS and card in cards
    }


def _nested(cards: Iterable[str], values: dict[Where, Any]) -> dict[str, dict[str, Any]]:
    """Card -> language -> value."""
    table: dict[str, dict[str, Any]] = {card: {} for card in cards}
    for (card, language), value in values.items():
        table[card][language] = value
    return table


def _corrected(scores: dict[Where, Score]) -> dict[Where, Estimate]:
    """Numbers corrected for chance, but for those of which guessing is always right."""
    return {where: _estimate(score, score.chance) for where, score in scores.items() if score.chance != 1}


def _estimate(score: Score, chance: float | None = None) -> Estimate:
    ends = (score.value, score.low, score.high)
    return tuple(None if end is None else finite(corrected(end, chance)) for end in ends)


def _means(estimates: dict[Where, Estimate]) -> dict[str, Estimate]:
    """Language -> the mean over the cards that have it."""
    by_language = defaultdict(list)
    for (_, language), estimate in estimates.items():
        by_language[language].append(estimate)
    return {language: _mean(of) for language, of in by_language.items()}


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of numbers of different images, and the ends of its interval from theirs, where all have one.

    There is none where one is not a number: over the other cards it would be another mean than that of other models.
    Distances to the ends are squared and added: MOVER (Zou and Donner, Statistics in Medicine 27, 2008, equation 3).
    """
    values, lows, highs = zip(*estimates, strict=True)
    if None in values:
        return None, None, None
    mean = fmean(values)
    if None in lows or None in highs:
        return mean, None, None
    return mean, mean - math.dist(values, lows) / len(values), mean + math.dist(values, highs) / len(values)


def groups_of(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each table, best first: runs that were scored on the same images and asked alike in English.

    India first, own cards last; the group that covers most first; in a group by the mean in English, then that over all
    languages. A run that does not say on which images it was scored is alone; one that does not say how it asked stands
    beside the first of those that do.
    """
    asked: dict[tuple[str, str], str] = {}
    for row in rows:
        if "en" in row["asked"]:
            asked.setdefault(_images(row), row["asked"]["en"])
    groups = defaultdict(list)
    for row in rows:
        groups[_images(row), row["asked"].get("en", asked.get(_images(row)))].append(row)
    best_first = [sorted(group, key=_merit, reverse=True) for group in groups.values()]
    return sorted(best_first, key=_place)


def _images(row: Row) -> tuple[str, str]:
    return row["suite"], row["data"] or f"unknown {row['run']}"


def _merit(row: Row) -> tuple[float, float]:
    means = {language: mean for language, mean in row["mean"].items() if mean is not None}
    return means.get("en", -math.inf), fmean(means.values()) if means else -math.inf


def _place(group: list[Row]) -> tuple[Any, ...]:
    row = group[0]
    suite = row["suite"]
    return suite == OWN, suite != INDIA, suite, not row["data"], -row["covered"], -len(group)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode(errors="replace")).hexdigest()[:12]
