"""The section of one card in the benchmark's report."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from indiclip.evals.formatting import (
    class_name,
    found_by,
    group_name,
    in_reading_order,
    language_name,
    metric_name,
    protocol_name,
    signed,
    words,
)
from indiclip.evals.reports.bench_pictures import PictureOf, gallery
from indiclip.evals.reports.confusion import confusions_of
from indiclip.evals.reports.embedding_map import HEIGHT, SIDE, WIDTH, embedding_map
from indiclip.evals.reports.place_map import place_map
from indiclip.evals.results import CLEAN, IMAGES, CardResult, Prediction, Result, Score, less_english, name_of


class Table(NamedTuple):
    """Names of columns, some with words below them; cells are words or scores."""

    head: Sequence[str | tuple[str, str]]
    rows: Sequence[Sequence[str | Score | None]]


class Most(NamedTuple):
    """How much of a card the page has room for."""

    pictures: int  # in the gallery
    thumbnails: int  # on the map


def card_section(result: Result, card: CardResult, picture: PictureOf, most: Most) -> dict[str, Any]:
    """Everything about a card that was scored, for `bench_card.html`."""
    every = [score for score in result.scores if score.key == card.key]
    scores = [less_english(score) for score in every]
    scores.sort(key=lambda score: (score.metric != card.metric, score.metric.startswith("parity_")))
    protocols = list(dict.fromkeys(score.protocol for score in every))  # in the card's order
    scores.sort(key=lambda score: protocols.index(score.protocol))
    mains = (score for score in scores if score.protocol == card.protocol and not score.subset)
    numbers = {
        name: _numbers([score for score in scores if score.protocol == name], result, card)
        for name in dict.fromkeys(score.protocol for score in scores)
    }
    on_map = place_map(result, card)
    by_state: list[Table] = []
    if on_map and "places" in numbers:  # whose groups are states: their table stands beside the map
        by_state, numbers["places"]["by_group"] = numbers["places"]["by_group"], []
    return {
        "card": card,
        "map": on_map,
        "by_state": by_state,
        "every": _every(every, result),
        "chance": next((score.chance for score in mains if score.metric == card.metric), None),
        "numbers": numbers,
        "contamination": _contamination(scores, result, card),
        **_answers(result, card, picture, most),
    }


def _numbers(scores: list[Score], result: Result, card: CardResult) -> dict[str, Any]:
    """Of one protocol: all languages with their chance, then all lengths and views, then the groups of images."""
    full = [score for score in scores if result.is_main_setting(score)]
    main = [score for score in full if not score.subset]
    metrics = in_reading_order(score.metric for score in main)
    found = {(score.language, score.metric): score for score in main}
    rows = [
        [_asked_in(language, main, card), *(found.get((language, metric)) for metric in metrics)]
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
            for language in (_languages(whole, result)[:1] if has_lengths else [])
        ],
        "by_group": _by_group([score for score in full if score.subset not in ("", CLEAN)], result, card),
    }


def _asked_in(language: str, scores: list[Score], card: CardResult) -> str:
    """A language, and of how many of the card's classes it has a name, where not of all."""
    asked = {score.num_classes for score in scores if score.language == language and score.metric == "acc1"}
    is_less = card.candidates == "classes" and asked and 0 < max(asked) < card.of_classes and language != IMAGES
    return (
        f"{language_name(language)}, {max(asked)} of {card.of_classes} classes" if is_less else language_name(language)
    )


def _every(scores: list[Score], result: Result) -> list[tuple[Score, list[float | None]]]:
    """A score at the greatest length, and its values at all lengths."""
    found: dict[tuple[str, ...], dict[int, Score]] = {}
    for score in scores:
        name = (score.protocol, score.language, score.metric, score.view, score.subset)
        found.setdefault(name, {})[score.length] = score
    return [
        (of[max(of)], [of[length].value if length in of else None for length in result.lengths])
        for of in found.values()
    ]


def _languages(scores: list[Score], result: Result) -> list[str]:
    """Those that have a score."""
    found = {score.language for score in scores}
    return [language for language in dict.fromkeys((IMAGES, *result.languages())) if language in found]


def _by_length(scores: list[Score], result: Result) -> Table:
    """Rows are lengths of the embedding, columns metrics and views."""
    found = {(score.metric, score.view, score.length): _without_interval(score) for score in scores}
    every = in_reading_order(score.metric for score in scores)
    metrics = [metric for metric in every if not metric.startswith("parity_")]
    views = {(metric, view) for metric, view, _ in found}
    columns = [(metric, view) for metric in metrics for view in result.views if (metric, view) in views]
    rows = [[f"{length}", *(found.get((*column, length)) for column in columns)] for length in result.lengths]
    return Table(["length", *((metric_name(metric), view) for metric, view in columns)], rows)


def _without_interval(score: Score) -> Score:
    return score._replace(low=None, high=None)


def _by_group(scores: list[Score], result: Result, card: CardResult) -> list[Table]:
    """Rows are groups of images, such as their script, or ways to ask; a table per metric."""
    tables = []
    for metric in dict.fromkeys(score.metric for score in scores):
        of_metric = [score for score in scores if score.metric == metric]
        found = {(score.subset, score.language): score for score in of_metric}
        languages = _languages(of_metric, result)
        rows: list[list[str | Score | None]] = []
        for group in dict.fromkeys(score.subset for score in of_metric):
            cells = [found.get((group, language)) for language in languages]
            images = max(score.num_items for score in cells if score is not None)
            name = card.names.get(group, {}).get("en") or words(group)  # some groups are classes
            rows.append([name, f"{images:,}", *cells])
        said = f"{group_name(of_metric[0].protocol)} · {metric_name(metric)}"
        head = [said, "images", *map(language_name, languages)]
        tables.append(Table(head, rows))
    return tables


def _contamination(scores: list[Score], result: Result, card: CardResult) -> dict[str, Any] | None:
    """How many images were found in the training data, and the scores without these."""
    found = result.about.get("contamination", {}).get("cards", {}).get(name_of(*card.key))
    clean = [score for score in scores if score.subset == CLEAN]
    if found is None:  # the run of another program, or of before, which flags its answers alone
        rows = [row for rows in result.answers_of(card).values() for row in rows]
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


def _answers(result: Result, card: CardResult, picture: PictureOf, most: Most) -> dict[str, Any]:
    """Confusions and pictures, of the main protocol in the first language; and the map of the embeddings."""
    of_card = result.answers_of(card)
    with_answers = [protocol for protocol, _ in of_card]
    protocol = card.protocol if card.protocol in with_answers else next(iter(with_answers), None)
    found = {language: rows for (name, language), rows in of_card.items() if name == protocol}
    found = dict(sorted(found.items(), key=lambda item: item[0] != "en"))
    language, rows = next(iter(found.items()), ("", []))
    are_classes = card.candidates == "classes"
    return {
        "language": language,
        "confusions": confusions_of(rows) if rows and are_classes else None,
        "gallery": gallery(found, picture, most.pictures, are_classes) if rows else None,
        "embeddings": _embeddings(result, card, picture, most.thumbnails, rows),
    }


def _embeddings(
    result: Result, card: CardResult, picture: PictureOf, most: int, rows: list[Prediction]
) -> dict[str, Any] | None:
    """What `embedding_map.html` shows, where the run kept embeddings."""
    sample = next((sample for sample in result.samples if sample.key == card.key), None)
    found = sample and embedding_map(sample, lambda key: picture(*card.key, key), most)
    if not found:
        return None
    is_right = {row.key: row.rank == 0 for row in rows}
    kind = {True: "right", False: "wrong", None: "open"}
    points = [(point, kind[is_right.get(point.key)]) for point in found.points]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "side": SIDE,
        "num_images": len(points),
        "dots": {
            name: "".join(f"M{point.x} {point.y}h0" for point, of in points if of == name and not point.has_picture)
            for name in kind.values()
        },
        "kinds": [name for name in kind.values() if any(of == name for _, of in points)],
        "pictures": [
            (point, of, str(class_name(card, point.class_id)) if point.class_id else point.key)
            for point, of in points
            if point.has_picture
        ],
        "thumbnails": found.thumbnails,
        "closest": found.closest,
    }
