"""What the model got right and wrong, in pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np

from indiclip.evals.pages.confusion import Mistake, confusion, mistakes, pairs, words
from indiclip.evals.pages.formatting import language_name
from indiclip.evals.pages.page import Html, image, many, tag, thumbnail
from indiclip.evals.results import Prediction

PictureOf = Callable[[str, str, str], np.ndarray | None]  # (card, part, key) -> uint8 (height, width, 3)


def grids(by_language: dict[str, list[Prediction]], picture: PictureOf, most: int, are_classes: bool) -> Html:
    """Hits, mistakes and the hardest pairs.

    Args:
        by_language: Predictions of one card and protocol; the first language's are shown, the others named.
        picture: Gives the pixels; None shows a blank.
        most: Pictures.
        are_classes: Answers are classes, not texts: there are pairs of them.
    """
    rows = next(iter(by_language.values()))
    others = _hits_of(by_language)
    share = max(most // 3, 1) if are_classes else max(most // 2, 1)
    hits = _varied(sorted((row for row in rows if row.rank == 0), key=_margin, reverse=True))[:share]
    misses = _varied(sorted((row for row in rows if row.rank > 0), key=_margin, reverse=True))[:share]
    parts: list[str] = []
    for heading, chosen in (("Surest hits", hits), ("Surest mistakes", misses)):
        if chosen:
            figures = [_figure(row, picture, others) for row in chosen]
            parts += [tag("h3", heading), tag("div", *figures, class_="pictures small")]
    if are_classes and misses:
        found = confusion(rows)
        counted = {(one.truth, one.predicted): one for one in mistakes(found)}
        drawn = [_pair(rows, pair, counted, picture, others) for pair in pairs(found)[: max(share // 2, 1)]]
        parts += [tag("h3", "Hardest pairs"), tag("div", *drawn, class_="pictures pairs")]
    return many(parts)


def _hits_of(by_language: dict[str, list[Prediction]]) -> dict[str, dict[str, bool]]:
    """key -> language -> whether it was right."""
    found: dict[str, dict[str, bool]] = defaultdict(dict)
    for language, rows in by_language.items():
        for row in rows:
            found[row.key][language] = row.rank == 0
    return found


def _margin(row: Prediction) -> float:
    """How much nearer the answer is than the next one; in a mistake, than the truth."""
    nearest = dict(zip(row.top, row.cosines, strict=False))
    if row.rank == 0 or row.truth not in nearest:
        return row.cosines[0] - row.cosines[1 if row.rank == 0 else -1] if len(row.cosines) > 1 else 0.0
    return row.cosines[0] - nearest[row.truth]


def _varied(rows: list[Prediction]) -> list[Prediction]:
    """One of every class before the second of any, else in their order."""
    seen: dict[str, int] = defaultdict(int)
    turns = []
    for i, row in enumerate(rows):
        turns.append((seen[row.truth], i))
        seen[row.truth] += 1
    return [rows[i] for _, i in sorted(turns)]


def _pair(
    rows: list[Prediction],
    pair: tuple[str, str],
    counted: dict[tuple[str, str], Mistake],
    picture: PictureOf,
    others: dict[str, dict[str, bool]],
) -> Html:
    """An image of each class, one that was taken for the other where there is any."""
    chosen, said = [], []
    for truth, answer in (pair, pair[::-1]):
        # False before None and True: one that is wrong among the confusable classes too says more.
        of_class = sorted((row for row in rows if row.truth == truth), key=lambda row: row.hard_hit is not False)
        chosen += [row for row in of_class if row.predicted == answer][:1] or of_class[:1]
        if mistake := counted.get((truth, answer)):
            said.append(f"{words(truth)} taken for {words(answer)}: {mistake.images} of {mistake.of}")
    figures = [_figure(row, picture, others) for row in chosen]
    return tag("div", tag("p", "; ".join(said)), tag("div", *figures), class_="pair")


def _figure(row: Prediction, picture: PictureOf, others: dict[str, dict[str, bool]]) -> Html:
    pixels_HW3 = picture(row.card, row.part, row.key)
    shown = (
        image(thumbnail(pixels_HW3), row.key) if pixels_HW3 is not None else tag("span", "no picture", class_="blank")
    )
    said: list[str] = [tag("b", words(row.truth))]
    if row.rank > 0:
        said += [" → ", tag("span", words(row.predicted), class_="miss")]
    caption = tag("figcaption", tag("span", *said, class_="clamp"), _cosines(row), _languages(others[row.key]))
    return tag("figure", shown, caption, title=row.key)


def _cosines(row: Prediction) -> Html:
    nearest = list(zip(row.top, row.cosines, strict=False))
    shown = nearest[:3] + [pair for pair in nearest[3:] if pair[0] == row.truth]
    names = [
        tag("span", f"{_brief(name)} {cosine:.2f}".replace("-", "−"), class_="hit" if name == row.truth else None)
        for name, cosine in shown
    ]
    return tag("small", *_joined(names))


def _brief(name: str) -> str:
    return words(name) if len(name) <= 24 else f"{words(name)[:23]}…"


def _joined(names: Iterable[Html]) -> list[str]:
    parts: list[str] = []
    for name in names:
        parts += [" · ", name] if parts else [name]
    return parts


def _languages(hits: dict[str, bool]) -> Html:
    """In which languages it was right, where there are several."""
    if len(hits) < 2:
        return Html("")
    right, wrong = (
        [language_name(language) for language, hit in hits.items() if hit is kind] for kind in (True, False)
    )
    if not right or not wrong:
        said = f"{'right' if right else 'wrong'} in all {len(hits)} languages"
    elif min(len(right), len(wrong)) <= 3:
        said = f"wrong in {', '.join(wrong)}" if len(wrong) <= len(right) else f"right in {', '.join(right)}"
    else:
        said = f"right in {len(right)} of {len(hits)} languages"
    return many([Html("<br>"), tag("small", said)])
