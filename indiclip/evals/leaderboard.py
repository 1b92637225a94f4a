"""What a leaderboard keeps of a run of the benchmark, and which rows may stand in one table."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from indiclip.evals.leaderboard_file import INDIA, Row
from indiclip.evals.results import IMAGES, PHOTOGRAPHS, Result, Score, corrected, finite, less_english

Ends = tuple[float | None, float | None]


class Group(NamedTuple):
    """Runs that were scored on the same images and asked alike, best first."""

    suite: str
    data: str  # digest of the images; "" where a run does not say which they were
    covered: int
    of: int
    rows: list[Row]


def rows_of(result: Result) -> list[Row]:
    """A row for each suite of which photographs have a main number; the user's own cards are a suite too."""
    rows = (row_of(result, suite) for suite in dict.fromkeys((INDIA, *_suites(result))))
    return [row for row in rows if any(row["cards"].values())]


def _suites(result: Result) -> list[str]:
    return sorted({card.suite for card in result.cards}, key=lambda suite: (suite == "own", suite))


def row_of(result: Result, suite: str = INDIA) -> Row:
    """What the leaderboard keeps of a run.

    `run` tells runs apart: the same model at another time is another run. `data` tells which images they are over, the
    photographs of the suite that were scored; `asked` by which names and prompts, per language.
    """
    headline = result.headline(suite)
    scored = result.photographs(suite)
    ids = [card.card for card in scored]
    digests, asked = result.about.get("data", {}), result.about.get("asked", {})
    data = _digest({card: digests[card] for card in ids}) if ids and all(card in digests for card in ids) else ""
    date = str(result.about.get("date", ""))
    identity = [result.model, date, result.lengths, result.views, sorted(ids), data]
    mains = {language: _mains(result, language, ids) for language in result.languages()}
    gaps = {language: _gaps(result, mains[language]) for language in mains}

    def by_card(of_languages: dict[str, dict[str, Any]], read: Callable[[Any], Any]) -> dict[str, dict[str, Any]]:
        return {card: {of: read(found[card]) for of, found in of_languages.items() if card in found} for card in ids}

    return {
        "run": _digest(identity if suite == INDIA else [suite, *identity]),
        "suite": suite,
        "model": result.model,
        "date": date,
        "covered": headline["covered"],
        "of": headline["of"],
        # Not over fewer cards than others' means, where the model gave no number: that would be for its good.
        "mean": {
            language: finite(mean["value"]) if _are_numbers(mains[language]) else None
            for language, mean in headline["mean"].items()
        },
        "mean_interval": {language: _mean(map(_corrected, mains[language].values()))[1:] for language in mains},
        "mean_gap": {language: _mean(found.values()) for language, found in gaps.items() if found},
        "cards": by_card(mains, lambda score: finite(score.value)),
        "intervals": by_card(mains, _ends),
        "gaps": by_card(gaps, tuple),
        "titles": {card.card: card.title for card in scored},
        "metrics": {card.card: card.metric for card in scored},
        "chance": {card: score.chance for of in (IMAGES, "en") for card, score in mains.get(of, {}).items()},
        "chances": by_card(mains, lambda score: score.chance),
        "precision": str(result.about.get("options", {}).get("precision", "fp32")),
        "lengths": result.lengths,
        "views": result.views,
        "data": data,
        "asked": {of: _digest({card: asked[card].get(of) for card in ids}) for of in mains} if asked else {},
    }


def _are_numbers(mains: dict[str, Score]) -> bool:
    return all(math.isfinite(score.value) for score in mains.values())


def _mains(result: Result, language: str, cards: list[str]) -> dict[str, Score]:
    found = {card: score for (card, part), score in result.main(language).items() if part == PHOTOGRAPHS}
    return {card: found[card] for card in cards if card in found}


def _gaps(result: Result, mains: dict[str, Score]) -> dict[str, tuple[float | None, ...]]:
    """Card -> how far a language's main metric is from English on the same images and classes, and both ends."""
    wanted = {score._replace(metric=f"parity_{score.metric}")[:8]: card for card, score in mains.items()}
    rows = {wanted[row[:8]]: less_english(row) for row in result.scores if row[:8] in wanted and not row.subset}
    return {card: (finite(rows[card].value), *_ends(rows[card])) for card in mains if card in rows}


def _ends(score: Score) -> Ends:
    return finite(score.low), finite(score.high)


def _corrected(score: Score) -> tuple[float | None, ...]:
    ends = (None if end is None else corrected(end, score.chance) for end in (score.value, score.low, score.high))
    return tuple(map(finite, ends))


def _mean(values: Iterable[tuple[float | None, ...]]) -> tuple[float | None, float | None, float | None]:
    """The mean of numbers of different images, and the ends of its interval from theirs, where all have one.

    Distances to the ends are squared and added: MOVER (Zou and Donner, Statistics in Medicine 27, 2008, equation 3).
    """
    known = [value for value in values if value[0] is not None]
    if not known:
        return None, None, None
    middle = sum(value[0] or 0.0 for value in known) / len(known)
    if any(None in value for value in known):
        return middle, None, None
    below, above = (math.hypot(*((v[side] or 0) - (v[0] or 0) for v in known)) / len(known) for side in (1, 2))
    return middle, middle - below, middle + above


def groups_of(rows: list[Row]) -> list[Group]:
    """India first, own cards last; the group that covers most first; in a group by the mean in English, then that over
    all languages.
    """
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(_same(row, rows)), []).append(row)
    groups = [
        Group(of[0]["suite"], of[0]["data"], of[0]["covered"], of[0]["of"], sorted(of, key=_merit, reverse=True))
        for of in found.values()
    ]
    places = {INDIA: 0, "own": 2}
    return sorted(groups, key=lambda of: (places.get(of.suite, 1), of.suite, not of.data, -of.covered, -len(of.rows)))


def _same(row: Row, rows: list[Row]) -> Iterator[str]:
    """What the rows of a group share: the images, and how English was asked, where runs say so."""
    yield row["suite"]
    yield row["data"] or f"unknown {row['run']}"
    same_images = (other for other in rows if (other["suite"], other["data"]) == (row["suite"], row["data"]))
    known = (other["asked"]["en"] for other in (row, *same_images) if "en" in other["asked"])
    yield next(known, "")


def _merit(row: Row) -> tuple[float, float]:
    means = [value for value in row["mean"].values() if value is not None]
    english = row["mean"].get("en")
    overall = sum(means) / len(means) if means else -math.inf
    return (english if english is not None else -math.inf, overall)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode(errors="replace")).hexdigest()[:12]
