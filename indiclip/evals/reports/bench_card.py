"""The section of one card in the benchmark's report."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from indiclip.evals.formatting import (
    Bar,
    Gap,
    chance_of,
    group_name,
    in_reading_order,
    language_name,
    metric_name,
    words,
)
from indiclip.evals.reports.bench_pictures import PictureOf, gallery
from indiclip.evals.reports.confusion import confusion, mistakes, readable
from indiclip.evals.reports.embedding_map import embedding_map
from indiclip.evals.reports.place_map import place_map
from indiclip.evals.results import CLEAN, IMAGES, CardResult, Prediction, Result, Score, less_english, name_of


class Table(NamedTuple):
    """Names of columns, some with words below them; cells are words or scores."""

    head: Sequence[str | tuple[str, str]]
    rows: Sequence[Sequence[str | Score | None]]


def card_section(result: Result, card: CardResult, picture: PictureOf, most: int) -> dict[str, Any]:
    """Everything about a card that was scored, for `bench_card.html`; `most` is how many pictures it has room for."""
    of_card = [score for score in result.scores if score.key == card.key]
    protocols = list(dict.fromkeys(score.protocol for score in of_card))  # in the card's order
    scores = [less_english(score) for score in of_card]
    scores.sort(key=lambda s: (protocols.index(s.protocol), s.metric != card.metric, s.metric.startswith("parity_")))
    main = [score for score in scores if result.is_main_setting(score)]
    bars = _bars(main, card, result.languages())
    answers = _answers(result, card)
    language, rows = next(iter(answers.items()), ("", []))
    of_images = [] if any(row.question for row in rows) else rows  # one answer for each
    found = confusion(of_images) if of_images and card.candidates == "classes" else None
    is_right = dict.fromkeys((row.key for row in rows), True)
    is_right |= {row.key: False for row in rows if row.rank > 0}  # any of the questions about it
    sample = next((sample for sample in result.samples if sample.key == card.key), None)
    show = partial(picture, *card.key)
    return {
        "card": card,
        "bars": bars,
        "chance": chance_of(bar.score for bar in bars),
        "every": _every(of_card),
        "numbers": {name: _numbers([s for s in scores if s.protocol == name], result, card) for name in protocols},
        "seen": seen_in_training(result, card),
        "unseen": _unseen(main),
        "language": language,
        "confusion": found and readable(found),
        "num_classes": len(found.classes) if found else 0,
        "mistakes": mistakes(found) if found else [],
        "gallery": gallery(answers, found, picture, most) if rows else None,
        "embeddings": embedding_map(sample, is_right, show, 3 * most) if sample else None,
        "map": place_map(card, of_images),
    }


def _bars(scores: list[Score], card: CardResult, languages: list[str]) -> list[Bar]:
    """The main number in each language, with how far it is from English on the same images."""
    found = {(score.protocol, score.metric, score.language): score for score in scores if not score.subset}
    mains = [found.get((card.protocol, card.metric, language)) for language in languages]
    english = found.get((card.protocol, card.metric, "en"))
    bars = []
    for score in filter(None, mains):
        gap: Gap | None = None
        if english and score is not english:
            parity = found.get((card.protocol, f"parity_{card.metric}", score.language))
            gap = (parity.value, parity.low, parity.high) if parity else (score.value - english.value, None, None)
        bars.append(Bar(language_name(score.language), score, "en" if score is english else "", gap))
    return bars


def _every(scores: list[Score]) -> list[dict[int, Score]]:
    """Scores that differ in the length alone, by that."""
    found: dict[tuple[str, ...], dict[int, Score]] = {}
    for score in scores:
        name = (score.protocol, score.language, score.metric, score.view, score.subset)
        found.setdefault(name, {})[score.length] = score
    return list(found.values())


def _numbers(scores: list[Score], result: Result, card: CardResult) -> dict[str, Any]:
    """Of one protocol: all languages with their chance, then all lengths and views, then the groups of images."""
    whole = [score for score in scores if not score.subset]
    main = [score for score in whole if result.is_main_setting(score)]
    groups = [score for score in scores if score.subset not in ("", CLEAN) and result.is_main_setting(score)]
    metrics = in_reading_order(score.metric for score in main)
    found = {(score.language, score.metric): score for score in main}
    rows = [
        [_asked_in(language, main, card), *(found.get((language, metric)) for metric in metrics)]
        for language in _languages(main)
    ]
    has_lengths = len({(score.length, score.view) for score in whole}) > 1
    first = _languages(whole)[:1] if has_lengths else []
    return {
        "by_language": Table(["", *map(metric_name, metrics)], rows),
        # Of the first language: English names every class.
        "chances": [chance_of(score for score in main if score.metric == metric) for metric in metrics],
        "by_length": [
            (language, _by_length([score for score in whole if score.language == language], result))
            for language in first
        ],
        "by_group": [
            _by_group([score for score in groups if score.metric == metric], card)
            for metric in dict.fromkeys(score.metric for score in groups)
        ],
    }


def _asked_in(language: str, scores: list[Score], card: CardResult) -> str:
    """A language, and of how many of the card's classes it has a name, where not of all."""
    asked = max((s.num_classes for s in scores if s.language == language and s.metric == "acc1"), default=0)
    if card.candidates == "classes" and language != IMAGES and 0 < asked < card.of_classes:
        return f"{language_name(language)}, {asked} of {card.of_classes} classes"
    return language_name(language)


def _languages(scores: list[Score]) -> list[str]:
    """Those that have a score; what takes no text comes first, then English."""
    found = {score.language for score in scores}
    return sorted(found, key=lambda language: (language != IMAGES, language != "en", language))


def _by_length(scores: list[Score], result: Result) -> Table:
    """Rows are lengths of the embedding, columns metrics and views."""
    found = {(score.metric, score.view, score.length): _without_interval(score) for score in scores}
    shown = {(metric, view) for metric, view, _ in found}
    metrics = in_reading_order(score.metric for score in scores)
    columns = [(metric, view) for metric in metrics for view in result.views if (metric, view) in shown]
    rows = [[f"{length}", *(found.get((*column, length)) for column in columns)] for length in result.lengths]
    return Table(["length", *((metric_name(metric), view) for metric, view in columns)], rows)


def _without_interval(score: Score) -> Score:
    return score._replace(low=None, high=None)


def _by_group(scores: list[Score], card: CardResult) -> Table:
    """Rows are groups of images, such as their script, or ways to ask; of one metric."""
    found = {(score.subset, score.language): score for score in scores}
    languages = _languages(scores)
    rows: list[list[str | Score | None]] = []
    for group in dict.fromkeys(score.subset for score in scores):
        images = max(score.num_items for score in scores if score.subset == group)
        name = card.names.get(group, {}).get("en") or words(group)  # some groups are classes
        rows.append([name, f"{images:,}", *(found.get((group, language)) for language in languages)])
    name = f"{group_name(scores[0].protocol)} · {metric_name(scores[0].metric)}"
    return Table([name, "images", *map(language_name, languages)], rows)


def seen_in_training(result: Result, card: CardResult) -> dict[str, Any] | None:
    """How many of the card's images were found in the training data; None where nobody looked for them."""
    found: dict[str, Any] | None = result.about.get("contamination", {}).get("cards", {}).get(name_of(*card.key))
    if found:
        return found
    # The run of another program, or an earlier one, which flags its answers alone.
    rows = [row for rows in result.answers_of(card).values() for row in rows]
    flagged = {row.key for row in rows if row.flagged}
    return {"flagged": len(flagged), "images": len({row.key for row in rows})} if flagged else None


def _unseen(scores: list[Score]) -> list[tuple[Score, Score]]:
    """Scores of all images, each with that of the images which are not among the training data."""
    whole = {score.measured: score for score in scores if not score.subset}
    clean = [score for score in scores if score.subset == CLEAN and score.measured in whole]
    return [(_without_interval(whole[score.measured]), _without_interval(score)) for score in clean]


def _answers(result: Result, card: CardResult) -> dict[str, list[Prediction]]:
    """Of the main protocol, or of another where that has none: by language, English first."""
    of_card = result.answers_of(card)
    with_answers = [protocol for protocol, _ in of_card]
    protocol = card.protocol if card.protocol in with_answers else next(iter(with_answers), None)
    chosen = {language: rows for (name, language), rows in of_card.items() if name == protocol}
    return dict(sorted(chosen.items(), key=lambda item: item[0] != "en"))
