"""The section of one card in the benchmark's report."""

from __future__ import annotations

from collections.abc import Sequence

from indiclip.evals.pages.bench_pictures import PictureOf, grids
from indiclip.evals.pages.confusion import MOST_CLASSES, confusion, heat_map, mistakes, most_confused, words
from indiclip.evals.pages.formatting import heated, language_name, metric_name, number, protocol_name, signed
from indiclip.evals.pages.page import Html, details, many, small_print, table, tag
from indiclip.evals.results import (
    CLEAN,
    IMAGES,
    MAIN_PROTOCOLS,
    PHOTOGRAPHS,
    CardResult,
    Prediction,
    Result,
    Score,
    by_card,
    less_english,
)

# In this order.
_PROTOCOLS = ("zero_shot", "retrieval", "matching", "classes", "hard_pairs", "places", "knn", "linear_probe")
_TEXTS = ("retrieval", "matching")  # protocols whose answers are texts, not classes


def card_section(result: Result, card: CardResult, picture: PictureOf, pictures: int) -> Html:
    """Everything about a card that was scored."""
    scores = [less_english(score) for score in result.scores if (score.card, score.part) == (card.card, card.part)]
    scores.sort(key=lambda score: (score.metric != card.metric, score.metric.startswith("parity_")))
    scores.sort(key=lambda score: _PROTOCOLS.index(score.protocol) if score.protocol in _PROTOCOLS else len(_PROTOCOLS))
    parts: list[str] = [_heading(card, scores), _notes(card)]
    protocols = dict.fromkeys(score.protocol for score in scores)
    numbers = [_numbers([score for score in scores if score.protocol == name], result) for name in protocols]
    parts.append(tag("div", *numbers, class_="beside"))
    parts.append(_contamination(scores, result, card))
    parts.append(_answers(result, card, picture, pictures))
    parts.append(small_print(f"Source: {card.source or 'not said'}. Licence: {card.licence or 'not said'}."))
    return tag("section", *parts, id=anchor(card))


def anchor(card: CardResult) -> str:
    """The id of a card's section."""
    return f"{card.card}-{card.part}"


def badges(card: CardResult) -> Html:
    """Words beside the heading that must not be missed."""
    if card.part == PHOTOGRAPHS:
        return tag("span", "photographs", class_="badge")
    return tag("span", "generated pictures, in no mean", class_="badge procedural")


def _heading(card: CardResult, scores: list[Score]) -> Html:
    mains = (score for score in scores if score.protocol in MAIN_PROTOCOLS and not score.subset)
    chance = next((score.chance for score in mains if score.metric == card.metric), None)
    facts = [f"{card.num_images:,} image{'s' * (card.num_images != 1)}"]
    if card.of_classes:
        facts.append(f"{card.num_classes} of the card's {card.of_classes} classes have images")
    facts.append(f"main metric: {metric_name(card.metric)}" + (f", chance {number(chance)}" if chance else ""))
    return many([tag("h2", card.title, badges(card)), tag("p", " · ".join(facts), class_="lead")])


def _notes(card: CardResult) -> Html:
    return tag("ul", *(tag("li", note) for note in card.notes), class_="plain quiet") if card.notes else Html("")


def _numbers(scores: list[Score], result: Result) -> Html:
    """Of one protocol: all languages, then all lengths and views, then the groups of images."""
    full = [score for score in scores if result.is_main_setting(score)]
    whole = [score for score in scores if not score.subset]
    languages = [IMAGES, *result.languages()]
    tables = [
        _by_language([score for score in full if not score.subset], languages),
        *_by_length(whole, languages, result),
        *_by_subset([score for score in full if score.subset not in ("", CLEAN)], languages),
    ]
    heading = tag("h3", protocol_name(scores[0].protocol).capitalize())
    return tag("div", heading, tag("div", *tables, class_="beside"))


def _by_language(scores: list[Score], languages: list[str]) -> Html:
    if not scores:
        return Html("")
    metrics = list(dict.fromkeys(score.metric for score in scores))
    found = {(score.language, score.metric): score for score in scores}
    # Of the first language: English names every class.
    chance = [next(score.chance for score in scores if score.metric == metric) for metric in metrics]
    rows: list[list[str]] = [
        [language_name(language), *(heated(found.get((language, metric))) for metric in metrics)]
        for language in _of(scores, languages)
    ]
    if any(value is not None for value in chance):
        rows.append([tag("span", "chance", class_="quiet"), *(number(c) if c else "" for c in chance)])
    return table(["", *map(metric_name, metrics)], rows)


def _of(scores: list[Score], languages: list[str]) -> list[str]:
    """Those of the languages that have a score."""
    found = {score.language for score in scores}
    return [language for language in languages if language in found]


def _by_length(scores: list[Score], languages: list[str], result: Result) -> list[Html]:
    """Rows are lengths of the embedding, columns metrics and views; the first language open, the others folded."""
    if len({(score.length, score.view) for score in scores}) < 2:
        return []
    first, *others = [(language, _lengths_table(scores, language, result)) for language in _of(scores, languages)]
    if not others:
        return [first[1]]
    folded = [tag("div", tag("h4", language_name(language)), content) for language, content in others]
    name = tag("h4", f"{language_name(first[0])}, by embedding length")
    return [tag("div", name, first[1], details("the other languages", *folded))]


def _lengths_table(scores: list[Score], language: str, result: Result) -> Html:
    scores = [score for score in scores if score.language == language and not score.metric.startswith("parity_")]
    found = {(score.length, score.view, score.metric): score for score in scores}
    metrics = dict.fromkeys(score.metric for score in scores)
    columns = [(view, metric) for metric in metrics for view in result.views]
    columns = [(v, m) for v, m in columns if any((length, v, m) in found for length in result.lengths)]
    rows = [
        [f"{length}", *(_plain(found.get((length, view, metric))) for view, metric in columns)]
        for length in result.lengths
    ]
    head = [many([metric_name(metric), tag("small", view)]) for view, metric in columns]
    return table(["length", *head], rows)


def _plain(score: Score | None) -> Html:
    return heated(score and score._replace(low=None, high=None))


def _by_subset(scores: list[Score], languages: list[str]) -> list[Html]:
    """Rows are groups of images, such as their script; a table per metric."""
    parts = []
    for metric in dict.fromkeys(score.metric for score in scores):
        of_metric = [score for score in scores if score.metric == metric]
        found = {(score.subset, score.language): score for score in of_metric}
        names = _of(of_metric, languages)
        rows = []
        for subset in dict.fromkeys(score.subset for score in of_metric):
            cells = [found.get((subset, language)) for language in names]
            images = max(score.num_items for score in cells if score is not None)
            rows.append([words(subset), f"{images:,}", *map(heated, cells)])
        head = [f"group · {metric_name(metric)}", "images", *map(language_name, names)]
        parts.append(table(head, rows))
    return parts


def _contamination(scores: list[Score], result: Result, card: CardResult) -> Html:
    """How many images were found in the training data, and the scores without these."""
    rows = [row for row in result.predictions if (row.card, row.part) == (card.card, card.part)]
    flagged, images = {row.key for row in rows if row.flagged}, {row.key for row in rows}
    clean = [score for score in scores if score.subset == CLEAN]
    if not flagged and not clean:
        return Html("")
    whole = {score[:8]: score for score in scores if not score.subset}
    lines: list[Sequence[str]] = []
    for score in clean:
        every = whole.get(score[:8])
        if every is None or not result.is_main_setting(score):
            continue
        name = f"{protocol_name(score.protocol)}, {language_name(score.language)}: {metric_name(score.metric)}"
        change = signed(score.value - every.value, score.metric)
        lines.append((name, _plain(every), _plain(score), change, f"{score.num_items:,}"))
    said = f"{len(flagged):,} of {len(images):,} images found among the training images."
    columns = ["score", "all images", "without them", "difference", "images left"]
    found = table(columns, lines) if lines else ""
    return many([tag("h3", "Seen in training"), tag("p", said, class_="note"), found])


def _answers(result: Result, card: CardResult, picture: PictureOf, pictures: int) -> Html:
    """Confusions and pictures, of the main protocol in the first language."""
    groups = {key[2:]: rows for key, rows in by_card(result.predictions).items() if key[:2] == (card.card, card.part)}
    if not groups:
        return Html("")
    mains = [result.main(language).get((card.card, card.part)) for language in result.languages()]
    protocol = next((score.protocol for score in mains if score is not None), next(iter(groups))[0])
    by_language = {language: rows for (name, language), rows in groups.items() if name == protocol}
    by_language = dict(sorted(by_language.items(), key=lambda item: item[0] != "en"))
    if not by_language:
        return Html("")
    language, rows = next(iter(by_language.items()))
    are_classes = protocol not in _TEXTS
    parts = [_confusions(rows, language)] if are_classes else []
    return many([*parts, grids(by_language, picture, pictures, are_classes)])


def _confusions(rows: list[Prediction], language: str) -> Html:
    found = confusion(rows)
    worst = [
        f"{words(one.truth)} taken for {words(one.predicted)}: {one.images} of {one.of}" for one in mistakes(found)
    ]
    heading = tag("h3", f"What was taken for what, {language_name(language)}")
    shown = found if len(found.classes) <= MOST_CLASSES else most_confused(found, MOST_CLASSES // 2)
    hint = "Rows: the truth. Columns: the answer. Stronger colour: a larger share of the row."
    if shown is not found:
        hint = f"The {len(shown.classes)} most confused of {len(found.classes)} classes. {hint}"
    listed = tag("ul", *(tag("li", line) for line in worst[:12]), class_="plain") if worst else tag("p", "No mistake.")
    drawn = tag("div", heat_map(shown, found), small_print(hint)) if shown.classes else Html("")
    return many([heading, tag("div", drawn, listed, class_="beside")])
