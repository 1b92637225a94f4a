"""The section of one card in the benchmark's report."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from indiclip.evals.formatting import found_by, language_name, metric_name, protocol_name, signed, words
from indiclip.evals.reports.bench_pictures import PictureOf, grids_of
from indiclip.evals.reports.confusion import confusions_of
from indiclip.evals.results import CLEAN, IMAGES, CardResult, Result, Score, less_english, name_of


class Table(NamedTuple):
    """Names of columns, some with words below them; cells are words or scores."""

    head: Sequence[str | tuple[str, str]]
    rows: Sequence[Sequence[str | Score | None]]


def card_section(result: Result, card: CardResult, picture: PictureOf, pictures: int) -> dict[str, Any]:
    """Everything about a card that was scored, for `bench_card.html`."""
    every = [score for score in result.scores if score.key == card.key]
    scores = [less_english(score) for score in every]
    scores.sort(key=lambda score: (score.metric != card.metric, score.metric.startswith("parity_")))
    protocols = list(dict.fromkeys(score.protocol for score in every))  # in the card's order
    scores.sort(key=lambda score: protocols.index(score.protocol))
    mains = (score for score in scores if score.protocol == card.protocol and not score.subset)
    numbers = {
        name: _numbers([score for score in scores if score.protocol == name], result)
        for name in dict.fromkeys(score.protocol for score in scores)
    }
    return {
        "card": card,
        "scores": every,
        "chance": next((score.chance for score in mains if score.metric == card.metric), None),
        "numbers": numbers,
        "contamination": _contamination(scores, result, card),
        **_answers(result, card, picture, pictures),
    }


def _numbers(scores: list[Score], result: Result) -> dict[str, Any]:
    """Of one protocol: all languages with their chance, then all lengths and views, then the groups of images."""
    full = [score for score in scores if result.is_main_setting(score)]
    main = [score for score in full if not score.subset]
    metrics = list(dict.fromkeys(score.metric for score in main))
    found = {(score.language, score.metric): score for score in main}
    rows = [
        [language_name(language), *(found.get((language, metric)) for metric in metrics)]
        for language in _languages(main, result)
    ]
    whole = [score for score in scores if not score.subset]
    has_lengths = len({(score.length, score.view) for score in whole}) > 1
    return {
        "by_language": Table(["", *map(metric_name, metrics)], rows),
        # Of the first language: English names every class.
        "chances": [next(score.chance for score in main if score.metric == metric) for metric in metrics],
        "by_length": [
            (language_name(language), _by_length([score for score in whole if score.language == language], result))
            for language in (_languages(whole, result) if has_lengths else [])
        ],
        "by_group": _by_group([score for score in full if score.subset not in ("", CLEAN)], result),
    }


def _languages(scores: list[Score], result: Result) -> list[str]:
    """Those that have a score."""
    found = {score.language for score in scores}
    return [language for language in (IMAGES, *result.languages()) if language in found]


def _by_length(scores: list[Score], result: Result) -> Table:
    """Rows are lengths of the embedding, columns metrics and views."""
    found = {(score.metric, score.view, score.length): _without_interval(score) for score in scores}
    metrics = [metric for metric in dict.fromkeys(score.metric for score in scores) if not metric.startswith("parity_")]
    views = {(metric, view) for metric, view, _ in found}
    columns = [(metric, view) for metric in metrics for view in result.views if (metric, view) in views]
    rows = [[f"{length}", *(found.get((*column, length)) for column in columns)] for length in result.lengths]
    return Table(["length", *((metric_name(metric), view) for metric, view in columns)], rows)


def _without_interval(score: Score) -> Score:
    return score._replace(low=None, high=None)


def _by_group(scores: list[Score], result: Result) -> list[Table]:
    """Rows are groups of images, such as their script; a table per metric."""
    tables = []
    for metric in dict.fromkeys(score.metric for score in scores):
        of_metric = [score for score in scores if score.metric == metric]
        found = {(score.subset, score.language): score for score in of_metric}
        languages = _languages(of_metric, result)
        rows: list[list[str | Score | None]] = []
        for group in dict.fromkeys(score.subset for score in of_metric):
            cells = [found.get((group, language)) for language in languages]
            images = max(score.num_items for score in cells if score is not None)
            rows.append([words(group), f"{images:,}", *cells])
        head = [f"group · {metric_name(metric)}", "images", *map(language_name, languages)]
        tables.append(Table(head, rows))
    return tables


def _contamination(scores: list[Score], result: Result, card: CardResult) -> dict[str, Any] | None:
    """How many images were found in the training data, and the scores without these."""
    found = result.about.get("contamination", {}).get("cards", {}).get(name_of(*card.key))
    clean = [score for score in scores if score.subset == CLEAN]
    if found is None:  # the run of another program, or of before, which flags its answers alone
        rows = [row for answers in result.answers if answers.key == card.key for row in answers.rows()]
        found = {"flagged": len({row.key for row in rows if row.flagged}), "images": len({row.key for row in rows})}
        if not found["flagged"] and not clean:
            return None
    whole = {score[:8]: score for score in scores if not score.subset}
    lines = []
    for score in clean:
        every = whole.get(score[:8])
        if every is None or not result.is_main_setting(score):
            continue
        name = f"{protocol_name(score.protocol)}, {language_name(score.language)}: {metric_name(score.metric)}"
        change = signed(score.value - every.value, score.metric)
        lines.append((name, _without_interval(every), _without_interval(score), change, f"{score.num_items:,}"))
    head = ["score", "all images", "without them", "difference", "images left"]
    said = f"{found['flagged']:,} of {found['images']:,} are in the training data: {found_by(found)}."
    return {"said": said, "table": Table(head, lines)}


def _answers(result: Result, card: CardResult, picture: PictureOf, pictures: int) -> dict[str, Any]:
    """Confusions and pictures, of the main protocol in the first language."""
    of_card = [answers for answers in result.answers if answers.key == card.key]
    protocols = [card.protocol, *(answers.protocol for answers in of_card)]
    protocol = next((name for name in protocols if any(answers.protocol == name for answers in of_card)), None)
    found = {answers.language: list(answers.rows()) for answers in of_card if answers.protocol == protocol}
    if not found:
        return {"confusions": None, "grids": None}
    found = dict(sorted(found.items(), key=lambda item: item[0] != "en"))
    language, rows = next(iter(found.items()))
    are_classes = card.candidates == "classes"
    return {
        "language": language,
        "confusions": confusions_of(rows) if are_classes else None,
        "grids": grids_of(found, picture, pictures, are_classes),
    }
